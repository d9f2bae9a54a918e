"""What it costs that the cache of keys and values grows as it is used.

    python benchmarks/growing_cache.py

The demo continues a prompt of one token by 1,500 tokens, with the cache that llama3.generate
begins with and lets grow, and with one that has room for all of them from the start. The two take
turns; a line gives the time of a run and what is resident at most of the two caches.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import llama3  # noqa: E402

N_TOKENS, TURNS = 1500, 10


def seconds(weights: llama3.Weights, config: llama3.Config) -> float:
    start = time.perf_counter()
    for _ in llama3.generate([1024], weights, config, max_new_tokens=N_TOKENS):
        pass
    return time.perf_counter() - start


def main() -> None:
    config = llama3.load_config(ROOT / "demo")
    weights = llama3.load_weights(ROOT / "demo", config)
    growing = llama3.new_cache

    def whole(weights: llama3.Weights, config: llama3.Config, _: int, batch: list) -> torch.Tensor:
        return growing(weights, config, 1 + N_TOKENS, batch)

    ratios = []
    for turn in range(TURNS):
        times = {}
        for new_cache in (growing, whole) if turn % 2 else (whole, growing):
            llama3.new_cache = new_cache
            times[new_cache] = seconds(weights, config)
        ratios.append(times[growing] / times[whole])
        print(f"growing {times[growing]:.2f} s, whole from the start {times[whole]:.2f} s")
    ratio = statistics.median(ratios)
    print(f"torch {torch.__version__}: growing takes {ratio:.3f} of the time (median of {TURNS})")


if __name__ == "__main__":
    main()
