"""Tensors on their way from a mapped file to a GPU."""

import functools
import itertools

import torch
from torch import Tensor

CHUNK = 2**26  # bytes copied at a time


@functools.cache
def _pinned() -> list[tuple[Tensor, torch.cuda.Event]]:
    """Two buffers in memory that a GPU copies from by itself, and when it was done with each."""
    return [
        (torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
        for _ in range(2)
    ]


def copy_through(
    source: Tensor, target: Tensor, buffers: list[tuple[Tensor, torch.cuda.Event]]
) -> None:
    """Copy bytes to a device, a buffer being filled while another is on its way."""
    parts = zip(source.split(CHUNK), target.split(CHUNK), itertools.cycle(buffers), strict=False)
    for part, to, (buffer, done) in parts:
        done.synchronize()
        to.copy_(buffer[: len(part)].copy_(part), non_blocking=True)
        done.record()


def to_device(w: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without a second copy of it on the host."""
    if device.type != "cuda" or not w.is_contiguous() or w.device.type != "cpu":
        return w.to(device)
    placed = torch.empty_like(w, device=device)
    with torch.cuda.device_of(placed):
        copy_through(*(x.flatten().view(torch.uint8) for x in (w, placed)), _pinned())
    return placed
