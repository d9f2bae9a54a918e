"""Memory and speed of a model on several ranks.

    python benchmarks/ranks.py            a random model of 1.0 billion parameters (1b, see run.py)
    python benchmarks/ranks.py --table    what published sizes take on each rank, computed

Every measurement is a run of its own: so many processes read so many files, a prompt of 128 tokens,
and make 32 tokens. Printed is the rank that took most.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from run import SIZES, make_checkpoint, processor, prompt_of  # noqa: E402

import formats  # noqa: E402
import llama3  # noqa: E402
from cli import ranks  # noqa: E402
from cli.messages import peak_rss_bytes  # noqa: E402

COMMON = {"vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "n_kv_heads": 8}
PUBLISHED = {  # their params.json
    "8B": SIZES["8b"][0],
    "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}
    | {"ffn_dim_multiplier": 1.3},
    "405B": {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096}
    | {"ffn_dim_multiplier": 1.2},
}
RANKS, LENGTH = (1, 2, 4, 8, 16), 8192


def memory_of_rank(config: llama3.Config, rank: int, n: int, length: int) -> tuple[int, int]:
    """The bytes of a rank's part of the weights, and of its cache for `length` positions."""
    span, elements = ranks.span_of(config, rank, n), 0
    for name, shape in llama3.weight_shapes(config).items():
        axis = llama3.split_axis(name) or 0
        begin, end = span(name, shape[axis])
        elements += math.prod(shape) // shape[axis] * (end - begin)
    part = ranks.part_of(config, n)
    cache = 2 * part.n_layers * part.n_kv_heads * part.head_dim * length
    return 2 * elements, 2 * cache  # in bfloat16


def table() -> None:
    """The table of docs/processes.md: GB of weights and of the cache, in bfloat16, on each rank."""
    print("| | parameters |", " | ".join(f"R = {n}" for n in RANKS), "|")
    print("|---" * (2 + len(RANKS)) + "|")
    for name, params in PUBLISHED.items():
        config = llama3.config_from_params(COMMON | params)
        total = memory_of_rank(config, 0, 1, 0)[0] / 2
        cells = []
        for n in RANKS:
            weights, cache = max(memory_of_rank(config, rank, n, LENGTH) for rank in range(n))
            cells.append(f"{weights / 1e9:.1f} + {cache / 1e9:.2f}")
        print(f"| {name} | {total / 1e9:.1f} billion |", " | ".join(cells), "|")


def split(folder: Path, parts: int, into: Path) -> None:
    """The checkpoint in `folder` as Meta's files for so many ranks."""
    config, [whole] = llama3.load_config(folder), llama3.map_files(folder)
    (into / "params.json").write_text((folder / "params.json").read_text())
    for part in range(parts):
        weights = {}
        for name in llama3.weight_shapes(config):
            axis = llama3.split_axis(name)
            shards = [whole[name]] * parts if axis is None else whole[name].chunk(parts, axis)
            weights[name] = shards[part].clone()
        torch.save(weights, into / f"consolidated.{part:02}.pth")


def as_rank(folder: str) -> None:
    """What each process does."""
    ranks.meet()
    rank, n = ranks.this_rank(), ranks.n_ranks()
    start = time.perf_counter()
    source = formats.open(folder)
    weights = source.load_weights(span=ranks.span_of(source.config, rank, n))
    weights = ranks.connected(weights, source.config, rank, n)
    share = memory_of_rank(source.config, rank, n, 0)[0]
    config, times = ranks.part_of(source.config, n), [time.perf_counter()]
    prompt = prompt_of(128, config.vocab_size)
    for _ in llama3.generate(prompt, weights, config, max_new_tokens=32):
        times.append(time.perf_counter())
    found = {
        "load_s": times[0] - start,
        "prefill_s": times[1] - times[0],
        "token_ms": 1000 * (times[-1] - times[1]) / (len(times) - 2),
        "peak_gb": peak_rss_bytes() / 1e9,
        "over_share_gb": (peak_rss_bytes() - share) / 1e9,
    }
    of_all = ranks.gathered(found)
    if rank == 0:
        print(json.dumps({name: max(other[name] for other in of_all) for name in found}))


def main() -> None:
    print(f"{processor()}, PyTorch {torch.__version__}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SIZES["1b"][0])
        for parts in (1, 2, 4):
            with tempfile.TemporaryDirectory() as files:
                split(Path(folder), parts, Path(files))
                for n_ranks in (1, 2):
                    command = [*launch, str(n_ranks), __file__, "--rank", files]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    found = json.loads(done.stdout)
                    numbers = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
                    print(f"{parts} files on {n_ranks} ranks: {numbers}", flush=True)


if __name__ == "__main__":
    if "--table" in sys.argv:
        table()
    elif "--rank" in sys.argv:
        as_rank(sys.argv[-1])
    else:
        main()
