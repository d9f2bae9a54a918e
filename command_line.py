"""The command line, `python llama3.py --prompt TEXT`: options, devices, streams, statistics.

The completion goes to standard output and everything else to standard error. What is wrong with the
user's input is raised where it is found, as a CheckpointError or a UsageError; `main` alone turns
either into one line and exit status 2.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import tiktoken
import torch
from tqdm import tqdm

import llama3
import tokenizer_setup
from checkpoint_files import CheckpointError, Limits, one_line

DEMO_DIR = Path(__file__).resolve().parent / "demo"


class UsageError(ValueError):
    """What the user asked for cannot be done: one line that says why, and what to do."""


def note(message: str) -> None:
    """Tell the user something on standard error."""
    print(f"llama3.py: {message}", file=sys.stderr)


# --- options --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def number(limits: Limits) -> Callable[[str], float]:
    """A type for argparse: a number within `limits`."""

    def parse(text: str) -> float:
        try:
            value = limits.kind(text)
        except ValueError:
            value = None
        if not limits.allow(value):
            found = one_line(text, 40)
            raise argparse.ArgumentTypeError(f"found {found!r}, expected {limits}")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and check each by itself. Raises UsageError."""
    parser = _Parser(
        prog="llama3.py",
        description="Continue a text with a Llama 3 model, read from its files as Meta ships them. "
        "The completion goes to standard output, everything else to standard error.",
        epilog="Without --ckpt-dir: the folder that the environment variable LLAMA3_CKPT_DIR "
        "names, else Meta-Llama-3-8B in the current folder, else the small bundled demo.",
        allow_abbrev=False,
    )
    positive = number(Limits(int, 1, 2**24))
    sampling = {name: number(limits) for name, limits in llama3.SAMPLING_LIMITS.items()}

    parser.add_argument("--prompt", help="the text to continue", metavar="TEXT", required=True)
    parser.add_argument(
        "--ckpt-dir",
        help="folder with the model's files (default: see below)",
        metavar="DIR",
        type=Path,
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.model to use (default: the one in that folder)",
        metavar="FILE",
    )
    parser.add_argument(
        "--max-new-tokens",
        help="tokens to make at most (default: 128)",
        metavar="N",
        type=positive,
        default=128,
    )
    parser.add_argument(
        "--temperature",
        help="0 always takes the likeliest token, more is more random (default: 0)",
        metavar="X",
        type=sampling["temperature"],
        default=llama3.GREEDY.temperature,
    )
    parser.add_argument(
        "--top-p",
        help="draw among the likeliest tokens that have probability P together (default: 1)",
        metavar="P",
        type=sampling["top_p"],
        default=llama3.GREEDY.top_p,
    )
    parser.add_argument(
        "--seed",
        help="make the random choices repeatable (default: new ones every time)",
        metavar="N",
        type=sampling["seed"],
        default=llama3.GREEDY.seed,
    )
    parser.add_argument(
        "--device",
        help="auto, the default, takes the first of the others that this machine has",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
    )
    parser.add_argument(
        "--dtype",
        help="type to compute in (default: the checkpoint's)",
        choices=llama3.DTYPES,
    )
    parser.add_argument(
        "--max-seq-len",
        help="tokens in the context (default: 8192, with use_scaled_rope 131072)",
        metavar="N",
        type=positive,
    )
    parser.add_argument(
        "--stats",
        help="end with a line of JSON on standard error",
        action="store_true",
    )
    return parser.parse_args(argv)


def default_checkpoint() -> Path:
    """The folder to use without --ckpt-dir; says on standard error which it is."""
    if os.environ.get("LLAMA3_CKPT_DIR"):
        ckpt_dir, origin = Path(os.environ["LLAMA3_CKPT_DIR"]), "from LLAMA3_CKPT_DIR"
    elif Path("Meta-Llama-3-8B").is_dir():
        ckpt_dir, origin = Path("Meta-Llama-3-8B"), "found in the current folder"
    else:
        ckpt_dir, origin = DEMO_DIR, "the small bundled demo"
    note(f"using the model in {ckpt_dir} ({origin})")
    return ckpt_dir


def choose_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" the best one that this machine has.

    Raises UsageError for one that it does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    present = {"cuda": cuda, "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in present if present[kind])
    if not present[name]:
        raise UsageError(
            f"argument --device: PyTorch finds no {name} device here; use --device cpu"
        )
    return torch.device(name)


# --- statistics -----------------------------------------------------------------------------------


def timed(items: Iterable[int], times: list[float]) -> Iterator[int]:
    """`items`, with the time at which each came added to `times`."""
    for item in items:
        times.append(time.perf_counter())
        yield item


def peak_rss_bytes() -> int | None:
    """The most memory that this process has had resident so far; None where it cannot be told."""
    try:  # Linux: getrusage would also count what the parent had resident when it forked
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def statistics(
    load_s: float, prompt_tokens: int, times: list[float], device: torch.device
) -> dict[str, float | None]:
    """What --stats reports, times in seconds; `times`: of the start, then of every token."""
    ends = times if len(times) > 1 else [*times, time.perf_counter()]  # or not one token came
    stats = {
        "load_s": round(load_s, 4),
        "prompt_tokens": prompt_tokens,
        "prefill_s": round(ends[1] - ends[0], 4),
        "decode_tokens": len(ends) - 2,
        "decode_s": round(ends[-1] - ends[1], 4),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if device.type == "cuda":
        stats["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return stats


# --- a completion ---------------------------------------------------------------------------------


def load_tokenizer(path: str | os.PathLike, config: llama3.Config) -> tiktoken.Encoding:
    """The tokenizer, if it is that of a model like this. Raises CheckpointError, UsageError."""
    tokenizer = tokenizer_setup.load_tokenizer(path)
    if tokenizer.n_vocab != config.vocab_size:
        raise UsageError(
            f'the tokenizer has {tokenizer.n_vocab} tokens, but "vocab_size" in params.json is '
            f"{config.vocab_size}; use the tokenizer.model that came with the weights"
        )
    return tokenizer


def check_room(prompt_tokens: int, max_new_tokens: int, max_seq_len: int) -> None:
    """Raise UsageError if the prompt is longer than the context; note if the completion may be."""
    room = max_seq_len - prompt_tokens
    if room < 0:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, but the context only {max_seq_len}; "
            "shorten the prompt or raise --max-seq-len"
        )
    if max_new_tokens > room:
        note(f"the context of {max_seq_len} tokens has room for {room} new ones")


def stream(texts: Iterable[str]) -> int:
    """Write `texts` to standard output as they come, and nothing else; returns the exit status.

    Raises UsageError if standard output cannot be written.
    """
    if sys.stdout is None:
        raise UsageError("standard output is closed, so there is nowhere to write to")
    sys.stdout.reconfigure(encoding="utf-8")
    status = 0
    try:
        for text in texts:
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        # Python flushes standard output once more when it ends; what is left then goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # with which a reader says that it has enough
            raise UsageError(f"standard output cannot be written: {error.strerror}") from None
    if sys.stdout.isatty():
        print(flush=True)
    return status


def run(args: argparse.Namespace) -> int:
    """Load the model and stream its completion of the prompt; returns the exit status.

    Raises CheckpointError and UsageError; what is cheap to check is checked before the weights
    are loaded.
    """
    start = time.perf_counter()
    ckpt_dir = args.ckpt_dir or default_checkpoint()
    device = choose_device(args.device)
    config = llama3.load_config(ckpt_dir)
    tokenizer = load_tokenizer(args.tokenizer or ckpt_dir / "tokenizer.model", config)
    prompt_tokens = tokenizer_setup.encode(tokenizer, args.prompt)
    max_seq_len = args.max_seq_len or config.max_seq_len
    check_room(len(prompt_tokens), args.max_new_tokens, max_seq_len)
    weights = llama3.load_weights(
        ckpt_dir,
        config,
        device,
        llama3.DTYPES.get(args.dtype),
        functools.partial(
            tqdm, desc="loading", unit=" tensors", delay=0.5, leave=False, disable=None
        ),
    )
    load_s = time.perf_counter() - start

    tokens = llama3.generate(
        prompt_tokens,
        weights,
        config,
        max_new_tokens=args.max_new_tokens,
        sampling=llama3.Sampling(args.temperature, args.top_p, args.seed),
        stop_tokens=tokenizer_setup.stop_tokens(tokenizer),
        max_seq_len=max_seq_len,
    )
    times = [time.perf_counter()]  # of the start, then of every token
    status = stream(tokenizer_setup.decode_stream(tokenizer, timed(tokens, times)))
    if args.stats:
        print(json.dumps(statistics(load_s, len(prompt_tokens), times, device)), file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 if the input was bad."""
    try:
        return run(parse_arguments(argv))
    except (CheckpointError, UsageError) as error:
        note(f"error: {one_line(error, limit=1000)}")
        return 2
    except KeyboardInterrupt:
        return 130
