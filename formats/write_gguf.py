"""Write a model as a GGUF file, for llama.cpp."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import llama3
from formats.blocks import SIZES, to_blocks
from formats.errors import CheckpointError
from formats.gguf import DTYPES, GGUF_KEYS, to_gguf_name
from formats.rope import llama3_divisors
from formats.source import Source
from formats.write_text import CHAT_TEMPLATE, llama3_ranks, merges_of
from tokenizer_setup import SPECIAL_TOKENS

TYPES = ("BF16", "Q8_0", "Q4_0")


def fields_of(source: Source) -> dict[str, object]:
    """The constants of a model, under llama.cpp's names."""
    config = source.config
    fields = {key: getattr(config, metas) for metas, key in GGUF_KEYS.items()}
    fields |= {"rope.dimension_count": config.head_dim, "attention.value_length": config.head_dim}
    return {f"llama.{key}": value for key, value in fields.items()}


def tokenizer_fields(source: Source) -> dict[str, object]:
    """Those of Llama 3's tokenizer. Raises CheckpointError for another one."""
    ranks = llama3_ranks(source.tokenizer())
    if ranks is None:
        problem = "its tokenizer is not Llama 3's; leave it out with --no-tokenizer"
        raise CheckpointError(source.path, problem)
    spelled, merges = merges_of(ranks)
    tokens = [*sorted(spelled, key=spelled.get), *SPECIAL_TOKENS]
    unused = range(len(tokens), source.config.vocab_size)
    fields = {
        "tokens": tokens + [f"<|unused_{i}|>" for i in unused],
        "token_type": [1] * len(ranks) + [3] * len(SPECIAL_TOKENS) + [5] * len(unused),
        "merges": [f"{left} {right}" for left, right in merges],
        "pre": "llama-bpe",
        "bos_token_id": tokens.index("<|begin_of_text|>"),
        "eos_token_id": tokens.index("<|end_of_text|>"),
        "eot_token_id": tokens.index("<|eot_id|>"),
        "eom_token_id": tokens.index("<|eom_id|>"),
        "add_bos_token": True,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return named | {"tokenizer.chat_template": CHAT_TEMPLATE}


def to_gguf(
    source: Source,
    path: Path,
    kind: str,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    tokenizer: bool = True,
) -> None:
    """Write a model as a new file, with matrices of a type where its blocks divide their rows.

    kind: F32, F16, or one of TYPES. Raises CheckpointError.
    """
    import gguf

    config, tensors = source.config, {}
    if config.rope_attention_factor != 1 or "layers.0.attention.q_norm.weight" in source.stored:
        problem = "found YaRN or norms of heads, which this writes no GGUF file of"
        raise CheckpointError(source.path, problem)
    fields = fields_of(source) | (tokenizer_fields(source) if tokenizer else {})
    fields["tokenizer.ggml.model"] = "gpt2" if tokenizer else "none"
    for name, stored in source.stored.items():
        cut = kind in SIZES and stored.shape[-1] % SIZES[kind]
        tensors[name] = "F32" if len(stored.shape) == 1 else "BF16" if cut else kind
    divisors = config.rope_divisors
    if config.rope_scaling_factor:
        args = config.rope_theta, config.head_dim, config.rope_scaling_factor
        divisors = llama3_divisors(*args).tolist()

    def content(name: str) -> Tensor:
        """A tensor's bytes in the file."""
        w = source.stored[name].weight(llama3.split_axis(name), torch.float32)
        if tensors[name] in SIZES:
            return to_blocks(w, tensors[name])
        return w.to(DTYPES[gguf.GGMLQuantizationType[tensors[name]]]).contiguous()

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add |= {bool: writer.add_bool, list: writer.add_array}
        add[type(value)](key, value)
    if divisors:
        raw = torch.tensor(divisors, dtype=torch.float32).numpy()
        writer.add_tensor_info("rope_freqs.weight", raw.shape, raw.dtype, raw.nbytes)
    for name, type_name in tensors.items():
        number, shape = gguf.GGMLQuantizationType[type_name], source.stored[name].shape
        numbers, size = gguf.GGML_QUANT_SIZES[number]
        n_bytes, there = math.prod(shape) // numbers * size, to_gguf_name(name)
        writer.add_tensor_info(there, shape, np.dtype("float32"), n_bytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors:
        writer.write_tensor_data(raw)
    for name in progress(tensors):
        writer.write_tensor_data(content(name).flatten().view(torch.uint8).numpy())
    writer.close()
