"""Hugging Face's folders: config.json, safetensors or pytorch_model.bin, tokenizer.json."""

import functools
import os
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
from formats.rope import rope_params
from formats.source import (
    KEYS,
    NAMES,
    Source,
    Stored,
    config_of,
    in_metas_order,
    renamed,
    summary,
)
from formats.vocabulary import folder_tokenizer

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


def hf_rope(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], object]:
    """RoPE's scaling and rope_theta, wherever a config.json has them, as transformers 5 does."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(inner, dict) for inner in rope.values()):
        refuse(path, "rope_parameters", rope, "an object, the same for all layers")
    old = config.get("original_max_position_embeddings")
    rope = rope | ({"original_max_position_embeddings": old} if old else {})
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        refuse(path, "partial_rotary_factor", partial, "1, or none")
    return rope, rope.get("rope_theta", config.get("rope_theta", 10000.0))


FAMILIES = {  # and transformers' defaults where they are not those of params.json
    "llama": {"max_seq_len": 2048},
    "mistral": {"max_seq_len": 131072},
    "qwen2": {"max_seq_len": 32768},
    "qwen3": {"max_seq_len": 32768, "head_dim": 128},
    "internlm": {"max_seq_len": 2048},
}


def refuse_window(path: Path, config: dict[str, Any], used: llama3.Config) -> None:
    """Raise CheckpointError if some layers attend to fewer positions than the context has."""
    default = 4096 if config["model_type"] in ("mistral", "qwen2", "qwen3") else None
    window, types = config.get("sliding_window", default), config.get("layer_types")
    if config["model_type"] in ("qwen2", "qwen3"):
        later = config.get("max_window_layers", 28) < used.n_layers  # the layers that have it
        have = "sliding_attention" in types if types else later
        window = window if config.get("use_sliding_window") and have else None
    if window and window < used.max_seq_len:
        refuse(path, "sliding_window", window, "attention to all positions")
    if {*(types or ())} - {"full_attention", "sliding_attention"}:
        refuse(path, "layer_types", types, "full_attention in all layers")


def hf_params(path: Path, config: dict[str, Any]) -> tuple[dict[str, object], set[str]]:
    """Return a config.json's constants as params.json has them, and the matrices with a bias."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        refuse(path, "model_type", family, f"one of {', '.join(FAMILIES)}")
    defaults = FAMILIES[family]
    if config.get("quantization_config"):
        expected = "weights that are not quantized, or a GGUF file"
        refuse(path, "quantization_config", config["quantization_config"], expected)
    for key, allowed, expected in (
        ("hidden_act", ("silu", "swish", None), "silu"),
        ("is_causal", (True, None), "true: each token sees those before it"),
    ):
        if config.get(key) not in allowed:
            refuse(path, key, config[key], expected)
    rotary = config.get("rotary") if family == "internlm" else None
    rotary = rotary if isinstance(rotary, dict) else {"type": rotary}
    if rotary.get("type") not in (None, "origin", "dynamic"):  # dynamic: only for longer contexts
        refuse(path, "rotary", rotary, '"origin" or "dynamic"')
    params = {metas: config.get(key) for metas, key in HF_KEYS.items()}
    params |= {key: defaults[key] for key in defaults if params.get(key) is None}
    used = config_of(path, params | {"rope_theta": 1e4}, HF_KEYS)
    refuse_window(path, config, used)
    rope, theta = hf_rope(path, config)
    params |= rope_params(path, rope, theta, used.head_dim, used.max_seq_len)
    params["rope_theta"] = rotary.get("base", params["rope_theta"])
    key = {"qwen2": None, "internlm": "bias"}.get(family, "attention_bias")
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
    family = raw["model_type"]
    tied = raw.get("tie_word_embeddings", "lm_head.weight" not in tensors)
    stored = in_metas_order(
        folder, family, config, tensors, to_metas_name, to_hf_name, tied, True, biased
    )
    found = summary(f"Hugging Face, {family}", config, stored)
    found += ", without its adapter" * (folder / "adapter_config.json").exists()
    text = functools.partial(folder_tokenizer, folder, config.vocab_size)
    suggested = folder / "generation_config.json"
    suggested = read_json_object(suggested) if suggested.is_file() else {}
    return Source(folder, found, config, stored, text, suggested)
