"""Quantized matrices in llama.cpp's blocks, as tensor code: what their bytes stand for.

A block is 32 numbers with a scale, or 256 with scales of their own for every 32 or 16. The layouts
are those of ggml/src/ggml-common.h (https://github.com/ggml-org/ggml), the order of the operations
is that of the gguf package, so that the results equal its to the last bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**18  # numbers that are dequantized at a time, which fit in the processor's cache


def halves(block: Tensor) -> Tensor:
    """float16 numbers [..., 2 n bytes] as float32 [..., n]."""
    return block.view(torch.float16).float()


def bits(block: Tensor, width: int) -> Tensor:
    """Numbers of so many bits, the lowest of all bytes first: [..., n] -> [..., 8 / width, n]."""
    parts = [(block >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.stack(parts, dim=-2)


def nibbles(block: Tensor, group: int) -> Tensor:
    """4 bits each, the low ones of `group` bytes before their high ones: [..., n] -> [..., 2 n]."""
    return bits(block.unflatten(-1, (-1, group)), 4).flatten(-3)


def fifth_bits(block: Tensor) -> Tensor:
    """A bit for each of 32 numbers: [..., 4] -> [..., 32]."""
    return bits(block[..., None], 1).flatten(-3)


def group_scales(block: Tensor) -> Tensor:
    """6 bits for each of the eight groups in a block of Q4_K or Q5_K: [..., 12] -> [..., 2, 8].

    The scales, then the minimums; the high ones of the last four in the bytes of the first four.
    """
    scale, minimum, last = block.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([scale & 63, (last & 15) | ((scale >> 2) & 48)], dim=-1)
    minimums = torch.cat([minimum & 63, (last >> 4) | ((minimum >> 2) & 48)], dim=-1)
    return torch.stack([scales, minimums], dim=-2)


def with_minimum(block: Tensor, q: Tensor) -> Tensor:
    """Numbers q [..., 32] times a scale, plus a minimum, the block's first two float16."""
    d, minimum = halves(block[..., :4]).split(1, dim=-1)
    return d * q.float() + minimum


def in_groups(block: Tensor, q: Tensor) -> Tensor:
    """Numbers q [..., 8, 32], each eighth with its own scale and minimum: -> [..., 256]."""
    by_group = halves(block[..., :4])[..., None] * group_scales(block[..., 4:16]).float()
    scales, minimums = by_group[..., None].unbind(-3)
    return (scales * q.float() - minimums).flatten(-2)


def high_q6_k(block: Tensor) -> Tensor:
    """The high 2 bits of 256 numbers: [..., 64] -> [..., 256]."""
    return bits(block.unflatten(-1, (2, 32)), 2).flatten(-3)


def q6_k(block: Tensor) -> Tensor:
    """Blocks of 16 groups, whose numbers have 4 low bits and 2 high ones, and no minimum."""
    scales = halves(block[..., 208:]) * block[..., 192:208].view(torch.int8).float()
    q = nibbles(block[..., :128], 64) | (high_q6_k(block[..., 128:192]) << 4)
    return (scales[..., None] * (q.float() - 32).unflatten(-1, (16, 16))).flatten(-2)


# The function for blocks [..., bytes] of each type -> float32 [..., numbers].
DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": lambda b: halves(b[..., :2]) * b[..., 2:].view(torch.int8).float(),
    "Q4_0": lambda b: halves(b[..., :2]) * (nibbles(b[..., 2:], 16).float() - 8),
    "Q5_0": lambda b: (
        halves(b[..., :2]) * ((nibbles(b[..., 6:], 16) | fifth_bits(b[..., 2:6]) << 4).float() - 16)
    ),
    "Q4_1": lambda b: with_minimum(b, nibbles(b[..., 4:], 16)),
    "Q5_1": lambda b: with_minimum(b, nibbles(b[..., 8:], 16) | fifth_bits(b[..., 4:8]) << 4),
    "Q4_K": lambda b: in_groups(b, nibbles(b[..., 16:], 32).unflatten(-1, (8, 32))),
    "Q5_K": lambda b: in_groups(
        b, nibbles(b[..., 48:], 32).unflatten(-1, (8, 32)) | bits(b[..., 16:48], 1) << 4
    ),
    "Q6_K": q6_k,
}
# Numbers in a block, and its bytes.
SIZES = dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1"), 32)
SIZES |= dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), 256)
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q5_0": 22, "Q4_1": 20, "Q5_1": 24}
BYTES |= {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


@dataclass(frozen=True, eq=False)
class Blocks:
    """A quantized matrix [outputs, inputs], as its file has it: a function that multiplies by it.

    A piece of it at a time is dequantized, in float32, and used in the dtype of what it multiplies.
    """

    raw: Tensor  # uint8 [outputs, bytes of a row]
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """[outputs, inputs]."""
        return len(self.raw), self.raw.shape[1] // BYTES[self.kind] * SIZES[self.kind]

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Rows, dequantized: float32 [..., inputs]."""
        blocks = self.raw[rows].unflatten(-1, (-1, BYTES[self.kind]))
        return DEQUANTIZE[self.kind](blocks).flatten(-2)

    def pieces(self) -> Iterator[Tensor]:
        """Some rows after the other, dequantized: float32 [n, inputs]."""
        at_once = AT_ONCE if self.raw.device.type == "cpu" else 64 * AT_ONCE
        n = max(at_once // self.shape[1], 1)
        return (self[start : start + n] for start in range(0, len(self.raw), n))

    def to(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix, dequantized."""
        whole, start = self.raw.new_empty(self.shape, dtype=dtype), 0
        for piece in self.pieces():
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return whole

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([x @ piece.to(x.dtype).T for piece in self.pieces()], dim=-1)


def in_blocks(x: Tensor, kind: str) -> Tensor:
    """Numbers in blocks of Q8_0 or Q4_0, rounded as the gguf package does.

    float32 [..., 32 n] -> uint8 [..., bytes].
    """
    x = x.unflatten(-1, (-1, 32))
    most = x.abs().amax(-1, keepdim=True)
    if kind == "Q8_0":
        d = most / 127
        x = x * torch.where(d == 0, 0, 1 / d)
        size = x.abs().floor()
        q = x.sign() * (size + (2 * (x.abs() - size)).floor())  # halves go away from zero
        q = q.to(torch.int8).view(torch.uint8)
    else:
        low, high = x.amin(-1, keepdim=True) == -most, x.amax(-1, keepdim=True) == most
        most, both = torch.where(low, -most, most), (low & high).squeeze(-1)
        most[both] = x[both].gather(-1, x[both].abs().argmax(-1, keepdim=True))  # the first one
        d = most / -8
        x = (x * torch.where(d == 0, 0, 1 / d) + 8.5).clamp(0, 15.5).floor()
        q = (x[..., :16] + 16 * x[..., 16:]).to(torch.uint8)
    return torch.cat([d.half().view(torch.uint8), q], dim=-1).flatten(-2)


def to_blocks(w: Tensor | Blocks, kind: str) -> Tensor:
    """A matrix in blocks of Q8_0 or Q4_0, uint8 [outputs, bytes of a row], some rows at a time."""
    if isinstance(w, Blocks) and w.kind == kind:
        return w.raw
    pieces = w.pieces() if isinstance(w, Blocks) else w.split(max(AT_ONCE // w.shape[1], 1))
    raw, start = torch.empty(len(w), w.shape[1] // SIZES[kind] * BYTES[kind], dtype=torch.uint8), 0
    for piece in pieces:
        raw[start : start + len(piece)] = in_blocks(piece.float(), kind)
        start += len(piece)
    return raw
