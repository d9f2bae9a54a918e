"""The check, before the weights are loaded, that a model and its cache fit in memory."""

import math
import re
from contextlib import suppress
from pathlib import Path

import torch
from torch import device as Device
from torch import dtype as Dtype

import llama3
from cli import ranks
from cli.messages import UsageError
from llama3 import Config


def free_bytes(device: Device) -> float:
    """The memory that is free on a device, as far as it can be told: infinity where it cannot."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []

    def read(path: str, pattern: str) -> int:
        return int(re.search(pattern, Path(path).read_text(), re.MULTILINE)[1])

    with suppress(OSError, TypeError):  # Linux: what can be had without swapping
        limits.append(1024 * read("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB"))
    with suppress(OSError, TypeError):  # a container's limit; its files can be dropped
        group = "/sys/fs/cgroup/memory"
        used = read(f"{group}.current", r"(\d+)") - read(f"{group}.stat", r"^inactive_file (\d+)")
        limits.append(read(f"{group}.max", r"^(\d+)") - used)
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
    scores = 10 * min(config.n_heads * block * prompt, batch * llama3.SCORES_AT_ONCE)
    work = scores + block * (3 * config.ffn_dim + 8 * config.dim) * dtype.itemsize
    parts = {"weights": size, "cache": position * (prompt + new), "work": work}
    needed = sum(parts.values())
    if needed > free:
        found = ", ".join(f"{name} {amount(part)}" for name, part in parts.items())
        advice = "fewer tokens" if size < free else "a smaller model"
        found = f"this needs {amount(needed)} of memory ({found}), but {amount(free)} are free"
        raise UsageError(f"{found} on {device.type}; use {advice}")
