"""Quantized matrices as one token is multiplied by them: rows side by side, in words of 32 bits.

The compiler makes one loop of such a product, with a lane of the processor's vectors for each row,
of which there are 16 in AVX-512 and else 8 (16 in the shapes below). The inputs are in chunks of
32, or 64 in types whose blocks are of 256 (the dimensions C are chunks, or blocks and their 4
chunks). A matrix of 16 R outputs is two tensors:

    scales  [R, C, n, 16]       for 32 inputs, or for a block; with n = 2 minimums as well
    words   int32 [R, C, n, 16] the low 4 bits of a chunk's numbers, or all 8; then the high 1 or 2
                                bits; then, in blocks of 256, 8 bits for each scale of its groups

Numbers 4 w to 4 w + 3 of a chunk are in the bytes of word w, which has only 4, 2 or 1 bits of each
byte: the words that follow are above it, in what remains of these bytes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llama3
from cli.build import BUILT_FROM_BYTES, Part, Run, key_of, runs_of
from cli.messages import bar
from formats.blocks import BYTES, SIZES, Blocks

REPACKED_AT_ONCE = 2**22  # numbers
DEQUANTIZED_AT_ONCE = 2**20  # numbers
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
LANES = 16 if AVX512 else 8  # of a vector: rows that lie side by side
# Smaller, but the compiler converts float16 beside numbers of 32 bits well for AVX-512 alone.
SCALES = torch.float16 if AVX512 else torch.float32
HIGH_WORDS = {"Q5_0": 1, "Q5_1": 1, "Q5_K": 2, "Q6_K": 4}  # of a chunk
# What is added to numbers of a type, so that they are not negative; the last byte has a sign.
RAISED = {"Q8_0": [128, 128, 128, 0], "Q4_0": [8] * 4, "Q5_0": [16] * 4, "Q6_K": [32] * 4}
BYTE_SCALES = [1, 2**-8, 2**-16, 2**-24]


def lanes(block: Tensor, kind: torch.dtype = torch.int32) -> Tensor:
    """Bytes of rows, side by side as numbers of a kind: [16 R, B, bytes] -> [R, B, n, 16]."""
    return block.contiguous().view(kind).unflatten(0, (-1, LANES)).movedim(1, -1)


def spread(bits: Tensor) -> Tensor:
    """32 bits, one for each number, in a word that has bit w of byte k for number 4 w + k."""
    # Four neighbours, times this, are the lowest bits of the four bytes.
    words = [((bits >> 4 * w & 15) * 0x204081 & 0x01010101) << w for w in range(8)]
    return functools.reduce(torch.bitwise_or, words)


def high_bits(bits: Tensor, width: int, first: int, second: int) -> Tensor:
    """The high bits of 64 numbers: [..., 8, 16] -> [..., 2 width, 16].

    bits: numbers 0 to 31 at bit `first` of its bytes, 32 to 63 at bit `second`, `width` bits each.
    """
    n, mask, parts = 2 * width, (2**width - 1) * 0x01010101, []
    for i, right in enumerate((first, second)):
        for j in range(8 // n):
            part = bits[..., j * n : (j + 1) * n, :] >> right & mask
            parts.append(part << width * (8 // n * i + j))
    return functools.reduce(torch.bitwise_or, parts)


def paired(a: Tensor, b: Tensor) -> Tensor:
    """The two low bytes of words a and b, and the two high ones: [..., 16] -> [..., 2, 16]."""
    return torch.stack([a & 0xFFFF | b << 16, a >> 16 & 0xFFFF | b & ~0xFFFF], dim=-2)


def q4_k(b: Tensor) -> list[Tensor]:
    """See REPACK: of Q4_K, and of Q5_K but for its fifth bits."""
    # As group_scales in formats/blocks.py, of four bytes at once, which takes half the time.
    scale, minimum, last = lanes(b[..., 4:16]).unbind(-2)
    first = paired(scale & 0x3F3F3F3F, minimum & 0x3F3F3F3F)
    scale = last & 0x0F0F0F0F | scale >> 2 & 0x30303030
    minimum = last >> 4 & 0x0F0F0F0F | minimum >> 2 & 0x30303030
    groups = torch.cat([first, paired(scale, minimum)], dim=-2)[..., None, :]
    return [lanes(b[..., :4], torch.float16), lanes(b[..., -128:]).unflatten(-2, (4, 8)), groups]


def q5_k(b: Tensor) -> list[Tensor]:
    """See REPACK."""
    (scales, low, groups), bits = q4_k(b), lanes(b[..., 16:48])
    high = torch.stack([high_bits(bits, 1, 2 * c, 2 * c + 1) for c in range(4)], dim=-3)
    return [scales, low, high, groups]


def q6_k(b: Tensor) -> list[Tensor]:
    """See REPACK. Numbers 0 to 31 and 64 to 95 of each half share bytes: they are in a chunk."""
    bits = lanes(b[..., 128:192]).unflatten(-2, (2, 8))
    high = torch.stack([high_bits(bits, 2, 2 * p, 2 * p + 4) for p in range(2)], dim=-3)
    groups = paired(*lanes(b[..., 192:208]).unflatten(-2, (2, 2)).unbind(-2)).flatten(-3, -2)
    low = lanes(b[..., :128]).unflatten(-2, (4, 8))
    return [lanes(b[..., 208:], torch.float16), low, high.flatten(-4, -3), groups[..., None, :]]


# Of blocks [16 R, B, bytes] of a type: scales, and the parts of words.
REPACK: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "Q8_0": lambda b: [lanes(b[..., :2], torch.float16), lanes(b[..., 2:]) ^ 0x808080],
    "Q4_0": lambda b: [lanes(b[..., :2], torch.float16), lanes(b[..., 2:])],
    "Q4_1": lambda b: [lanes(b[..., :4], torch.float16), lanes(b[..., 4:])],
    "Q5_0": lambda b: [
        lanes(b[..., :2], torch.float16),
        lanes(b[..., 6:]),
        spread(lanes(b[..., 2:6])),
    ],
    "Q5_1": lambda b: [
        lanes(b[..., :4], torch.float16),
        lanes(b[..., 8:]),
        spread(lanes(b[..., 4:8])),
    ],
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


class Words(NamedTuple):
    """A quantized matrix [outputs, inputs]."""

    kind: str
    outputs: int | None  # None: all that there are
    scales: Tensor
    words: Tensor

    @property
    def shape(self) -> tuple[int | None, int]:
        """[outputs, inputs]."""
        return self.outputs, self.scales.shape[1] * SIZES[self.kind]

    @property
    def chunk(self) -> int:
        """How many inputs are in a chunk."""
        return 32 if SIZES[self.kind] == 32 else 64

    @property
    def group(self) -> int:
        """How many of them share a scale."""
        return 16 if self.kind == "Q6_K" else 32

    def numbers(self) -> Tensor:
        """The numbers, in four bytes of words: float32 [R, C, chunk / 4, 4, 16].

        Those in byte k are times 256**k, so that no shift is needed, and raised: see RAISED.
        """
        high = HIGH_WORDS.get(self.kind, 0)
        low = self.words.shape[-2] - high - (SIZES[self.kind] > 32)
        words, bit, sizes = 0, 0, [low, high] if high else [low]
        for plane in self.words[..., : low + high, :].split(sizes, dim=-2):
            width = 32 * plane.shape[-2] // self.chunk
            above = width * torch.arange(8 // width, dtype=torch.int32)[:, None, None]
            part = plane[..., None, :, :] >> above & (2**width - 1) * 0x01010101
            words, bit = words | part.flatten(-3, -2) << bit, bit + width
        masks = 255 << 8 * torch.arange(4, dtype=torch.int32)
        return (words[..., None, :] & masks[:, None]).float()

    def group_scales(self) -> tuple[Tensor, Tensor | None]:
        """The scales of groups, and what is subtracted then, if anything: [R, C, groups, 16]."""
        scales, groups = self.scales, self.words[..., -1:, :]
        if SIZES[self.kind] == 32:
            minimum = -scales[..., 1:, :].float() if scales.shape[-2] == 2 else None
            return scales[..., :1, :].float(), minimum
        scales = scales[..., None, :, None, :].float()  # of a block: [R, B, 1, 1 or 2, 1, 16]
        at = 8 * torch.arange(4, dtype=torch.int32)[:, None]
        if self.kind == "Q6_K":
            return (groups << 24 - at >> 24).float() * scales[..., 0, :, :], None
        of_groups = (groups >> at[:2] & 255).float() * scales[..., 0, :, :]
        return of_groups, (groups >> at[2:] & 255).float() * scales[..., 1, :, :]


def repacked(blocks: Blocks) -> Words:
    """The words of a matrix in blocks."""
    outputs, inputs = blocks.shape
    at_once, rows = max(REPACKED_AT_ONCE // inputs // LANES, 1) * LANES, -(-outputs // LANES)
    scales = words = torch.empty(0)
    for start in range(0, outputs, at_once):
        raw = blocks.raw[start : start + at_once]
        if len(raw) % LANES:  # rows of zeros are added
            raw = torch.cat([raw, raw.new_zeros(-len(raw) % LANES, raw.shape[1])])
        first, *parts = REPACK[blocks.kind](raw.unflatten(-1, (-1, BYTES[blocks.kind])))
        if not start:
            n = sum(part.shape[-2] for part in parts)
            scales = torch.empty(rows, *first.shape[1:], dtype=SCALES)
            words = torch.empty(rows, *parts[0].shape[1:-2], n, LANES, dtype=torch.int32)
        here = slice(start // LANES, start // LANES + len(first))
        scales[here] = first
        places = words[here].split([part.shape[-2] for part in parts], dim=-2)
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)
    return Words(blocks.kind, outputs, scales, words)


# --- computing with them --------------------------------------------------------------------------


def in_chunks(x: Tensor, kind: str) -> Tensor:
    """A number for each input [inputs], as chunks have them: -> [C, chunk]."""
    if SIZES[kind] == 32:
        return x.unflatten(0, (-1, 32))
    if kind == "Q6_K":  # see q6_k
        return x.unflatten(0, (-1, 2, 2, 2, 32)).transpose(2, 3).flatten(3).flatten(1, 2)
    return x.unflatten(0, (-1, 4, 64))


def multiply_words(x: Tensor, m: Words) -> Tensor:
    """x @ w.T for one vector x [..., inputs], as it compiles to a loop that reads words once."""
    inputs = in_chunks(x.float().flatten(), m.kind)  # [C, chunk]
    by_bytes = inputs * torch.tensor(BYTE_SCALES * (m.chunk // 4))
    by_bytes = by_bytes.as_strided(by_bytes.shape, by_bytes.stride())  # computed before the loop
    by_bytes = by_bytes.unflatten(-1, (-1, m.group // 4, 4))[..., None]  # [C, groups, words, 4, 1]
    terms = m.numbers().unflatten(-3, (-1, m.group // 4)) * by_bytes
    sums = terms.sum(-3).sum(-2)  # four at a time, so that no addition waits for the one before
    if m.kind in RAISED:
        raised = inputs * torch.tensor(RAISED[m.kind] * (m.chunk // 4))
        sums = sums - raised.unflatten(-1, (-1, m.group)).sum(-1)[..., None]
    scales, minimums = m.group_scales()  # [R, C, groups, 16]
    sums = sums * scales
    if minimums is not None:
        sums = sums - inputs.unflatten(-1, (-1, m.group)).sum(-1)[..., None] * minimums
    y = sums.sum(-2).sum([*range(1, sums.dim() - 2)]).flatten()[: m.outputs]
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def dequantized(m: Words, dtype: torch.dtype) -> Tensor:
    """The matrix that words stand for, on its side: [inputs, 16 R]."""
    q = m.numbers() * torch.tensor(BYTE_SCALES)[:, None]
    q = q - torch.tensor(RAISED[m.kind])[:, None] if m.kind in RAISED else q
    scales, minimums = m.group_scales()
    w = scales[..., None, :] * q.flatten(-3, -2).unflatten(-2, (-1, m.group))
    w = w if minimums is None else w - minimums[..., None, :]
    if m.kind == "Q6_K":  # see q6_k
        w = w.flatten(2, 4).unflatten(2, (2, 2, 2, 32)).transpose(3, 4)
    return w.flatten(1, -2).to(dtype).transpose(0, 1).flatten(1)


# --- in place of blocks ---------------------------------------------------------------------------


def some_rows(m: Words, begin: int, end: int) -> Words:
    """Some of its R rows, with all of their outputs."""
    return Words(m.kind, None, m.scales[begin:end], m.words[begin:end])


def part_of(m: Words, dtype: torch.dtype) -> Part:
    """Dequantizing such words, of any number of rows and chunks, as a part to build."""

    def function(*tensors: Tensor) -> Tensor:
        return dequantized(Words(m.kind, None, *tensors), dtype)

    tensors = m[2:]
    sizes = tuple({i: f"size{i}" for i in (0, 1) if t.shape[i] > 1} for t in tensors)
    return Part(function, function, (), tensors, sizes, f"dequantize {m.kind} {dtype}")


class Product(NamedTuple):
    """A function that multiplies by words, of which it dequantizes some rows at a time."""

    words: Words
    run: Run  # which dequantizes

    def __call__(self, x: Tensor) -> Tensor:
        m, rows = self.words, max(DEQUANTIZED_AT_ONCE // x.shape[-1] // LANES, 1)
        starts = range(0, len(m.words), rows)
        parts = [x @ self.run([*some_rows(m, i, i + rows)[2:]])[0] for i in starts]
        return torch.cat(parts, dim=-1)[..., : m.outputs]


def make_words(weights: dict[str, Any], build: bool, again: bool) -> None:
    """Put words in the place of all blocks but the embeddings, if what they need is built.

    Blocks go one after the other, so that there is no second copy of a model.
    """
    names = [n for n, w in weights.items() if isinstance(w, Blocks) and "embed" not in n]
    dtype, parts = weights["norm.weight"].dtype, {}
    for name in names:
        few = Blocks(weights[name].raw[: 3 * LANES], weights[name].kind)
        parts[name] = part_of(repacked(few), dtype)
    runs = runs_of(parts.values(), build, again, "what dequantizes weights fast")
    keys = {name: key_of(part) for name, part in parts.items()}
    if {*keys.values()} == runs.keys():
        for name in bar("repacking", " tensors", delay=0.5)(names):
            weights[name] = Product(repacked(weights[name]), runs[keys[name]])


def size_of(w: Tensor | Blocks) -> int:
    """The bytes of a weight; of one in blocks, those of its numbers in bfloat16."""
    return 2 * math.prod(w.shape) if isinstance(w, Blocks) else w.nbytes


def expanded(weights: llama3.Weights) -> llama3.Weights:
    """The weights without blocks, but for embeddings, if that is a small model.

    Where nothing was built for them, single tokens are faster so.
    """
    blocks = {n: w for n, w in weights.items() if isinstance(w, Blocks) and "embed" not in n}
    dtype = weights["norm.weight"].dtype
    if sum(map(size_of, blocks.values())) > BUILT_FROM_BYTES:
        return weights
    return {**weights, **{name: b.to(dtype) for name, b in blocks.items()}}
