"""Tensors on their way from a mapped file to a GPU."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**26  # bytes copied at a time
Buffers = Iterator[tuple[Tensor, torch.cuda.Event]]


@functools.cache
def _pinned(device: torch.device) -> Buffers:
    """Two buffers that a GPU copies from by itself, in turns, and when it was done with each."""
    buffers = (torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    return itertools.cycle([(buffer, torch.cuda.Event()) for buffer in buffers])


def copy_through(source: Tensor, target: Tensor, buffers: Buffers) -> None:
    """Copy bytes to a device, a buffer being filled while another is on its way."""
    for part, to in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
        buffer, done = next(buffers)
        done.synchronize()
        to.copy_(buffer[: len(part)].copy_(part), non_blocking=True)
        done.record()


def to_device(w: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without a second copy of it on the host."""
    if device.type != "cuda" or not w.is_contiguous() or w.device.type != "cpu":
        return w.to(device)
    placed = torch.empty_like(w, device=device)
    with torch.cuda.device_of(placed):
        copy_through(*(x.flatten().view(torch.uint8) for x in (w, placed)), _pinned(device))
    return placed
