"""Models and tokenizers as other programs write them, for the tests of formats/.

Small models of transformers, GGUF files as llama.cpp's converter writes them, byte-level
tokenizers of the tokenizers package, and what is said of files that are refused. Nothing that is
returned here is to be changed: most of it is made once and used by many tests.
"""

import functools
import json

import numpy as np
import pytest
import torch
from references import texts

import formats
from formats.errors import CheckpointError
from formats.vocabulary import QWEN2_PATTERN
from tokenizer_setup import SPLIT_PATTERN

# --- models of transformers -----------------------------------------------------------------------

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
METAS_SCALING = SCALING | {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
METAS_SCALING |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama": ("Llama", {}),
    "scaled": ("Llama", {"rope_parameters": SCALING}),
    "scaled as Meta's": ("Llama", {"rope_parameters": METAS_SCALING}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased, as InternLM": ("Llama", {"attention_bias": True}),
    "biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}
TOKENS = torch.randint(0, 96, (50,), generator=torch.Generator().manual_seed(1))


@functools.cache
def hf_model(kind, dtype=torch.float32, **more):
    """A model of transformers, with weights and biases as wide as trained ones."""
    import transformers

    family, of_kind = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**SIZES | of_kind | more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:
            weight.copy_(noise if "embed" in name else noise * weight.shape[1] ** -0.5)
        else:
            weight.copy_(noise if "bias" in name else 1 + 0.1 * noise)
    return model.to(dtype)


def logits_of(model, tokens=TOKENS):
    """What transformers computes."""
    with torch.no_grad():
        return model(tokens[None]).logits[0].float()


# --- GGUF files -----------------------------------------------------------------------------------

GGUF_NAMES = {  # by the last part of Meta's names but for ".weight" and ".bias"
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


def gguf_name(name):
    """blk.3.attn_q.weight for layers.3.attention.wq.weight."""
    *parts, last, kind = name.split(".")
    layer = f"blk.{parts[1]}." if parts else ""
    return f"{layer}{GGUF_NAMES[last]}.{kind}"


def in_blocks(weight, kind):
    """A weight quantized by the gguf package, or random blocks of types that it cannot make."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    if kind.name not in ("Q4_K", "IQ4_NL"):
        return gguf.quants.quantize(weight.float().numpy(), kind)
    random = np.random.default_rng(weight.numel())
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    n, n_scales = weight.numel() // numbers, 2 if kind.name == "Q4_K" else 1
    scales = (random.random((n, n_scales)) * 0.01).astype(np.float16).view(np.uint8)
    rest = random.integers(0, 256, (n, size - 2 * n_scales), dtype=np.uint8)
    return np.concatenate([scales, rest], axis=1).reshape(weight.shape[0], -1)


def write_gguf(
    path, weights, config, kind="F32", family="llama", change=None, tokens=None, split=None
):
    """Meta's weights as llama.cpp's converter writes them; returns the path.

    change: methods of gguf.GGUFWriter with their arguments. tokens: writes the vocabulary. split:
    how many files there are, and how many tensors in all of them.
    """
    import gguf

    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if split:
        writer.add_uint16("split.count", split[0])
        writer.add_int32("split.tensors.count", split[1])
    for key, arguments in (change or {}).items():
        getattr(writer, key)(*arguments)
    writer.add_tokenizer_model("gpt2" if tokens else "none")
    if tokens:
        tokens(writer)
    for name, weight in weights.items():
        if weight.dim() == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), weight.float().numpy())
        elif kind == "F16":
            writer.add_tensor(gguf_name(name), weight.half().numpy())
        else:
            type_of_blocks = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), in_blocks(weight, kind), raw_dtype=type_of_blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- tokenizers -----------------------------------------------------------------------------------


PATTERNS = {"llama3": SPLIT_PATTERN, "qwen2": QWEN2_PATTERN}


@functools.cache
def _trained(split):
    """The tokenizer.json of `trained_tokenizer`, as text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama3"))
    by_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt2", "smollm"))
    tokenizer.pre_tokenizer = {
        "gpt2": by_bytes,
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), by_bytes]),
    }.get(split) or pre.Sequence([pre.Split(Regex(PATTERNS[split]), "isolated"), by_bytes])
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"] if split != "llama3" else ["<|begin_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if split == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    if split == "qwen2":
        tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer.to_str()


def trained_tokenizer(split):
    """A new byte-level tokenizer of transformers, trained here, that cuts text as a family does."""
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_trained(split))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@functools.cache
def _fallback():
    """The tokenizer.json of `fallback_content`, as text."""
    from tokenizers import Tokenizer, models, processors, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.Metaspace()
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *in_bytes]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*texts()[:4], *["hello world, here it is"] * 5], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    content["added_tokens"] = content["added_tokens"][:3]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}, replace]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    content["pre_tokenizer"] = None
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    content["decoder"] = {"type": "Sequence", "decoders": decoders}
    return json.dumps(content)


def fallback_content():
    """A tokenizer.json of a vocabulary with byte fallback, written as Llama 2's is."""
    return json.loads(_fallback())


CHATML = (  # Qwen2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def gguf_tokens(tokenizer, pre, padding=0, template=None, bos=None):
    """For `write_gguf`: what llama.cpp's converter writes of a tokenizer of transformers."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}
    kinds = {t["content"]: 3 if t["special"] else 4 for t in content["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    pads = [f"[PAD{len(tokens) + i}]" for i in range(padding)]

    def write(writer):
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, *pads])
        writer.add_token_types([kinds.get(token, 1) for token in tokens] + [5] * padding)
        writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
        if bos is not None:
            writer.add_bos_token_id(bos)
        if template:
            writer.add_chat_template(template)

    return write


def write_qwen2(folder):
    """A Hugging Face folder with 501 tokens and 27 rows more, which the model thinks likeliest."""
    model = hf_model("qwen2", vocab_size=528)
    changed = type(model)(model.config).bfloat16()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.lm_head.weight[501:] *= 100
    changed.save_pretrained(folder)
    tokenizer = trained_tokenizer("qwen2")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


# --- what is refused ------------------------------------------------------------------------------


def refused(path, *expected, read=formats.open):
    """The text of the one-line CheckpointError with which a file or folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert len(line) < 700 + len(str(path))
    assert all(part in line for part in expected), line
    return line


def tokenizer_of(path):
    """For `refused`: a source's tokenizer."""
    return formats.open(path).tokenizer()
