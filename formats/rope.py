"""RoPE's scalings: how a config.json or a GGUF file stretches the waves for longer contexts."""

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama3
from formats.errors import refuse


def llama3_divisors(
    theta: float,
    head_dim: int,
    factor: float,
    low: float = 1,
    high: float = 4,
    old_context: float = 8192,
) -> Tensor:
    """What Llama 3.1's scaling divides RoPE's frequencies by, [d / 2]; by default, Meta's own.

    By the definition in transformers' modeling_rope_utils.py: by `factor` for wavelengths beyond
    old_context / low, 1 for those below old_context / high, and blended between.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    kept = ((old_context / (2 * math.pi / frequencies) - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / factor + kept)


def yarn_divisors(
    theta: float, head_dim: int, factor: float, old_context: float, rope: Mapping[str, Any]
) -> Tensor:
    """What YaRN divides RoPE's frequencies by, [d / 2] (Peng et al. 2023, arXiv 2309.00071).

    By `factor` for waves that turn less than beta_slow times in the old context, 1 for those that
    turn more than beta_fast times, and blended between.
    """

    def pair(turns: float) -> float:  # of which the wave turns so many times
        return head_dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    stretched = ((torch.arange(head_dim // 2).double() - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - stretched) + stretched / factor)


def yarn_attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies queries and keys by."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    both = rope.get("mscale"), rope.get("mscale_all_dim")
    return mscale(both[0]) / mscale(both[1]) if all(both) else mscale(1)


def scaling_params(divisors: Tensor, theta: float, head_dim: int) -> dict[str, object]:
    """RoPE's scaling as params.json has it: Meta's factor, or the divisors [d / 2] of any other."""
    if (divisors - 1).abs().max() < 1e-6:
        return {}
    factor = round(divisors.max().item(), 5)
    if factor >= 1 and (divisors / llama3_divisors(theta, head_dim, factor) - 1).abs().max() < 1e-5:
        return {"use_scaled_rope": True, "rope_scaling_factor": factor}
    return {"rope_divisors": tuple(divisors.tolist())}


def rope_params(
    path: Path, rope: Mapping[str, Any], theta: object, head_dim: int, context: object
) -> dict[str, object]:
    """RoPE's constants as params.json has them, and two more of Config.

    rope: the scaling, under transformers' names. context: the positions that the model was trained
    with, unless `rope` says how many they were before. CheckpointError names what is wrong.
    """
    kind, params = rope.get("rope_type", rope.get("type", "default")), {"rope_theta": theta}
    if kind in ("default", "none", None):
        return params
    if kind not in ("linear", "llama3", "yarn"):
        refuse(path, "rope_type", kind, '"linear", "llama3", "yarn", or no scaling')

    def number(key: str, default: object = None) -> float:
        found = default if rope.get(key) is None else rope[key]
        try:
            return llama3.checked(f'"{key}"', found, 1e-6, 2**24, Real)
        except ValueError:
            refuse(path, key, found, "a number that is greater than 0")

    theta = llama3.checked('"rope_theta"', theta, 1, 1e12, Real)
    factor, old = number("factor"), rope.get("original_max_position_embeddings") or context
    if kind == "linear":
        return params | scaling_params(torch.full((head_dim // 2,), factor), theta, head_dim)
    old = number("original_max_position_embeddings", old)
    if kind == "yarn":
        divisors = yarn_divisors(theta, head_dim, factor, old, rope)
        params["rope_attention_factor"] = yarn_attention_factor(factor, rope)
        return params | scaling_params(divisors, theta, head_dim)
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
        refuse(path, "high_freq_factor", high, "more than low_freq_factor")
    divisors = llama3_divisors(theta, head_dim, factor, low, high, old)
    return params | scaling_params(divisors, theta, head_dim)
