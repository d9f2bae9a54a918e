"""Eight prompts of unequal lengths together, against one of them alone.

python benchmarks/batch.py

A random bfloat16 model (small, see run.py); each turn reads the prompts, of up to 128 tokens, and
makes 32 tokens.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from run import SIZES, make_checkpoint, processor, prompt_of

import llama3
from cli.step import with_built_steps

TURNS = 7


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SIZES["small"][0])
        config = llama3.load_config(folder)
        lengths = [128, 16, 100, 40, 77, 5, 64, 120]
        prompts = [prompt_of(n, config.vocab_size) for n in lengths]
        print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
        for dtype in (torch.bfloat16, torch.float32):
            plain = llama3.load_weights(folder, config, dtype=dtype)
            for name, weights in (
                ("not built", plain),
                ("built", with_built_steps(plain, config, build=True)),
            ):

                def seconds(prompts: list[list[int]], weights: llama3.Weights = weights) -> float:
                    start = time.perf_counter()
                    for _ in llama3.generate_batch(prompts, weights, config, max_new_tokens=32):
                        pass
                    return time.perf_counter() - start

                pairs = [(seconds(prompts), seconds(prompts[:1])) for _ in range(TURNS + 1)][1:]
                one = statistics.median(alone for _, alone in pairs)
                ratio = statistics.median(together / alone for together, alone in pairs)
                dtype_name = str(dtype).removeprefix("torch.")
                print(f"{dtype_name}, {name}: one {one:.2f} s, eight {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
