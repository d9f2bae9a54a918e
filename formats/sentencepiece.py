"""Vocabularies of sentencepiece's BPE with byte fallback, as what a tokenizer.json has."""

import base64
import struct
from collections.abc import Iterator
from typing import Any

from formats.text import Content, added


def fallback_decoder(space: bool) -> Content:
    """That of vocabularies with byte fallback."""
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *[strip] * space]
    return {"type": "Sequence", "decoders": steps}


def by_scores(
    pieces: list[tuple[str, float, int]], unknown: str, steps: list[Content], space: bool
) -> Content:
    """A sentencepiece BPE vocabulary: spelling, score and kind of each piece.

    kind: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. steps: normalizers.
    space: whether text gets one before it.
    """
    vocab = {name: i for i, (name, _, _) in enumerate(pieces)}
    rank = {name: (-score, i) for i, (name, score, kind) in enumerate(pieces) if kind == 1}
    cuts = ((name, name[:i], name[i:]) for name in rank for i in range(1, len(name)))
    merges = [cut for cut in cuts if cut[1] in rank and cut[2] in rank]
    merges.sort(key=lambda cut: (rank[cut[0]], rank[cut[1]], rank[cut[2]]))
    steps = [*steps, *[{"type": "Prepend", "prepend": "▁"}] * space]
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    model = {"type": "BPE", "vocab": vocab, "merges": [cut[1:] for cut in merges]}
    kinds = ((name, i, kind) for i, (name, _, kind) in enumerate(pieces))
    return {
        "added_tokens": [added(name, i, kind != 4) for name, i, kind in kinds if kind in (2, 3, 4)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": fallback_decoder(space),
        "model": model | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer, by number. Raises ValueError or IndexError."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]  # beyond its end: IndexError
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128 or shift > 63:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        size = {1: 8, 5: 4}.get(kind)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else size
        if size is None or at + size > len(message):
            raise ValueError("not a whole sentencepiece model")
        yield number, message[at : at + size]
        at += size


def sentencepiece(data: bytes) -> Content:
    """A sentencepiece model (sentencepiece_model.proto of that project). Raises ValueError."""
    pieces, trainer, normalizer = [], {}, {}
    for number, inner in _fields(data):
        if number == 1:
            piece = {1: b"", 2: bytes(4), 3: 1} | dict(_fields(inner))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(inner))
    if trainer.get(3, 1) != 2:
        raise ValueError("found a sentencepiece model of another kind, expected BPE")
    steps = []
    if normalizer.get(2):
        charsmap = base64.b64encode(normalizer[2]).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normalizer.get(4, 1):  # extra white space goes
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    unknown = next((name for name, _, kind in pieces if kind == 2), None)
    return by_scores(pieces, unknown, steps, bool(normalizer.get(3, 1)))
