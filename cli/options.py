"""The options of `python llama3.py`, and the texts that they bring."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import llama3
from cli import ranks
from cli.messages import UsageError
from formats.errors import one_line

MAX_PROMPT_BYTES = 2**26  # more than any context holds, and not more than is quickly read
MAX_SCORED_BYTES = 2**30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith(": expected one argument"):
            option = message.split()[1].rstrip(":")
            message += f'; write values that begin with "-" as {option}="-..."'
        raise UsageError(message)


def number(kind: type[float], low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: an int or a float from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            found = f"found {one_line(repr(text), 40)}"
            raise argparse.ArgumentTypeError(f"{found}, expected {noun} from {low} to {high}")
        return value

    return parse


def text_value(text: str) -> str:
    """A type for argparse: text in UTF-8, whatever the locale is."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError("found bytes that are not UTF-8, expected text") from None


HELP = {
    "--prompt": "text to continue; several go through as one batch, and are numbered",
    "--prompt-file": "file with the text to continue (- for stdin); may be given several times",
    "--score": "score a text file (- for stdin) instead of continuing it: its perplexity, as JSON",
    "--by-line": "with --score: every line is a text",
    "--special": "names of special tokens in the prompt are those tokens, not their characters",
    "--chat": "use the Instruct dialog format; without a prompt, start a conversation",
    "--system": "with --chat: system message",
    "--ckpt-dir": "folder with Meta's files, a Hugging Face folder, or a GGUF file",
    "--tokenizer": "another tokenizer.model (default: the model's own)",
    "--max-seq-len": "tokens in the context (default: as many as the model was trained with)",
    "--max-new-tokens": "maximum number of new tokens (default: 128, with --chat 1024)",
    "--temperature": "0 always takes the likeliest token, more is more random (default: 0)",
    "--top-k": "sample from the K likeliest tokens (default: 0, all)",
    "--top-p": "sample from the likeliest tokens whose probabilities sum to P (default: 1)",
    "--min-p": "sample from tokens at least P times as likely as the likeliest (default: 0)",
    "--repetition-penalty": "above 1, tokens that already occurred become less likely (default: 1)",
    "--seed": "make the random choices repeatable (default: new ones every time)",
    "--logprobs": "write JSON, a line for each new token, with the K likeliest ones",
    "--plot": "draw the likeliest next tokens, and the attention patterns of a layer's heads",
    "--plot-layer": "the layer whose heads --plot draws (default: 0, the first)",
    "--stats": "end with a line of JSON on standard error",
    "--device": "cuda, cuda:N, mps or cpu; auto, the default, takes the first that is there",
    "--dtype": "dtype to compute in (default: the weights')",
    "--quantize": "make weights smaller as they are loaded: 8.5 or 4.5 bits each",
    "--compile": "build the step of one token for this machine, which is then kept (default: on a "
    "CPU, for more than half a gigabyte of weights)",
    "--threads": "CPU threads to compute with (default: one a core)",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all options, in groups."""
    parser = _Parser(
        prog="llama3.py",
        description="Continue a text with a Llama 3 model. The completion goes to standard output, "
        "everything else to standard error.",
        epilog="Without --ckpt-dir: the folder that the environment variable LLAMA3_CKPT_DIR "
        "names, else Meta-Llama-3-8B in the current folder, else the small bundled demo.",
        allow_abbrev=False,
    )
    at_least_1, share, flag = number(int, 1, 2**24), number(float, 0, 1), {"action": "store_true"}
    text = parser.add_argument_group("text")
    what = text.add_mutually_exclusive_group()
    model, sampling, output, machine = map(
        parser.add_argument_group, ("model", "sampling", "output", "machine")
    )

    def add(group: argparse._ActionsContainer, name: str, metavar: str = "", **more: Any) -> None:
        more |= {"metavar": metavar} if metavar else {}
        group.add_argument(name, help=HELP[name], **more)

    add(what, "--prompt", "TEXT", action="append", type=text_value)
    add(what, "--prompt-file", "FILE", action="append")
    add(what, "--score", "FILE")
    add(text, "--by-line", **flag)
    add(text, "--special", **flag)
    add(text, "--chat", **flag)
    add(text, "--system", "TEXT", type=text_value)
    add(model, "--ckpt-dir", "DIR", type=Path)
    add(model, "--tokenizer", "FILE")
    add(model, "--max-seq-len", "N", type=at_least_1)
    add(sampling, "--max-new-tokens", "N", type=at_least_1)
    add(sampling, "--temperature", "X", type=number(float, 0, 10**6), default=0.0)
    add(sampling, "--top-k", "K", type=number(int, 0, 2**24), default=0)
    add(sampling, "--top-p", "P", type=share, default=1.0)
    add(sampling, "--min-p", "P", type=share, default=0.0)
    add(sampling, "--repetition-penalty", "X", type=number(float, 0.01, 100), default=1.0)
    add(sampling, "--seed", "N", type=number(int, 0, 2**63 - 1))
    add(output, "--logprobs", "K", type=number(int, 0, 1000))
    add(output, "--plot", "FILE.png")
    add(output, "--plot-layer", "N", type=number(int, 0, 4096))
    add(output, "--stats", **flag)
    add(machine, "--device", "NAME", default="auto")
    add(machine, "--dtype", choices=llama3.DTYPES)
    add(machine, "--quantize", choices=("Q8_0", "Q4_0"))
    add(machine, "--compile", action=argparse.BooleanOptionalAction)
    add(machine, "--threads", "N", type=number(int, 1, 1024))
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and check which go together. Raises UsageError."""
    parser = make_parser()
    args = parser.parse_args(argv)
    texts = args.prompt or args.prompt_file or ()
    if not (texts or args.chat) and args.score is None:
        parser.error("one of the arguments --prompt --prompt-file --score --chat is required")
    if (args.prompt_file or []).count("-") > 1:
        parser.error("argument --prompt-file: standard input can be used only once")
    values = {name: getattr(args, name[2:].replace("-", "_")) for name in HELP}
    given = {name: value is not None and value is not False for name, value in values.items()}
    given["several prompts"] = len(texts) > 1
    for option, *others in (
        ("--special", "--chat", "--score"),
        ("--chat", "--score", "several prompts", "--logprobs"),
        ("--score", "--logprobs"),
        ("--plot", "--chat", "--score", "several prompts"),
    ):
        for other in others:
            if given[option] and given[other]:
                parser.error(f"argument {option}: not allowed with {other}")
    needs = {"--system": "--chat", "--by-line": "--score", "--plot-layer": "--plot"}
    for option, needed in needs.items():
        if given[option] and not given[needed]:
            parser.error(f"argument {option}: only valid with {needed}")
    if given["--plot"] and not args.plot.lower().endswith(".png"):
        found = one_line(repr(args.plot), 60)
        parser.error(f"argument --plot: found {found}, expected the name of a .png file")
    args.max_new_tokens = args.max_new_tokens or (1024 if args.chat else 128)
    return args


def decode(content: bytes, origin: str) -> str:
    """UTF-8 as text. Raises UsageError, which says where a byte is that is not."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"the byte 0x{content[error.start]:02x} at position {error.start}"
        found += ", as UTF-16 has it" * content.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise UsageError(f"{origin}: found {found}, expected text in UTF-8") from None


def from_file(option: str, path: str, limit: int, pipes: bool = True) -> str:
    """The text in a file of at most `limit` bytes; "-" is standard input. Raises UsageError."""
    origin = f"argument {option}: {'standard input' if path == '-' else path}"
    if path == "-" and sys.stdin is None:
        raise UsageError("standard input is closed, so there is nothing to read from")
    stdin = nullcontext(getattr(sys.stdin, "buffer", sys.stdin))  # a notebook's has no buffer
    try:
        if not pipes and os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is not a regular file")  # it may never end
        with stdin if path == "-" else open(path, "rb") as file:
            content = file.read(limit + 1)
            content = content if isinstance(content, bytes) else content.encode()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"{origin}: cannot be read: {problem}") from None
    if len(content) > limit:
        advice = "cut it in parts" if option == "--score" else "no context holds as many"
        raise UsageError(f"{origin}: found more than {limit} bytes; {advice}")
    return decode(content.removeprefix(b"\xef\xbb\xbf"), origin)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts of --prompt or --prompt-file. Raises UsageError if one is none."""
    if args.prompt is not None:
        return args.prompt

    def read() -> list[str]:
        texts = [from_file("--prompt-file", path, MAX_PROMPT_BYTES) for path in args.prompt_file]
        return [t.removesuffix("\n").removesuffix("\r") if t.endswith("\n") else t for t in texts]

    return ranks.agreed(read)
