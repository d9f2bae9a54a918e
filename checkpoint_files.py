"""The files of a checkpoint: where they are, what is in them, and what to say when it is not right.

Nothing in here needs PyTorch. What another file finds wrong with a checkpoint is raised as the
CheckpointError defined here, so that one `except` serves a whole folder.
"""

import json
import numbers
import os
from pathlib import Path
from typing import NamedTuple


class CheckpointError(ValueError):
    """A file of a checkpoint is missing or not usable: `path`, and what is the problem with it.

    The message is one line: where, what was found, what is needed, what to do.
    """

    def __init__(self, path: str | os.PathLike, problem: str) -> None:
        super().__init__(path, problem)

    def __str__(self) -> str:
        path, problem = self.args
        return f"{path}: {problem}"


def one_line(text: object, limit: int = 200) -> str:
    """Any text, such as an error's, on one line, shortened; the type's name if it has no text."""
    line = " ".join(str(text).split()) or type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def describe_file(head: bytes) -> str:
    """What a file that begins with `head` looks like: one of the usual mix-ups, or ""."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (fetch the file itself with 'git lfs pull')"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (the download failed or needs a login)"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, such as a PyTorch checkpoint"
    if head.startswith(b"\n") and b"<unk>" in head[:64]:
        return "a sentencepiece model, as Llama 1 and 2 have it"
    if head.startswith(b"\x80"):
        return "a Python pickle"
    return ""


def find_file(ckpt_dir: str | os.PathLike, name: str) -> Path:
    """The path of the file `name` in the folder `ckpt_dir`.

    Raises CheckpointError, which says what is there instead.
    """
    folder = Path(ckpt_dir)
    if os.path.isfile(folder / name):
        return folder / name
    found = f"has no {name}" if os.path.isdir(folder) else "no such folder"
    if os.path.isfile(folder / "original" / name):
        found += " (but its folder 'original' has: use that one)"
    elif os.path.isfile(folder / "config.json"):
        found += " (it is a Hugging Face checkpoint)"
    needed = "a folder with Meta's params.json, consolidated.00.pth and tokenizer.model"
    raise CheckpointError(folder, f"{found}; needed is {needed}")


def read_file(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, by default all of them. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object that a file holds. Raises CheckpointError if it holds anything else."""
    content = read_file(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        found = describe_file(content) or f"no JSON: {one_line(error)}"
        raise CheckpointError(path, f"found {found}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"found a JSON {type(value).__name__}, expected an object")
    return value


class Limits(NamedTuple):
    """Which values a setting may have; as text, for messages: "a whole number from 1 to 9"."""

    kind: type  # int, float or bool
    low: float
    high: float

    def allow(self, value: object) -> bool:
        """Whether `value` is of this kind and within the limits; a whole number is a float too."""
        if self.kind is bool or isinstance(value, bool):
            return type(value) is self.kind
        number = numbers.Integral if self.kind is int else numbers.Real
        return isinstance(value, number) and self.low <= value <= self.high

    def __str__(self) -> str:
        noun = {int: "a whole number", float: "a number", bool: "a boolean"}[self.kind]
        return f"{noun} from {json.dumps(self.low)} to {json.dumps(self.high)}"
