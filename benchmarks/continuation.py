"""How much time a continuation saves by not repeating keys and values for every query head.

    python benchmarks/continuation.py

Attention of T new tokens over the first L positions of a longer cache, with the heads of the 8B
model: as llama3.grouped_query_attention does it, and with the keys and values of each group written
out once for every query head first. The two take turns; a line gives the medians of
both times and of their ratios.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama3

N_KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
TURNS = 15


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def copying(q, k, v, mask):
    """The same after every query head has been given keys and values of its own."""
    k, v = llama3.repeat_heads(k, GROUP), llama3.repeat_heads(v, GROUP)
    return llama3.grouped_query_attention(q, k, v, mask)


@torch.inference_mode()
def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'type':>8} {'T':>4} {'L':>5} {'ms':>8} {'ms, copying':>12} {'times as fast':>14}")
    for dtype in (torch.bfloat16, torch.float32):
        for length in (128, 1024, 4096):
            for T in (1, 8, 64):
                q = torch.randn(N_KV_HEADS * GROUP, T, HEAD_DIM).to(dtype)
                cache = torch.randn(2, N_KV_HEADS, length + 128, HEAD_DIM).to(dtype)
                k, v = cache[..., :length, :]
                mask = torch.arange(length) <= torch.arange(length - T, length)[:, None]
                inputs = q, k, v, mask
                pairs = [
                    (seconds(llama3.grouped_query_attention, *inputs), seconds(copying, *inputs))
                    for _ in range(TURNS + 2)
                ][2:]  # the first two warm up
                ours, theirs = (
                    1000 * statistics.median(times) for times in zip(*pairs, strict=True)
                )
                ratio = statistics.median(copied / grouped for grouped, copied in pairs)
                name = str(dtype).removeprefix("torch.")
                print(f"{name:>8} {T:>4} {length:>5} {ours:>8.2f} {theirs:>12.2f} {ratio:>14.1f}")


if __name__ == "__main__":
    main()
