"""Hugging Face folders and GGUF files, run as they are and converted, against transformers."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import DEMO, ROOT, apart, compressed, config_of, peak_of, random_weights
from references import texts
from safetensors.torch import load_file, save_file

import command_line
import convert
import llama3
import tokenizer_setup
from checkpoint_files import CheckpointError

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
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
MODELS = {
    "llama": ("Llama", {}),
    "scaled": ("Llama", {"rope_parameters": SCALING}),
    "scaled as Meta's": ("Llama", {"rope_parameters": METAS_SCALING}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased, as InternLM": ("Llama", {"attention_bias": True}),
    "biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "heads that do not divide": (
        "Llama",
        {"head_dim": 16, "hidden_size": 72, "num_attention_heads": 6},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def made(kind, dtype=torch.float32):
    """A model of transformers, with weights and biases as wide as trained ones."""
    family, more = MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**SIZES | more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                weight.copy_(noise if "embed" in name else noise * weight.shape[1] ** -0.5)
            else:
                weight.copy_(noise if "bias" in name else 1 + 0.1 * noise)
    return model.to(dtype)


def saved(folder, model, sharded=False):
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    assert len([*folder.glob("*.safetensors")]) == 1 or sharded
    return folder


def loaded(source, dtype=torch.float32):
    return llama3.place_weights(source.weights(), torch.device("cpu"), dtype)


TOKENS = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(model, tokens=TOKENS):
    return model(tokens[None]).logits[0].float()


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "several"])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_of_a_hugging_face_folder_equal_those_of_transformers(tmp_path, kind, sharded):
    model = made(kind)
    source = convert.open_source(saved(tmp_path / "hf", model, sharded))
    weights = loaded(source)
    assert apart(llama3.forward(TOKENS, weights, source.config), theirs(model)) < 1e-4
    convert.to_meta(
        convert.open_source(tmp_path / "hf", keep=False), tmp_path / "meta", tokenizer=False
    )
    assert sorted(os.listdir(tmp_path)) == ["hf", "meta"]
    config = llama3.load_config(tmp_path / "meta")
    assert config == source.config
    converted = llama3.load_weights(tmp_path / "meta", config)
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_equal_those_of_transformers(tmp_path, kind):
    model = made(kind)
    source = convert.open_source(saved(tmp_path, model))
    ours = llama3.generate(TOKENS[:9], loaded(source), source.config, max_new_tokens=50)
    expected = model.generate(
        TOKENS[None, :9], max_new_tokens=50, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert [*ours] == expected[0, 9:].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "several"])
def test_weights_keep_their_type(tmp_path, sharded, dtype):
    model = made("qwen2", dtype)
    saved(tmp_path / "hf", model, sharded)
    source = convert.open_source(tmp_path / "hf")
    state = model.state_dict()
    weights = source.weights()
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert torch.equal(
        weights["layers.1.feed_forward.w2.weight"], state["model.layers.1.mlp.down_proj.weight"]
    )
    logits = llama3.forward(TOKENS, loaded(source), source.config)
    again = type(model).from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert apart(logits, theirs(again)) < 1e-4
    status = convert.main([str(tmp_path / "hf"), str(tmp_path / "meta"), "--no-tokenizer"])
    assert status == 0
    converted = llama3.map_weights(tmp_path / "meta", llama3.load_config(tmp_path / "meta"))
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    assert {weight.dtype for weight in converted.values()} == {dtype}


def test_older_files_and_names_are_read(tmp_path):
    """pytorch_model.bin, one or several, tensors without "model.", and inv_freq in them."""
    model = made("llama")
    expected = theirs(model)
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    source = convert.open_source(tmp_path)
    assert apart(llama3.forward(TOKENS, loaded(source), source.config), expected) < 1e-4
    names = [*state]
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: state[name].clone() for name in names if places[name] == file}
        torch.save(part, tmp_path / file)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    source = convert.open_source(tmp_path)
    assert apart(llama3.forward(TOKENS, loaded(source), source.config), expected) < 1e-4


def test_what_metas_formulas_give_is_not_spelled_out():
    """The published sizes: their params.json is Meta's own."""
    for dim, heads, ffn_dim, formula in [
        (2048, 32, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),
        (3072, 24, 8192, {"multiple_of": 256}),
        (4096, 32, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),
        (8192, 64, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        (16384, 128, 53248, {"multiple_of": 4096, "ffn_dim_multiplier": 1.2}),
        (896, 14, 4864, {"multiple_of": 256, "ffn_dim": 4864}),
    ]:
        config = {
            "model_type": "llama",
            "hidden_size": dim,
            "intermediate_size": ffn_dim,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }
        params, _ = convert.hf_params(Path("config.json"), config)
        expected = {"dim": dim, "n_layers": 1, "n_heads": heads, "n_kv_heads": 2, "vocab_size": 300}
        expected |= {"norm_eps": 1e-5, "rope_theta": 5e5} | formula
        assert params == expected | {"use_scaled_rope": True, "rope_scaling_factor": 8.0}
        made_of = llama3.Config(**params)
        assert (made_of.ffn_dim, made_of.max_seq_len) == (ffn_dim, 131072)


# --- GGUF -----------------------------------------------------------------------------------------

CONTENT = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "Q8_0": None,
    "Q4_K": None,
}


def in_blocks(weight, kind):
    """A weight quantized by the gguf package, or random blocks of Q4_K, which it cannot make."""
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name != "Q4_K":
        return gguf.quants.quantize(weight.float().numpy(), kind)
    random = np.random.default_rng(weight.numel())
    n = weight.numel() // 256
    scales = (random.random((n, 2)) * 0.01).astype(np.float16).view(np.uint8)
    rest = random.integers(0, 256, (n, 140), dtype=np.uint8)
    return np.concatenate([scales, rest], axis=1).reshape(weight.shape[0], -1)


def write_gguf(path, weights, config, kind="F32", family="llama", change=None, tokens=None):
    """Meta's weights as llama.cpp's converter writes them."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    for key, add in (change or {}).items():
        getattr(writer, key)(*add)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        tokens(writer)
    else:
        writer.add_tokenizer_model("none")
    for name, weight in weights.items():
        there = convert.renamed(name, convert.GGUF_NAMES, "layers", "blk")
        if weight.dim() == 1 or kind == "F32":
            writer.add_tensor(there, weight.float().numpy())
        elif kind == "F16":
            writer.add_tensor(there, weight.half().numpy())
        else:
            blocks = in_blocks(weight, kind)
            writer.add_tensor(there, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", CONTENT)
def test_logits_of_a_gguf_file_equal_those_of_transformers(tmp_path, kind):
    config = config_of(
        tmp_path, dim=256, n_heads=8, multiple_of=256, vocab_size=320, rope_theta=1e4
    )
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config, kind)
    source = convert.open_source(path)
    assert source.config == config._replace(max_seq_len=256)
    weights = source.weights()
    stored = CONTENT[kind] or torch.bfloat16
    assert {w.dtype for w in weights.values() if w.dim() == 2} == {stored}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # quantized weights are rounded to bfloat16 here
            parameter.copy_(parameter.to(stored if parameter.dim() == 2 else torch.float32))
    assert apart(llama3.forward(TOKENS, loaded(source), source.config), theirs(model)) < 1e-4
    convert.to_meta(convert.open_source(path, keep=False), tmp_path / "meta", tokenizer=False)
    converted = llama3.map_weights(tmp_path / "meta", llama3.load_config(tmp_path / "meta"))
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def test_a_folder_with_one_gguf_file_will_do(tmp_path):
    config = config_of(tmp_path)
    (tmp_path / "params.json").unlink()
    write_gguf(tmp_path / "any name.gguf", random_weights(config), config)
    assert convert.is_source(tmp_path)
    assert convert.open_source(tmp_path).config.dim == config.dim


@pytest.mark.parametrize("kind", ["qwen2", "qwen2, tied"])
def test_gguf_has_hugging_faces_order_for_qwen2(tmp_path, kind):
    """And biases. transformers reads it so, too."""
    model = made(kind)
    source = convert.open_source(saved(tmp_path / "hf", model))
    weights = source.weights()
    if "tied" in kind:
        del weights["output.weight"]
    for name in [*weights]:
        if "attention.wq" in name or "attention.wk" in name:
            weights[name] = convert.pairs_half_a_head_apart(weights[name], source.config.head_dim)
    path = write_gguf(tmp_path / "model.gguf", weights, source.config, family="qwen2")
    again = convert.open_source(path)
    assert again.config == source.config
    assert apart(llama3.forward(TOKENS, loaded(again), again.config), theirs(model)) < 1e-4
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    assert apart(theirs(read), theirs(model)) < 1e-4


@pytest.mark.parametrize("kind", ["scaled", "scaled as Meta's"])
def test_rope_freqs_of_a_gguf_file_are_obeyed(tmp_path, kind):
    """llama.cpp's converter writes what each frequency is divided by."""
    model = made(kind)
    source = convert.open_source(saved(tmp_path / "hf", model))
    plain = transformers.LlamaConfig(**SIZES | {"rope_parameters": {"rope_type": "default"}})
    plain.rope_parameters["rope_theta"] = model.config.rope_parameters["rope_theta"]
    inv_freq = model.model.rotary_emb.inv_freq
    unscaled = transformers.LlamaForCausalLM(plain).model.rotary_emb.inv_freq
    divisors = (unscaled / inv_freq).numpy()
    assert divisors.max() > 5
    change = {"add_tensor": ("rope_freqs.weight", divisors)}
    path = write_gguf(tmp_path / "model.gguf", source.weights(), source.config, change=change)
    again = convert.open_source(path)
    assert again.config.use_scaled_rope == (kind == "scaled as Meta's")
    assert torch.allclose(llama3.rope_frequencies(again.config), inv_freq, rtol=1e-5)
    assert apart(llama3.forward(TOKENS, loaded(again), again.config), theirs(model)) < 1e-4


# --- tokenizers -----------------------------------------------------------------------------------


def trained(split):
    """A byte-level tokenizer that the tokenizers package trains, as a family has it."""
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
    pattern = tokenizer_setup.SPLIT_PATTERNS[split]
    tokenizer.pre_tokenizer = {
        "gpt2": by_bytes,
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), by_bytes]),
    }.get(split) or pre.Sequence([pre.Split(Regex(pattern), "isolated"), by_bytes])
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"] if split != "llama3" else ["<|begin_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
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
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("split", tokenizer_setup.SPLIT_PATTERNS)
def test_token_ids_equal_those_of_transformers(tmp_path, split):
    expected = trained(split)
    expected.save_pretrained(tmp_path)
    vocabulary = convert.hf_vocabulary(tmp_path)
    assert vocabulary.text_format.split == split
    direct = tokenizer_setup.make_tokenizer("", *vocabulary)
    convert.write_vocabulary(tmp_path, vocabulary)
    written = tokenizer_setup.load_tokenizer(tmp_path / "tokenizer.model")
    assert written.format == direct.format
    assert written.n_vocab == len(expected)
    for text in [*texts(), "a<tool_call>b"]:
        ids = expected(text)["input_ids"]
        assert tokenizer_setup.encode(written, text) == ids, text
        assert tokenizer_setup.encode(direct, text) == ids, text
    assert ("<tool_call>" in written.format.spelled) == (split == "qwen2")


def test_bytes_that_are_no_tokens_are_left_out_as_transformers_does(tmp_path):
    from tokenizers import Tokenizer, models, trainers
    from tokenizers import pre_tokenizers as pre

    for unknown in (None, "[UNK]"):
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        special = [unknown] if unknown else []
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts()[:3], trainer)
        expected = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        expected.save_pretrained(tmp_path)
        ours = tokenizer_setup.make_tokenizer("", *convert.hf_vocabulary(tmp_path))
        assert ours.n_vocab == len(expected)
        for text in texts():
            assert tokenizer_setup.encode(ours, text) == expected(text)["input_ids"], text


def test_metas_tokenizer_comes_back_byte_for_byte(tmp_path, meta_tokenizer):
    """From the tokenizer.json that transformers' own converter makes of it."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = ROOT.parent / "shared" / "llama3" / "tokenizer.model"
    converter = TikTokenConverter(
        vocab_file=str(path),
        pattern=tokenizer_setup.SPLIT_PATTERN,
        extra_special_tokens=[*tokenizer_setup.SPECIAL_TOKENS],
    )
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    theirs = json.loads((tmp_path / "tokenizer.json").read_text())
    ranks = {meta_tokenizer.decode_single_token_bytes(i): i for i in range(128000)}
    ours = convert.hf_tokenizer(ranks, meta_tokenizer.format.special_tokens)
    for part in ("model", "pre_tokenizer", "added_tokens"):
        assert theirs[part] == ours[part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(ours))
    vocabulary = convert.hf_vocabulary(tmp_path)
    assert vocabulary == (ranks, None)  # Llama 3's own
    convert.write_vocabulary(tmp_path, vocabulary)
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    assert not (tmp_path / "tokenizer_setup.json").exists()


# --- and back -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "demo"
    assert convert.main(["--to-hf", str(DEMO), str(folder)]) == 0
    return folder


def test_the_demo_says_the_same_in_transformers(exported, demo_tokenizer, demo_config):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    for text in texts():
        assert tokenizer(text)["input_ids"] == tokenizer_setup.encode(demo_tokenizer, text), text
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    stop = tokenizer_setup.stop_tokens(demo_tokenizer)
    for prompt in ("17 plus 8 is ", "the capital of France is", "Once upon a time"):
        ids = tokenizer_setup.encode(demo_tokenizer, prompt)
        found = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
        found = found[len(ids) :]
        found = found[:-1] if found[-1] in stop else found
        ours = llama3.generate(ids, weights, demo_config, max_new_tokens=40, stop_tokens=stop)
        assert found == [*ours]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is the capital of Japan?\n"},
        {"role": "assistant", "content": "Tokyo."},
        {"role": "tool", "content": "{}"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer_setup.encode_dialog(demo_tokenizer, messages)


def test_there_and_back_is_the_same_to_the_bit(tmp_path, exported, demo_config):
    convert.to_meta(convert.open_source(exported, keep=False), tmp_path / "meta")
    config = llama3.load_config(tmp_path / "meta")
    formula = {"multiple_of": config.multiple_of, "ffn_dim_multiplier": config.ffn_dim_multiplier}
    assert config == demo_config._replace(**formula)
    there, back = (llama3.map_weights(folder, demo_config) for folder in (DEMO, tmp_path / "meta"))
    assert all(torch.equal(there[name], back[name]) for name in there)
    again = (tmp_path / "meta" / "tokenizer.model").read_bytes()
    assert again == (DEMO / "tokenizer.model").read_bytes()
    assert sorted(os.listdir(tmp_path / "meta")) == sorted(
        ["consolidated.00.pth", "params.json", "tokenizer.model"]
    )


@pytest.mark.parametrize("kind", ["scaled as Meta's", "tied", "biased, as InternLM", "head_dim"])
def test_models_of_other_sizes_go_there_and_back(tmp_path, kind, monkeypatch):
    model = made(kind)
    source = convert.open_source(saved(tmp_path / "hf", model))
    convert.to_meta(source, tmp_path / "meta", tokenizer=False)
    monkeypatch.setattr(convert, "SHARD_BYTES", 50_000)
    convert.to_hf(tmp_path / "meta", tmp_path / "back", tokenizer=False)
    assert len([*(tmp_path / "back").glob("*.safetensors")]) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.float32
    assert torch.equal(theirs(again), theirs(model))
    assert convert.open_source(tmp_path / "back").params == source.params


@pytest.mark.parametrize("kind", ["scaled", "qwen2"])
def test_what_hugging_faces_llama_does_not_have_is_not_exported(tmp_path, kind):
    source = convert.open_source(saved(tmp_path / "hf", made(kind)))
    convert.to_meta(source, tmp_path / "meta", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"rope_divisors|attention\.wk"):
        convert.to_hf(tmp_path / "meta", tmp_path / "back", tokenizer=False)
    assert sorted(os.listdir(tmp_path)) == ["hf", "meta"]


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder whose embeddings have rows that stand for no token, the likeliest."""
    config = transformers.Qwen2Config(**SIZES | {"vocab_size": 960})
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[901:] *= 100
    saved(tmp_path / "hf", model.to(torch.bfloat16))
    trained("qwen2").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def said(capfd, status, function, *arguments):
    """What a command wrote to standard output and to standard error."""
    assert function([*map(str, arguments)]) == status
    return capfd.readouterr()


def test_a_folder_is_run_as_it_is_and_converted(tmp_path, folder, capfd):
    prompt = ["--prompt", "Hello, 12", "--max-new-tokens", "8", "--dtype", "float32"]
    capfd.readouterr()
    out, err = said(capfd, 0, command_line.main, *prompt, "--ckpt-dir", folder)
    about = "Hugging Face, qwen2, 2 layers, 0.2 million weights in bfloat16"
    assert err == f"llama3.py: found in {folder}: {about}\n"
    assert out  # rows beyond the vocabulary are never chosen: they could not be written
    _, err = said(capfd, 0, convert.main, folder, tmp_path / "meta")
    assert err == f"convert.py: found {about}\nconvert.py: wrote {tmp_path / 'meta'}\n"
    again, err = said(capfd, 0, command_line.main, *prompt, "--ckpt-dir", tmp_path / "meta")
    assert (again, err) == (out, "")
    source = convert.open_source(folder)
    ids = source.tokenizer().encode("Hello, 12")
    ours = llama3.generate(ids, loaded(source), source.config, max_new_tokens=1)
    assert next(ours) > 900


def test_nothing_is_written_over_and_nothing_is_left_behind(tmp_path, folder, capfd, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    said(capfd, 0, convert.main, folder, out)  # an empty folder will do
    before = {path: path.read_bytes() for path in out.iterdir()}
    err = said(capfd, 2, convert.main, folder, out).err
    told = "it is there already, and is not written over; name a new folder"
    assert err == f"convert.py: error: {out}: {told}\n"
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    assert "is there already" in said(capfd, 2, convert.main, folder, tmp_path / "file").err
    assert "cannot be written" in said(capfd, 2, convert.main, folder, tmp_path / "file" / "x").err
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    assert "MB are free" in said(capfd, 2, convert.main, folder, tmp_path / "more").err
    monkeypatch.undo()

    for error, status in ((KeyboardInterrupt, 130), (MemoryError, 2)):

        def fails(names, error=error):
            yield next(iter(names))
            raise error

        monkeypatch.setattr(convert, "tqdm", lambda names, fails=fails, **_: fails(names))
        said(capfd, status, convert.main, folder, tmp_path / "more")
        said(capfd, status, convert.main, "--to-hf", DEMO, tmp_path / "more")
    assert sorted(os.listdir(tmp_path)) == ["file", "hf", "out"]


def test_the_archive_is_a_whole_one(tmp_path, folder):
    """With the checksums of what is in it, each tensor once, and read by torch.load unmapped."""
    convert.to_meta(convert.open_source(folder), tmp_path / "meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    content = torch.load(path, weights_only=True, mmap=False)
    weights = convert.open_source(folder).weights()
    assert content.keys() == weights.keys()
    assert all(torch.equal(content[name], weights[name]) for name in weights)
    model = made("tied")
    convert.to_meta(
        convert.open_source(saved(tmp_path / "tied", model)), tmp_path / "t", tokenizer=False
    )
    content = torch.load(tmp_path / "t" / "consolidated.00.pth", weights_only=True)
    output, embeddings = content["output.weight"], content["tok_embeddings.weight"]
    assert output.data_ptr() == embeddings.data_ptr()  # Meta's own code asks for both
    numbers = sum(weight.numel() for weight in model.parameters())
    assert path.parent.parent.joinpath("t/consolidated.00.pth").stat().st_size < 4 * numbers + 20000


def test_a_sentencepiece_vocabulary_is_refused_and_the_weights_are_not(tmp_path, folder, capfd):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    for main, arguments in (
        (convert.main, [folder, tmp_path / "meta"]),
        (command_line.main, ["--ckpt-dir", folder, "--prompt", "a"]),
    ):
        error = said(capfd, 2, main, *arguments).err.splitlines()[-1]
        assert "its tokenizer.model is a sentencepiece model" in error
        assert "--no-tokenizer" in error
    said(capfd, 0, convert.main, folder, tmp_path / "meta", "--no-tokenizer")
    assert sorted(os.listdir(tmp_path / "meta")) == ["consolidated.00.pth", "params.json"]


@pytest.mark.parametrize("package", ["safetensors", "gguf"])
def test_a_missing_package_is_named(tmp_path, folder, capfd, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    path = folder
    if package == "gguf":
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
    for main, arguments in (
        (convert.main, [path, tmp_path / "meta"]),
        (command_line.main, ["--ckpt-dir", path, "--prompt", "a"]),
    ):
        error = said(capfd, 2, main, *arguments).err.splitlines()[-1]
        assert f"it takes the package {package}; install it with: pip install {package}" in error


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_holds_the_reordered_rows_alone(tmp_path):
    """Of 0.5 GB, 21 MB; and of a conversion, a tensor at a time."""
    more = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000}
    more |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | more))
    state = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    del state
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 5e8

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    before = anonymous()
    source = convert.open_source(tmp_path)
    assert source.copied_bytes() == 2 * 2 * (2048 * 2048 + 512 * 2048)
    weights = loaded(source)
    next(llama3.generate([5] * 10, weights, source.config, max_new_tokens=1))
    assert anonymous() - before < source.copied_bytes() + 1e8
    del weights, source
    largest = 2 * 32000 * 2048
    source = convert.open_source(tmp_path, keep=False)
    peak = peak_of(lambda: convert.to_meta(source, tmp_path / "meta", tokenizer=False))
    assert peak < largest + 1e8


# --- what is refused ------------------------------------------------------------------------------


def refused(capfd, path, *expected):
    """The one line with which both commands refuse a source."""
    for main, arguments in (
        (convert.main, [path, Path(path).parent / "not written"]),
        (command_line.main, ["--ckpt-dir", path, "--prompt", "a"]),
    ):
        capfd.readouterr()
        out, err = said(capfd, 2, main, *arguments)
        *notes, line = err.splitlines()
        assert ": error: " in line
        assert all(": found " in note for note in notes)
        assert out == ""
        assert all(part in line for part in expected), line
    assert not (Path(path).parent / "not written").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mistral"}, '"model_type" is "mistral"'),
        ({"model_type": None}, '"model_type" is null'),
        ({"model_type": ["qwen2"]}, '"model_type" is ["qwen2"]'),
        ({"quantization_config": {"quant_method": "gptq"}}, '"quantization_config" is "gptq"'),
        ({"hidden_act": "gelu"}, '"hidden_act" is "gelu"'),
        ({"use_sliding_window": True, "sliding_window": 4096}, '"sliding_window" is 4096'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, '"layer_types" is'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, '"rope_type" is "yarn"'),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, '"rope_type" is "linear"'),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            '"low_freq_factor" is missing',
        ),
        ({"rope_parameters": SCALING | {"high_freq_factor": 1.5}}, '"high_freq_factor" is 1.5'),
        ({"rope_parameters": {"full_attention": {}}}, "the same for all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, '"partial_rotary_factor" is 0.5'),
        ({"rope_parameters": [1]}, '"rope_parameters" is [1]'),
        ({"num_local_experts": 8}, '"num_local_experts" is 8'),
        ({"is_causal": False}, '"is_causal" is false'),
        ({"logits_scaling": 8.0}, '"logits_scaling" is 8.0'),
        ({"tie_word_embeddings": "false"}, '"tie_word_embeddings" is "false"'),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embeddings"),
        ({"hidden_size": 63}, '"num_attention_heads" is 4'),
        ({"hidden_size": "64"}, '"hidden_size" is "64", expected a whole number'),
        (
            {"hidden_size": 128},
            "model.embed_tokens.weight has shape [960, 64], expected [960, 128]",
        ),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"num_key_value_heads": 3}, '"num_key_value_heads" is 3'),
        (
            {"num_key_value_heads": 4},
            "self_attn.k_proj.weight has shape [32, 64], expected [64, 64]",
        ),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight has shape"),
        ({"vocab_size": 961}, "has shape [960, 64], expected [961, 64] from config.json"),
        ({"rms_norm_eps": None}, '"rms_norm_eps" is missing'),
        ({"model_type": "llama"}, "q_proj.bias is there, which contradicts config.json"),
        ({"mlp_bias": True}, "gate_proj.bias is missing, which contradicts config.json"),
    ],
    ids=str,
)
def test_what_is_not_computed_or_contradicts_is_refused_by_name(folder, capfd, change, says):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in change or v is not None})
        if says.endswith("missing")
        else json.dumps(config)
    )
    refused(capfd, folder, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "its tokenizer is Unigram"),
        ({"model": None}, "found no ids of tokens"),
        ({"normalizer": {"type": "NFKC"}}, '"normalizer" is {"type": "NFKC"}'),
        ({"pre_tokenizer": {"type": "Metaspace"}}, '"pre_tokenizer" is'),
        ({"pre_tokenizer": None}, '"pre_tokenizer" is null'),
        ({"post_processor": {"type": "BertProcessing"}}, '"post_processor" is "BertProcessing"'),
        ({"added_tokens": [{"id": 0}]}, '"added_tokens" is'),
        ({"added_tokens": [{"content": "x", "id": 5, "lstrip": True}]}, '"added_tokens" is'),
    ],
    ids=str,
)
def test_tokenizers_of_another_kind_are_refused(folder, capfd, change, says):
    content = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(capfd, folder, says)


def test_merges_in_another_order_than_the_ids_are_refused(folder, capfd):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(capfd, folder, "is not in the order of the ids")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capfd):
    model = made("qwen2")
    saved(tmp_path / "hf", model)
    trained("qwen2").save_pretrained(tmp_path / "hf")
    told = 'the tokenizer has 901 tokens, but the "vocab_size" of the model is 320'
    refused(capfd, tmp_path / "hf", told)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_cut_off_safetensors_are_refused(folder, capfd, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(capfd, folder, "model.safetensors", "download it again")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (20).to_bytes(8, "little") + b'{"a": {"dtype": 1}} ',
        (80).to_bytes(8, "little")
        + b'{"norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,99999999999]}}'.ljust(80),
        b"<html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1",
    ],
    ids=lambda header: str(header[:12]),
)
def test_hostile_safetensors_are_refused(folder, capfd, header):
    (folder / "model.safetensors").write_bytes(header)
    refused(capfd, folder, "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({"model.norm.weight": "../model.safetensors"}, "expected a file in the same folder"),
        ({"model.norm.weight": "/etc/passwd"}, "expected a file in the same folder"),
        ({"model.norm.weight": "absent.safetensors"}, "which is not there"),
        ({"another": "part.safetensors"}, "does not have it"),
        ({"model.norm.weight": 3}, 'its "weight_map" is no object of file names'),
        ([], 'its "weight_map" is no object of file names'),
    ],
    ids=str,
)
def test_an_index_must_name_files_that_are_there(folder, capfd, places, says):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capfd, folder, says)


def test_other_folders_and_files_are_refused(tmp_path, folder, capfd):
    (folder / "model.safetensors").rename(tmp_path / "model.bin")
    refused(capfd, folder, "found neither; needed is model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(capfd, folder, "it is an adapter (LoRA)")
    torch.save({"a": torch.ones(1)}, tmp_path / "some.pth")
    refused(capfd, tmp_path / "some.pth", "found a zip archive", "or name the file's folder")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    refused(capfd, folder, "found several GGUF files (a.gguf, b.gguf); name one of them")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    refused(capfd, folder, "which could run any code")
    assert not (tmp_path / "ran").exists()
    torch.save([1], folder / "pytorch_model.bin")
    refused(capfd, folder, "found no dictionary of tensors")


def test_weights_of_other_types_and_names_are_refused(folder, capfd):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, path)
    refused(capfd, folder, "is of type I8, expected one of float32, bfloat16, float16")
    save_file(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, path)
    refused(capfd, folder, "found model.layers.0.self_attn.q_norm.weight, which is no weight")
    save_file(weights | {"norm.weight": torch.ones(64)}, path)
    refused(capfd, folder, "under two names")


# --- GGUF: what is refused, and its vocabularies --------------------------------------------------


def plain_gguf(tmp_path, name="model.gguf", **more):
    config = config_of(tmp_path, vocab_size=320, rope_theta=1e4)
    (tmp_path / "params.json").unlink()
    return write_gguf(tmp_path / name, random_weights(config), config, **more)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"add_uint32": ("llama.expert_count", 8)}, '"expert_count" is 8'),
        ({"add_string": ("llama.rope.scaling.type", "yarn")}, '"rope.scaling.type" is "yarn"'),
        ({"add_float32": ("llama.rope.scale_linear", 2.0)}, '"rope.scale_linear" is 2.0'),
        (
            {"add_uint32": ("llama.attention.sliding_window", 512)},
            '"attention.sliding_window" is 512',
        ),
        ({"add_bool": ("llama.attention.causal", False)}, '"attention.causal" is false'),
        ({"add_float32": ("llama.logit_scale", 0.5)}, '"logit_scale" is 0.5'),
        ({"add_key_length": (32,)}, '"rope.dimension_count" is 16'),
        ({"add_uint16": ("split.count", 3)}, '"split.count" is 3'),
        ({"add_uint32": ("general.alignment", 7)}, "its general.alignment is 7"),
        (
            {"add_tensor": ("rope_freqs.weight", np.ones(3, np.float32))},
            "rope_freqs.weight has shape",
        ),
        ({"add_tensor": ("rope_freqs.weight", np.zeros(8, np.float32))}, "no divisors"),
        ({"add_tensor": ("blk.0.attn_q_norm.weight", np.ones(16, np.float32))}, "attn_q_norm"),
        (
            {"add_tensor": ("blk.0.attn_q.bias", np.ones(64, np.float32))},
            "blk.1.attn_q.bias is missing",
        ),
    ],
    ids=str,
)
def test_gguf_files_that_are_not_computed_are_refused_by_name(tmp_path, capfd, change, says):
    if "general.alignment" in str(change):
        path = plain_gguf(tmp_path)
        content = path.read_bytes()
        key = b"general.architecture"
        at = content.index(key) - 8
        entry = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 7)
        count = struct.pack("<Q", struct.unpack_from("<Q", content, 16)[0] + 1)
        path.write_bytes(content[:16] + count + content[24:at] + entry + content[at:])
    else:
        path = plain_gguf(tmp_path, change=change)
    refused(capfd, path, says)


def test_another_architecture_is_refused(tmp_path, capfd):
    path = plain_gguf(tmp_path, family="gemma")
    refused(capfd, path, '"general.architecture" is "gemma", which is not computed here')


def test_cut_off_gguf_files_are_refused(tmp_path, capfd):
    path = plain_gguf(tmp_path)
    content = path.read_bytes()
    for keep in (0, 3, 4, 7, 20, 30, 60, 300, 700, 1500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(capfd, path, str(path))


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (4, 1, "found GGUF, version 1"),
        (4, 3 << 24, "found GGUF, a big-endian file"),
        (8, 2**63, "ends before its header does"),  # tensors
        (16, 2**63, "ends before its header does"),  # fields
        (24, 2**63, "ends before its header does"),  # bytes of the first key
        ("tokenizer.ggml.model", 2**62, "ends before its header does"),
    ],
)
def test_counts_and_lengths_beyond_the_file_end_at_once(tmp_path, capfd, at, value, says):
    path = plain_gguf(tmp_path)
    content = bytearray(path.read_bytes())
    if isinstance(at, str):  # the length of a text, after the key and the type
        at = content.index(at.encode()) + len(at) + 4
    size = "<I" if at == 4 else "<Q"
    struct.pack_into(size, content, at, value)
    path.write_bytes(content)
    refused(capfd, path, says)


def test_a_key_that_is_there_twice_is_refused(tmp_path, capfd):
    path = plain_gguf(tmp_path)
    content = path.read_bytes()
    at = content.index(b"llama.block_count") - 8
    field = content[at : at + 8 + 17 + 8]
    count = struct.pack("<Q", struct.unpack_from("<Q", content, 16)[0] + 1)
    path.write_bytes(content[:16] + count + content[24:at] + field + content[at:])
    refused(capfd, path, '"llama.block_count" is there twice in its header')


def test_arrays_and_tensors_beyond_the_file_end_at_once(tmp_path, capfd):
    path = plain_gguf(tmp_path)
    content = path.read_bytes()
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 9, 8) + struct.pack("<Q", 2**60)
    path.write_bytes(content[:24] + array + content[24:])
    refused(capfd, path, "not a whole GGUF file")
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 9, 9) + struct.pack("<Q", 2**60)
    path.write_bytes(content[:24] + array + content[24:])
    refused(capfd, path, "unknown type 9")
    name = b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 16 + 4  # its offset, after dimensions and type
    for offset, says in (
        (2**40, "not a whole GGUF file"),
        (2**63, "not a whole"),
        (3, "cannot be"),
    ):
        path.write_bytes(content[:at] + struct.pack("<Q", offset) + content[at + 8 :])
        refused(capfd, path, name.decode(), says)
    for kind, says in ((36, "36"), (9999, "unknown type 9999"), (24, "I8")):
        path.write_bytes(content[: at - 4] + struct.pack("<I", kind) + content[at:])
        refused(capfd, path, name.decode(), says)


def gguf_tokens(tokenizer, pre, padding=0, template=None, bos=None):
    """What llama.cpp's converter writes of a tokenizer of transformers."""
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


@pytest.mark.parametrize(
    ("pre", "split"),
    [("llama-bpe", "llama3"), ("qwen2", "qwen2"), ("gpt-2", "gpt2"), ("smollm", "smollm")],
)
def test_vocabularies_of_gguf_files_equal_those_of_transformers(tmp_path, capfd, pre, split):
    """And its rows of padding are never chosen."""
    expected = trained(split)
    config = config_of(tmp_path, vocab_size=960, rope_theta=1e4)
    (tmp_path / "params.json").unlink()
    weights = random_weights(config)
    weights["output.weight"][len(expected) :] *= 100  # the likeliest
    bos = 0 if split == "llama3" else None
    tokens = gguf_tokens(expected, pre, padding=960 - len(expected), bos=bos)
    path = write_gguf(tmp_path / "model.gguf", weights, config, tokens=tokens)
    tokenizer = convert.open_source(path).tokenizer()
    assert tokenizer.n_vocab == len(expected)
    for text in [*texts(), "a<tool_call>b"]:
        assert tokenizer_setup.encode(tokenizer, text) == expected(text)["input_ids"], text
    arguments = ["--prompt", "Hello", "--max-new-tokens", "9", "--ckpt-dir", path]
    out = said(capfd, 0, command_line.main, *arguments).out
    assert "PAD" not in out
    ids = expected("Hello")["input_ids"]
    source = convert.open_source(path)
    chosen = llama3.generate(ids, source.load_weights(), source.config, max_new_tokens=1)
    assert next(chosen) >= len(expected)
    n_vocab = tokenizer.n_vocab
    assert all(
        token < n_vocab
        for token in llama3.generate(
            ids, source.load_weights(), source.config, max_new_tokens=9, n_vocab=n_vocab
        )
    )


# --- dialogs --------------------------------------------------------------------------------------

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN_SYSTEM = QWEN2.replace("You are a helpful assistant.", 'It\\\'s\\n \\\\boxed{} \\"it\\"')
NO_SYSTEM = QWEN2[: QWEN2.index("{% if loop")] + QWEN2[QWEN2.index("{{'<|im_start|>' +") :]


@pytest.mark.parametrize("template", [QWEN2, OWN_SYSTEM, NO_SYSTEM], ids=["qwen2", "own", "none"])
@pytest.mark.parametrize("begins", [None, "<s>", "<|im_start|>"])
def test_dialogs_in_chatml_equal_those_of_transformers(tmp_path, template, begins):
    expected = trained("qwen2")
    if begins:  # SmolLM2's <|im_start|> begins every turn, and no dialog
        template = "{{ bos_token }}" * (begins == "<s>") + template
        expected.add_special_tokens({"bos_token": begins})
    expected.chat_template = template
    expected.save_pretrained(tmp_path)
    ours = tokenizer_setup.make_tokenizer("", *convert.hf_vocabulary(tmp_path))
    assert ours.format.dialog == "chatml"
    user = {"role": "user", "content": "Hi <|im_end|> there"}
    plain = {"role": "user", "content": " e\u0301 12\n"}
    for messages in (
        [plain],
        [{"role": "system", "content": "Be brief."}, plain],
        [plain, {"role": "assistant", "content": "yes"}, plain],
    ):
        ids = expected.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert tokenizer_setup.encode_dialog(ours, messages) == ids
    end = ours.encode_single_token("<|im_end|>")
    assert tokenizer_setup.stop_tokens(ours) == {end}
    system = template != NO_SYSTEM and "system" in template
    assert tokenizer_setup.encode_dialog(ours, [user]).count(end) == 1 + system  # not the user's


def test_a_tokenizer_without_a_dialog_format_says_so(folder):
    tokenizer = convert.open_source(folder).tokenizer()
    with pytest.raises(ValueError, match="has no known dialog format"):
        tokenizer_setup.encode_dialog(tokenizer, [])


# --- what means harm ------------------------------------------------------------------------------


def test_templates_are_read_in_one_go(folder):
    """Without patterns that try every beginning with every end."""
    path = folder / "tokenizer_config.json"
    for template in ("<|im_start|>system\n", "{{ '", '{{ "', "{%", "<|im_start|>user'"):
        settings = {"chat_template": template * (60_000 // len(template))}
        path.write_text(json.dumps(settings))
        convert.hf_vocabulary(folder)
    path.write_text(json.dumps({"chat_template": QWEN2 + " " * 2**16}))
    assert convert.hf_vocabulary(folder).text_format.dialog is None


def test_a_gguf_header_is_read_in_one_go(tmp_path, capfd):
    """Unused tokens, and a list that no one asked for."""
    content = plain_gguf(
        tmp_path, tokens=gguf_tokens(trained("gpt2"), "gpt-2", 100_000)
    ).read_bytes()
    n = 10**8 + 7  # the header stays a multiple of 32 bytes
    unasked = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, n) + bytes(n)
    count = struct.pack("<Q", struct.unpack_from("<Q", content, 16)[0] + 1)
    (tmp_path / "model.gguf").write_bytes(content[:16] + count + unasked + content[24:])
    del content, unasked
    fields = None

    def read():
        nonlocal fields
        fields = convert.read_gguf(tmp_path / "model.gguf", gguf.GGML_QUANT_SIZES).fields

    before = peak_of(lambda: (tmp_path / "model.gguf").read_bytes())
    assert peak_of(read) < before
    assert fields["a"] is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"blk.1.ffn_up.weight\x02", b"blk.1.ffn_up.weight\x00", "has 0 dimensions"),
        (b"blk.1.ffn_up.weight\x02", b"blk.1.ffn_up.weight\x09", "has 9 dimensions"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "is there twice"),
        (b"blk.1.ffn_up.weight", b"blk.01.ffn_u.weight", "which is no weight"),
    ],
    ids=str,
)
def test_odd_gguf_headers_are_refused(tmp_path, capfd, old, new, says):
    path = plain_gguf(tmp_path)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    refused(capfd, path, says)


def test_what_a_pickle_may_hold_is_refused(tmp_path, folder, capfd):
    weights = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    path, name = folder / "pytorch_model.bin", "model.layers.0.mlp.up_proj.weight"
    for bad in (
        {1: torch.ones(1)},
        {name: torch.ones(1, dtype=torch.bfloat16).expand(weights[name].shape)},
        {name: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        {name: torch._neg_view(weights[name])},
        {name: weights[name].to_sparse()},
        {f"model.layers.{'1' * 5000}.mlp.up_proj.weight": torch.ones(1)},
    ):
        torch.save(weights | bad, path)
        refused(capfd, folder)
    torch.save(weights, path)
    said(capfd, 0, command_line.main, "--ckpt-dir", folder, "--prompt", "a")
    compressed(path)
    refused(capfd, folder, "found a compressed zip archive; save it anew with torch.save")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": float("inf"), "content": "x"}]}),
        ("tokenizer.json", {"added_tokens": [{"id": "0", "content": "x"}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 0, "content": None}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 2000, "content": "x"}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 901, "content": ""}]}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 1.5}}),
        ("tokenizer.json", {"post_processor": {"type": "Sequence", "processors": 5}}),
        (
            "tokenizer.json",
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": []}}],
                }
            },
        ),
        ("config.json", {"eos_token_id": "x" * 2**22}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"hidden_size": float("nan")}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_types_in_a_folders_files_are_refused(folder, capfd, name, change):
    content = json.loads((folder / name).read_text()) | change
    (folder / name).write_text(json.dumps(content))
    refused(capfd, folder)


def test_names_that_are_too_long_are_refused(tmp_path, folder, capfd):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "x" * 300}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capfd, folder, "which is not there")
    for arguments in ([tmp_path / ("y" * 300), tmp_path / "o"], [folder, tmp_path / ("y" * 300)]):
        said(capfd, 2, convert.main, *arguments)
    said(capfd, 2, command_line.main, "--prompt", "a", "--ckpt-dir", tmp_path / ("y" * 300))


def run_convert(*arguments, before="pass", **options):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\nimport convert\n"
    code += f"sys.exit(convert.main({[*map(str, arguments)]!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, folder):
    """A limit for the size of files, no standard error, and a signal in the middle of it."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    for arguments in ([folder, tmp_path / "out"], ["--to-hf", DEMO, tmp_path / "out"]):
        result = run_convert(*arguments, before=limit)
        assert result.returncode == 2, result.stderr
        assert "out: cannot be written: " in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    stop = "import os, signal, convert\n"
    stop += "convert.tqdm = lambda names, **_: (os.kill(os.getpid(), signal.SIGTERM), names)[1]"
    assert run_convert(folder, tmp_path / "out", before=stop).returncode == 143
    assert sorted(os.listdir(tmp_path)) == ["hf"]
    closed = run_convert(folder, tmp_path / "out", before="sys.stderr = None")
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_links_are_followed_and_shared_tensors_are_written(tmp_path, folder, capfd):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    said(capfd, 0, convert.main, folder, tmp_path / "link")
    assert (tmp_path / "real" / "params.json").exists()
    weights = dict(llama3.map_weights(DEMO, llama3.load_config(DEMO)))
    first, second = (f"layers.0.feed_forward.{w}.weight" for w in ("w1", "w3"))
    weights[second] = weights[first]
    shutil.copytree(DEMO, tmp_path / "demo")
    torch.save(weights, tmp_path / "demo" / "consolidated.00.pth")
    said(capfd, 0, convert.main, "--to-hf", tmp_path / "demo", tmp_path / "demo-hf")
    again = convert.open_source(tmp_path / "demo-hf").weights()
    assert torch.equal(again[second], weights[first])


def test_a_setup_of_wrong_types_is_refused(tmp_path, folder, capfd):
    said(capfd, 0, convert.main, folder, tmp_path / "meta")
    path = tmp_path / "meta" / "tokenizer_setup.json"
    setup = json.loads(path.read_text())
    for change in (
        {"special_tokens": []},
        {"special_tokens": {"a": -1}},
        {"special_tokens": setup["special_tokens"] | {"": 901}},
        {"special_tokens": dict.fromkeys(setup["special_tokens"], 1)},
        {"split": "llama4"},
        {"split": []},
        {"normalization": "NFKD"},
        {"spelled": ["no such"]},
        {"spelled": "<"},
        {"begin": "no such"},
        {"stop": [3]},
        {"dialog": "alpaca"},
        {"system": 3},
        {"unknown": "no such"},
        {"more": 1},
    ):
        path.write_text(json.dumps(setup | change))
        error = said(
            capfd, 2, command_line.main, "--ckpt-dir", tmp_path / "meta", "--prompt", "a"
        ).err
        assert error.count("\n") == 1
        assert next(iter(change)) in error or "empty token" in error


def test_internlm_is_llama_with_biases_under_another_config(tmp_path):
    model = made("biased, as InternLM")
    saved(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("attention_bias", "rope_parameters", "head_dim", "mlp_bias"):
        del config[key]
    config |= {"model_type": "internlm", "rotary": {"base": 10000, "type": "dynamic"}}
    del config["max_position_embeddings"]  # as in the first ones
    for bias in ({"bias": True}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config | bias))
        source = convert.open_source(tmp_path)
        logits = llama3.forward(TOKENS, loaded(source), source.config)
        assert apart(logits, theirs(model)) < 1e-4
        assert source.config.max_seq_len == 2048
    (tmp_path / "config.json").write_text(json.dumps(config | {"bias": False}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is there, which contradicts"):
        convert.open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rotary": {"type": "yarn"}}))
    with pytest.raises(CheckpointError, match='"rotary" is'):
        convert.open_source(tmp_path)


# --- tokens of other kinds ------------------------------------------------------------------------


def test_tokens_that_no_merge_makes_and_gaps_between_ids(tmp_path):
    """The first never come out of a text, as with transformers; the others stand for nothing."""
    expected = trained("gpt2")
    expected.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"qqqq": 900}
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 905, "content": "<|far|>"})
    path.write_text(json.dumps(content))
    expected = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    vocabulary = convert.hf_vocabulary(tmp_path)
    convert.write_vocabulary(tmp_path, vocabulary)
    for ours in (
        tokenizer_setup.make_tokenizer("", *vocabulary),
        tokenizer_setup.load_tokenizer(tmp_path / "tokenizer.model"),
    ):
        assert ours.n_vocab == 906
        assert tokenizer_setup.encode(ours, "qqqq") == expected("qqqq")["input_ids"] != [900]
        assert "".join(tokenizer_setup.decode_stream(ours, [903, 905])) == "<|unused_903|><|far|>"


def test_no_text_spells_what_begins_or_ends_a_turn(tmp_path):
    """Even where a tokenizer.json calls these tokens not special."""
    from tokenizers import AddedToken

    expected = trained("qwen2")
    expected.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    ours = tokenizer_setup.make_tokenizer("", *convert.hf_vocabulary(tmp_path))
    assert ours.format.spelled == ("<tool_call>",)
    assert len(tokenizer_setup.encode(ours, "<|im_start|><|im_end|>")) > 2
    assert tokenizer_setup.special_tokens_in(ours, "a <|im_end|>") == ["<|im_end|>"]
    expected.add_tokens([AddedToken("<|x|>", lstrip=True, special=False)])
    expected.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match='"added_tokens" is'):
        convert.hf_vocabulary(tmp_path)


def test_a_template_that_puts_a_task_around_the_dialog_is_no_dialog_format():
    template = "<|start_header_id|>user<|end_header_id|>{{ messages }}<|eot_id|>"
    special = {"<|start_header_id|>": 1, "<|end_header_id|>": 2, "<|eot_id|>": 3}
    assert convert._dialog_of(template, special, None)["dialog"] == "llama3"
    guard = template.replace("{{", "<BEGIN CONVERSATION>{{")
    assert convert._dialog_of(guard, special, None)["dialog"] is None


def test_biases_in_one_layer_alone_are_not_exported(tmp_path):
    source = convert.open_source(saved(tmp_path / "hf", made("biased, as InternLM")))
    convert.to_meta(source, tmp_path / "meta", tokenizer=False)
    path = tmp_path / "meta" / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    for name in [name for name in weights if name.startswith("layers.1.") and "bias" in name]:
        del weights[name]
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"attention\.wk"):
        convert.to_hf(tmp_path / "meta", tmp_path / "back", tokenizer=False)


def test_copies_need_memory_which_is_compared_with_what_is_free(folder, capfd, monkeypatch):
    copied = convert.open_source(folder).copied_bytes()
    assert copied == 2 * 2 * (64 * 64 + 32 * 64 + 64 + 32)
    arguments = ["--ckpt-dir", folder, "--prompt", "a", "--max-new-tokens", "1"]
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 24_000)
    assert "of memory (weights 0 MB" in said(capfd, 2, command_line.main, *arguments).err
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 24_000 + copied)
    said(capfd, 0, command_line.main, *arguments)
