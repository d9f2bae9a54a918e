"""GGUF files, llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The header is not left to the gguf package, which takes twenty times as long for a vocabulary.
"""

import functools
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.blocks import AT_ONCE, DEQUANTIZE
from formats.errors import CheckpointError, describe_file, one_line, quoted, read_file, refuse
from formats.rope import rope_params, scaling_params, yarn_attention_factor
from formats.source import (
    KEYS,
    NAMES,
    Source,
    Stored,
    config_of,
    in_metas_order,
    renamed,
    summary,
)
from formats.vocabulary import gguf_tokenizer

GGUF_NAMES = {metas: there for metas, (_, there) in NAMES.items()}
METAS_NAMES = {there: metas for metas, there in GGUF_NAMES.items()}
to_metas_name = functools.partial(renamed, names=METAS_NAMES, layers="layers")
to_gguf_name = functools.partial(renamed, names=GGUF_NAMES, layers="blk")
GGUF_KEYS = {metas: there for metas, (_, there) in KEYS.items()} | {"rope_theta": "rope.freq_base"}
FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_KEYS = {  # of a scaling, under transformers' names
    "rope_type": "scaling.type",
    "factor": "scaling.factor",
    "original_max_position_embeddings": "scaling.original_context_length",
    "attention_factor": "scaling.attn_factor",
    "beta_fast": "scaling.yarn_beta_fast",
    "beta_slow": "scaling.yarn_beta_slow",
}
ROPE_UNUSED = ("scaling.finetuned",)
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # of a model in several files
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # those that are mapped


_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
Fields = dict[str, Any]
Places = dict[str, tuple[tuple[int, ...], int, int]]  # a tensor's shape, type, place in the file


class _Reader:
    """A place in the bytes of a file, from where values are read one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 4

    def take(self, size: int) -> bytes:
        if size > min(len(self.content) - self.at, 2**24):  # no text or list is so long
            raise ValueError(f"a value of {size} bytes in its header, at {self.at}")
        self.at += size
        return self.content[self.at - size : self.at]

    def numbers(self, kind: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(kind)))

    def text(self) -> str:
        return self.take(self.numbers("Q")[0]).decode(errors="replace")

    def value(self) -> Any:
        kind, count = self.numbers("I")[0], None
        if kind == _ARRAY:
            kind, count = *self.numbers("I"), *self.numbers("Q")
        if kind != _STRING and kind not in _SCALARS:
            raise ValueError(f"found a value of the unknown type {kind}")
        if kind == _STRING:
            return self.text() if count is None else [self.text() for _ in range(count)]
        numbers = self.numbers(_SCALARS[kind], 1 if count is None else count)
        return numbers[0] if count is None else [*numbers]


def read_header(path: Path, sizes: dict[int, tuple[int, int]]) -> tuple[Fields, Places]:
    """The fields and tensors in a GGUF file; sizes: elements and bytes of a block, by type."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            version, n_tensors, n_fields = *reader.numbers("I"), *reader.numbers("Q", 2)
            if data[:4] != b"GGUF" or version not in (2, 3):
                raise ValueError(f"found version {version}, expected GGUF of version 2 or 3")
            fields = {}
            for _ in range(n_fields):
                key = reader.text()
                fields[key] = reader.value()
            tensors = {}
            for _ in range(n_tensors):
                name, n_dims = reader.text(), reader.numbers("I")[0]
                shape = reader.numbers("Q", min(n_dims, 9))[::-1]
                tensors[name] = (shape, *reader.numbers("I"), *reader.numbers("Q"))
            alignment = fields.get("general.alignment", 32)
            if type(alignment) is not int or alignment < 8 or alignment % 8:
                raise ValueError(f"general.alignment is {alignment}")
            start = math.ceil(reader.at / alignment) * alignment
            for name, (shape, kind, offset) in tensors.items():
                block, block_bytes = sizes.get(kind, (0, 0))
                if not (block and math.prod(shape)) or shape[-1] % block or offset % alignment:
                    raise ValueError(f"{one_line(name, 80)}: shape {[*shape]}, offset {offset}")
                end = start + offset + math.prod(shape) // block * block_bytes
                if end > len(data):
                    raise ValueError(f"{one_line(name, 80)} ends at {end}, the file at {len(data)}")
                tensors[name] = shape, kind, start + offset
    except (OSError, ValueError, TypeError, IndexError) as error:
        looks = describe_file(read_file(path, 4096))
        found = one_line(error) if looks in ("", "a GGUF file") else f"found {looks}"
        problem = f"not a whole GGUF file: {found}; download it again"
        raise CheckpointError(path, problem) from None
    return fields, tensors


def gguf_tensors(path: Path, places: Places) -> dict[str, Stored]:
    """All tensors of a GGUF file, under the names there. Raises CheckpointError."""
    import gguf

    file = path.open("rb")  # the same one, whatever is there under its name later

    def entry(name: str, shape: tuple[int, ...], number: int, start: int) -> Stored:
        kind, dtype = gguf.GGMLQuantizationType(number), DTYPES.get(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes

        def mapped() -> Tensor:  # by itself, so that its pages go when it does
            try:
                return torch.from_numpy(np.memmap(file, mode="c", offset=start, shape=(size,)))
            except ValueError as error:  # it was longer when its header was read
                raise CheckpointError(path, one_line(error)) from None

        def dequantized() -> Tensor:
            with np.errstate(all="ignore"):  # infinite scales are found when computed with
                numbers, at_once = torch.empty(shape, dtype=torch.bfloat16), AT_ONCE // block
                pieces = mapped().view(-1, block_bytes).split(at_once)
                for place, piece in zip(
                    numbers.view(-1, block).split(at_once), pieces, strict=True
                ):
                    place.copy_(torch.from_numpy(gguf.quants.dequantize(piece.numpy(), kind)))
                return numbers

        if dtype is not None:
            return Stored(
                shape, dtype, lambda: [mapped().view(dtype).view(shape)], False, kind.name
            )
        if kind.name in DEQUANTIZE and len(shape) == 2:
            rows = (shape[0], -1)
            return Stored(
                shape, torch.bfloat16, lambda: [mapped().view(rows)], False, kind.name, True
            )
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
        except NotImplementedError:
            expected = "F32, F16, BF16 or a type that the gguf package dequantizes"
            problem = f"{one_line(name, 80)} is of type {kind.name}, expected {expected}"
            raise CheckpointError(path, problem) from None
        return Stored(shape, torch.bfloat16, lambda: [dequantized()], True, kind.name)

    return {name: entry(name, *place) for name, place in places.items()}


def gguf_params(path: Path, fields: Fields, tensors: dict[str, Stored]) -> dict[str, object]:
    """Return a GGUF file's constants as params.json has them. CheckpointError names the key."""
    family = fields.get("general.architecture")
    if family not in FAMILIES:
        refuse(path, "general.architecture", family, f"one of {', '.join(FAMILIES)}")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(path, "token_embd.weight is missing, expected [vocab_size, dim]")
    of_family = {}
    for key, value in fields.items():
        if key.startswith(f"{family}."):
            values = value if isinstance(value, list) else [value]
            if any(other != values[0] for other in values):
                refuse(path, key, value, "the same for all layers")
            of_family[key.removeprefix(f"{family}.")] = values[0] if values else value
    params = {metas: of_family.get(key) for metas, key in GGUF_KEYS.items()}
    if type(params["norm_eps"]) is not float:
        refuse(path, f"{family}.{GGUF_KEYS['norm_eps']}", params["norm_eps"], "a float32")
    params["norm_eps"] = float(f"{params['norm_eps']:.7g}")  # it was a float32
    params["rope_theta"] = params["rope_theta"] or 10000.0
    params["vocab_size"] = tensors["token_embd.weight"].shape[0]
    used = config_of(path, params, GGUF_KEYS)
    head_dim = used.head_dim
    only = {
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "expert_count": 0,
        "attention.causal": True,
        "vocab_size": params["vocab_size"],
    }
    for key, allowed in only.items():
        if of_family.get(key, allowed) != allowed:
            refuse(path, key, of_family[key], f"{allowed}")
    window = of_family.get("attention.sliding_window")
    if window and window < used.max_seq_len:
        refuse(path, f"{family}.attention.sliding_window", window, "attention to all positions")
    rope = {there: of_family.get(f"rope.{key}") for there, key in ROPE_KEYS.items()}
    rope["factor"] = rope["factor"] or of_family.get("rope.scale_linear") or 1
    rope["rope_type"] = rope["rope_type"] or ("default" if rope["factor"] == 1 else "linear")
    for key in of_family:
        if key.startswith("rope.scaling.") and key[5:] not in (*ROPE_KEYS.values(), *ROPE_UNUSED):
            refuse(path, f"{family}.{key}", of_family[key], "none")
    if rope["attention_factor"] is not None:  # which comes on top of YaRN's own
        rope["attention_factor"] *= yarn_attention_factor(rope["factor"], {})
    params |= rope_params(path, rope, params["rope_theta"], head_dim, used.max_seq_len)
    if "rope_freqs.weight" in tensors:
        divisors = tensors["rope_freqs.weight"].parts()[0].double()
        if divisors.shape != (head_dim // 2,) or not (divisors.isfinite() & (divisors > 0)).all():
            raise CheckpointError(path, f"rope_freqs.weight: expected {head_dim // 2} divisors")
        if rope["rope_type"] not in ("none", "default"):
            refuse(path, "rope.scaling.type", rope["rope_type"], "none beside rope_freqs.weight")
        params |= scaling_params(divisors, params["rope_theta"], head_dim)
    return params


def in_parts(path: Path, fields: Fields) -> list[Path]:
    """The files of a model that is split over several, the first of which is `path`."""
    count, match = fields.get("split.count", 1), PART.fullmatch(path.name)
    if count in (0, 1):
        return [path]
    if type(count) is not int or match is None or int(match[3]) != count:
        problem = f"it says that it is one of {quoted(count)} files"
        raise CheckpointError(path, f"{problem}, expected the name NAME-00001-of-0000N.gguf")
    return [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def open_gguf(path: Path) -> Source:
    """A GGUF file, or several that are named by one of them. Raises CheckpointError."""
    from gguf import GGML_QUANT_SIZES

    if match := PART.fullmatch(path.name):
        path = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
    fields, places = read_header(path, GGML_QUANT_SIZES)
    tensors, files = gguf_tensors(path, places), in_parts(path, fields)
    for i, file in enumerate(files[1:], start=1):
        if not file.is_file():
            raise CheckpointError(file, "is missing, which is a part of the model; download it too")
        own, places = read_header(file, GGML_QUANT_SIZES)
        twice = tensors.keys() & places.keys()
        if twice or (own.get("split.no"), own.get("split.count")) != (i, len(files)):
            raise CheckpointError(file, f"is not the part {i + 1} of the model of {path.name}")
        tensors |= gguf_tensors(file, places)
    if fields.get("split.tensors.count", len(tensors)) != len(tensors):
        expected = f"{fields['split.tensors.count']} tensors, found {len(tensors)}"
        raise CheckpointError(path, f"expected {expected}: its parts are not of one model")
    config = config_of(path, gguf_params(path, fields, tensors), GGUF_KEYS)
    family = fields["general.architecture"]
    if family == "qwen2" and "blk.0.attn_q.bias" not in tensors:
        raise CheckpointError(path, "blk.0.attn_q.bias is missing, which a qwen2 model has")
    tied, reorder = "output.weight" not in tensors, family != "llama"
    tensors.pop("rope_freqs.weight", None)
    stored = in_metas_order(
        path, family, config, tensors, to_metas_name, to_gguf_name, tied, reorder
    )
    found = summary(f"GGUF, {family}", config, stored)
    text = functools.partial(gguf_tokenizer, path, fields, config.vocab_size)
    return Source(path, found, config, stored, text)
