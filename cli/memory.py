"""The check, before the weights are loaded, that a model and its cache fit in memory."""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import device as Device
from torch import dtype as Dtype

import llama3
from cli import ranks
from cli.messages import UsageError
from llama3 import Config


def number_in(path: str | Path, pattern: str) -> int:
    """The number that a pattern finds in a file. Raises OSError and TypeError."""
    return int(re.search(pattern, Path(path).read_text(), re.MULTILINE)[1])


GROUPS = (  # of /proc/self/cgroup, in version 2 and 1: where they are, a limit, what is used of it
    (r"^0::/(.*)", "", "memory.max", "memory.current", "inactive_file"),
    (
        r"^\d+:(?:\S+,)?memory(?:,\S+)?:/(.*)",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def group_limits() -> Iterator[int]:
    """What is left to this process's control groups and those around them (Linux), in bytes.

    Their files in memory can be dropped.
    """
    groups = ""
    with suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text()
    for pattern, folder, limit, used, files in GROUPS:
        match = re.search(pattern, groups, re.MULTILINE)
        top = Path("/sys/fs/cgroup", folder)
        own = top / (match[1] if match else "")
        for place in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            with suppress(OSError, TypeError):
                in_use = number_in(place / used, r"(\d+)")
                in_files = number_in(place / "memory.stat", rf"^{files} (\d+)")
                yield number_in(place / limit, r"^(\d+)") - in_use + in_files


def free_bytes(device: Device) -> float:
    """The memory that is free on a device, as far as it can be told: infinity where it cannot."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [*group_limits()]
    with suppress(OSError, TypeError):  # Linux: what can be had without swapping
        limits.append(1024 * number_in("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB"))
    return max(min(limits, default=math.inf), 0)


def amount(size: float) -> str:
    """A number of bytes for a message."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def check_memory(
    config: Config, size: float, device: Device, dtype: Dtype, prompt: int, new: int, batch: int = 1
) -> None:
    """Raise UsageError if weights and a cache for so many tokens need more memory than is free.

    config: of what one rank computes. size: of the weights, but for what is mapped, in bytes.
    prompt, new: tokens of each of `batch` prompts, and those that follow.
    """
    free = free_bytes(device) / (ranks.ranks_here() if device.type == "cpu" else 1)
    position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize * batch
    block = batch * min(prompt, llama3.PREFILL_TOKENS)
    at_once = batch * llama3.SCORES_AT_ONCE << 5 * (device.type == "cuda")
    scores = 10 * min(config.n_heads * block * prompt, at_once)
    work = scores + block * (3 * config.ffn_dim + 8 * config.dim) * dtype.itemsize
    parts = {"weights": size, "cache": position * (prompt + new), "work": work}
    needed = sum(parts.values())
    if needed > free:
        found = ", ".join(f"{name} {amount(part)}" for name, part in parts.items())
        advice = "fewer tokens" if size < free else "a smaller model"
        found = f"this needs {amount(needed)} of memory ({found}), but {amount(free)} are free"
        raise UsageError(f"{found} on {device.type}; use {advice}")
