"""The files of a checkpoint: where they are, what is in them, and what to say when it is not right.

Nothing in here needs PyTorch. What another file finds wrong with a checkpoint is raised as the
CheckpointError defined here, so that one `except` serves a whole folder. Limits are for numbers
from anywhere: from params.json, from options, from arguments.
"""

import ctypes
import errno
import functools
import json
import math
import mmap
import numbers
import os
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

DOWNLOAD_AGAIN = "download it again"


class CheckpointError(ValueError):
    """A file of a checkpoint, `path`, is missing or not usable.

    The message is one line: where, what was found, what is needed, what to do.
    """

    def __init__(self, path: str | os.PathLike, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def one_line(text: object, limit: int = 200) -> str:
    """Any text, such as an error's, on one line, shortened; an error's type if it has no text."""
    line = " ".join(str(text).split())
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def quoted(value: object, limit: int = 40) -> str:
    """A value from a file as JSON has it, shortened."""
    try:
        return one_line(json.dumps(value), limit)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


# --- what is said ---------------------------------------------------------------------------------

# How a control character is shown on a terminal, which would obey it: all but line break and tab.
CONTROL_CHARACTERS = {
    code: repr(chr(code))[1:-1]
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}


def give_up(out: TextIO) -> None:
    """Let what a stream still holds, and what is still written to it, go nowhere.

    Python writes it once more when it ends, and would complain once more.
    """
    with suppress(OSError, AttributeError):  # no stream of the system's: a notebook's
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def say(line: str) -> None:
    """Write a line to standard error, if there is one."""
    try:
        if sys.stderr is not None:  # or print would take standard output
            print(line.translate(CONTROL_CHARACTERS), file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


# --- what a file looks like -----------------------------------------------------------------------


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
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head[8:10] == b'{"' and head[6:8] == b"\0\0":
        return "a safetensors file"
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"(\xb5/\xfd", b"7z\xbc\xaf")):
        return "a compressed file (unpack it first)"
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    if head.startswith(b"\n") and b"<unk>" in head[:64]:
        return "a sentencepiece model, as Llama 1 and 2 have it"
    if head.startswith(b"\x80"):
        return "a Python pickle"
    return ""


def describe_weights(content: object) -> str:
    """What else a checkpoint file held than the weights of a text model, or "".

    With what was expected, and what to do. A dictionary is judged by the names in it.
    """
    expected = "expected a dictionary of tensors"
    if not isinstance(content, dict):
        return f"a {type(content).__name__}, {expected}"
    expected += " under Meta's names"
    metas = "tok_embeddings.weight"
    names = [name for name in content if isinstance(name, str)]
    kinds = [
        (r"vision_|text_model\.|cross_attention", "a vision checkpoint", "use a text model"),
        (r"lora_", "LoRA weights", "merge them into their model first"),
        (
            r"embed_tokens|self_attn|lm_head|\bmlp\.|transformer\.h\.",
            "the names of a Hugging Face checkpoint",
            "use the files in the folder 'original' of Meta's download",
        ),
        (rf".+\b{re.escape(metas)}$", "names with a prefix", "save the weights without it"),
    ]
    for pattern, kind, todo in kinds:
        for name in names:
            if re.search(pattern, name):
                return f"{kind} ({one_line(name, 80)}); {expected}; {todo}"
    for name, value in content.items():
        if metas not in content and isinstance(value, dict):
            return f"a dictionary in a dictionary, as {quoted(name)}; {expected}; save it alone"
    return ""


# --- finding and reading --------------------------------------------------------------------------


def find_file(ckpt_dir: str | os.PathLike, name: str) -> Path:
    """The path of the file `name` in the folder `ckpt_dir`.

    Raises CheckpointError, which says what is there instead.
    """
    folder = Path(ckpt_dir)
    if os.path.isfile(folder / name):
        return folder / name
    if os.path.isfile(folder):
        found = "is a file"
    elif os.path.lexists(folder / name) and os.path.isdir(folder):
        kind = "a folder" if os.path.isdir(folder / name) else "no regular file"
        found = f"its {name} is {kind}"
        if os.path.islink(folder / name) and not os.path.exists(folder / name):
            found = f"its {name} is a link to a file that is not there"
    else:
        found = f"has no {name}" if os.path.isdir(folder) else "no such folder"
    if os.path.isfile(folder / "original" / name):
        found += " (but its folder 'original' has: use that one)"
    elif os.path.isfile(folder / "config.json"):
        found += " (it is a Hugging Face checkpoint)"
    needed = "a folder with Meta's params.json, consolidated.00.pth and tokenizer.model"
    raise CheckpointError(folder, f"{found}; needed is {needed}")


def find_weights(ckpt_dir: str | os.PathLike) -> list[Path]:
    """The paths of consolidated.00.pth, consolidated.01.pth, ... in the folder `ckpt_dir`.

    Raises CheckpointError if one is missing in between. Other names, such as
    "consolidated.00 (1).pth", are of no consequence.
    """
    folder = Path(ckpt_dir)
    names = (
        {file.name for file in folder.glob("consolidated.*.pth")}
        if os.path.isdir(folder)
        else set()
    )
    names = {name for name in names if re.fullmatch(r"consolidated\.\d\d\.pth", name)}
    if not names:
        find_file(folder, "consolidated.00.pth")  # raises
    wanted = [f"consolidated.{number:02}.pth" for number in range(len(names))]
    missing = sorted(set(wanted) - names)
    if missing:
        problem = f"{missing[0]} is missing, but there is {max(names)}"
        raise CheckpointError(folder, f"{problem}; expected all files of the model, from 00 on")
    return [find_file(folder, name) for name in wanted]


def read_file(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, by default all of them. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None


def read_json_object(path: Path, limit: int = 2**24) -> dict[str, object]:
    """The JSON object that a file of at most `limit` bytes holds. Raises CheckpointError."""
    content = read_file(path, limit + 1)
    if len(content) > limit:
        problem = f"found more than {limit} bytes; expected a JSON object of a few hundred"
        raise CheckpointError(path, problem)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        found = describe_file(content) or f"no JSON: {one_line(error)}"
        raise CheckpointError(path, f"found {found}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"found a JSON {type(value).__name__}, expected an object")
    return value


# --- GGUF -----------------------------------------------------------------------------------------

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is not left to the gguf package:
# counts and lengths in it may be anything, and that package keeps two arrays for each of its texts,
# which may be a million.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


MOST_VALUES = 2**22  # in a list, or bytes in a text: a vocabulary has half a million merges


class _Header:
    """A place in the bytes of a GGUF file, from where values are read one after the other."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 0

    def skip(self, size: int) -> int:
        """Go on by so many bytes; returns where they begin. Raises CheckpointError at the end."""
        if size > len(self.content) - self.at:
            end = f"it ends before its header does, after {len(self.content)} bytes"
            raise CheckpointError(self.path, f"not a whole GGUF file: {end}; download it again")
        self.at += size
        return self.at - size

    def check_count(self, count: int) -> None:
        if count > MOST_VALUES:
            self.skip(count)  # this is the usual reason
            problem = f"found {count} values in its header, expected {MOST_VALUES} at most"
            raise CheckpointError(self.path, problem)

    def number(self, kind: str) -> Any:
        return struct.unpack_from(f"<{kind}", self.content, self.skip(struct.calcsize(kind)))[0]

    def text(self) -> str:
        length = self.number("Q")
        self.check_count(length)
        start = self.skip(length)
        return self.content[start : start + length].decode(errors="replace")

    def value(self, wanted: bool) -> object:
        """The value of a field, after its type; a list is read only if it is wanted."""
        kind, count = self.number("I"), None
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
        if kind == _STRING and count is not None:
            self.check_count(count)
            return [self.text() for _ in range(count)]
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            problem = f"found a value of the unknown type {kind} in its header"
            raise CheckpointError(self.path, problem)
        if count is None:
            return self.number(_SCALARS[kind])
        start = self.skip(count * struct.calcsize(_SCALARS[kind]))
        if not wanted:
            return None
        self.check_count(count)
        return [*struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.content, start)]


class GGUF(NamedTuple):
    """What the header of a GGUF file says."""

    fields: dict[str, object]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]  # shape, type, place in the file


def read_gguf(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GGUF:
    """The header of a GGUF file, every place in it within the file. Raises CheckpointError.

    sizes: of each type of tensors, the numbers in a block and its bytes.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(path, data)
            if data[:4] != b"GGUF":
                found = describe_file(data[:4096]) or "neither GGUF nor anything known"
                raise CheckpointError(path, f"found {found}, expected a GGUF file")
            header.at = 4
            version = header.number("I")
            if version not in (2, 3):
                found = (
                    "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
                )
                raise CheckpointError(path, f"found GGUF, {found}, expected version 2 or 3")
            n_tensors, n_fields = header.number("Q"), header.number("Q")
            header.check_count(n_tensors)
            header.check_count(n_fields)
            fields, found = {}, {}
            for _ in range(n_fields):
                key = header.text()
                if key in fields:
                    raise CheckpointError(path, f"{quoted(key, 80)} is there twice in its header")
                fields[key] = header.value(wanted=key.startswith("tokenizer.ggml."))
            for _ in range(n_tensors):
                name, n_dims = header.text(), header.number("I")
                if not 1 <= n_dims <= 4:
                    problem = f"{one_line(name, 80)} has {n_dims} dimensions, expected 1 to 4"
                    raise CheckpointError(path, problem)
                if name in found:
                    raise CheckpointError(path, f"{one_line(name, 80)} is there twice")
                shape = tuple(header.number("Q") for _ in range(n_dims))[::-1]
                found[name] = shape, header.number("I"), header.number("Q")
            alignment, size = fields.get("general.alignment", 32), len(data)
            if not (type(alignment) is int and alignment in [2**i for i in range(3, 21)]):
                problem = f"its general.alignment is {quoted(alignment)}, expected 32 or the like"
                raise CheckpointError(path, problem)
            start = math.ceil(header.at / alignment) * alignment
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        found = "an empty file" if "empty file" in str(error) else one_line(error)
        raise CheckpointError(path, f"found {found}, expected a GGUF file") from None
    tensors = {}
    for name, (shape, kind, offset) in found.items():
        if kind not in sizes:
            raise CheckpointError(path, f"{one_line(name, 80)} is of the unknown type {kind}")
        block, block_bytes = sizes[kind]
        end = start + offset + math.prod(shape) // block * block_bytes
        if math.prod(shape) == 0 or shape[-1] % block or offset % 8:
            problem = f"{one_line(name, 80)} has shape {[*shape]} and offset {offset}"
            raise CheckpointError(path, f"{problem}, which cannot be")
        if end > size:
            problem = f"{one_line(name, 80)} ends at {end}, but the file at {size} bytes"
            raise CheckpointError(path, f"not a whole GGUF file: {problem}; download it again")
        tensors[name] = shape, kind, start + offset
    return GGUF(fields, tensors)


# --- refusing -------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, or address space, did not suffice."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    texts = r"cannot allocate memory|can't allocate memory|not enough memory|out of memory"
    return isinstance(error, RuntimeError) and bool(re.search(texts, str(error), re.IGNORECASE))


def _is_cut_off_zip(path: Path) -> bool:
    """Whether a file that begins as a zip archive lacks the directory at its end."""
    try:
        return not zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # there is one, but not of a single archive
        return False


def _is_cut_off_pickle(path: Path, error: BaseException) -> bool:
    """Whether a file begins as a pickle and ends before it; `error` is what came of loading it."""
    if isinstance(error, EOFError) or re.search("unexpected EOF|Ran out of input", str(error)):
        return True
    try:
        with path.open("rb") as file:  # as before 1.6: a magic number and three more pickles
            first = next(pickletools.genops(file))[0].name == "PROTO"
            magic = first and next(pickletools.genops(file))[1] == 0x1950A86A20F9469CFC6C
            file.seek(0)
            for _ in range(4 if magic else 1):
                for _ in pickletools.genops(file):
                    pass
    except Exception as problem:  # it raises many things at what is no pickle
        return bool(
            re.search("exhausted|no newline found|not enough|expected .* bytes", str(problem))
        )
    return False


def refuse_pickle(path: Path, error: BaseException) -> NoReturn:
    """Raise the CheckpointError that says why PyTorch could not load the file `path`.

    error: what torch.load raised; the true reason is in the file as often as in it.
    """
    expected = "expected a PyTorch checkpoint, a dictionary of plain tensors"
    if out_of_memory(error):
        size = os.path.getsize(path) / 1e9
        problem = f"there is not enough memory (or address space, ulimit -v) for its {size:.1f} GB"
        raise CheckpointError(path, f"{problem}; free some, or use a smaller model") from None
    head = read_file(path, 4096)
    found = describe_file(head)
    if not head or "LFS" in found or "web page" in found:
        raise CheckpointError(path, f"found {found}; {expected}; {DOWNLOAD_AGAIN}") from None
    is_zip = b"PK\x03\x04".startswith(head[:4])
    is_pickle = head.startswith(b"\x80")
    if (is_zip and _is_cut_off_zip(path)) or (is_pickle and _is_cut_off_pickle(path, error)):
        found = f"a file that was cut off after {os.path.getsize(path)} bytes"
        raise CheckpointError(path, f"found {found}; {expected}; {DOWNLOAD_AGAIN}") from None
    if "TorchScript" in str(error):
        problem = f"found a TorchScript archive, which is a program; {expected}"
    elif match := re.search(r"\bGLOBAL (\S+)", str(error)):
        found = f"a pickle that calls for {one_line(match[1], 80)}, which could run any code"
        problem = f"found {found} and is not loaded; {expected}: save the state_dict alone"
    elif found and not is_zip and not is_pickle:
        problem = f"found {found}; {expected}"
    else:
        found = "a zip archive" if is_zip else found or "neither a zip archive nor a pickle"
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = one_line(reason[1] if reason else error)
        if reason.startswith("Unsupported operand"):  # those of pickle protocol 4 and later
            reason = "pickled with another protocol than torch.save's own"
        problem = f"not a PyTorch checkpoint of plain tensors: found {found} ({reason}); {expected}"
    raise CheckpointError(path, problem) from None


MAPPABLE = "a zip archive of which every entry stands in it as it is"


def _entries(path: Path) -> list[zipfile.ZipInfo] | None:
    """What stands in a zip archive; None if the file is none, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception:  # zipfile raises many things at a damaged archive
        return None


def kind_of_archive(path: Path) -> str:
    """MAPPABLE, or what else a checkpoint file is, which can only be read as a whole."""
    entries = _entries(path)
    if entries is None:
        return "no zip archive, as checkpoints were before PyTorch 1.6"
    as_it_is = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    return MAPPABLE if as_it_is else "a compressed zip archive"


def bytes_to_read(path: Path) -> int:
    """The memory that the file of a checkpoint takes at least where it cannot be mapped, else 0."""
    if kind_of_archive(path) == MAPPABLE:
        return 0
    entries = _entries(path)
    return path.stat().st_size if entries is None else sum(entry.file_size for entry in entries)


@contextmanager
def _spelled_in_utf8(path: Path) -> Iterator[str]:
    """A name for a file that is UTF-8, as PyTorch's own code needs it, even where its own is not.

    It stands for the open file, on Linux and macOS, and holds as long as the context does.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # bytes that the locale cannot spell
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


@contextmanager
def opened_for_pytorch(path: Path) -> Iterator[tuple[str, str]]:
    """A name of the file `path` for torch.load, and its `kind_of_archive`.

    What goes wrong in the context, whatever it is, becomes a CheckpointError with the true reason.
    """
    try:
        with _spelled_in_utf8(path) as name:
            yield name, kind_of_archive(path)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        refuse_pickle(path, error)


def content_of_weights(path: Path, load: Callable) -> object:
    """What is in a consolidated.NN.pth, whatever that is, mapped into memory.

    load: torch.load. Where it cannot be mapped it is read, with a UserWarning; those of pickle
    protocols are ignored, as what is wrong with them is raised. Raises CheckpointError.
    """
    with opened_for_pytorch(path) as (name, kind), warnings.catch_warnings(action="ignore"):
        content = load(name, map_location="cpu", weights_only=True, mmap=kind == MAPPABLE)
    if kind != MAPPABLE:
        warnings.warn(f"{path} is {kind}: it is read as a whole, not mapped", stacklevel=3)
    return content


# Keys of params.json that change what is computed: other spellings of RoPE scaling, quantization,
# and the parts of other architectures.
OTHER_COMPUTATION = re.compile(
    "rope|rotary|yarn|ntk|freq_factor|original_max_pos|quant|lora|adapter|expert|moe|vision|image"
    "|cross_att|bias|qk_norm|softcap|sliding|window|alibi|head_dim|hidden_act|activation"
    "|multiplier|logits?_scal|(attention|embedding|residual).scale|scale_emb|clip|clamp|pruned"
    "|parallel_residual|causal|pooling|dual_chunk",
    re.IGNORECASE,
)


def refuse_other_computation(
    path: Path,
    params: dict[str, object],
    known: Collection[str],
    same: dict[str, object],
    scaling: str = 'Meta\'s "use_scaled_rope": true and "rope_scaling_factor" in its place',
) -> None:
    """Raise CheckpointError for a key that changes what is computed and is not `known`.

    It may be there with no value, with -1, which is Meta's word for off, or with that in `same`.
    scaling: what is expected where a key is about RoPE.
    """
    for key, value in params.items():
        off = value in (None, False, 0, -1, "", [], {}) or (key in same and value == same[key])
        if key in known or off or not OTHER_COMPUTATION.search(key):
            continue
        problem = f"{quoted(key)} is {quoted(value)}, which would change what is computed"
        expected = "a text model of the plain Llama 3 architecture, without it"
        if re.search("rope|scal|factor|yarn|ntk", key, re.IGNORECASE):
            expected = scaling
        raise CheckpointError(path, f"{problem} and is not known here; expected {expected}")


# --- what a file held -----------------------------------------------------------------------------


def embeddings_in(content: object, path: str | os.PathLike) -> Any:
    """tok_embeddings.weight from what a checkpoint file held, which must be a text model's weights.

    Raises CheckpointError, which says what it is instead.
    """
    found = describe_weights(content)
    if found:
        raise CheckpointError(path, f"found {found}")
    embeddings = content.get("tok_embeddings.weight")
    if len(getattr(embeddings, "shape", ())) != 2:
        problem = "tok_embeddings.weight is missing or no matrix, expected [vocab_size, dim]"
        raise CheckpointError(path, problem)
    return embeddings


def check_weights(
    content: object,
    shapes: dict[str, tuple[int, ...]],
    types: Collection[str],
    path: str | os.PathLike,
    origin: str = "params.json",
    described: bool = False,
) -> dict[str, Any]:
    """What a checkpoint file held, if it is just the tensors of these shapes, each of a known type.

    An entry "rope.freqs" is left out, and output.weight may be missing, which makes it the
    embeddings. Beside each other matrix there may be a bias. origin: the file that the shapes are
    from. described: tensors on the device "meta" stand for those that are yet to be loaded. Raises
    CheckpointError, which names `path`.
    """

    def refuse(problem: str) -> NoReturn:
        raise CheckpointError(path, problem)

    embeddings = embeddings_in(content, path)
    weights = {name: tensor for name, tensor in content.items() if name != "rope.freqs"}
    weights.setdefault("output.weight", embeddings)  # tied
    for name, shape in [*shapes.items()]:
        bias = name.removesuffix("weight") + "bias"
        if len(shape) == 2 and "embeddings" not in name and bias in weights:
            shapes = shapes | {bias: shape[:1]}
    for name, shape in shapes.items():
        tensor = weights.get(name)
        if tensor is None:
            refuse(f"{name} is missing, expected a tensor of shape {[*shape]}")
        if str(getattr(tensor, "layout", None)) != "torch.strided" or tensor.is_meta != described:
            refuse(f"{name} is no dense tensor, expected one of shape {[*shape]}")
        if tensor.shape != shape:
            refuse(f"{name} has shape {[*tensor.shape]}, expected {[*shape]} from {origin}")
        found = str(tensor.dtype).removeprefix("torch.")
        if found not in types:
            refuse(f"{name} is of type {found}, expected one of {', '.join(types)}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            refuse(f"{name} shows fewer stored numbers again and again, expected each to be stored")
    for name in weights.keys() - shapes.keys():
        found = one_line(repr(name), 80)
        refuse(f"found {found}, which is no weight of a Llama 3 text model with these params")
    return weights


def pieces_of(weight: Any) -> list[Any]:
    """The tensors of a weight: several, if it lies in several files and is not joined."""
    return weight if isinstance(weight, list) else [weight]


def why_not_finite(weights: dict[str, Any], dtype: str) -> str:
    """The reason for logits that are not finite numbers: a weight, or a type that overflows."""
    dtype = dtype.removeprefix("torch.")
    pieces = ((name, piece) for name, weight in weights.items() for piece in pieces_of(weight))
    bad = next((name for name, piece in pieces if not piece.isfinite().all()), None)
    reason = f"{bad} holds NaN or infinity"
    if bad is None:
        reason = f"{dtype} overflowed on the way, although all weights are finite"
    if dtype == "float16":
        reason += ", and float16 ends at 65504; compute in bfloat16 or float32 (--dtype)"
    return reason


def check_finite(logits: Any, weights: Mapping[str, Any], step: int) -> None:
    """Raise FloatingPointError, with the reason, if the logits of a step are not finite numbers."""
    low, high = logits.aminmax()
    if not math.isfinite((high - low).item()):
        reason = why_not_finite(weights, str(weights["norm.weight"].dtype))
        raise FloatingPointError(f"the logits of new token {step} are not finite numbers: {reason}")


# --- parts of a model -----------------------------------------------------------------------------
#
# Meta's larger models lie in several files, each with a part of every matrix, and several processes
# that compute one model have such parts too, as many as there are processes (Shoeybi et al. 2019,
# Megatron-LM; fairscale's layers in Meta's llama3/model.py).


@functools.cache  # it is asked for at every product
def split_axis(name: str) -> int | None:
    """The dimension in which a weight is cut: wo and w2 by columns, and norms not at all.

    All other matrices are cut by rows, with their biases.
    """
    if "norm" in name:
        return None
    if re.search(r"\b(wo|w2)\.", name):
        return 1 if name.endswith("weight") else None
    return 0


def _span(name: str, size: int, unit: int, part: int, parts: int) -> tuple[int, int]:
    """From where to where a part goes, of a weight that is `size` long in its split_axis.

    unit: rows or columns of attention that stay together. Where there are fewer of these units than
    parts, several parts have the same one.
    """
    unit = unit if ".attention." in name else 1
    n = size // unit
    begin, end = n * part // parts, n * (part + 1) // parts
    end = max(end, begin + 1) if ".attention." in name else end
    return begin * unit, end * unit


def possible_parts(n_heads: int, n_kv_heads: int, most: int) -> list[int]:
    """Into how many parts, at most so many, a model can be cut for ranks.

    Each has as many heads, with their keys.
    """
    divisors = (n for n in range(1, min(n_heads, most) + 1) if n_heads % n == 0)
    return [n for n in divisors if n_kv_heads % n == 0 or n % n_kv_heads == 0]


def shapes_of_part(
    shapes: Mapping[str, tuple[int, ...]], unit: int, part: int, parts: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of one of so many parts; shapes: those of the whole.

    unit: head_dim where heads stay whole, as ranks have them; 1 where rows are just cut.
    """
    found = {}
    for name, shape in shapes.items():
        sizes, axis = list(shape), split_axis(name)
        if axis is not None:
            begin, end = _span(name, sizes[axis], unit, part, parts)
            sizes[axis] = end - begin
        found[name] = tuple(sizes)
    return found


def part_of_weights(
    files: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    head_dim: int,
    part: int,
    parts: int,
    unit: int = 1,
) -> dict[str, Any]:
    """What one of so many ranks has of the weights that lie in these files, or in a single one.

    Views of the files' tensors; where they come from several files, a list of them. shapes: those
    of the whole; unit: as the files were cut, see `shapes_of_part`.
    """
    found = {}
    for name, first in files[0].items():
        axis = split_axis(name)
        if axis is None:
            found[name] = first.detach()
            continue
        size = shapes[re.sub("bias$", "weight", name)][axis]
        at, end = _span(name, size, head_dim, part, parts)
        pieces = []
        for number, file in enumerate(files):
            begin, until = _span(name, size, unit, number, len(files))
            if begin <= at < min(until, end):
                until = min(until, end)
                pieces.append(file[name].detach().narrow(axis, at - begin, until - at))
                at = until
        found[name] = pieces if len(pieces) > 1 else pieces[0]
    return found


def check_one_model(files: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Raise CheckpointError unless the files are parts of one model, as far as can be told.

    They have weights of the same names and types, and what is not cut is the same in all. No two
    begin with the same row of wq, as a copy would.
    """
    first = [file["layers.0.attention.wq.weight"][0] for file in files]
    for i, path in enumerate(paths):
        for j in range(i):
            if first[i].equal(first[j]) and first[i].any():
                problem = f"it holds the same as {paths[j].name}"
                raise CheckpointError(path, f"{problem}; expected the next part of the model")
    for path, file in zip(paths[1:], files[1:], strict=True):
        for name in sorted(files[0].keys() ^ file.keys()):
            problem = f"one of it and {paths[0].name} has {name}, the other has not"
            raise CheckpointError(path, f"{problem}; expected files of one model")
        for name, weight in files[0].items():
            same = str(weight.dtype) == str(file[name].dtype)
            if same and split_axis(name) is None:
                same = weight.nan_to_num().equal(file[name].nan_to_num())
            if not same:
                problem = f"its {name} is another one than that of {paths[0].name}"
                raise CheckpointError(path, f"{problem}; expected files of one model")


def weights_in(
    ckpt_dir: str | os.PathLike,
    load: Callable,
    shapes: dict[str, tuple[int, ...]],
    types: Collection[str],
    head_dim: int,
) -> tuple[list[dict[str, Any]], int]:
    """The weights in each consolidated.NN.pth of a folder, mapped and checked, and their unit.

    load: torch.load. shapes: those of the whole. unit: see `shapes_of_part`; files for more ranks
    than there are heads of keys may have whole heads, some twice. Raises CheckpointError.
    """
    paths, files, unit = find_weights(ckpt_dir), [], 1
    for number, path in enumerate(paths):
        content = content_of_weights(path, load)
        if number == 0 and len(paths) > 1:
            embeddings_in(content, path)  # or it is something else
            rows = getattr(content.get("layers.0.attention.wk.weight"), "shape", (0,))[0]
            whole = shapes["layers.0.attention.wk.weight"][0]
            unit = head_dim if rows == head_dim > whole // len(paths) else 1
        expected = shapes_of_part(shapes, unit, number, len(paths))
        where = "params.json" + f" for one of {len(paths)} files" * (len(paths) > 1)
        files.append(check_weights(content, expected, types, path, where))
    check_one_model(files, paths)
    return files, unit


def forget(tensors: Iterable[Any]) -> None:
    """Give back the memory of tensors that are mapped from a file and are not needed for now.

    It comes from the file again if it is, as the file has it, whatever was written to the tensor.
    For tensors that are not mapped, and where this is not Linux, nothing is done.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    mapped = [
        (int(begin, 16), int(end, 16))
        for begin, end in re.findall(r"^(\w+)-(\w+) \S+p \S+ \S+ [1-9]\d* .*\.pth$", maps, re.M)
    ]
    for tensor in tensors:
        begin = tensor.data_ptr()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        end = begin + (last + 1) * tensor.itemsize
        page = mmap.PAGESIZE
        if any(low <= begin and end <= high for low, high in mapped):
            begin, end = -(-begin // page) * page, end // page * page  # pages that are all its own
            size = ctypes.c_size_t(max(end - begin, 0))
            advise(ctypes.c_void_p(begin), size, mmap.MADV_DONTNEED)


# --- values ---------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Which values a setting may have; as text, for messages: "a whole number from 1 to 9"."""

    kind: type  # int, float, bool, or tuple: a list of numbers
    low: float
    high: float

    def allow(self, value: object) -> bool:
        """Whether `value` is of this kind and within the limits; a whole number is a float too."""
        if self.kind is tuple:
            each = Limits(float, self.low, self.high)
            return isinstance(value, list | tuple) and all(map(each.allow, value))
        if self.kind is bool or isinstance(value, bool):
            return type(value) is self.kind
        number = numbers.Integral if self.kind is int else numbers.Real
        return isinstance(value, number) and self.low <= value <= self.high

    def refusal(self, found: object) -> str:
        """What to say of a value that is not allowed."""
        return f"found {one_line(repr(found), 40)}, expected {self}"

    def check(self, name: str, value: object) -> float:
        """`value`, as this kind of number. Raises ValueError, which names the setting."""
        if not self.allow(value):
            raise ValueError(f"{name}: {self.refusal(value)}")
        return self.kind(value)

    def check_each(self, name: str, values: object) -> list[float]:
        """`values`, a sequence, an array or a tensor of one dimension, as a list; or ValueError."""
        values = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise ValueError(f"{name}: found {one_line(repr(values), 40)}, expected token ids")
        return [self.check(f"a token of {name}", value) for value in values]

    def __str__(self) -> str:
        nouns = {int: "a whole number", float: "a number", bool: "a boolean"}
        noun = nouns.get(self.kind, "a list of numbers")
        return f"{noun} from {json.dumps(self.low)} to {json.dumps(self.high)}"


def swiglu_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Width inside the feed-forward network (llama3/model.py in Meta's llama-models)."""
    width = int((1 if multiplier is None else multiplier) * int(2 * 4 * dim / 3))
    return math.ceil(width / multiple_of) * multiple_of


# For the values in params.json. They are far beyond any model, and catch a file of another kind.
PARAMS_LIMITS = {
    "dim": Limits(int, 1, 2**24),
    "n_layers": Limits(int, 1, 4096),
    "n_heads": Limits(int, 1, 2**24),
    "n_kv_heads": Limits(int, 1, 2**24),
    "head_dim": Limits(int, 1, 2**16),
    "ffn_dim": Limits(int, 1, 2**24),
    "vocab_size": Limits(int, 1, 2**24),
    "multiple_of": Limits(int, 1, 2**24),
    "ffn_dim_multiplier": Limits(float, 0.01, 100),
    "norm_eps": Limits(float, 1e-12, 1),
    "rope_theta": Limits(float, 1, 1e12),
    "use_scaled_rope": Limits(bool, False, True),
    "rope_scaling_factor": Limits(float, 1, 1e6),
    "rope_divisors": Limits(tuple, 1e-6, 1e6),
    "max_seq_len": Limits(int, 1, 2**24),
}

# For the fields of llama3.Sampling.
SAMPLING_LIMITS = {
    "temperature": Limits(float, 0, 10**6),
    "top_p": Limits(float, 0, 1),
    "seed": Limits(int, 0, 2**63 - 1),
    "top_k": Limits(int, 0, 2**24),
    "min_p": Limits(float, 0, 1),
    "repetition_penalty": Limits(float, 0.01, 100),
}

# By dim, for a params.json that gives no rope_scaling_factor: Meta's code uses 8 for every model,
# but Llama 3.2 1B and 3B were made with 32 (their config.json; issues 166 and 241 of llama-models).
ROPE_SCALING_FACTORS = {2048: 32.0, 3072: 32.0}


def refuse_value(path: Path, params: dict[str, object], key: str, expected: object) -> NoReturn:
    """Raise the CheckpointError for a key of params.json."""
    found = quoted(params[key]) if key in params else "missing"
    raise CheckpointError(path, f'"{key}" is {found}, expected {expected}')


def check_values(
    path: Path, params: dict[str, object], limits: dict[str, Limits], optional: Collection[str]
) -> dict[str, float]:
    """The values of the keys in `limits`, each as its kind: 500000 becomes 500000.0.

    Those that are optional may be missing or null, and are left out. Raises CheckpointError.
    """
    values = {}
    for key, limit in limits.items():
        value = params.get(key)
        if value is None and key in optional:
            continue
        if not limit.allow(value):
            refuse_value(path, params, key, limit)
        values[key] = limit.kind(value)
    return values


def check_params(
    path: Path, params: dict[str, object], optional: Collection[str]
) -> dict[str, float]:
    """The values of a params.json, as check_values has them, that are possible together.

    Other keys than PARAMS_LIMITS has are ignored, unless they would change what is computed.
    Without rope_scaling_factor, ROPE_SCALING_FACTORS goes before the default. Raises
    CheckpointError, which names the key.
    """
    values = check_values(path, params, PARAMS_LIMITS, optional)

    def refuse(key: str, expected: str) -> NoReturn:
        refuse_value(path, params, key, expected)

    if "rope_scaling_factor" in values and not values.get("use_scaled_rope"):
        refuse("use_scaled_rope", 'true where there is a "rope_scaling_factor", or neither')
    if values["dim"] in ROPE_SCALING_FACTORS:
        values.setdefault("rope_scaling_factor", ROPE_SCALING_FACTORS[values["dim"]])
    dim, n_heads = values["dim"], values["n_heads"]
    head_dim = values.get("head_dim", dim // n_heads)
    if (dim % n_heads and "head_dim" not in values) or head_dim % 2 or not head_dim:
        refuse("n_heads", f'a number that cuts "dim" ({dim}) into heads of even width')
    if n_heads % values.get("n_kv_heads", n_heads):
        refuse("n_kv_heads", f'a number that divides "n_heads" ({n_heads})')
    divisors = values.get("rope_divisors")
    if divisors is not None and (values.get("use_scaled_rope") or len(divisors) != head_dim // 2):
        refuse("rope_divisors", f'{head_dim // 2} numbers, and no "use_scaled_rope"')
    refuse_other_computation(path, params, known=PARAMS_LIMITS, same={"hidden_act": "silu"})
    return values


def completed_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a llama3.Config, with what follows from others in the place of None."""
    width = swiglu_width(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"])
    follows = {
        "n_kv_heads": params["n_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "ffn_dim": width,
        "max_seq_len": 131072 if params["use_scaled_rope"] else 8192,
    }
    missing = (key for key in follows if params[key] is None)
    return {**params, **{key: follows[key] for key in missing}}


def params_in(
    ckpt_dir: str | os.PathLike, load: Callable, optional: Collection[str]
) -> dict[str, float]:
    """The values of the params.json in a folder, see check_params.

    A vocab_size of -1, Meta's default, is that of the weights; load: torch.load. Raises
    CheckpointError.
    """
    path = find_file(ckpt_dir, "params.json")
    params = read_json_object(path)
    if params.get("vocab_size") == -1:
        paths = find_weights(ckpt_dir)
        tables = (embeddings_in(content_of_weights(path, load), path) for path in paths)
        params["vocab_size"] = sum(len(table) for table in tables)
    return check_params(path, params, optional)
