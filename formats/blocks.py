"""Quantized blocks of llama.cpp, as tensor code: what their bytes stand for.

A block is 32 numbers with a scale, or 256 with scales of their own for every 32 or 16. The layouts
are those of ggml/src/ggml-common.h (https://github.com/ggml-org/ggml), the order of the operations
is that of the gguf package, so that the results equal its to the last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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
    """A bit for each of 32 numbers, worth 16: [..., 4] -> [..., 32]."""
    return bits(block[..., None], 1).flatten(-3) << 4


def scales_and_minimums(block: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the eight groups in a block of Q4_K or Q5_K: [..., 16] -> float32 [..., 8, 1].

    Two float16, by which all are multiplied, then 6 bits each, the high ones of the last four in
    the bytes of the first four.
    """
    scale, minimum, last = block[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    d, dmin = halves(block[..., :4]).split(1, dim=-1)
    scales = torch.cat([scale & 63, (last & 15) | ((scale >> 2) & 48)], dim=-1)
    minimums = torch.cat([minimum & 63, (last >> 4) | ((minimum >> 2) & 48)], dim=-1)
    return (d * scales.float())[..., None], (dmin * minimums.float())[..., None]


def with_minimum(block: Tensor, q: Tensor) -> Tensor:
    """Numbers q [..., 32] times a scale, plus a minimum, the block's first two float16."""
    d, minimum = halves(block[..., :4]).split(1, dim=-1)
    return d * q.float() + minimum


def in_groups(block: Tensor, q: Tensor) -> Tensor:
    """Numbers q [..., 8, 32], each eighth with its own scale and minimum: -> [..., 256]."""
    scales, minimums = scales_and_minimums(block)
    return (scales * q.float() - minimums).flatten(-2)


def q6_k(block: Tensor) -> Tensor:
    """Blocks of 16 groups, whose numbers have 4 low bits and 2 high ones, and no minimum."""
    high = bits(block[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
    scales = halves(block[..., 208:]) * block[..., 192:208].view(torch.int8).float()
    q = (nibbles(block[..., :128], 64) | (high << 4)).float() - 32
    return (scales[..., None] * q.unflatten(-1, (16, 16))).flatten(-2)


# The function for blocks [..., bytes] of each type -> float32 [..., numbers].
DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": lambda b: halves(b[..., :2]) * b[..., 2:].view(torch.int8).float(),
    "Q4_0": lambda b: halves(b[..., :2]) * (nibbles(b[..., 2:], 16).float() - 8),
    "Q5_0": lambda b: (
        halves(b[..., :2]) * ((nibbles(b[..., 6:], 16) | fifth_bits(b[..., 2:6])).float() - 16)
    ),
    "Q4_1": lambda b: with_minimum(b, nibbles(b[..., 4:], 16)),
    "Q5_1": lambda b: with_minimum(b, nibbles(b[..., 8:], 16) | fifth_bits(b[..., 4:8])),
    "Q4_K": lambda b: in_groups(b, nibbles(b[..., 16:], 32).unflatten(-1, (8, 32))),
    "Q5_K": lambda b: in_groups(
        b, nibbles(b[..., 48:], 32).unflatten(-1, (8, 32)) | bits(b[..., 16:48], 1) << 4
    ),
    "Q6_K": q6_k,
}
