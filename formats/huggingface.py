"""Hugging Face's folders: config.json, safetensors or pytorch_model.bin, tokenizer.json."""

import functools
import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama3
from formats.errors import (
    CheckpointError,
    describe_file,
    one_line,
    out_of_memory,
    quoted,
    read_file,
    read_json_object,
    refuse,
)
from formats.meta import map_file
from formats.source import KEYS, NAMES, Source, Stored, config_of, in_metas_order, renamed, summary
from formats.text import hf_vocabulary

HF_NAMES, HF_KEYS = ({metas: there for metas, (there, _) in t.items()} for t in (NAMES, KEYS))
METAS_NAMES = {there: metas for metas, there in HF_NAMES.items()}
BIASES_QKV = {"attention.wq", "attention.wk", "attention.wv"}


def to_hf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight."""
    name = renamed(name, HF_NAMES, "layers") or name
    return name if name.startswith("lm_head.") else f"model.{name}"


def to_metas_name(name: str) -> str | None:
    return renamed(name.removeprefix("model."), METAS_NAMES, "layers")


def _in_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}

    def load(name: str) -> list[Tensor]:
        return [file.get_tensor(name)]

    try:
        file = safe_open(os.fspath(path), framework="pt")
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in types:
                problem = f"{name} is of type {dtype}, expected {', '.join(types)}"
                raise CheckpointError(path, problem)
            shape = tuple(part.get_shape())
            found[name] = Stored(shape, types[dtype], functools.partial(load, name))
    except (SafetensorError, OSError) as error:
        if out_of_memory(error):
            raise
        looks = describe_file(read_file(path, 4096))
        looks = f"found {looks}" if looks not in ("", "a safetensors file") else one_line(error)
        problem = f"not a safetensors file of {path.stat().st_size} bytes: {looks}"
        raise CheckpointError(path, f"{problem}; download it again") from None
    return found


def _in_pickle(path: Path) -> dict[str, Stored]:
    content = map_file(path)
    held = content.values() if isinstance(content, dict) else [None]
    dense = (isinstance(w, Tensor) and w.layout == torch.strided and not w.is_meta for w in held)
    if not all(dense):
        raise CheckpointError(path, "found no dictionary of dense tensors, expected weights")
    return {
        str(name): Stored(tuple(w.shape), w.dtype, lambda w=w: [w.detach()])
        for name, w in content.items()
    }


def hf_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder, under the names there. Raises CheckpointError."""
    for single, read in (("model.safetensors", _in_safetensors), ("pytorch_model.bin", _in_pickle)):
        if (folder / single).is_file():
            return read(folder / single)
        index = folder / f"{single}.index.json"
        if not index.is_file():
            continue
        places, tensors = read_json_object(index)["weight_map"], {}
        for name in sorted(set(places.values())):
            if name != os.path.basename(name) or not os.path.isfile(folder / name):
                problem = f"names {quoted(name, 80)}, which is not in the folder; download it too"
                raise CheckpointError(index, problem)
            held = read(folder / name)
            tensors |= {key: held[key] for key in held if places.get(key) == name}
        for key in places.keys() - tensors.keys():
            problem = f"says that {one_line(key, 80)} is in {places[key]}, which does not have it"
            raise CheckpointError(index, problem)
        return tensors
    adapter = (folder / "adapter_config.json").exists()
    todo = "it is an adapter (LoRA); merge it into its model first" if adapter else "download them"
    raise CheckpointError(
        folder, f"has no model.safetensors, nor the files of a larger one; {todo}"
    )


def divisors_of(
    theta: float, head_dim: int, factor: float, low: float = 1, high: float = 4, old: float = 8192
) -> Tensor:
    """The divisors of frequencies that llama3.rope_frequencies' scaling has: float64 [d / 2]."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    kept = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / factor + kept)


def scaling_params(divisors: Tensor, theta: float, head_dim: int) -> dict[str, object]:
    """RoPE's scaling as params.json has it: Meta's factor, or the divisors [d / 2] of any other."""
    if (divisors - 1).abs().max() < 1e-6:
        return {}
    factor = round(divisors.max().item(), 5)
    if factor >= 1 and (divisors / divisors_of(theta, head_dim, factor) - 1).abs().max() < 1e-5:
        return {"use_scaled_rope": True, "rope_scaling_factor": factor}
    return {"rope_divisors": tuple(divisors.tolist())}


def rope_params(path: Path, config: dict[str, Any], head_dim: int) -> dict[str, object]:
    """rope_theta and RoPE's scaling, wherever config.json has them, as params.json has them."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            refuse(path, key, value, "an object, the same for all layers")
        rope |= value
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        refuse(path, "partial_rotary_factor", partial, "1, or none")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        refuse(path, "rope_type", kind, 'RoPE scaling of type "llama3", or none')
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    theta = llama3.checked('"rope_theta"', theta, 1, 1e12, Real)
    values = [llama3.checked(f'"{key}"', rope.get(key), 1e-6, 2**24, Real) for key in keys]
    if values[2] <= values[1]:
        refuse(path, "high_freq_factor", values[2], "more than low_freq_factor")
    divisors = divisors_of(theta, head_dim, *values)
    return {"rope_theta": theta} | scaling_params(divisors, theta, head_dim)


def hf_params(path: Path, config: dict[str, Any]) -> tuple[dict[str, object], set[str]]:
    """Return a config.json's constants as params.json has them, and the matrices with a bias."""
    family = config.get("model_type")
    if family not in ("llama", "qwen2", "internlm"):
        refuse(path, "model_type", family, "llama, qwen2 or internlm")
    if config.get("quantization_config"):
        expected = "weights that are not quantized, or a GGUF file"
        refuse(path, "quantization_config", config["quantization_config"], expected)
    window = "use_sliding_window" if family == "qwen2" else "sliding_window"
    for key, allowed, expected in (
        ("hidden_act", ("silu", "swish", None), "silu"),
        (window, (False, None), "attention to all positions"),
        ("is_causal", (True, None), "true: each token sees those before it"),
    ):
        if config.get(key) not in allowed:
            refuse(path, key, config[key], expected)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        refuse(path, "layer_types", config["layer_types"], "full_attention in all layers")
    rotary = config.get("rotary") if family == "internlm" else None
    rotary = rotary if isinstance(rotary, dict) else {"type": rotary}
    if rotary.get("type") not in (None, "origin", "dynamic"):  # dynamic: only for longer contexts
        refuse(path, "rotary", rotary, '"origin" or "dynamic"')
    params = {metas: config.get(key) for metas, key in HF_KEYS.items()}
    if params["max_seq_len"] is None:  # transformers' defaults
        params["max_seq_len"] = 32768 if family == "qwen2" else 2048
    head_dim = config_of(path, params | {"rope_theta": 1e4}, HF_KEYS).head_dim
    params |= rope_params(path, config, head_dim)
    params["rope_theta"] = rotary.get("base", params["rope_theta"])
    key = {"llama": "attention_bias", "internlm": "bias"}.get(family)
    biased = BIASES_QKV if family == "qwen2" else set()
    if key and config.get(key, family == "internlm"):
        biased = BIASES_QKV | {"attention.wo"}
    if config.get("mlp_bias"):
        biased = biased | {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
    return params, biased


def open_huggingface(folder: Path) -> Source:
    """A folder with config.json and safetensors or pytorch_model.bin. Raises CheckpointError."""
    path = folder / "config.json"
    raw = read_json_object(path)
    params, biased = hf_params(path, raw)
    config, tensors = config_of(path, params, HF_KEYS), hf_tensors(folder)
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    tied = raw.get("tie_word_embeddings", "lm_head.weight" not in tensors)
    stored = in_metas_order(
        path.parent, config, tensors, to_metas_name, to_hf_name, tied, True, biased
    )
    found = summary(f"Hugging Face, {raw['model_type']}", config, stored)
    return Source(folder, found, config, stored, functools.partial(hf_vocabulary, folder))
