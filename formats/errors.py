"""Messages about files that are not what they should be: one line, and the true reason."""

import errno
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from llama3 import CheckpointError

# How a control character is shown on a terminal, which would obey it: all but line break and tab.
CONTROL_CHARACTERS = {
    code: repr(chr(code))[1:-1]
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}


def one_line(text: object, limit: int = 200) -> str:
    """Collapse text to one line and shorten it; an error without a text is named by its type."""
    line = " ".join(str(text).split())
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def quoted(value: object, limit: int = 40) -> str:
    """A value from a file as JSON has it, shortened."""
    return one_line(json.dumps(value, default=repr), limit)


def refuse(path: Path, key: str, value: object, expected: str) -> NoReturn:
    """Raise the CheckpointError for a value that is not computed here."""
    problem = f'"{key}" is {quoted(value, 80)}, which is not computed here; expected {expected}'
    raise CheckpointError(path, problem)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that there was not enough memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    texts = r"cannot allocate memory|can't allocate memory|not enough memory|out of memory"
    return isinstance(error, RuntimeError) and bool(re.search(texts, str(error), re.IGNORECASE))


def describe_file(head: bytes) -> str:
    """Return what a file that begins with `head` looks like: one of the usual mix-ups, or ""."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    sentencepiece = head.startswith(b"\n") and b"<unk>" in head[:64]
    lfs, page = b"version https://git-lfs", (b"<!doctype", b"<html", b"<?xml")
    looks = {
        "an empty file": not head,
        "a Git LFS pointer (fetch the file itself with 'git lfs pull')": text.startswith(lfs),
        "a web page (the download failed or needs a login)": text.startswith(page),
        "a zip archive, such as a PyTorch checkpoint": head.startswith(b"PK\x03\x04"),
        "a GGUF file": head.startswith(b"GGUF"),
        "a safetensors file": head[8:10] == b'{"' and head[6:8] == b"\0\0",
        "a compressed file (unpack it first)": head.startswith((b"\x1f\x8b", b"BZh")),
        "a sentencepiece model, as Llama 1 and 2 have it": sentencepiece,
        "JSON, such as a Hugging Face tokenizer.json": text.startswith(b"{"),
        "a Python pickle": head.startswith(b"\x80"),
    }
    return next((kind for kind, true in looks.items() if true), "")


def read_file(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, by default all of them. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None


def read_json_object(path: Path, limit: int = 2**22) -> dict[str, object]:
    """The JSON object in a file of at most `limit` bytes. Raises CheckpointError."""
    content = read_file(path, limit + 1)
    if len(content) > limit:
        raise CheckpointError(path, f"found more than {limit} bytes, expected a JSON object")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        looks = "" if content.lstrip()[:1] == b"{" else describe_file(content[:4096])
        found = looks or f"no JSON: {one_line(error)}"
        raise CheckpointError(path, f"found {found}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"found a JSON {type(value).__name__}, expected an object")
    return value


def find_file(folder: Path, name: str) -> Path:
    """The path of a file in a folder of Meta's. CheckpointError says what is there instead."""
    if os.path.isfile(folder / name):
        return folder / name
    found = f"has no {name}" if os.path.isdir(folder) else "no such folder"
    if os.path.lexists(folder / name):
        found = f"its {name} is not a regular file"
    if os.path.isfile(folder / "original" / name):
        found += " (but its folder 'original' has: use that one)"
    expected = (
        "a folder with Meta's params.json, consolidated.00.pth and tokenizer.model, or config.json"
    )
    raise CheckpointError(folder, f"{found}; expected {expected}")


def give_up(out: TextIO) -> None:
    """Discard what a stream has buffered, which Python would write once more when it ends."""
    with suppress(OSError, AttributeError):  # no stream of the system's: a notebook's
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def say(line: str) -> None:
    """Write a line to standard error, if there is one."""
    try:
        if sys.stderr is not None:  # or print would take standard output
            print(line.translate(CONTROL_CHARACTERS), file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)
