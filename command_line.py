"""The command line, `python llama3.py --prompt TEXT`: options, devices, streams, statistics.

The completion goes to standard output and everything else to standard error. What is wrong with the
user's input is raised where it is found, as a CheckpointError or a UsageError; `main` alone turns
either into one line and exit status 2. Only `main` is for others to use.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (llama3.py comes here first, whatever runs it)
    found = "{}.{}".format(*sys.version_info[:2])
    sys.stderr.write("llama3.py: error: this is Python " + found + ", needed is 3.11 or newer\n")
    sys.exit(2)

import argparse
import codecs
import contextlib
import datetime
import functools
import itertools
import json
import logging
import math
import os
import re
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import torch
from tqdm import tqdm

import convert
import llama3
import tokenizer_setup
from checkpoint_files import (
    CONTROL_CHARACTERS,
    SAMPLING_LIMITS,
    CheckpointError,
    Limits,
    bytes_to_read,
    find_weights,
    give_up,
    one_line,
    out_of_memory,
    possible_parts,
    say,
    shapes_of_part,
    split_axis,
)

DEMO_DIR = Path(__file__).resolve().parent / "demo"
THREADS_BYTES = 2**28  # of address space for PyTorch's threads, which end the process without it
COMPILED_FROM_BYTES = 5e8  # of weights: below, compiling takes longer than it saves
MAX_PROMPT_BYTES = 2**26  # more than any context holds, and not more than is quickly read
MAX_SCORED_BYTES = 2**30
MEETING = datetime.timedelta(minutes=2)  # for all ranks to start
SCORED_LOGITS = 2**24  # at a time: 64 MB


class UsageError(ValueError):
    """What the user asked for cannot be done: one line that says why, and what to do."""


class OutputError(UsageError):
    """Standard output cannot be written."""


# --- streams --------------------------------------------------------------------------------------


def note(message: object) -> None:
    """Tell the user something on standard error."""
    say(f"llama3.py: {one_line(message, limit=1000)}")


def stream(texts: Iterable[str]) -> bool:
    """Write `texts` to standard output as they come, and nothing else; whether someone reads it.

    On a terminal a line break comes last. Raises OutputError if standard output cannot be written.
    """
    out = sys.stdout
    if hasattr(out, "reconfigure"):  # a notebook's has no encoding to change
        out.reconfigure(encoding="utf-8", newline="\n")
    terminal, text = out.isatty(), ""
    try:
        for text in texts:
            out.write(text.translate(CONTROL_CHARACTERS) if terminal else text)
            out.flush()
    except OSError as error:
        give_up(out)
        if not isinstance(error, BrokenPipeError):  # with which a reader says that it has enough
            raise OutputError(f"standard output cannot be written: {error.strerror}") from None
        return False
    finally:
        if terminal and not text.endswith("\n"):
            print(flush=True)
    return True


# --- ranks ----------------------------------------------------------------------------------------
#
# Several processes, as torchrun starts them, compute one model, each with a part of it. Rank 0 does
# all that a single process does, and before each computation tells the others what it is; they do
# nothing else, and have no voice. So prompts, conversations and errors are the matter of one.


def in_environment(name: str, default: int) -> int:
    """A number that torchrun, or another launcher, has put into the environment of a rank."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and "MASTER_ADDR" in os.environ else default


def n_ranks() -> int:
    """How many processes compute together."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ranks else 1


def this_rank() -> int:
    """Which of them this one is."""
    return torch.distributed.get_rank() if n_ranks() > 1 else 0


def ranks_here() -> int:
    """How many of them are on this machine."""
    return in_environment("LOCAL_WORLD_SIZE", 1) if n_ranks() > 1 else 1


def meet() -> None:
    """Meet the other ranks, if there are any. Raises UsageError if they cannot be reached."""
    rank, n = in_environment("RANK", 0), in_environment("WORLD_SIZE", 1)
    if n == 1:
        return
    if rank >= n:
        raise UsageError(f"RANK is {rank}, expected less than WORLD_SIZE, which is {n}")
    if not torch.distributed.is_available():
        raise UsageError("this PyTorch is built without torch.distributed, and needs one process")
    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    forever = datetime.timedelta(days=365)  # users may think for long; who ends is noticed at once
    try:
        torch.distributed.init_process_group(backend, timeout=MEETING)
        torch.distributed.distributed_c10d._set_pg_timeout(forever)
    except (ValueError, RuntimeError) as error:
        reason = one_line(error, limit=300)
        raise UsageError(f"the {n} processes cannot reach each other: {reason}") from None


class OutOfStep:
    """Whether a computation was broken off here, in which the other ranks still are."""

    now = False


def tell(message: object = None) -> object:
    """What rank 0 tells all ranks: its own `message`, whatever the others say."""
    if n_ranks() == 1 or OutOfStep.now:
        return message
    box = [message]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def computing(*message: object) -> Iterator[None]:
    """What the other ranks do too, as they are told. If it ends early, nothing reaches them again.

    But for numbers that are not finite, which all ranks find at the same time.
    """
    try:
        tell(message)
        yield
    except FloatingPointError:
        raise
    except BaseException:
        OutOfStep.now = True
        raise


def gathered(value: object) -> list[object]:
    """The values of all ranks."""
    values = [value] * n_ranks()
    if n_ranks() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def lost_connection(error: BaseException) -> bool:
    """Whether an error is the end of another rank, which has its own."""
    closed = "peer|closed|reset by|recv|NCCL|timed out"
    return n_ranks() > 1 and isinstance(error, RuntimeError) and bool(re.search(closed, str(error)))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all ranks do or none: raises UsageError on all of them if one cannot."""
    problem, known = None, (CheckpointError, UsageError, MemoryError, OSError, RuntimeError)
    try:
        yield
    except known as error:
        if n_ranks() == 1:
            raise
        problem = one_line(error, limit=1000)
    except BaseException:
        OutOfStep.now = True
        raise
    for rank, found in enumerate(gathered(problem)):
        if found is not None:
            raise UsageError(found if rank == 0 else f"rank {rank}: {found}")


# --- options --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith(": expected one argument"):
            option = message.split()[1].rstrip(":")
            message += f'; what begins with "-" is written {option}="-..."'
        raise UsageError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        if arg_strings == ["--"] and action.nargs is None:  # --option=--, lost before Python 3.13
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


def number(limits: Limits) -> Callable[[str], float]:
    """A type for argparse: a number within `limits`."""

    def parse(text: str) -> float:
        try:
            value = limits.kind(text)
        except ValueError:
            value = None
        if not limits.allow(value):
            raise argparse.ArgumentTypeError(limits.refusal(text))
        return value

    return parse


def device_name(text: str) -> str:
    """A type for argparse: the name of a device, whether it is there or not."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text):
        found, expected = one_line(text, 40), "auto, cuda, cuda:0, cuda:1, ..., mps or cpu"
        raise argparse.ArgumentTypeError(f"found {found!r}, expected {expected}")
    return text


def _decode(content: bytes, origin: str) -> str:
    """UTF-8 as text. Raises UsageError, which says where a byte is that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"the byte 0x{content[error.start]:02x} at position {error.start}"
        utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        looks = ", as UTF-16 has it" if utf_16 else ""
        raise UsageError(f"{origin}: found {found}{looks}, expected text in UTF-8") from None


def from_argument(text: str, option: str) -> str:
    """The text of an option. Raises UsageError if it is none."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # bytes that the locale cannot spell, or that nothing can
        origin = f"argument {option}"
    try:
        return _decode(os.fsencode(text), origin)
    except UnicodeEncodeError:
        raise UsageError(f"{origin}: found half a character, expected text") from None


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
    sampling = {name: number(limits) for name, limits in SAMPLING_LIMITS.items()}

    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt",
        help="the text to continue; given several times, the texts go through as one batch, and "
        "their completions are numbered",
        metavar="TEXT",
        action="append",
    )
    what.add_argument(
        "--prompt-file",
        help="file with the text to continue, - for standard input; a line break at its end is "
        "left out; may be given several times",
        metavar="FILE",
        action="append",
    )
    what.add_argument(
        "--score",
        help="file with a text, - for standard input, of which no continuation is made: a line of "
        "JSON says how likely the model finds it; a text longer than the context is read in "
        "windows that overlap by half",
        metavar="FILE",
    )
    parser.add_argument("--by-line", help="with --score: every line is a text", action="store_true")
    parser.add_argument(
        "--chat",
        help="answer the prompt as an Instruct model does; without one, talk: on the terminal, or "
        "a line in and a line out",
        action="store_true",
    )
    parser.add_argument("--system", help="with --chat: the system message", metavar="TEXT")
    parser.add_argument(
        "--logprobs",
        help="write a line of JSON for each new token, with its probability and those of the K "
        "likeliest, as logarithms, before temperature and filters",
        metavar="K",
        type=number(Limits(int, 0, 1000)),
    )
    parser.add_argument(
        "--plot",
        help="draw what may come next after the prompt, and what each head of a layer attends to",
        metavar="FILE.png",
    )
    parser.add_argument(
        "--plot-layer",
        help="the layer whose heads --plot draws (default: 0, the first)",
        metavar="N",
        type=number(Limits(int, 0, 4096)),
    )
    parser.add_argument(
        "--ckpt-dir",
        help="folder with the model's files as Meta ships them, a Hugging Face folder, or a GGUF "
        "file (default: see below)",
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
        help="tokens to make at most (default: 128, with --chat 1024)",
        metavar="N",
        type=positive,
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
        "--top-k",
        help="draw among the K likeliest tokens (default: 0, all)",
        metavar="K",
        type=sampling["top_k"],
        default=llama3.GREEDY.top_k,
    )
    parser.add_argument(
        "--min-p",
        help="draw among tokens at least P times as likely as the likeliest (default: 0)",
        metavar="P",
        type=sampling["min_p"],
        default=llama3.GREEDY.min_p,
    )
    parser.add_argument(
        "--repetition-penalty",
        help="more than 1 makes tokens of prompt and completion less likely (default: 1)",
        metavar="X",
        type=sampling["repetition_penalty"],
        default=llama3.GREEDY.repetition_penalty,
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
        help="cuda, cuda:N, mps or cpu; auto, the default, takes the first that this machine has",
        metavar="NAME",
        type=device_name,
        default="auto",
    )
    parser.add_argument(
        "--dtype",
        help="type to compute in (default: the checkpoint's)",
        choices=llama3.DTYPES,
    )
    parser.add_argument(
        "--max-seq-len",
        help="tokens in the context (default: the model's, which is 8192 or, with use_scaled_rope, "
        "131072 unless its files say otherwise)",
        metavar="N",
        type=positive,
    )
    parser.add_argument(
        "--compile",
        help="compile the products of one token for this processor, which takes seconds the first "
        "time (default: on a CPU, for weights of more than half a gigabyte)",
        action=argparse.BooleanOptionalAction,
    )
    parser.add_argument(
        "--threads",
        help="threads to compute with on the CPU (default: one a core)",
        metavar="N",
        type=number(Limits(int, 1, 1024)),
    )
    parser.add_argument(
        "--stats",
        help="end with a line of JSON on standard error",
        action="store_true",
    )
    args = parser.parse_args(argv)
    prompts = len(args.prompt or args.prompt_file or ())
    scored = args.score is not None
    if not (prompts or scored or args.chat):
        parser.error("one of the arguments --prompt --prompt-file --score --chat is required")
    if (args.prompt_file or []).count("-") > 1:
        parser.error("argument --prompt-file: standard input is read once")
    if args.chat and (prompts > 1 or scored or args.logprobs is not None):
        other = "--score" if scored else "--logprobs" if prompts < 2 else "several prompts"
        parser.error(f"argument --chat: not allowed with {other}")
    if args.plot is not None:
        if prompts != 1 or args.chat:
            parser.error("argument --plot: it goes with a single prompt, and not with --chat")
        if not args.plot.lower().endswith(".png"):
            found = one_line(repr(args.plot), 60)
            parser.error(f"argument --plot: found {found}, expected the name of a .png file")
    elif args.plot_layer is not None:
        parser.error("argument --plot-layer: it goes with --plot FILE.png")
    if args.system is not None:
        if not args.chat:
            parser.error("argument --system: it goes with --chat")
        args.system = from_argument(args.system, "--system")
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024 if args.chat else 128
    if args.by_line and not scored:
        parser.error("argument --by-line: it goes with --score FILE")
    if scored and args.logprobs is not None:
        parser.error("argument --logprobs: not allowed with argument --score")
    return args


def sampling_of(args: argparse.Namespace) -> llama3.Sampling:
    """How the next token is chosen, by the options."""
    return llama3.Sampling(**{name: getattr(args, name) for name in llama3.Sampling._fields})


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

    Of several ranks on a machine each has a GPU of its own, or they share the processor. Raises
    UsageError for a device that is not there.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = [f"cuda:{i}" for i in range(cuda)] + ["mps"] * torch.backends.mps.is_available()
    local, here = in_environment("LOCAL_RANK", 0), ranks_here()
    if n_ranks() > 1 and name != "cpu":
        if name not in ("auto", "cuda"):
            found = f"found {name}, expected cuda or cpu where several processes compute together"
            raise UsageError(f"argument --device: {found}")
        if name == "auto" and not cuda:
            name = "cpu"
        elif cuda < here:
            raise UsageError(
                f"{here} processes here, but {cuda} CUDA devices; start no more processes than "
                "devices (--nproc-per-node), or use --device cpu"
            )
        else:
            torch.cuda.set_device(local)
            name = f"cuda:{local}"
    if name == "auto":
        name = present[0] if present else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name not in (*present, "cpu"):
        wanted = "cuda" if name == "cuda:0" else name
        others = ", ".join(f"--device {other}" for other in (*present, "cpu"))
        raise UsageError(f"argument --device: PyTorch finds no {wanted} device here; use {others}")
    return torch.device(name)


# --- the prompt -----------------------------------------------------------------------------------


def from_file(option: str, path: str, limit: int) -> str:
    """The text in a file of at most `limit` bytes; "-" is standard input. Raises UsageError."""
    origin = "standard input" if path == "-" else path
    try:
        if path != "-":
            with open(path, "rb") as file:
                content = file.read(limit + 1)
        elif sys.stdin is None:
            raise UsageError("standard input is closed, so there is nothing to read from")
        elif hasattr(sys.stdin, "buffer"):
            content = sys.stdin.buffer.read(limit + 1)
        else:
            content = sys.stdin.read(limit + 1).encode()
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        problem = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"argument {option}: {origin}: cannot be read: {problem}") from None
    if len(content) > limit:
        problem = f"found more than {limit} bytes, which no context holds"
        if option == "--score":
            problem = f"found more than {limit} bytes; cut it in parts"
        raise UsageError(f"argument {option}: {origin}: {problem}")
    return _decode(content.removeprefix(b"\xef\xbb\xbf"), f"argument {option}: {origin}")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts of --prompt or --prompt-file. Raises UsageError if one is none."""
    if args.prompt is not None:
        return [from_argument(text, "--prompt") for text in args.prompt]
    texts = [from_file("--prompt-file", path, MAX_PROMPT_BYTES) for path in args.prompt_file]
    return [t.removesuffix("\n").removesuffix("\r") if t.endswith("\n") else t for t in texts]


def check_room(
    prompt_tokens: int, max_new_tokens: int, max_seq_len: int, config: llama3.Config
) -> None:
    """Raise UsageError if the prompt is longer than the context; note if the completion may be."""
    room = max_seq_len - prompt_tokens
    if room < 0:
        can_be_raised = prompt_tokens <= config.max_seq_len
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, but the context only {max_seq_len}; "
            "shorten the prompt" + " or raise --max-seq-len" * can_be_raised
        )
    if max_new_tokens > room:
        note(f"the context of {max_seq_len} tokens has room for {room} new ones")


def check_vocabulary(
    tokenizer: tokenizer_setup.Tokenizer, config: llama3.Config, exact: bool
) -> None:
    """Raise UsageError unless the tokenizer is that of a model like this.

    exact: it has a token for each row of the embeddings, as Meta's models have.
    """
    if tokenizer.n_vocab > config.vocab_size or (exact and tokenizer.n_vocab < config.vocab_size):
        raise UsageError(
            f'the tokenizer has {tokenizer.n_vocab} tokens, but the "vocab_size" of the model is '
            f"{config.vocab_size}; use the tokenizer that came with the weights"
        )


# --- memory ---------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> float:
    """The memory that is free on a device, as far as it can be told: infinity where it cannot."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []

    def read(path: str, pattern: str) -> int:
        return int(re.search(pattern, Path(path).read_text(), re.MULTILINE)[1])

    with contextlib.suppress(OSError, TypeError):  # Linux: what can be had without swapping
        limits.append(1024 * read("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB"))
    with contextlib.suppress(OSError, TypeError):  # a container's limit; its files can be dropped
        group = "/sys/fs/cgroup/memory"
        used = read(f"{group}.current", r"(\d+)") - read(f"{group}.stat", r"^inactive_file (\d+)")
        limits.append(read(f"{group}.max", r"^(\d+)") - used)
    with contextlib.suppress(ImportError, OSError, TypeError):  # of address space (ulimit -v)
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = 1024 * read("/proc/self/status", r"^VmSize:\s+(\d+) kB")
            limits.append(limit - used - THREADS_BYTES)
    return max(min(limits, default=math.inf), 0)


def amount(size: float) -> str:
    """A number of bytes for a message."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def bytes_needed(
    config: llama3.Config,
    weights: float,
    itemsize: int,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
) -> dict[str, float]:
    """What the weights, the cache and the work on a block of the prompt take, about.

    weights: their bytes; itemsize: bytes of a number of the cache and of the activations. Scores
    exist several times: as products, scaled, masked, in float32, and as shares.
    """
    position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * itemsize * batch
    block = min(prompt_tokens, llama3.PREFILL_TOKENS)
    most = max(llama3.MOST_SCORES, config.n_heads * prompt_tokens * 32)
    scores = batch * min(config.n_heads * block * prompt_tokens, most)
    scores *= 10 if itemsize == 2 else 8
    activations = batch * block * (3 * config.ffn_dim + 8 * config.dim) * itemsize
    return {
        "weights": weights,
        "cache": position * (prompt_tokens + new_tokens),
        "prompt": scores + activations,
    }


def check_files(ckpt_dir: Path) -> None:
    """Raise UsageError if the weights cannot be mapped and there is no memory to read them."""
    try:
        paths = find_weights(ckpt_dir)
    except CheckpointError:  # which is raised again where they are needed
        return
    sizes = {path: bytes_to_read(path) for path in paths}
    path, size = max(sizes, key=sizes.get), sum(sizes.values()) * ranks_here()
    free = free_bytes(torch.device("cpu"))
    if size > free:
        raise UsageError(
            f"{path} cannot be mapped, and to read it takes {amount(size)} of memory, but "
            f"{amount(free)} are free; save it anew with torch.save, or use a smaller model"
        )


def bytes_of_weights(
    weights: llama3.Weights, device: torch.device, dtype: torch.dtype, copied: int = 0
) -> int:
    """The memory that the weights take on a device; `copied`: bytes that are not mapped on the CPU.

    There those that are mapped need none of their own: they are dropped and read again. Others are
    joined from pieces, or are some of the columns of a matrix.
    """
    if device.type == "cpu":
        joined = [w for w in weights.values() if isinstance(w, list)]
        if n_ranks() > 1:
            tensors = (w for name, w in weights.items() if split_axis(name) == 1)
            joined += [[w] for w in tensors if not isinstance(w, list) and not w.is_contiguous()]
        return copied + sum(piece.nbytes for pieces in joined for piece in pieces)
    tensors = llama3.Weights(weights).tensors()
    distinct = {(t.data_ptr() or id(t), t.stride()): t.numel() for t in tensors}
    return sum(distinct.values()) * dtype.itemsize


def part_of_config(config: llama3.Config) -> llama3.Config:
    """The sizes of what one rank computes."""
    n = n_ranks()
    return config._replace(
        n_heads=config.n_heads // n,
        n_kv_heads=max(config.n_kv_heads // n, 1),
        ffn_dim=-(-config.ffn_dim // n),
    )


def memory_of_rank(
    config: llama3.Config, rank: int, n_ranks: int, itemsize: int, length: int
) -> tuple[int, int]:
    """The bytes of a rank's part of the weights, and of its cache for `length` positions."""
    shapes = shapes_of_part(llama3.weight_shapes(config), config.head_dim, rank, n_ranks)
    keys = shapes["layers.0.attention.wk.weight"][0]
    cache = config.n_layers * 2 * keys * length
    return sum(map(math.prod, shapes.values())) * itemsize, cache * itemsize


def check_memory(
    config: llama3.Config,
    weights_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
) -> None:
    """Raise UsageError if the model and the prompts need more memory than is free.

    Notes if the completion may.
    """

    def needed(prompt: int, new: int) -> dict[str, float]:
        return bytes_needed(config, weights_bytes, dtype.itemsize, prompt, new, batch)

    free = free_bytes(device)
    if device.type == "cpu":  # which the ranks on this machine share
        free /= ranks_here()
    parts = needed(prompt_tokens, 1)
    if sum(parts.values()) > free:
        found = ", ".join(f"{name} {amount(size)}" for name, size in parts.items())
        fits = 0
        for step in reversed(range(prompt_tokens.bit_length())):  # the longest prompt, bit by bit
            if sum(needed(fits + 2**step, 1).values()) <= free:
                fits += 2**step
        advice = f"a prompt of {fits} tokens would fit" if fits else "use a smaller model"
        if not fits and dtype.itemsize == 4 and weights_bytes:
            advice += " or --dtype bfloat16"
        if not free:
            advice = "free some, or raise the limit of address space (ulimit -v)"
        raise UsageError(
            f"this needs {amount(sum(parts.values()))} of memory ({found}), but {amount(free)} "
            f"are free on {device.type}; {advice}"
        )
    if sum(needed(prompt_tokens, new_tokens).values()) > free:
        each = needed(0, 1)["cache"]
        fits = int((free - sum(needed(prompt_tokens, 0).values())) // each)
        note(f"memory is free for about {fits} of the {new_tokens} new tokens")


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
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def stats_of(
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


# --- speed ----------------------------------------------------------------------------------------


def bar(what: str, unit: str, delay: float) -> Callable[[Iterable], Iterable]:
    """A progress bar on a terminal for what takes longer than `delay` seconds."""
    options = {"unit": f" {unit}", "delay": delay, "leave": False, "disable": None}
    return functools.partial(tqdm, desc=what, **options)


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worth_compiling(weights: llama3.Weights, device: torch.device) -> bool:
    """Whether compiled products save more than compiling takes, and a C++ compiler is at hand."""
    whole = not any(isinstance(weight, list) for weight in weights.values())
    size = sum(tensor.nbytes for tensor in llama3.Weights(weights).tensors())
    large = device.type == "cpu" and whole and size > COMPILED_FROM_BYTES
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return large and any(shutil.which(name) for name in compilers if name)


def multiply_and_sum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T for one vector x [..., inputs], as it compiles to a loop that reads w once.

    It converts, multiplies and sums in float32 on the way. Of sums of more than 4096 numbers
    PyTorch's compiler makes a slower loop: they are taken in equal parts.
    """
    inputs = w.shape[1]
    parts = next(n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= 4096)
    products = x.float().view(parts, -1) * w.float().unflatten(1, (parts, -1))
    return products.sum(-1).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)


@torch.inference_mode()
def compiled_products(weights: llama3.Weights) -> llama3.Weights:
    """The same weights, with products of one token compiled for the processor, which takes seconds.

    Raises what torch.compile raises, and RuntimeError for wrong results.
    """
    fast = llama3.Weights(weights)
    fast.one_token = torch.compile(multiply_and_sum, dynamic=False)
    kinds = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and "embeddings" not in name:
            torch._dynamo.mark_dynamic(weight, 0)  # one loop for all matrices with as many inputs
            kinds[weight.dtype, weight.shape[1]] = name.removesuffix(".weight")
    for (_, inputs), name in kinds.items():
        x = torch.linspace(-1, 1, inputs).to(weights["norm.weight"])[None]
        matrix = weights[f"{name}.weight"]
        y, expected = fast.one_token(x, matrix), llama3.product_of_one(x, matrix)
        if not (y - expected).abs().max() <= 0.02 * expected.abs().max():
            raise RuntimeError(f"the compiled product with {name} is wrong")
    return fast


def compiled(weights: llama3.Weights) -> llama3.Weights:
    """The weights with compiled products of one token, or as they are where that fails."""
    start = time.perf_counter()
    logging.disable(logging.ERROR)  # what the compiler has to say is for those who develop it
    try:
        with warnings.catch_warnings(action="ignore"):
            weights = compiled_products(weights)
        note(f"products of one token were compiled in {time.perf_counter() - start:.1f} s")
    except Exception as error:  # it fails in many ways
        reason = one_line(str(error).partition("\n")[0] or error)
        note(f"going on without compiled products, which failed: {reason}")
    finally:
        logging.disable(logging.NOTSET)
    return weights


# --- a model --------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What all that is done with a model needs."""

    config: llama3.Config
    tokenizer: tokenizer_setup.Tokenizer
    max_seq_len: int
    load: Callable[..., llama3.Weights]  # for so many prompt tokens, new tokens, and prompts


def opened(args: argparse.Namespace) -> Model:
    """The model that the options name, but for its weights.

    They are loaded by `load`, which raises UsageError if memory does not suffice. Raises
    CheckpointError and UsageError.
    """
    ckpt_dir = args.ckpt_dir or default_checkpoint()
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    elif n_ranks() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # which torchrun has set
        torch.set_num_threads(max(processors() // ranks_here(), 1))
    source = convert.open_source(ckpt_dir) if convert.is_source(ckpt_dir) else None
    if source:
        note(f"found in {ckpt_dir}: {source.found}")
        config = source.config
    else:
        check_files(ckpt_dir)
        config = llama3.load_config(ckpt_dir)
    most = min(config.ffn_dim, config.vocab_size)
    possible = possible_parts(config.n_heads, config.n_kv_heads, most)
    if n_ranks() not in possible:
        raise UsageError(
            f"{n_ranks()} processes cannot share {config.n_heads} heads of queries and "
            f"{config.n_kv_heads} of keys; start {', '.join(map(str, possible))}"
        )
    if source and not args.tokenizer:
        tokenizer = source.tokenizer()
    else:
        tokenizer = tokenizer_setup.load_tokenizer(args.tokenizer or ckpt_dir / "tokenizer.model")
    exact = not source and tokenizer_setup.is_llama3(tokenizer)
    check_vocabulary(tokenizer, config, exact)

    def load(prompt_tokens: int, new_tokens: int, batch: int = 1) -> llama3.Weights:
        part = {"rank": this_rank(), "n_ranks": n_ranks()}
        weights = source.described if source else llama3.map_weights(ckpt_dir, config, **part)
        dtype = llama3.DTYPES.get(args.dtype) or llama3.default_dtype(weights, device)
        copied = source.copied_bytes() // n_ranks() if source else 0
        size = bytes_of_weights(weights, device, dtype, copied)
        needs = [part_of_config(config), size, device, dtype, prompt_tokens, new_tokens, batch]
        join = True
        try:
            check_memory(*needs)
        except UsageError:
            if device.type != "cpu" or source or not size:
                raise
            needs[1], join = 0, False
            check_memory(*needs)
            pieces = "products go over the pieces as they lie in the files, which is slower"
            note(f"memory does not suffice to join the weights, {amount(size)}: {pieces}")
        loading = bar("loading", "tensors", delay=0.5)
        if source:
            weights = source.load_weights(device, dtype, loading, **part)
        else:
            weights = llama3.place_weights(weights, device, dtype, loading, join)
        if args.compile and not join:
            note("--compile: products over pieces are not compiled")
        elif args.compile or (args.compile is None and worth_compiling(weights, device)):
            weights = compiled(weights)
        return weights

    max_seq_len = args.max_seq_len or config.max_seq_len
    if max_seq_len > config.max_seq_len:
        made_for = f"the model was made for {config.max_seq_len}, and gets worse beyond"
        note(f"--max-seq-len {max_seq_len}: {made_for}")
    return Model(config, tokenizer, max_seq_len, load)


# --- on all ranks ---------------------------------------------------------------------------------

Steps = Iterator[tuple[torch.Tensor, torch.Tensor]]


def best_reason(reasons: Sequence[str]) -> str:
    """Of several reasons for numbers that are not finite one that names a weight, or the first."""
    return next((reason for reason in reasons if "holds" in reason), reasons[0])


def load_on_ranks(model: Model, *sizes: int) -> llama3.Weights:
    """The weights, or on each rank its part; sizes: see Model.load. Raises UsageError."""
    tell(("load", *sizes))
    with together():
        return model.load(*sizes)


def steps_of(
    prompts: Sequence[Sequence[int]],
    weights: llama3.Weights,
    config: llama3.Config,
    context: llama3.Context | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    **options: object,
) -> Steps:
    """llama3.steps, which the other ranks take as well. To be closed if it is not used up."""
    steps = llama3.steps(prompts, weights, config, context=context, progress=progress, **options)

    def led() -> Steps:
        tell(("steps", prompts, context is not None, options))
        going = True
        try:
            while going:
                with computing("next"):
                    step = next(steps, None)
                going = step is not None
                if going:
                    yield step
        except FloatingPointError as error:
            going = False
            raise FloatingPointError(best_reason(gathered(str(error)))) from None
        finally:
            if going:
                tell(None)

    return led() if n_ranks() > 1 else steps


def slowest(stats: dict[str, float | None]) -> dict[str, float | None]:
    """The largest of what each rank has, for --stats."""
    if n_ranks() == 1:
        return stats
    tell(("stats",))
    found = gathered(stats)
    return {
        key: max((other[key] for other in found if other.get(key) is not None), default=None)
        for key in stats
    }


# --- what steps give ------------------------------------------------------------------------------


def text_of(tokenizer: tokenizer_setup.Tokenizer, token: int) -> str:
    """The text of one token; U+FFFD for a part of a character."""
    return tokenizer.decode_single_token_bytes(token).decode(errors="replace")


def numbered(tokenizer: tokenizer_setup.Tokenizer, steps: Steps, n: int) -> Iterator[str]:
    """The completions of n prompts, one after the other, each as soon as the one before has ended.

    "[1] " goes before the first, and a line break after each.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n)]
    waiting = [f"[{i}] " for i in range(1, n + 1)]
    ended, current = [False] * n, 0
    for tokens, _ in steps:
        for i, token in enumerate(tokens.tolist()):
            if token >= 0:
                piece = tokenizer.decode_single_token_bytes(token)
                waiting[i] += decoders[i].decode(piece)
            else:
                ended[i] = True
        yield waiting[current]
        waiting[current] = ""
        while ended[current] and current < n - 1:
            yield decoders[current].decode(b"", final=True) + "\n"
            current += 1
            yield waiting[current]
            waiting[current] = ""
    for i in range(current, n):
        yield waiting[i] + decoders[i].decode(b"", final=True) + "\n"


def as_json(
    tokenizer: tokenizer_setup.Tokenizer, steps: Steps, n_prompts: int, k: int
) -> Iterator[str]:
    """A line of JSON for each new token, as --logprobs has it."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        text = text_of(tokenizer, token)
        return {"token": token, "text": text, "logprob": round(logprob, 6)}

    for tokens, logprobs in steps:
        likeliest = logprobs[:, : tokenizer.n_vocab].topk(min(k, tokenizer.n_vocab))
        for i, token in enumerate(tokens.tolist()):
            if token >= 0:
                of_prompt = {"prompt": i + 1} if n_prompts > 1 else {}
                line = of_prompt | entry(token, logprobs[i, token].item())
                others, values = likeliest.indices[i].tolist(), likeliest.values[i].tolist()
                line["top"] = [entry(*other) for other in zip(others, values, strict=True)]
                yield json.dumps(line) + "\n"


# --- pictures -------------------------------------------------------------------------------------

PLOTTED_TOKENS = 60  # at most, of the end of a prompt
PLOTTED_CHARACTERS = 14  # of a token
MOST_PIXELS = 4e7


@torch.inference_mode()
def attention_of(
    tokens: Sequence[int], weights: llama3.Weights, config: llama3.Config, layer: int, last: int
) -> torch.Tensor:
    """What each head of a layer attends to: shares [n_heads, last, T] of the last tokens' queries.

    The layers before go through the functions of llama3.forward, in its order.
    """
    tokens = torch.tensor(tokens, device=weights["norm.weight"].device)
    positions = torch.arange(len(tokens), device=tokens.device)
    rotations = llama3.rope_rotations(positions, config)
    x = llama3.embed(tokens, weights, config.vocab_size)  # [T, dim]
    for i in range(layer + 1):
        norm = weights[f"layers.{i}.attention_norm.weight"]
        normed = llama3.rms_norm(x, norm, config.norm_eps)
        if i < layer:
            x = x + llama3.attention(normed, weights, i, config, rotations, positions)
            norm = weights[f"layers.{i}.ffn_norm.weight"]
            x = x + llama3.feed_forward(llama3.rms_norm(x, norm, config.norm_eps), weights, i)
    q, k, _ = llama3.queries_keys_values(normed, weights, layer, config, rotations)
    k = llama3.repeat_heads(k, len(q) // len(k))
    visible = positions <= positions[-last:, None]
    shares = llama3.attention_shares(q[:, -last:], k, visible)
    return llama3.whole(shares, weights, config.n_heads, dim=-3)


def label_of(token: bytes, has_glyph: Callable[[str], bool]) -> str:
    """A token as it can be drawn: spaces are dots; what the font lacks, or half a letter, hex."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        text = ""
        shown = "".join(f"\\x{byte:02x}" for byte in token)
    else:
        shown = text.replace(" ", "\u00b7")
    if not all(c.isprintable() and has_glyph(c) for c in shown):
        shown = text.encode("unicode_escape").decode()
    cut = PLOTTED_CHARACTERS - 1
    return shown if len(shown) <= PLOTTED_CHARACTERS else shown[:cut] + "\u2026"


def draw(
    path: str,
    tokenizer: tokenizer_setup.Tokenizer,
    tokens: Sequence[int],
    logprobs: torch.Tensor,
    shares: torch.Tensor,
    layer: int,
) -> None:
    """Draw the likeliest next tokens, logprobs [V], and attention, shares [n_heads, last, T].

    Raises UsageError if the file cannot be written.
    """
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))

    def label(token: int) -> str:
        token = tokenizer.decode_single_token_bytes(token)
        return label_of(token, lambda character: font.get_char_index(ord(character)) != 0)

    n_heads, last = shares.shape[:2]
    names = [label(token) for token in tokens[-last:]]
    widest = max(map(len, names))
    side = max(0.17 * last, 1.2) + 0.075 * widest + 0.35  # of a head's panel, in inches
    columns = next(c for c in range(1, n_heads + 1) if c * c * 2 >= n_heads * 3 or c == n_heads)
    rows = math.ceil(n_heads / columns)
    size = columns * side + 4.2, max(rows * side, 4.6)
    figure = Figure(size, dpi=min(100, math.sqrt(MOST_PIXELS / math.prod(size))))
    FigureCanvasAgg(figure)
    bars, heads = figure.subfigures(1, 2, width_ratios=[4.2, columns * side])

    axes = bars.subplots()
    top = logprobs[: tokenizer.n_vocab].float().exp().topk(min(15, tokenizer.n_vocab))
    chances = top.values.tolist()
    axes.barh(range(len(chances)), chances)
    axes.set_yticks(range(len(chances)), [label(token) for token in top.indices.tolist()])
    for i, chance in enumerate(chances):
        shown = f" {chance:.3f}" if chance >= 0.001 else f" {chance:.0e}"
        axes.text(chance, i, shown, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.2 * max(chances)), xlabel="probability", title="the next token")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    height = figure.get_figheight()
    bars.subplots_adjust(left=0.36, right=0.96, top=1 - 0.4 / height, bottom=1 - 3.4 / height)

    grid = heads.subplots(rows, columns, squeeze=False).flat
    for head, axes in enumerate(grid):
        if head >= n_heads:
            axes.axis("off")
            continue
        share = shares[head, :, -last:].float().cpu().numpy()
        image = axes.imshow(share, norm=PowerNorm(0.5, 0, 1), cmap="Blues")  # small ones show
        axes.set_xticks(range(last), names, rotation=90, fontsize=7)
        axes.set_yticks(range(last), names, fontsize=7)
        axes.tick_params(length=1.5, pad=1.5)
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
    scale = bars.add_axes((0.36, 1 - 4.15 / height, 0.6, 0.1 / height))
    bars.colorbar(image, cax=scale, orientation="horizontal", ticks=[0, 0.1, 0.5, 1])
    scale.set_title("share of attention", fontsize=8)
    scale.tick_params(labelsize=7, length=1.5)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign is one
    margin = (0.075 * widest + 0.15) / side
    heads.subplots_adjust(
        left=margin / columns,
        right=1 - 0.02 / columns,
        top=1 - 0.3 / (rows * side),
        bottom=margin / rows,
        wspace=margin * 1.35,
        hspace=margin * 1.35 + 0.2 / side,
    )
    try:
        figure.savefig(path, format="png")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"argument --plot: {path}: cannot be written: {problem}") from None
    note(f"drew {path}" + f", the last {last} tokens" * (last < len(tokens)))


def check_plot(args: argparse.Namespace, config: llama3.Config) -> None:
    """Raise UsageError if --plot cannot be drawn, as far as that can be told before."""
    os.environ["MPLBACKEND"] = "agg"  # whatever the user has for windows
    try:
        import matplotlib
    except ImportError:
        raise UsageError("argument --plot: it takes matplotlib; pip install matplotlib") from None
    matplotlib.rcdefaults()  # its fonts are those that labels are made for
    if (args.plot_layer or 0) >= config.n_layers:
        layers = f"found {args.plot_layer}, expected a layer from 0 to {config.n_layers - 1}"
        raise UsageError(f"argument --plot-layer: {layers}")
    if os.path.isdir(args.plot) or not os.path.isdir(os.path.dirname(args.plot) or "."):
        problem = "is a folder" if os.path.isdir(args.plot) else "there is no such folder"
        raise UsageError(f"argument --plot: {args.plot}: cannot be written: {problem}")


def plot(
    args: argparse.Namespace, model: Model, weights: llama3.Weights, tokens: Sequence[int]
) -> None:
    """Draw what --plot asks for, after a prompt of these tokens."""
    layer, last = args.plot_layer or 0, min(len(tokens), PLOTTED_TOKENS)
    room = len(tokens) + 1  # also where the prompt fills the context
    steps = steps_of([tokens], weights, model.config, max_new_tokens=1, max_seq_len=room)
    with contextlib.closing(steps):
        _, logprobs = next(steps)
    with computing("attention", tokens, layer, last):
        shares = attention_of(tokens, weights, model.config, layer, last)
    draw(args.plot, model.tokenizer, tokens, logprobs[0], shares, layer)


# --- completions ----------------------------------------------------------------------------------


def complete(args: argparse.Namespace) -> int:
    """Stream the completion of the prompt, or of several; returns the exit status."""
    start = time.perf_counter()
    prompts = read_prompts(args)
    model = opened(args)
    config, tokenizer, max_seq_len = model[:3]
    if args.plot is not None:
        check_plot(args, config)
    encoded = []
    for prompt in prompts:
        spelled = tokenizer_setup.special_tokens_in(tokenizer, prompt)
        if spelled:
            note(f"the prompt is plain text, in which {spelled[0]} is no special token")
        encoded.append(tokenizer_setup.encode(tokenizer, prompt))
        if not encoded[-1]:
            raise UsageError("the prompt is empty, and this model has no token that begins a text")
    n_prompt = max(map(len, encoded))
    check_room(n_prompt, args.max_new_tokens, max_seq_len, config)
    n_new = min(args.max_new_tokens, max_seq_len - n_prompt)
    weights = load_on_ranks(model, n_prompt, n_new, len(encoded))
    load_s = time.perf_counter() - start
    if args.plot is not None:
        plot(args, model, weights, encoded[0])

    all_steps = steps_of(
        encoded,
        weights,
        config,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling_of(args),
        stop_tokens=tokenizer_setup.stop_tokens(tokenizer),
        max_seq_len=max_seq_len,
        n_vocab=tokenizer.n_vocab,
        progress=bar("reading the prompt", "blocks", delay=2),
    )
    times = [time.perf_counter()]  # of the start, then of every token
    steps = timed(all_steps, times)
    if args.logprobs is not None:
        texts = as_json(tokenizer, steps, len(encoded), args.logprobs)
    elif len(encoded) > 1:
        texts = numbered(tokenizer, steps, len(encoded))
    else:
        texts = tokenizer_setup.decode_stream(tokenizer, (tokens.item() for tokens, _ in steps))
    try:
        with contextlib.closing(all_steps):
            stream(texts)
        status = 0
    except KeyboardInterrupt:  # what was written stays
        status = 130
    if args.stats:
        device = weights["norm.weight"].device
        say(json.dumps(slowest(stats_of(load_s, sum(map(len, encoded)), times, device))))
    return status


# --- scores ---------------------------------------------------------------------------------------


def windows(n_tokens: int, window: int) -> Iterator[tuple[int, int]]:
    """Where each window over so many tokens begins, and the first token that it scores.

    They overlap by half, so that every token has half a window before it, or all there is.
    """
    yield 0, 1
    stride = max(window - window // 2, 1)
    for begin in range(stride, n_tokens - window + stride, stride):
        yield begin, begin + window - stride


@torch.inference_mode()
def scored_tokens(
    tokens: Sequence[int],
    weights: llama3.Weights,
    config: llama3.Config,
    *,
    first: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> torch.Tensor:
    """The logarithms of the probabilities of tokens, each after all before it in the sequence.

    tokens [T] -> float32 [T - first], of tokens[first:]. Some positions at a time go by `progress`.
    """
    Limits(int, 1, 2**63 - 1).check("first", first)
    tokens = Limits(int, 0, config.vocab_size - 1).check_each("the text", tokens)
    tokens = torch.tensor(tokens, device=weights["norm.weight"].device)
    cache = llama3.new_cache(weights, config, len(tokens))
    rows = max(min(SCORED_LOGITS // config.vocab_size, llama3.PREFILL_TOKENS), 1)
    found = [torch.empty(0, device=tokens.device)]
    for i in progress(range(0, len(tokens) - 1, rows)):
        end = min(i + rows, len(tokens) - 1)
        positions = torch.arange(i, end, device=tokens.device)
        logits = llama3.forward(
            tokens[i:end], weights, config, positions=positions, cache=cache[..., :end, :]
        )
        chosen = logits.gather(1, tokens[i + 1 : end + 1, None])[:, 0]
        found.append(chosen - logits.logsumexp(-1))
    return torch.cat(found)[first - 1 :]


def score(args: argparse.Namespace) -> int:
    """Write how likely the model finds a text, or every line of one; returns the exit status."""
    start = time.perf_counter()
    text = from_file("--score", args.score, MAX_SCORED_BYTES)
    model = opened(args)
    config, tokenizer, max_seq_len = model[:3]
    if max_seq_len < 2:
        raise UsageError("--max-seq-len 1: a score needs a context of 2 tokens at least")
    documents = text.removesuffix("\n").split("\n") if args.by_line else [text]
    if args.by_line:
        documents = [line.removesuffix("\r") for line in documents]
    encoded = [tokenizer_setup.encode(tokenizer, document) for document in documents]
    longest = max(map(len, encoded), default=0)
    if longest > max_seq_len:
        overlap = f"{max_seq_len} that overlap by {max_seq_len // 2}"
        note(f"texts of up to {longest} tokens are read in windows of {overlap}")
    weights = load_on_ranks(model, min(longest, max_seq_len), 0)
    load_s = time.perf_counter() - start
    total = sum(max(len(tokens) - 1, 0) for tokens in encoded)
    progress = tqdm(total=total, desc="scoring", unit=" tokens", leave=False, disable=None)

    def counted(positions: Iterable[int]) -> Iterator[int]:
        before = 0
        for position in positions:
            progress.update(position - before)
            before = position
            yield position

    def lines() -> Iterator[str]:
        for document, tokens in zip(documents, encoded, strict=True):
            nll, n = 0.0, max(len(tokens) - 1, 0)
            for begin, first in windows(len(tokens), max_seq_len) if n else ():
                window = tokens[begin : begin + max_seq_len]
                done = progress.n
                with computing("score", window, first - begin):
                    scored = scored_tokens(
                        window, weights, config, first=first - begin, progress=counted
                    )
                if not scored.isfinite().all():
                    raise FloatingPointError("the scores are not finite numbers")
                nll -= scored.double().sum().item()
                progress.update(done + len(scored) - progress.n)
            size = len(document.encode(errors="replace"))
            if not tokenizer.format.begin:  # then the first token is not scored
                size = sum(len(tokenizer.decode_single_token_bytes(t)) for t in tokens[1:])
            line = {"tokens": n, "nll": round(nll, 4)}
            line["perplexity"] = float(f"{math.exp(min(nll / n, 700)):.6g}") if n else None
            line["bits_per_byte"] = float(f"{nll / math.log(2) / size:.6g}") if n and size else None
            yield json.dumps(line) + "\n"

    begin = time.perf_counter()
    try:
        stream(lines())
        status = 0
    except KeyboardInterrupt:  # what was written stays
        status = 130
    finally:
        progress.close()
    if args.stats:
        stats = {"load_s": round(load_s, 4), "tokens": total}
        stats["score_s"] = round(time.perf_counter() - begin, 4)
        say(json.dumps(slowest(stats | {"peak_rss_bytes": peak_rss_bytes()})))
    return status


# --- chat -----------------------------------------------------------------------------------------

HELP = """\
/reset            begin anew, with the same system message
/system TEXT      begin anew with this system message; without a text, with none
/save FILE        write the conversation as JSON
/load FILE        go on with one that was saved
/help             this
/exit             end, as Ctrl-D does
A backslash at the end of a line goes on with the next one. Ctrl-C stops an answer."""


COMMAND = re.compile(r"/[a-z]+(\s|$)")  # and not a path


class Chat:
    """A conversation: its messages, and the context of what the model has read of it."""

    def __init__(self, args: argparse.Namespace, model: Model, weights: llama3.Weights) -> None:
        self.args, self.model, self.weights = args, model, weights
        self.context = llama3.Context()
        self.times: list[float] = []  # of every token
        self.system = args.system
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[dict[str, object]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def fitting(self, messages: list[dict[str, object]]) -> tuple[list[int], int]:
        """The tokens of a dialog without its oldest turns, if it is too long; how many those are.

        Takes them out of `messages`. Raises UsageError if the last message alone is too long.
        """
        tokenizer, max_seq_len = self.model.tokenizer, self.model.max_seq_len
        most = max_seq_len - min(self.args.max_new_tokens, max(max_seq_len // 4, 1))
        first = 1 if messages[0]["role"] == "system" else 0
        dropped = 0
        while True:
            tokens = tokenizer_setup.encode_dialog(tokenizer, messages)
            users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > first]
            # Once some must go, as many as leave room for a while: each time all is read anew.
            if len(tokens) <= (most if not (dropped and users) else max_seq_len // 2):
                return tokens, dropped
            if not users:
                problem = f"the message makes {len(tokens)} tokens, and the context has room for"
                raise UsageError(f"{problem} {most} and an answer; shorten it")
            del messages[first : users[0]]
            dropped += 1

    def answer(self, text: str) -> Iterator[str]:
        """Answer a message, piece by piece; what there is of the answer joins the conversation.

        Raises UsageError if there is no room for it; then the message does not join.
        """
        tokenizer = self.model.tokenizer
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, dropped = self.fitting(messages)
        self.messages = messages
        if dropped:
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            note(f"the context is full: {turns} dropped")
        stop, message, pieces = tokenizer_setup.stop_tokens(tokenizer), {"role": "assistant"}, []
        special, ended = tokenizer.format.special_tokens, []
        steps = steps_of(
            [prompt],
            self.weights,
            self.model.config,
            max_new_tokens=self.args.max_new_tokens,
            sampling=sampling_of(self.args),
            max_seq_len=self.model.max_seq_len,
            n_vocab=tokenizer.n_vocab,
            context=self.context,
            progress=bar("reading", "blocks", delay=2),
        )

        def tokens() -> Iterator[int]:
            for n, (chosen, _) in enumerate(timed(steps, self.times)):
                token = chosen.item()
                if n == 0 and token == special.get("<|python_tag|>"):
                    message["python_tag"] = True
                if token == special.get("<|eom_id|>"):  # the call of a tool, whose result is next
                    message["stop_reason"] = "end_of_message"
                if token in stop:
                    ended.append(token)
                    return
                yield token

        try:
            for piece in tokenizer_setup.decode_stream(tokenizer, tokens()):
                pieces.append(piece)
                yield piece
            if not ended:
                note("the answer was cut off: --max-new-tokens or the context is used up")
        finally:
            steps.close()
            content = "".join(pieces)
            if message.get("python_tag"):
                content = content.removeprefix("<|python_tag|>")
            if pieces or ended:
                self.messages.append(message | {"content": content})
            else:  # stopped before there was anything
                self.messages.pop()

    def command(self, line: str) -> bool:
        """Obey a line that begins with "/"; whether to go on. Raises UsageError."""
        name, rest = (*line.split(maxsplit=1), "")[:2]
        file = Path(os.path.expanduser(rest))
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            for text in HELP.splitlines():
                say(text)
        elif name in ("/reset", "/system"):
            if name == "/system":
                self.system = rest or None
            self.reset()
            note("a new conversation")
        elif name in ("/save", "/load") and not rest:
            raise UsageError(f"{name} needs the name of a file")
        elif name == "/save":
            self.save(file)
        elif name == "/load":
            self.load(file)
        else:
            raise UsageError(f"{one_line(name, 40)} is no command; /help lists them")
        return True

    def save(self, path: Path) -> None:
        text = json.dumps(self.messages, ensure_ascii=False, indent=1)
        try:
            path.write_text(text + "\n", encoding="utf-8", errors="replace")
        except (OSError, ValueError) as error:  # of a name with a NUL
            problem = getattr(error, "strerror", None) or one_line(error)
            raise UsageError(f"{path}: cannot be written: {problem}") from None
        note(f"{len(self.messages)} messages are in {path}")

    def load(self, path: Path) -> None:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never end
            raise UsageError(f"{path}: cannot be read: it is no regular file")
        text = from_file("/load", f"./{path}" if str(path) == "-" else str(path), MAX_PROMPT_BYTES)
        try:
            messages = tokenizer_setup.check_messages(json.loads(text))
        except (ValueError, RecursionError) as error:
            problem = f"{path}: found no conversation: {one_line(error)}"
            raise UsageError(problem) from None
        self.messages = [dict(message) for message in messages]
        first = self.messages[0] if self.messages else {}
        self.system = first["content"] if first.get("role") == "system" else None
        note(f"{len(self.messages)} messages from {path}")


def typed_lines() -> Iterator[str]:
    """Messages from the terminal, with editing and a history; Ctrl-C takes a line back."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    lines = []
    while True:
        try:
            line = input("... " if lines else "> ")
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print(flush=True)
            lines = []
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(lines)
            lines = []


def piped_lines() -> Iterator[str]:
    """Messages from a pipe, one a line."""
    if sys.stdin is None:
        raise UsageError("standard input is closed, so there is nothing to read from")
    source = getattr(sys.stdin, "buffer", sys.stdin)
    for number in itertools.count(1):
        line = source.readline(MAX_PROMPT_BYTES + 1)
        origin = f"standard input, line {number}"
        if not line:
            return
        if len(line) > MAX_PROMPT_BYTES:
            raise UsageError(f"{origin}: found more than {MAX_PROMPT_BYTES} bytes")
        line = line if isinstance(line, str) else _decode(line, origin)
        yield line.removeprefix("\ufeff").rstrip("\r\n")


def converse(chat: Chat) -> int:
    """Talk until the input ends; returns the exit status, 2 if a line of a pipe had no answer."""
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        note("/help lists the commands; Ctrl-D ends")
    status = 0
    for line in typed_lines() if terminal else piped_lines():
        if not line.strip():
            continue
        command, read = COMMAND.match(line), True
        try:
            if command:
                if not chat.command(line.strip()):
                    break
            elif terminal:
                stream(chat.answer(line))
            else:
                read = stream([" ".join("".join(chat.answer(line)).splitlines()) + "\n"])
        except KeyboardInterrupt:  # what was written stays, and on a terminal the conversation
            if not terminal or OutOfStep.now:
                raise
        except OutputError:
            raise
        except (UsageError, FloatingPointError, RuntimeError, MemoryError) as error:
            if OutOfStep.now or (isinstance(error, RuntimeError) and not out_of_memory(error)):
                raise
            note(error)
            if not (terminal or command):  # the answers stay in line with the turns
                status, read = 2, stream(["\n"])
        if not read:
            break
    return status


def talk(args: argparse.Namespace) -> int:
    """Answer the prompt in the instruct format, or hold a conversation; returns the exit status."""
    start = time.perf_counter()
    prompts = read_prompts(args) if args.prompt or args.prompt_file else []
    model = opened(args)
    if model.tokenizer.format.dialog is None:
        raise UsageError("argument --chat: no dialog format is known for this model's tokenizer")
    first = [{"role": "system", "content": args.system}] if args.system is not None else []
    first += [{"role": "user", "content": prompt} for prompt in prompts]
    n_prompt = len(tokenizer_setup.encode_dialog(model.tokenizer, first))
    room = max(model.max_seq_len - n_prompt, 1)
    n_new = min(args.max_new_tokens, room) if prompts else room
    chat = Chat(args, model, load_on_ranks(model, min(n_prompt, model.max_seq_len), n_new))
    load_s, status = time.perf_counter() - start, 0
    if not prompts:
        status = converse(chat)
        stats = {"load_s": round(load_s, 4), "decode_tokens": len(chat.times)}
        if args.stats:
            say(json.dumps(slowest(stats | {"peak_rss_bytes": peak_rss_bytes()})))
        return status
    chat.times.append(time.perf_counter())
    try:
        stream(chat.answer(prompts[0]))
    except KeyboardInterrupt:  # what was written stays
        status = 130
    if args.stats:
        device = chat.weights["norm.weight"].device
        say(json.dumps(slowest(stats_of(load_s, n_prompt, chat.times, device))))
    return status


# --- as another rank than 0 -----------------------------------------------------------------------


class Follower:
    """What another rank than 0 does: each method is something that rank 0 may say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.context = args, llama3.Context()
        self.load_s, self.times = 0.0, [time.perf_counter()]

    def load(self, *sizes: int) -> None:
        start = time.perf_counter()
        with contextlib.suppress(UsageError), together():  # of which rank 0 tells
            self.model = opened(self.args)
            self.weights = self.model.load(*sizes)
        self.load_s = time.perf_counter() - start

    def steps(self, prompts: list[list[int]], keep: bool, options: dict[str, object]) -> None:
        context = self.context if keep else None
        config = self.model.config
        steps = llama3.steps(prompts, self.weights, config, context=context, **options)
        self.times = [time.perf_counter()]
        steps = timed(steps, self.times)
        try:
            while tell() and next(steps, None) is not None:
                pass
        except FloatingPointError as error:
            gathered(str(error))

    def score(self, tokens: list[int], first: int) -> None:
        scored_tokens(tokens, self.weights, self.model.config, first=first)

    def attention(self, tokens: list[int], layer: int, last: int) -> None:
        attention_of(tokens, self.weights, self.model.config, layer, last)

    def stats(self) -> None:
        device = self.weights["norm.weight"].device
        gathered(stats_of(self.load_s, 0, self.times, device))


def follow(args: argparse.Namespace) -> int:
    """Do what rank 0 says, until it has no more to say; returns the exit status."""
    follower = Follower(args)
    for what, *arguments in iter(tell, None):
        getattr(follower, what)(*arguments)
    return 0


# --- what is asked for ----------------------------------------------------------------------------


def lead(args: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    if args.chat:
        return talk(args)
    return complete(args) if args.score is None else score(args)


def run(argv: Sequence[str] | None) -> int:
    """Lead the ranks, or follow; returns the exit status. Raises CheckpointError, UsageError."""
    meet()
    if this_rank() > 0:
        args = None
        with contextlib.suppress(UsageError):  # of which rank 0 tells, and then that is all
            args = parse_arguments(argv)
        return follow(args)
    try:
        args = parse_arguments(argv)
        if sys.stdout is None:
            raise UsageError("standard output is closed, so there is nowhere to write to")
        return lead(args)
    finally:
        with contextlib.suppress(RuntimeError):
            tell(None)  # that is all


def status_of(argv: Sequence[str] | None, rank: int, voice: TextIO) -> int:
    """Run, and say in one line what went wrong; returns the exit status."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(message)
            return run(argv)
    except (CheckpointError, UsageError, FloatingPointError) as error:
        note(f"error: {error}")
        return 2
    except (RuntimeError, MemoryError, OSError) as error:
        if lost_connection(error):
            note(f"another rank has ended ({one_line(error, limit=100)})")
            return 2
        sys.stderr = voice  # this rank is the first to know
        if not out_of_memory(error):
            raise
        where = f"rank {rank}: " * (n_ranks() > 1)
        reason = f"memory ran out ({one_line(error)}); use a shorter prompt or a smaller model"
        note(f"error: {where}{reason}")
        return 2
    except KeyboardInterrupt:
        exec("")  # in which Python forgets that an import was interrupted, and obeys the status
        return 130
    except Exception:
        sys.stderr = voice
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 if the input was bad."""
    if sys.stderr is None:  # closed: no file that is opened from here on may take its place
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    rank, voice = in_environment("RANK", 0), sys.stderr
    if rank > 0 and in_environment("WORLD_SIZE", 1) > 1:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = status_of(argv, rank, voice)
    except BaseException as error:
        if n_ranks() == 1:
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc(file=voice)
    if n_ranks() > 1:  # the others may be in a computation that never ends, and are left at once
        for out in (sys.stdout, voice):
            with contextlib.suppress(OSError, ValueError):
                out.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
