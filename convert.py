"""Models as Hugging Face and llama.cpp keep them: run as they are, or written as Meta's files.

    python convert.py SOURCE OUT_DIR           # from a Hugging Face folder or a GGUF file to Meta's
    python convert.py --to-hf CKPT_DIR HF_DIR  # and from Meta's files to a Hugging Face folder

    source = convert.open_source("Qwen2-0.5B")  # nothing is written, and what can be is mapped
    weights, tokenizer = source.load_weights(), source.tokenizer()
    logits = llama3.forward(tokens, weights, source.config)

Llama, Qwen2 and InternLM are one computation: they differ in constants and in biases. The numbers
are everywhere the same, but not the order of some rows. RoPE turns pairs of a head's numbers: those
of Meta are neighbours, (2i, 2i + 1), those of Hugging Face lie half a head apart, (i, i + d / 2).
So the rows of wq and wk lie in another order there, and so do their biases. llama.cpp has Meta's
order for Llama and Hugging Face's for Qwen2.
"""

import argparse
import base64
import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import llama3
import tokenizer_setup
from checkpoint_files import (
    GGUF,
    MAPPABLE,
    PARAMS_LIMITS,
    CheckpointError,
    Limits,
    check_params,
    check_values,
    check_weights,
    describe_file,
    kind_of_archive,
    one_line,
    opened_for_pytorch,
    out_of_memory,
    part_of_weights,
    pieces_of,
    quoted,
    read_file,
    read_gguf,
    read_json_object,
    refuse_other_computation,
    say,
    split_axis,
    swiglu_width,
)
from tokenizer_setup import SPECIAL_TOKENS, TextFormat, Tokenizer

Progress = Callable[[Iterable[str]], Iterable[str]]
JSON_LIMIT = 2**26  # bytes of a tokenizer.json; Llama 3's has 17 million
CONFIG_LIMIT = 2**22  # of other files, which have some thousands
DEQUANTIZED_NUMBERS = 2**22  # at a time


class Stored(NamedTuple):
    """A tensor in a file, in Meta's order."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # that it is loaded with, or the name of one that is not known here
    load: Callable[[], Tensor]  # mapped, unless it is a copy
    is_copy: bool = False
    stored_as: str = ""  # GGUF's name of the type in the file


class Vocabulary(NamedTuple):
    """What Tokenizer is made of. text_format is None for Llama 3's own."""

    ranks: dict[bytes, int]
    text_format: TextFormat | None


class Source(NamedTuple):
    """A model as others keep it."""

    path: Path
    found: str  # what it is, in a few words
    params: dict[str, object]  # what its params.json would hold
    config: llama3.Config
    stored: dict[str, Stored]  # by Meta's names
    described: llama3.Weights  # shapes and types of all weights, on the device "meta"
    vocabulary: Callable[[], Vocabulary]  # raises CheckpointError

    def weights(self) -> llama3.Weights:
        """All weights as they are stored: mapped, but for the copies."""
        loaded = llama3.Weights((name, stored.load()) for name, stored in self.stored.items())
        loaded.setdefault("output.weight", loaded["tok_embeddings.weight"])  # tied
        return loaded

    def load_weights(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        progress: Progress = iter,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> llama3.Weights:
        """As llama3.load_weights: one after the other, to compute on `device` in `dtype`.

        Or what a rank has of them.
        """
        device, shapes = torch.device(device), llama3.weight_shapes(self.config)
        dtype = dtype or llama3.default_dtype(self.described, device)
        placed = llama3.Weights(rank=rank, n_ranks=n_ranks)
        for name in progress(self.stored):
            whole = {name: self.stored[name].load()}
            part = part_of_weights([whole], shapes, self.config.head_dim, rank, n_ranks)
            if self.stored[name].is_copy and n_ranks > 1:
                part[name] = part[name].clone()  # so that the rest of it goes
            placed |= llama3.place_weights(llama3.Weights(part), device, dtype)
        placed.setdefault("output.weight", placed["tok_embeddings.weight"])
        return placed

    def copied_bytes(self) -> int:
        """The memory that `weights` takes beside what is mapped."""
        copies = (stored for stored in self.stored.values() if stored.is_copy)
        return sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in copies)

    def tokenizer(self, vocabulary: Vocabulary | None = None) -> Tokenizer:
        """Its tokenizer, of its vocabulary, which may be given. Raises CheckpointError."""
        ranks, text_format = vocabulary or self.vocabulary()
        n_vocab = len(ranks) + len(text_format.special_tokens if text_format else SPECIAL_TOKENS)
        if n_vocab > self.config.vocab_size:
            problem = f'the tokenizer has {n_vocab} tokens, but the "vocab_size" of the model is'
            raise CheckpointError(self.path, f"{problem} {self.config.vocab_size}")
        if text_format is None:
            text_format = tokenizer_setup.llama3_format(len(ranks))
        try:
            return tokenizer_setup.make_tokenizer(self.path.name, ranks, text_format)
        except ValueError as error:
            raise CheckpointError(self.path, f"its tokenizer cannot be used: {error}") from None


def needed_package(name: str, path: Path) -> Any:
    """The module of a package that only some sources need. Raises CheckpointError without it."""
    try:
        return __import__(name)
    except ImportError:
        problem = f"to read it takes the package {name}; install it with: pip install {name}"
        raise CheckpointError(path, problem) from None


# --- the order of the rows ------------------------------------------------------------------------


def pairs_side_by_side(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, or their bias, from Hugging Face's order to Meta's: a copy.

    [heads * d, ...]: within a head, i and i + d / 2 become 2i and 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_half_a_head_apart(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of pairs_side_by_side."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def in_metas_order(name: str, stored: Stored, head_dim: int) -> Stored:
    """`stored` as it is, or with the rows of a head in Meta's order if it is of wq or wk."""
    if not re.search(r"attention\.w[qk]\.", name):
        return stored
    load = stored.load
    return stored._replace(load=lambda: pairs_side_by_side(load(), head_dim), is_copy=True)


# --- names ----------------------------------------------------------------------------------------

HF_NAMES = {
    "tok_embeddings": "embed_tokens",
    "norm": "norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def renamed(name: str, names: dict[str, str], old_layer: str, new_layer: str) -> str | None:
    """A weight's name elsewhere, or None: blk.3.attn_q.bias -> layers.3.attention.wq.bias.

    names: the new name for each old one, without the layer and "weight" or "bias".
    """
    number = "(0|[1-9][0-9]{0,5})"
    match = re.fullmatch(rf"(?:{re.escape(old_layer)}\.{number}\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return None
    layer = "" if match[1] is None else f"{new_layer}.{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"


def to_hf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight."""
    name = renamed(name, HF_NAMES, "layers", "layers") or name
    return name if name.startswith("lm_head.") else f"model.{name}"


# --- Hugging Face: weights ------------------------------------------------------------------------


def _in_safetensors(path: Path, keep: bool) -> dict[str, Stored]:
    needed_package("safetensors", path)
    from safetensors import SafetensorError, safe_open

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    opened = functools.partial(safe_open, os.fspath(path), framework="pt")
    if (
        keep
    ):  # one mapping for all; else each goes with its tensor, and so do the pages that it read
        opened = functools.cache(opened)

    def entry(file: Any, name: str) -> Stored:
        part = file.get_slice(name)
        dtype = types.get(part.get_dtype(), part.get_dtype())
        return Stored(tuple(part.get_shape()), dtype, lambda: opened().get_tensor(name))

    try:
        file = opened()
        return {name: entry(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        if out_of_memory(error):
            raise
        found = describe_file(read_file(path, 4096))
        found = f"found {found}" if found not in ("", "a safetensors file") else one_line(error)
        size = path.stat().st_size
        problem = f"not a safetensors file of {size} bytes: {found}; download it again"
        raise CheckpointError(path, problem) from None


def _in_pickle(path: Path, keep: bool) -> dict[str, Stored]:
    def opened() -> dict[str, Tensor]:
        with opened_for_pytorch(path) as (name, kind), warnings.catch_warnings(action="ignore"):
            return torch.load(name, map_location="cpu", weights_only=True, mmap=kind == MAPPABLE)

    kind = kind_of_archive(path)
    if "compressed" in kind:  # there is no telling how large it becomes
        raise CheckpointError(path, f"found {kind}; save it anew with torch.save")
    content = opened()
    if not (
        isinstance(content, dict)
        and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items())
    ):
        raise CheckpointError(path, "found no dictionary of tensors, expected a model's weights")
    for name, tensor in content.items():
        plain = str(tensor.layout) == "torch.strided" and not (
            tensor.is_meta or tensor.is_nested or tensor.is_neg() or tensor.is_conj()
        )
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(path, f"{one_line(name, 80)} is no dense tensor, stored as it is")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in content.items()}
    loaded = functools.cache(lambda: content) if keep or kind != MAPPABLE else opened
    return {
        name: Stored(*of, lambda name=name: loaded()[name].detach()) for name, of in shapes.items()
    }


def hf_tensors(folder: Path, keep: bool) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder, under the names there. Raises CheckpointError."""
    for single, read in (("model.safetensors", _in_safetensors), ("pytorch_model.bin", _in_pickle)):
        if (folder / single).is_file():
            return read(folder / single, keep)
        index = folder / f"{single}.index.json"
        if not index.is_file():
            continue
        places = read_json_object(index).get("weight_map")
        if not (isinstance(places, dict) and all(isinstance(p, str) for p in places.values())):
            raise CheckpointError(index, 'its "weight_map" is no object of file names by tensor')
        tensors = {}
        for name in sorted(set(places.values())):
            if name != os.path.basename(name) or name in ("", ".", ".."):
                problem = f"names {quoted(name, 80)}, expected a file in the same folder"
                raise CheckpointError(index, problem)
            if not os.path.isfile(folder / name):  # False for a name that is too long, too
                problem = f"names {quoted(name, 80)}, which is not there; download it as well"
                raise CheckpointError(index, problem)
            held = read(folder / name, keep)
            tensors |= {key: held[key] for key in held if places.get(key) == name}
        for key in places.keys() - tensors.keys():
            problem = f"says that {one_line(key, 80)} is in {places[key]}, which does not have it"
            raise CheckpointError(index, problem)
        return tensors
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            problem = (
                f"{name}: it is an adapter (LoRA), no whole model; merge it into its model first"
            )
            raise CheckpointError(folder, problem)
    found = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
    found = f"found {one_line(', '.join(found), 80)}" if found else "found neither"
    needed = "needed is model.safetensors, or the index and files of a larger model"
    raise CheckpointError(folder, f"{found}; {needed}")


# --- Hugging Face: constants ----------------------------------------------------------------------

HF_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
}
# What Meta's own models have: (multiple_of, ffn_dim_multiplier), so that their params.json is as
# Meta's, without an ffn_dim.
FFN_FORMULAS = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))


def _refuse(path: Path, key: str, value: object, expected: str) -> NoReturn:
    problem = f'"{key}" is {quoted(value, 80)}, which is not computed here; expected {expected}'
    raise CheckpointError(path, problem)


def meta_params(values: dict[str, Any]) -> dict[str, object]:
    """The entries of a params.json from all constants: what follows from others is left out."""
    dim, ffn_dim = values["dim"], values["ffn_dim"]
    params = dict(values)
    for multiple_of, multiplier in FFN_FORMULAS:
        if swiglu_width(dim, multiple_of, multiplier) == ffn_dim:
            del params["ffn_dim"]
            break
    else:
        multiple_of, multiplier = FFN_FORMULAS[0]
    params |= {"multiple_of": multiple_of}
    if multiplier is not None and "ffn_dim" not in params:
        params["ffn_dim_multiplier"] = multiplier
    if params.get("head_dim") == dim / values["n_heads"]:
        del params["head_dim"]
    if params.get("max_seq_len") == (131072 if params.get("use_scaled_rope") else 8192):
        del params["max_seq_len"]
    return params


def llama3_divisors(
    theta: float,
    head_dim: int,
    factor: float,
    low: float = 1,
    high: float = 4,
    old_context: float = 8192,
) -> Tensor:
    """What Llama 3.1's scaling divides each of RoPE's frequencies by: float64 [d / 2].

    See llama3.rope_frequencies, which has Meta's constants; Hugging Face's are in config.json.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * theta**pairs
    kept = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / factor + kept)


def check_heads(path: Path, values: dict[str, Any], keys: dict[str, str]) -> int:
    """The width of a head. keys: Meta's names by those in the file. Raises CheckpointError."""
    key_of = {metas: key for key, metas in keys.items()}
    dim, n_heads = values["dim"], values["n_heads"]
    n_kv_heads, head_dim = values.get("n_kv_heads", n_heads), values.get("head_dim", dim // n_heads)
    if "head_dim" not in values and dim % n_heads:
        problem = f"a number that divides {key_of['dim']} ({dim}), or a width of its own for a head"
        _refuse(path, key_of["n_heads"], n_heads, problem)
    if head_dim % 2 or not head_dim:
        _refuse(path, key_of["head_dim"], head_dim, "an even number")
    if n_heads % n_kv_heads:
        problem = f"a number that divides {key_of['n_heads']} ({n_heads})"
        _refuse(path, key_of["n_kv_heads"], n_kv_heads, problem)
    return head_dim


def scaling_params(divisors: Tensor, theta: float, head_dim: int) -> dict[str, object]:
    """RoPE's scaling as params.json has it, from what each frequency is divided by, [d / 2].

    Meta's own way of saying it, where that gives the same numbers, else the divisors.
    """
    if (divisors - 1).abs().max() < 1e-6:
        return {}
    factor = round(divisors.max().item(), 5)
    if factor >= 1:
        metas = llama3_divisors(theta, head_dim, factor)
        if (divisors / metas - 1).abs().max() < 1e-5:
            return {"use_scaled_rope": True, "rope_scaling_factor": factor}
    return {"rope_divisors": divisors.tolist()}


def _hf_scaling(path: Path, config: dict[str, Any], head_dim: int) -> dict[str, object]:
    """rope_theta and RoPE's scaling, wherever config.json has them, as params.json has them."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if not (value is None or isinstance(value, dict)):
            _refuse(path, key, value, "an object, or null")
        if any(isinstance(inner, dict) for inner in (value or {}).values()):
            _refuse(path, key, value, "the same for all layers")
        rope |= value or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    check_values(path, {"rope_theta": theta}, {"rope_theta": PARAMS_LIMITS["rope_theta"]}, ())
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        _refuse(path, "partial_rotary_factor", partial, "1, or none")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind != "llama3":
        _refuse(path, "rope_type", kind, 'RoPE scaling of type "llama3", or none')
    constants = {
        "factor": PARAMS_LIMITS["rope_scaling_factor"],
        "low_freq_factor": Limits(float, 1e-6, 1e6),
        "high_freq_factor": Limits(float, 1e-6, 1e6),
        "original_max_position_embeddings": Limits(int, 1, 2**24),
    }
    values = check_values(path, rope, constants, ())
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        _refuse(path, "high_freq_factor", values["high_freq_factor"], "more than low_freq_factor")
    divisors = llama3_divisors(theta, head_dim, *values.values())
    return {"rope_theta": float(theta)} | scaling_params(divisors, theta, head_dim)


def hf_params(path: Path, config: dict[str, Any]) -> tuple[dict[str, object], set[str]]:
    """What params.json would hold for a config.json, and which projections have a bias.

    Raises CheckpointError, which names the key that is missing, impossible or not computed here.
    """
    family = config.get("model_type")
    if family not in ("llama", "qwen2", "internlm"):
        _refuse(path, "model_type", family, "llama, qwen2 or internlm")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        _refuse(
            path, "quantization_config", method, "weights that are not quantized, or a GGUF file"
        )
    limits = {key: PARAMS_LIMITS[name] for key, name in HF_KEYS.items()}
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    values = check_values(path, config, limits, optional)
    values = {HF_KEYS[key]: value for key, value in values.items()}
    head_dim = check_heads(path, values, HF_KEYS)
    values |= _hf_scaling(path, config, head_dim)
    values.setdefault("max_seq_len", 32768 if family == "qwen2" else 2048)  # transformers' defaults

    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        _refuse(path, "hidden_act", activation, "silu")
    if config.get("use_sliding_window") or (family != "qwen2" and config.get("sliding_window")):
        _refuse(path, "sliding_window", config.get("sliding_window"), "attention to all positions")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        _refuse(path, "layer_types", layer_types, "full_attention in all layers")
    if config.get("is_causal", True) is not True:
        _refuse(path, "is_causal", config["is_causal"], "true: each token sees those before it")
    known = {
        "is_causal",
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "head_dim"),
        *("hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        *("attention_bias", "mlp_bias"),
    }
    if family == "internlm":  # its "dynamic" scaling changes nothing up to max_position_embeddings
        known |= {"bias", "rotary"}
        rotary = config.get("rotary") or {}
        kind = rotary.get("type") if isinstance(rotary, dict) else rotary
        if kind not in (None, "origin", "dynamic"):
            _refuse(path, "rotary", rotary, '"origin" or "dynamic"')
        if isinstance(rotary, dict) and "base" in rotary:
            check_values(path, rotary, {"base": PARAMS_LIMITS["rope_theta"]}, ())
            values["rope_theta"] = float(rotary["base"])
    scaling = 'RoPE scaling of type "llama3", or none'
    refuse_other_computation(path, config, known=known, same={}, scaling=scaling)
    qkv, o = {"attention.wq", "attention.wk", "attention.wv"}, {"attention.wo"}
    biased = {
        "llama": qkv | o if config.get("attention_bias") else set(),
        "qwen2": qkv,
        "internlm": qkv | o if config.get("bias", True) else set(),
    }[family]
    if config.get("mlp_bias"):
        biased |= {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
    return meta_params(values), biased


# --- tokenizers -----------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (encoder.py of GPT-2).

    Bytes that Latin-1 can show stand for themselves, the others for what follows U+00FF.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


DIALOG_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>")


def make_vocabulary(
    path: Path,
    tokens: dict[str, int],
    merges: Iterable[tuple[str, str]],
    special: dict[str, int],
    ignore_merges: bool,
    **text_format: Any,
) -> Vocabulary:
    """A byte-level vocabulary as tiktoken has it: the ids of tokens are the order of merges.

    tokens and merges are spelled in the alphabet of bytes. Tokens that no merge makes, and that are
    not looked up as a whole either (ignore_merges), can never come out of a text: they are listed
    with the special tokens. Raises CheckpointError.
    """

    def refuse(problem: str) -> NoReturn:
        raise CheckpointError(path, f"its tokenizer cannot be used: {problem}")

    special, made, last = dict(special), set(), -1
    for left, right in merges:
        number = tokens.get(left + right)
        if number is None or number < last:
            where = f"the merge of {one_line(repr(left), 40)} and {one_line(repr(right), 40)}"
            refuse(f"{where} is not in the order of the ids, which tiktoken needs")
        made.add(left + right)
        last = number
    ranks = {}
    for token, number in tokens.items():
        if token in special:
            continue
        try:
            spelled = bytes(BYTE_OF[character] for character in token)
        except KeyError:
            refuse(f"{one_line(repr(token), 40)} is not spelled in bytes, as GPT-2 does it")
        if len(spelled) > 1 and token not in made and not ignore_merges:
            special[token] = number
        else:
            ranks[spelled] = number
    taken = {*ranks.values(), *special.values()}
    if max(taken, default=0) > 2 * len(taken) + 1000:
        refuse(f"its ids go up to {max(taken)}, with {len(taken)} tokens")
    for number in set(range(max(taken, default=0))) - taken:
        special[f"<|unused_{number}|>"] = number

    text_format = TextFormat(special, **text_format)
    ends = {*text_format.stop, text_format.begin, *DIALOG_TOKENS}  # no text may spell these
    spelled = tuple(name for name in text_format.spelled if name not in ends)
    text_format = text_format._replace(spelled=spelled)
    if all(bytes([byte]) in ranks for byte in range(256)):
        text_format = text_format._replace(unknown=None)
    metas = set(range(len(ranks), len(ranks) + len(SPECIAL_TOKENS)))
    named = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    if (
        (text_format.split, text_format.begin) == ("llama3", "<|begin_of_text|>")
        and set(special.values()) == metas
        and not (text_format.normalization or text_format.spelled)
        and text_format.dialog in (None, "llama3")
        and all(special.get(name) == len(ranks) + SPECIAL_TOKENS.index(name) for name in named)
    ):
        return Vocabulary(ranks, None)  # Llama 3's own; only names of reserved tokens may differ
    return Vocabulary(ranks, text_format)


def _dialog_of(template: object, special: dict[str, int], bos: str | None) -> dict[str, str | None]:
    """The dialog format that a chat template (in Jinja) is an instance of, and its own message.

    Llama Guard's, which put a task around a dialog, are none.
    """
    none = {"dialog": None, "begin_dialog": bos, "system": None}
    template = template if isinstance(template, str) and len(template) < 2**16 else ""
    begins = "bos_token" in template or (bos not in (None, *DIALOG_TOKENS) and bos in template)
    if "BEGIN CONVERSATION" in template:
        return none
    if "<|start_header_id|>" in template and {*DIALOG_TOKENS[:2], "<|eot_id|>"} <= special.keys():
        return none | {"dialog": "llama3"}
    if "<|im_start|>" not in template or not {*DIALOG_TOKENS[2:]} <= special.keys():
        return none
    # The texts that it writes, of which one may be a whole message: quoted in its tags, where a
    # backslash escapes, or outside of them.
    literals = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", template, re.DOTALL)
    escapes = {"n": "\n", "t": "\t"}
    texts = [
        re.sub(r"\\(.)", lambda escaped: escapes.get(escaped[1], escaped[1]), one or two)
        for one, two in literals
    ]
    texts += [re.split(r"[}%#]\}", part, maxsplit=1)[-1] for part in re.split(r"\{[{%#]", template)]
    own = None
    for text in texts:
        _, begun, message = text.partition("<|im_start|>system\n")
        message, ended, _ = message.partition("<|im_end|>")
        if own is None and begun and ended and message:
            own = message
    return {"dialog": "chatml", "begin_dialog": bos if begins else None, "system": own}


def _stop_of(ends: Iterable[object], special: dict[str, int]) -> tuple[str, ...]:
    """The special tokens that end a generation: `ends`, names or ids, and those of any dialog."""
    name_of = {number: name for name, number in special.items()}
    usual = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")
    names = {name for name in usual if name in special}
    for end in ends:
        name = name_of.get(end) if isinstance(end, int) else end
        if isinstance(name, str) and name in special:
            names.add(name)
    return tuple(sorted(names, key=special.get))


NO_TOKENIZER = (
    "its weights can be converted without it (python convert.py --no-tokenizer SOURCE OUT_DIR); "
    "then llama3.load_config, load_weights, forward and generate work, on token ids"
)


def _steps(found: object, key: str) -> list[object]:
    """The steps of a sequence in a tokenizer.json, or the only one."""
    inner = found.get(key) if isinstance(found, dict) else None
    return inner if isinstance(inner, list) else [found]


def _split_of(path: Path, found: object) -> str:
    """Which of SPLIT_PATTERNS a pre_tokenizer of tokenizer.json is. Raises CheckpointError."""
    steps = _steps(found, "pretokenizers")
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]) and not any(
        step.get("add_prefix_space") for step in steps
    ):
        regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and regex:
            return "gpt2"
        if kinds[0] == "Digits" and regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds[0] == "Split" and not regex and isinstance(steps[0].get("pattern"), dict):
            behavior = (str(steps[0].get("behavior")).lower(), bool(steps[0].get("invert")))
            pattern = steps[0]["pattern"].get("Regex")
            for name, known in tokenizer_setup.SPLIT_PATTERNS.items():
                if pattern == known and behavior in (("isolated", False), ("removed", True)):
                    return name
    _refuse(path, "pre_tokenizer", found, "the pattern of Llama 3, Qwen2, GPT-2 or SmolLM2")


def _begin_of(path: Path, found: object) -> str | None:
    """The token that a post_processor of tokenizer.json puts before a text."""
    begin = None
    steps = _steps(found, "processors")
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else step
        if kind == "TemplateProcessing":
            try:
                parts = [next(iter(part.items())) for part in step["single"]]
                names = [part["id"] for kind, part in parts if kind == "SpecialToken"]
                kinds = [kind for kind, _ in parts]
                if not all(isinstance(name, str) for name in names):
                    raise TypeError
            except (KeyError, TypeError, AttributeError, StopIteration):
                _refuse(path, "post_processor", step, "a template")
            if kinds not in (["Sequence"], ["SpecialToken", "Sequence"]):
                _refuse(path, "post_processor", step["single"], "at most one token before a text")
            begin = names[0] if names else begin
        elif kind not in (None, "ByteLevel"):
            _refuse(path, "post_processor", kind, "ByteLevel or TemplateProcessing")
    return begin


def hf_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in the tokenizer.json of a Hugging Face folder. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        found, other = "has no tokenizer.json", folder / "tokenizer.model"
        if other.is_file():
            kind = describe_file(read_file(other, 4096)) or "a file of another kind"
            found += f"; its tokenizer.model is {kind}"
        raise CheckpointError(
            folder, f"{found}, expected a byte-level tokenizer.json; {NO_TOKENIZER}"
        )
    content = read_json_object(path, JSON_LIMIT)
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    tokens, merges = model.get("vocab"), model.get("merges")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        kind = "a sentencepiece vocabulary" if model.get("byte_fallback") else model.get("type")
        problem = f"its tokenizer is {one_line(kind)}, expected byte-level BPE; {NO_TOKENIZER}"
        raise CheckpointError(path, problem)
    if not (
        isinstance(tokens, dict)
        and all(type(number) is int and 0 <= number < 2**24 for number in tokens.values())
        and len(set(tokens.values())) == len(tokens)
    ):
        raise CheckpointError(path, "found no ids of tokens in it, each once, as model.vocab")
    merges = merges if isinstance(merges, list) else [merges]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        for pair in pairs
    ):
        raise CheckpointError(path, "found no pairs of tokens in it, as model.merges")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk"):
        if model.get(key):
            _refuse(path, key, model[key], "none")
    normalizer = content.get("normalizer")
    steps = _steps(normalizer, "normalizers") if normalizer is not None else []
    kinds = [step.get("type") if isinstance(step, dict) else quoted(step) for step in steps]
    if kinds not in ([], ["NFC"]):
        _refuse(path, "normalizer", normalizer, "NFC, or none")
    added = content.get("added_tokens") or []
    try:
        special = {entry["content"]: entry["id"] for entry in added}
        if not all(
            isinstance(name, str) and type(number) is int for name, number in special.items()
        ):
            raise TypeError
        if not all(0 <= number < 2**24 for number in special.values()):
            raise ValueError
        spelled = tuple(entry["content"] for entry in added if not entry.get("special"))
        flags = ("lstrip", "rstrip", "single_word")
        if len(set(special.values())) < len(special) or any(
            entry.get(flag) for entry in added if not entry.get("special") for flag in flags
        ):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        _refuse(path, "added_tokens", added, "tokens with an id each, and no strip")
    begin, unknown = _begin_of(path, content.get("post_processor")), model.get("unk_token")
    if not (unknown is None or isinstance(unknown, str)):
        _refuse(path, "unk_token", unknown, "a token, or none")

    def optional(name: str) -> dict[str, Any]:
        return read_json_object(folder / name, CONFIG_LIMIT) if (folder / name).is_file() else {}

    settings, template = optional("tokenizer_config.json"), folder / "chat_template.jinja"
    dialog = settings.get("chat_template")
    if isinstance(dialog, list):  # several, by name
        named = [t for t in dialog if isinstance(t, dict) and t.get("name") == "default"]
        dialog = named[0].get("template") if named else None
    if template.is_file():
        dialog = read_file(template).decode(errors="replace")
    bos, end = (
        token.get("content") if isinstance(token, dict) else token
        for token in (settings.get("bos_token"), settings.get("eos_token"))
    )
    bos, ends = bos if isinstance(bos, str) else begin, [end]
    for name in ("generation_config.json", "config.json"):
        ids = optional(name).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    return make_vocabulary(
        path,
        tokens,
        pairs,
        special,
        ignore_merges=bool(model.get("ignore_merges")),
        split=_split_of(path, content.get("pre_tokenizer")),
        normalization="NFC" if kinds else None,
        spelled=spelled,
        begin=begin if begin in special else None,
        unknown=unknown if unknown in special else "",
        stop=_stop_of(ends, special),
        **_dialog_of(dialog, special, bos if bos in special else None),
    )


# --- GGUF -----------------------------------------------------------------------------------------


def _dequantized(raw: np.ndarray, kind: int, shape: tuple[int, ...]) -> Tensor:
    """A bfloat16 copy of quantized rows, some of them at a time."""
    import gguf

    tensor = torch.empty(shape, dtype=torch.bfloat16)
    rows = max(DEQUANTIZED_NUMBERS // shape[-1], 1)
    flat = tensor.view(-1, shape[-1])
    for start in range(0, len(flat), rows):
        with np.errstate(all="ignore"):  # infinite scales are found when they are computed with
            part = gguf.quants.dequantize(
                raw[start : start + rows], gguf.GGMLQuantizationType(kind)
            )
        flat[start : start + rows] = torch.from_numpy(part)
    return tensor


def gguf_tensors(path: Path, header: GGUF, keep: bool) -> dict[str, Stored]:
    """All tensors of a GGUF file, under the names there. Raises CheckpointError."""
    import gguf

    types = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
    opened = functools.partial(np.memmap, path, mode="c")  # a copy where written to: never
    if keep:
        opened = functools.cache(opened)

    def entry(shape: tuple[int, ...], kind: int, start: int) -> Stored:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        end = start + math.prod(shape) // block * block_bytes

        def load() -> Tensor:
            raw = np.asarray(opened()[start:end])
            if kind in types:
                return torch.from_numpy(raw).view(types[kind]).view(shape)
            return _dequantized(raw.reshape(-1, shape[-1] // block * block_bytes), kind, shape)

        name = gguf.GGMLQuantizationType(kind).name
        return Stored(shape, types.get(kind, torch.bfloat16), load, kind not in types, name)

    for name, (_, kind, _) in header.tensors.items():
        if kind not in types:
            kind = gguf.GGMLQuantizationType(kind)
            try:
                gguf.quants.dequantize(
                    np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind
                )
            except NotImplementedError:
                expected = "F32, F16, BF16 or a type that the gguf package dequantizes"
                problem = f"{one_line(name, 80)} is of type {kind.name}, expected {expected}"
                raise CheckpointError(path, problem) from None
    return {name: entry(*place) for name, place in header.tensors.items()}


def _from_gguf(name: str) -> str | None:
    new = {there: metas for metas, there in GGUF_NAMES.items()}
    return renamed(name, new, "blk", "layers")


GGUF_KEYS = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "feed_forward_length": "ffn_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "context_length": "max_seq_len",
}


def gguf_params(
    path: Path, header: GGUF, tensors: dict[str, Stored]
) -> tuple[dict[str, object], set[str]]:
    """What params.json would hold for a GGUF file, and which projections have a bias.

    Raises CheckpointError, which names the key that is missing, impossible or not computed here.
    """
    family = header.fields.get("general.architecture")
    if family not in ("llama", "qwen2"):
        _refuse(path, "general.architecture", family, "llama or qwen2")
    if header.fields.get("split.count", 1) not in (0, 1):
        _refuse(path, "split.count", header.fields["split.count"], "a model in a single file")
    of_family = {
        key.removeprefix(f"{family}."): value
        for key, value in header.fields.items()
        if key.startswith(f"{family}.")
    }
    limits = {key: PARAMS_LIMITS[name] for key, name in GGUF_KEYS.items()}
    optional = (
        "attention.head_count_kv",
        "rope.freq_base",
        "attention.key_length",
        "context_length",
    )
    values = check_values(path, of_family, limits, optional)
    values = {GGUF_KEYS[key]: value for key, value in values.items()}
    values["norm_eps"] = float(f"{values['norm_eps']:.7g}")  # it was a float32
    values.setdefault("rope_theta", 10000.0)
    head_dim = check_heads(path, values, GGUF_KEYS)
    for key in ("rope.dimension_count", "attention.value_length"):
        if of_family.get(key, head_dim) != head_dim:
            _refuse(path, key, of_family[key], f"{head_dim}, the width of a head")
    if of_family.get("rope.scaling.type", "none") != "none":
        _refuse(path, "rope.scaling.type", of_family["rope.scaling.type"], "none, or rope_freqs")
    if of_family.get("rope.scale_linear", 1) != 1:
        _refuse(path, "rope.scale_linear", of_family["rope.scale_linear"], "1")
    if of_family.get("attention.causal", True) is not True:
        _refuse(path, "attention.causal", False, "true: each token sees those before it")
    known = {*GGUF_KEYS, "rope.dimension_count", "rope.scaling.type", "rope.scale_linear"}
    known |= {"rope.scaling.original_context_length", "attention.causal"}
    refuse_other_computation(path, of_family, known=known, same={}, scaling="none, or rope_freqs")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(path, "token_embd.weight is missing, expected [vocab_size, dim]")
    values["vocab_size"] = tensors["token_embd.weight"].shape[0]
    if of_family.get("vocab_size", values["vocab_size"]) != values["vocab_size"]:
        rows = f"{values['vocab_size']}, as many as token_embd.weight has rows"
        _refuse(path, "vocab_size", of_family["vocab_size"], rows)
    freqs = tensors.get("rope_freqs.weight")
    if freqs is not None:
        if freqs.shape != (head_dim // 2,):
            problem = f"rope_freqs.weight has shape {[*freqs.shape]}, expected {[head_dim // 2]}"
            raise CheckpointError(path, problem)
        divisors = freqs.load().double()
        if not (divisors.isfinite().all() and divisors.min() > 1e-6 and divisors.max() < 1e6):
            raise CheckpointError(path, "rope_freqs.weight holds numbers that are no divisors")
        values |= scaling_params(divisors, values["rope_theta"], head_dim)
    biased = {
        re.sub(r"^layers\.\d+\.|\.bias$", "", name)
        for name in map(_from_gguf, tensors)
        if name is not None and name.startswith("layers.") and name.endswith(".bias")
    }
    if family == "qwen2":
        biased |= {"attention.wq", "attention.wk", "attention.wv"}
    return meta_params(values), biased


GGUF_SPLITS = {  # by tokenizer.ggml.pre
    "llama-bpe": ("llama3", None),
    "llama3": ("llama3", None),
    "llama-v3": ("llama3", None),
    "smaug-bpe": ("llama3", None),
    "qwen2": ("qwen2", "NFC"),
    "deepseek-r1-qwen": ("qwen2", "NFC"),
    "smollm": ("smollm", None),
    "gpt-2": ("gpt2", None),
}


def gguf_vocabulary(path: Path, fields: dict[str, object]) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises CheckpointError."""

    def field(key: str, default: object = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    model, pre = field("model"), field("pre", "default")
    if model != "gpt2":
        kind = "a sentencepiece vocabulary" if model == "llama" else quoted(model)
        problem = f"its tokenizer is {kind}, expected byte-level BPE; {NO_TOKENIZER}"
        raise CheckpointError(path, problem)
    if not isinstance(pre, str) or pre not in GGUF_SPLITS:
        _refuse(path, "tokenizer.ggml.pre", pre, f"one of {', '.join(GGUF_SPLITS)}")
    tokens, kinds, merges = field("tokens"), field("token_type"), field("merges", [])
    for key, value, kind in (("tokens", tokens, str), ("merges", merges, str)):
        if not (isinstance(value, list) and all(isinstance(item, kind) for item in value)):
            _refuse(path, f"tokenizer.ggml.{key}", type(value).__name__, "a list of texts")
    kinds = kinds if isinstance(kinds, list) else [1] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(path, "its tokens are not one of each, with a type of each")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    for pair in pairs:
        if len(pair) != 2:
            _refuse(path, "tokenizer.ggml.merges", pair[0], "pairs of tokens")
    n_used = max((i for i, kind in enumerate(kinds, start=1) if kind != 5), default=0)
    tokens, kinds = tokens[:n_used], kinds[:n_used]  # the rest are rows that stand for nothing
    ids = {token: number for number, token in enumerate(tokens)}
    special = {token: ids[token] for token, kind in zip(tokens, kinds, strict=True) if kind != 1}
    spelled = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 4]
    split, normalization = GGUF_SPLITS[pre]
    bos = field("bos_token_id")
    begins = field("add_bos_token", split == "llama3")
    bos = tokens[bos] if type(bos) is int and 0 <= bos < len(tokens) else None
    begin = bos if begins and bos in special else None
    ends = [field(f"{end}_token_id") for end in ("eos", "eot", "eom")]
    return make_vocabulary(
        path,
        ids,
        pairs,
        special,
        ignore_merges=split == "llama3",
        split=split,
        normalization=normalization,
        spelled=tuple(spelled),
        begin=begin,
        unknown="",
        stop=_stop_of(ends, special),
        **_dialog_of(
            fields.get("tokenizer.chat_template"), special, bos if bos in special else None
        ),
    )


# --- opening --------------------------------------------------------------------------------------


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def is_source(path: Path) -> bool:
    """Whether `path` looks like a model that is not in Meta's files."""
    if not os.path.isdir(path):  # unlike Path's, False for a name that is too long
        return os.path.isfile(path)
    if (path / "params.json").exists():
        return False
    return (path / "config.json").is_file() or bool(_gguf_files(path))


def open_source(path: str | os.PathLike, keep: bool = True) -> Source:
    """A Hugging Face folder, or a GGUF file or the folder of a single one.

    keep: map each file once and for all; else each tensor is mapped by itself, and what was read of
    it goes with it. Raises CheckpointError for what is not a whole model of a known family.
    """
    path = Path(path)
    needed = "a Hugging Face folder with its config.json, or a GGUF file"
    if not os.path.exists(path):
        raise CheckpointError(path, f"no such file or folder; needed is {needed}")
    if path.is_dir() and not [*path.glob("*.safetensors*"), *path.glob("pytorch_model*")]:
        files = _gguf_files(path)
        if len(files) > 1:
            names = one_line(", ".join(file.name for file in files), 100)
            raise CheckpointError(path, f"found several GGUF files ({names}); name one of them")
        if files:
            path = files[0]
        elif not (path / "config.json").is_file():
            raise CheckpointError(path, f"found no config.json; needed is {needed}")
    if path.is_file() and read_file(path, 4) != b"GGUF":
        found = describe_file(read_file(path, 4096)) or "a file of another kind"
        raise CheckpointError(path, f"found {found}; needed is {needed}; or name the file's folder")
    if path.is_dir():
        named = path / "config.json"
        config = read_json_object(named, CONFIG_LIMIT)
        params, biased = hf_params(named, config)
        tensors, old = hf_tensors(path, keep), "Hugging Face"
        new = {there: metas for metas, there in HF_NAMES.items()}
        stored = {
            name: renamed(name.removeprefix("model."), new, "layers", "layers")
            for name in tensors
            if not name.endswith("rotary_emb.inv_freq")  # computed, in older checkpoints
        }
        reorder, family = True, config["model_type"]
        there = to_hf_name
        types = sorted({str(t.dtype).split(".")[-1] for t in tensors.values() if len(t.shape) > 1})
        types = "/".join(types)
        tied = config.get("tie_word_embeddings", "lm_head.weight" not in tensors)
        vocabulary = functools.partial(hf_vocabulary, path)
    else:
        named, header = path, read_gguf(path, needed_package("gguf", path).GGML_QUANT_SIZES)
        tensors, old = gguf_tensors(path, header, keep), "GGUF"
        params, biased = gguf_params(path, header, tensors)
        stored = {name: _from_gguf(name) for name in tensors if name != "rope_freqs.weight"}
        family = header.fields["general.architecture"]
        reorder, tied = family == "qwen2", "output.weight" not in tensors
        there = functools.partial(renamed, names=GGUF_NAMES, old_layer="layers", new_layer="blk")
        types = "/".join(sorted({t.stored_as for t in tensors.values() if len(t.shape) > 1}))
        types += ", made bfloat16" * any(t.is_copy for t in tensors.values())
        vocabulary = functools.partial(gguf_vocabulary, path, header.fields)
    config = llama3.Config(**check_params(named, params, llama3.Config._field_defaults))
    for name, metas in stored.items():
        if metas is None:
            problem = (
                f"found {one_line(name, 80)}, which is no weight of a {family} model known here"
            )
            raise CheckpointError(path, problem)
    by_metas = {}
    for name, metas in stored.items():
        if metas in by_metas:
            problem = f"found {metas} under two names, one of them {one_line(name, 80)}"
            raise CheckpointError(path, problem)
        by_metas[metas] = tensors[name]
    if type(tied) is not bool:
        _refuse(named, "tie_word_embeddings", tied, "true or false")
    output = by_metas.pop("output.weight", None) if tied else None
    if not tied and "output.weight" not in by_metas:
        problem = "lm_head.weight is missing, but tie_word_embeddings is false"
        raise CheckpointError(path, problem)
    for name, tensor in by_metas.items():
        if isinstance(tensor.dtype, str):
            expected = f"expected one of {', '.join(llama3.DTYPES)}"
            raise CheckpointError(path, f"{name} is of type {tensor.dtype}, {expected}")
        if not 0 < math.prod(tensor.shape) < 2**48:
            problem = f"{name} has shape {one_line([*tensor.shape], 80)}, which cannot be"
            raise CheckpointError(path, problem)
    described = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in by_metas.items()
    }
    shapes = llama3.weight_shapes(config)
    try:
        described = check_weights(
            described, shapes, llama3.DTYPES, path, named.name, described=True
        )
    except CheckpointError as error:  # it knows Meta's names
        problem = re.sub(
            r"[\w.]+\.(weight|bias)", lambda name: there(name[0]) or name[0], error.problem
        )
        raise CheckpointError(path, problem) from None
    embeddings = by_metas["tok_embeddings.weight"]
    if output is not None and not (
        (output.shape, output.dtype) == (embeddings.shape, embeddings.dtype)
        and torch.equal(output.load().view(torch.uint8), embeddings.load().view(torch.uint8))
    ):
        problem = "lm_head.weight is not the embeddings, but tie_word_embeddings is true"
        raise CheckpointError(path, f"{problem}; set it to false to use lm_head.weight")
    for matrix in shapes:
        kind, bias = re.sub(r"^layers\.\d+\.|\.weight$", "", matrix), f"{matrix[:-6]}bias"
        if (kind in biased) != (bias in by_metas):
            state = "is there" if bias in by_metas else "is missing"
            problem = f"{there(bias)} {state}, which contradicts {named.name}"
            raise CheckpointError(path, problem)
    if reorder:
        by_metas = {n: in_metas_order(n, t, config.head_dim) for n, t in by_metas.items()}
    count = sum(math.prod(tensor.shape) for tensor in by_metas.values())
    found = (
        f"{old}, {family}, {config.n_layers} layers, {count / 1e6:.1f} million weights in {types}"
    )
    described = llama3.Weights(described)
    return Source(path, found, params, config, by_metas, described, vocabulary)


# --- writing Meta's files -------------------------------------------------------------------------


def refuse_existing(path: Path) -> None:
    """Raise CheckpointError if there is something at `path` but an empty folder."""
    try:
        there = os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise CheckpointError(path, f"cannot be written: {error.strerror}") from None
    if there:
        problem = "it is there already, and is not written over; name a new folder"
        raise CheckpointError(path, problem)


@contextlib.contextmanager
def new_folder(path: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write to, which becomes `path` when all is written, and is gone if it is not.

    Raises CheckpointError if there is something at `path`, or no room for as many bytes.
    """
    refuse_existing(path)
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if needed_bytes > free:
            problem = f"{needed_bytes / 1e6:.0f} MB are needed there, {free / 1e6:.0f} MB are free"
            raise CheckpointError(path, problem)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:99]}.", dir=path.parent) as made:
            folder = Path(made) / "new"
            folder.mkdir()
            yield folder
            os.replace(folder, path)
    except OSError as error:
        problem = f"cannot be written: {error.strerror or one_line(error)}"
        raise CheckpointError(path, problem) from None


@contextlib.contextmanager
def library_writes(path: Path) -> Iterator[None]:
    """What a library raises when it cannot write the file `path`, whatever it is, as OSError."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise OSError(f"{path.name}: {one_line(error)}") from None


def write_pth(path: Path, stored: dict[str, Stored], progress: Progress) -> None:
    """Write consolidated.00.pth, with one tensor in memory at a time.

    torch.save writes it with room for the numbers, which then are filled in, with their checksums.
    Without an output.weight, it is the embeddings once more, which are stored once.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes half a second

    with FakeTensorMode():
        content = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in stored.items()}
    content.setdefault("output.weight", content["tok_embeddings.weight"])
    with torch.serialization.skip_data(materialize_fake_tensors=True), library_writes(path):
        torch.save(content, path)
    names = iter(progress(stored))
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        entry_at = archive.start_dir
        for entry in archive.infolist():  # the numbers stand in it in the order of the names
            if re.search(r"/data/\d+$", entry.filename):
                tensor = stored[next(names)].load().contiguous()
                content = tensor.flatten().view(torch.uint8).numpy()
                file.seek(entry.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(name_length + extra_length, os.SEEK_CUR)
                file.write(content)
                file.seek(entry_at + 16)
                file.write(struct.pack("<I", zlib.crc32(content)))
                del tensor, content
            entry_at += (
                46 + len(entry.orig_filename.encode()) + len(entry.extra) + len(entry.comment)
            )
    next(names, None)  # ends the progress


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.model and, for other families than Llama 3, tokenizer_setup.json."""
    ranks, text_format = vocabulary
    with (folder / "tokenizer.model").open("wb") as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    if text_format is not None:
        text = json.dumps(text_format._asdict(), indent=1)
        (folder / "tokenizer_setup.json").write_text(text + "\n")


def to_meta(
    source: Source, out_dir: Path, progress: Progress = iter, tokenizer: bool = True
) -> None:
    """Write a model as Meta's files, for llama3.py to run as it runs Meta's.

    tokenizer: write that as well. Raises CheckpointError.
    """
    vocabulary = source.vocabulary() if tokenizer else None
    if vocabulary:
        source.tokenizer(vocabulary)  # or it is refused now
    sizes = (math.prod(s.shape) * s.dtype.itemsize for s in source.stored.values())
    with new_folder(out_dir, sum(sizes)) as folder:
        (folder / "params.json").write_text(json.dumps(source.params) + "\n")
        if vocabulary:
            write_vocabulary(folder, vocabulary)
        write_pth(folder / "consolidated.00.pth", source.stored, progress)


# --- writing a Hugging Face folder ----------------------------------------------------------------

SHARD_BYTES = 2**31  # of one safetensors file, as it is in memory while it is written
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>"
    "{{ 'ipython' if message['role'] == 'tool' else message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def hf_config(config: llama3.Config, weights: llama3.Weights, path: Path) -> dict[str, object]:
    """The config.json of a LlamaForCausalLM. Raises CheckpointError for what it cannot say."""
    biases = [name for name in weights if name.endswith(".bias")]
    kinds = {re.sub(r"^layers\.\d+\.|\.bias$", "", name) for name in biases}
    allowed = set(), {"attention.wq", "attention.wk", "attention.wv", "attention.wo"}
    everywhere = len(biases) == len(kinds) * config.n_layers
    if config.rope_divisors is not None or kinds not in allowed or not everywhere:
        found = "rope_divisors" if config.rope_divisors is not None else ", ".join(sorted(kinds))
        problem = f"found {found}, which Hugging Face's Llama does not have; expected a Llama model"
        raise CheckpointError(path, problem)
    dtype = llama3.default_dtype(weights, torch.device("meta"))
    scaling = None
    if config.use_scaled_rope:
        scaling = {"rope_type": "llama3", "factor": config.rope_scaling_factor}
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 8192}
    output, embeddings = (
        [tensor.data_ptr() for tensor in pieces_of(weights[name])]
        for name in ("output.weight", "tok_embeddings.weight")
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, name) for key, name in HF_KEYS.items()},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": bool(kinds),
        "mlp_bias": False,
        "tie_word_embeddings": output == embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def hf_tokenizer(ranks: dict[bytes, int], special: dict[str, int]) -> dict[str, object]:
    """The tokenizer.json of Llama 3's tokenizer.

    tiktoken merges any two neighbours that make a token, the lowest rank first. Here merges are
    listed, so every cut of every token in two tokens is one, in the order of the ranks.
    """

    def spelled(token: bytes) -> str:
        return "".join(CHARACTER_OF[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [[spelled(left), spelled(right)] for left, right in cuts]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    begin, text = "<|begin_of_text|>", {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": True}
            for name, number in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer_setup.SPLIT_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [special[begin]], "tokens": [begin]}},
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def to_hf(ckpt_dir: Path, out_dir: Path, progress: Progress = iter, tokenizer: bool = True) -> None:
    """Write Meta's files as a Hugging Face folder. Raises CheckpointError.

    tokenizer: write that as well.
    """
    needed_package("safetensors", ckpt_dir)
    from safetensors.torch import save_file

    config = llama3.load_config(ckpt_dir)
    weights = llama3.map_weights(ckpt_dir, config)
    settings = hf_config(config, weights, ckpt_dir)
    files = {}
    if tokenizer:
        loaded = tokenizer_setup.load_tokenizer(ckpt_dir / "tokenizer.model")
        if not tokenizer_setup.is_llama3(loaded):
            problem = "its tokenizer is not Llama 3's; leave it out with --no-tokenizer"
            raise CheckpointError(ckpt_dir, problem)
        special = loaded.format.special_tokens
        ranks = {
            loaded.decode_single_token_bytes(number): number
            for number in range(loaded.n_vocab)
            if number not in set(special.values())
        }
        files["tokenizer.json"] = hf_tokenizer(ranks, special)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_seq_len,
            "chat_template": CHAT_TEMPLATE,
        }
        settings["bos_token_id"] = special["<|begin_of_text|>"]
        settings["eos_token_id"] = sorted(tokenizer_setup.stop_tokens(loaded))
        files["generation_config.json"] = {
            key: settings[key] for key in ("bos_token_id", "eos_token_id")
        }
    files["config.json"] = settings
    if settings["tie_word_embeddings"]:
        del weights["output.weight"]
    sizes = {
        name: sum(tensor.nbytes for tensor in pieces_of(weight)) for name, weight in weights.items()
    }
    shards, size = [[]], 0
    for name in weights:
        if shards[-1] and size + sizes[name] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    n = len(shards)
    shard_names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    shard_names = ["model.safetensors"] if n == 1 else shard_names
    places = {}
    with new_folder(out_dir, sum(sizes.values())) as folder:
        names = iter(progress(weights))
        for shard, shard_name in zip(shards, shard_names, strict=True):
            tensors, storages = {}, set()
            for _ in shard:
                name = next(names)
                weight = weights[name]
                if isinstance(weight, list):  # of several files
                    weight = torch.cat(weight, dim=split_axis(name))
                if re.search(r"attention\.w[qk]\.", name):
                    weight = pairs_half_a_head_apart(weight, config.head_dim)
                weight = weight.contiguous()
                if weight.untyped_storage().data_ptr() in storages:  # which safetensors refuses
                    weight = weight.clone()
                storages.add(weight.untyped_storage().data_ptr())
                tensors[to_hf_name(name)] = weight
                places[to_hf_name(name)] = shard_name
            with library_writes(folder / shard_name):
                save_file(tensors, folder / shard_name, metadata={"format": "pt"})
        next(names, None)
        if n > 1:
            total = sum(sizes.values())
            files["model.safetensors.index.json"] = {
                "metadata": {"total_size": total},
                "weight_map": places,
            }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


# --- the command ----------------------------------------------------------------------------------


def note(message: object) -> None:
    say(f"convert.py: {one_line(message, limit=1000)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        note(f"error: {message}")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 if the input was bad."""
    parser = _Parser(
        prog="convert.py",
        description="Write a Hugging Face folder or a GGUF file as Meta's files, or the other way "
        "round. Weights keep their type; those of a quantized GGUF file become bfloat16.",
    )
    parser.add_argument(
        "source", type=Path, help="Hugging Face folder or GGUF file", metavar="SOURCE"
    )
    parser.add_argument("out_dir", type=Path, help="new folder to write", metavar="OUT_DIR")
    parser.add_argument("--to-hf", action="store_true", help="SOURCE is a folder of Meta's files")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    args = parser.parse_args(argv)
    bar = {"desc": "writing", "unit": " tensors", "leave": False}
    quiet = True if sys.stderr is None else None  # None: unless it is a terminal
    progress = functools.partial(tqdm, disable=quiet, **bar)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        refuse_existing(args.out_dir)
        if args.to_hf:
            to_hf(args.source, args.out_dir, progress, not args.no_tokenizer)
        else:
            source = open_source(args.source, keep=False)
            note(f"found {source.found}")
            to_meta(source, args.out_dir, progress, not args.no_tokenizer)
        note(f"wrote {args.out_dir}")
        return 0
    except CheckpointError as error:
        note(f"error: {error}")
        return 2
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        note(f"error: memory ran out ({one_line(error)})")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
