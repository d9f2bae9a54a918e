"""Hugging Face folders: config.json and weights, run as they are, against transformers."""

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import apart, compressed
from other_formats import KINDS, SCALING, SIZES, TOKENS, YARN, hf_model, logits_of, refused
from safetensors.torch import load_file, save_file

import formats
import llama3
from formats.errors import CheckpointError

MATRICES = ("attention.wq", "attention.wk")  # whose rows lie in another order there


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder that transformers writes of a model, made once and not to be changed."""
    folders = {}

    def save(kind, dtype=torch.float32, sharded=False):
        if (kind, dtype, sharded) not in folders:
            folder = folders[kind, dtype, sharded] = tmp_path_factory.mktemp("saved")
            size = "20KB" if sharded else "5GB"
            hf_model(kind, dtype).save_pretrained(folder, max_shard_size=size)
            assert (len([*folder.glob("*.safetensors")]) > 2) == sharded
        return folders[kind, dtype, sharded]

    return save


@pytest.fixture
def folder(tmp_path, saved):
    """A copy of one of them, to be changed."""
    return shutil.copytree(saved("qwen2"), tmp_path / "hf")


def change_config(folder, change, without=()):
    config = json.loads((folder / "config.json").read_text()) | change
    content = {key: value for key, value in config.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(content))


def assert_same_logits(path, expected):
    source = formats.open(path)
    weights = source.load_weights(dtype=torch.float32)
    assert apart(llama3.forward(TOKENS, weights, source.config), expected) < 1e-4


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_those_of_transformers(saved, kind):
    model = hf_model(kind)
    source = formats.open(saved(kind))
    weights = source.load_weights(dtype=torch.float32)
    assert apart(llama3.forward(TOKENS, weights, source.config), logits_of(model)) < 1e-4
    new = [*llama3.generate(TOKENS[:9], weights, source.config, max_new_tokens=40)]
    after = logits_of(model, torch.cat([TOKENS[:9], torch.tensor(new)]))[8:-1]
    assert new == after.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["qwen2, tied", "biases everywhere", "qwen3", "mistral"])
def test_a_model_in_several_files_is_one_model(saved, kind):
    assert_same_logits(saved(kind, sharded=True), logits_of(hf_model(kind)))


@pytest.mark.parametrize("kind", ["tied", "qwen2, tied"])
def test_a_tied_model_has_an_output_matrix_too(saved, kind):
    source = formats.open(saved(kind))
    assert "output.weight" not in source.stored
    weights = source.load_weights()
    output, embeddings = weights["output.weight"], weights["tok_embeddings.weight"]
    assert output.data_ptr() == embeddings.data_ptr()
    expected = hf_model(kind).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("dtype", "sharded"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_matrices_keep_their_type(saved, dtype, sharded):
    source = formats.open(saved("qwen2", dtype, sharded))
    assert {stored.dtype for stored in source.stored.values()} == {dtype}
    weights = source.load_weights(dtype=torch.float32)
    assert {w.dtype for w in weights.values() if w.dim() == 2} == {dtype}
    assert {w.dtype for w in weights.values() if w.dim() == 1} == {torch.float32}
    down = hf_model("qwen2", dtype).state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(weights["layers.1.feed_forward.w2.weight"], down)


def test_older_files_and_names_are_read(tmp_path):
    """pytorch_model.bin, one or several, tensors without "model.", and inv_freq in them."""
    model = hf_model("llama")
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_logits(tmp_path, logits_of(model))
    names = [*state]
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: state[name].clone() for name in names if places[name] == file}
        torch.save(part, tmp_path / file)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same_logits(tmp_path, logits_of(model))


def test_internlm_is_llama_with_biases_under_another_config(tmp_path, saved):
    kind = "biased, as InternLM"
    shutil.copytree(saved(kind), tmp_path, dirs_exist_ok=True)
    llamas = ("attention_bias", "rope_parameters", "head_dim", "mlp_bias")
    rotary = {"base": 10000, "type": "dynamic"}
    change = {"model_type": "internlm", "rotary": rotary}
    change_config(tmp_path, change, without=[*llamas, "max_position_embeddings"])
    assert formats.open(tmp_path).config.max_seq_len == 2048  # the first ones do not say it
    assert_same_logits(tmp_path, logits_of(hf_model(kind)))
    change_config(tmp_path, {"bias": True})
    assert_same_logits(tmp_path, logits_of(hf_model(kind)))
    change_config(tmp_path, {"rotary": rotary | {"base": 500}})
    assert formats.open(tmp_path).config.rope_theta == 500
    change_config(tmp_path, {"rotary": {"type": "yarn"}})
    refused(tmp_path, '"rotary" is {"type": "yarn"}')
    change_config(tmp_path, {"bias": False, "rotary": rotary})
    refused(tmp_path, "q_proj.bias is there, which contradicts the config")


def test_what_config_json_leaves_out_is_transformers_default(folder):
    """As Qwen2's and SmolLM's do; rope_theta stands at the top level, as before transformers 5."""
    import transformers

    change_config(folder, {}, without=["rope_parameters", "max_position_embeddings", "hidden_act"])
    config, theirs = formats.open(folder).config, transformers.Qwen2Config()
    assert config.max_seq_len == theirs.max_position_embeddings
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    change_config(folder, {"rope_theta": 1e6, "rope_scaling": None})
    assert formats.open(folder).config.rope_theta == 1e6


# --- memory ---------------------------------------------------------------------------------------


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "older name": {"type": "linear", "factor": 2.5},
    "llama3": SCALING,
    "llama3 of the whole context": {
        key: SCALING[key] for key in SCALING if key != "original_max_position_embeddings"
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn of the whole context": {"rope_type": "yarn", "factor": 4.0},
    "yarn, its own factor": YARN | {"attention_factor": 0.8},
    "yarn, two scales": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, other turns": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    "yarn, all waves": YARN | {"beta_fast": 1e-4, "beta_slow": 1e-5},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rope_is_that_of_transformers(folder, key, scaling):
    """As it reads this file: what is added as rope_scaling counts before rope_parameters."""
    import transformers

    change = {key: SCALINGS[scaling]}
    if key == "rope_scaling":
        change |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    change_config(folder, change)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(folder, logits_of(model))


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None},
        {"sliding_window": 256},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 9},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
        | {"layer_types": None, "max_window_layers": 2},
    ],
    ids=str,
)
def test_a_sliding_window_that_is_not_in_use_is_nothing(tmp_path, saved, change):
    kind = "qwen2" if "model_type" in change else "mistral"
    folder = shutil.copytree(saved(kind), tmp_path / "hf")
    change_config(folder, change)
    assert_same_logits(folder, logits_of(hf_model(kind)))


def test_norms_of_heads_are_there_in_all_layers_or_in_none(tmp_path, saved):

    folder = shutil.copytree(saved("qwen3"), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_norm.weight"]
    save_file(weights, folder / "model.safetensors")
    refused(folder, "model.layers.1.self_attn.k_norm.weight is missing")
    change_config(folder, {"model_type": "llama"})
    refused(folder, "model.layers.0.self_attn.q_norm.weight is there, which contradicts llama")


def test_a_params_json_beside_it_and_an_adapter_are_no_obstacle(tmp_path, saved):
    folder = shutil.copytree(saved("llama"), tmp_path / "hf")
    (folder / "params.json").write_text("{}")
    assert formats.open(folder).found.startswith("Hugging Face, llama, 2 layers")
    (folder / "adapter_config.json").write_text("{}")
    assert formats.open(folder).found.endswith(", without its adapter")


def test_the_hubs_names_and_its_cache_are_told_what_to_name(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("meta-llama/Llama-3.2-1B", "no such folder")
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in line
    cache = tmp_path / "models--a--b"
    shutil.copytree(saved("llama"), cache / "snapshots" / "0123abc")
    refused(cache, f"name a folder in its snapshots: {cache / 'snapshots' / '0123abc'}")
    assert formats.open(cache / "snapshots" / "0123abc").config.dim == 32


def test_a_type_of_numbers_that_is_not_known_is_named_by_the_files_own_names(folder):

    weights, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    refused(folder, f"{name} is of type F8_E4M3, expected F32, F16, BF16")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_holds_the_reordered_rows_alone(tmp_path):
    """The other weights of this model, 131 of 132 megabytes, stay in the file."""
    import transformers

    sizes = SIZES | {"hidden_size": 256, "vocab_size": 2**17, "max_position_embeddings": 8192}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    state = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    del state
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 1.3e8

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    before = anonymous()
    source = formats.open(tmp_path)
    copied = 2 * 2 * (256 * 256 + 128 * 256)  # bytes of two layers' wq and wk
    assert source.bytes_needed(torch.device("cpu"), torch.bfloat16) == copied
    assert {name for name, stored in source.stored.items() if stored.is_copy} == {
        f"layers.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in MATRICES
    }
    weights = source.load_weights(dtype=torch.float32)
    next(llama3.generate([5] * 10, weights, source.config, max_new_tokens=1))
    assert anonymous() - before < copied + 2e7


def test_the_memory_that_is_needed_is_that_of_copies_or_on_a_gpu_of_all_weights(saved):
    source = formats.open(saved("qwen2", torch.bfloat16))
    copied = 2 * 2 * (32 * 32 + 16 * 32 + 32 + 16)  # of wq and wk and their biases, in two layers
    assert source.bytes_needed(torch.device("cpu"), torch.float32) == copied
    whole = 4 * sum(w.numel() for w in hf_model("qwen2").parameters())
    assert source.bytes_needed(torch.device("cuda"), torch.float32) == whole


# --- what is refused ------------------------------------------------------------------------------

BAD_CONFIGS = [
    ({"model_type": "gemma2"}, '"model_type" is "gemma2"', "llama, mistral, qwen2, qwen3"),
    ({"model_type": "qwen3"}, "self_attn.q_norm.weight is missing, which contradicts qwen3"),
    ({"model_type": "mistral", "sliding_window": 200}, '"sliding_window" is 200'),
    ({"model_type": "mistral"}, "q_proj.bias is there"),
    ({"model_type": None}, '"model_type" is null'),
    ({"model_type": ["qwen2"]}, '"model_type" is ["qwen2"]'),
    ({"quantization_config": {"quant_method": "gptq"}}, '"quantization_config" is {"quant_method"'),
    ({"hidden_act": "gelu"}, '"hidden_act" is "gelu"'),
    (
        {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 1}
        | {"layer_types": ["full_attention", "sliding_attention"]},
        '"sliding_window" is 99',
    ),
    (
        {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 0}
        | {"layer_types": None},
        '"sliding_window" is 99',
    ),
    ({"model_type": "llama", "sliding_window": 99}, '"sliding_window" is 99'),
    ({"layer_types": ["full_attention", "chunked_attention"]}, '"layer_types" is'),
    ({"layer_types": 5}, "cannot be used: TypeError"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, '"rope_type" is "longrope"'),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, '"rope_type" is "dynamic"'),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, '"factor" is null'),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, '"factor" is "4"'),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, '"low_freq_factor" is null'),
    ({"rope_parameters": SCALING | {"high_freq_factor": 1.5}}, '"high_freq_factor" is 1.5'),
    ({"rope_parameters": {"full_attention": {}}}, "the same for all layers"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, '"partial_rotary_factor" is 0.5'),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "\"rope_theta\": found '1e6'"),
    ({"rope_parameters": [1]}, '"rope_parameters" is [1]'),
    ({"is_causal": False}, '"is_causal" is false'),
    ({"tie_word_embeddings": "false"}, '"tie_word_embeddings" is "false"'),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embeddings"),
    ({"hidden_size": 31}, '"num_attention_heads", "head_dim": found 4, 7'),
    ({"hidden_size": "32"}, "\"hidden_size\": found '32', expected a whole number"),
    ({"hidden_size": float("nan")}, '"hidden_size": found nan'),
    (
        {"hidden_size": 64},
        "model.embed_tokens.weight has shape [96, 32]",
        "expected [96, 64]",
    ),
    ({"num_hidden_layers": 3}, "model.layers.2.", "is missing"),
    ({"num_hidden_layers": 1}, "model.layers.1."),
    ({"num_hidden_layers": 10**9}, '"num_hidden_layers": found 1000000000'),
    ({"num_key_value_heads": 3}, '"num_key_value_heads": found 3'),
    ({"num_key_value_heads": 4}, "k_proj.weight has shape [16, 32]", "expected [32, 32]"),
    ({"intermediate_size": 40}, "mlp.gate_proj.weight has shape [48, 32]"),
    ({"intermediate_size": None}, '"intermediate_size" is missing'),
    ({"vocab_size": 97}, "has shape [96, 32]", "expected [97, 32]"),
    ({"rms_norm_eps": None}, '"rms_norm_eps": found None'),
    ({"model_type": "llama"}, "q_proj.bias is there, which contradicts the config"),
    ({"mlp_bias": True}, "gate_proj.bias is missing, which contradicts the config"),
]


@pytest.mark.parametrize("case", BAD_CONFIGS, ids=lambda case: str(case[0]))
def test_what_is_not_computed_or_contradicts_is_refused_by_name(folder, case):
    change, *says = case
    change_config(folder, change)
    refused(folder, *says)


def test_damaged_safetensors_are_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    outside = b'{"norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,99999999999]}}'
    nothing = b'{"norm.weight":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 2**63
    for damaged, says in (
        *((content[:keep], "download it again") for keep in (0, 7, 100, 5000, -1)),
        (b"\xff" * 8, "download it again"),
        (struct.pack("<Q", 2**62) + b"{}", "download it again"),
        (struct.pack("<Q", 20) + b'{"a": {"dtype": 1}} ', "download it again"),
        (struct.pack("<Q", 80) + outside.ljust(80), "download it again"),
        (struct.pack("<Q", 80) + nothing.ljust(80), ""),
        (b"<html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
    ):
        path.unlink()  # or what is mapped of it would change
        path.write_bytes(damaged)
        refused(folder, says)


def test_an_index_must_name_files_that_are_there(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    for places, says in (
        ({"model.norm.weight": "../part.safetensors"}, "which is not in the folder"),
        ({"model.norm.weight": "/etc/passwd"}, "which is not in the folder"),
        ({"model.norm.weight": "absent.safetensors"}, 'names "absent.safetensors"'),
        ({"model.norm.weight": "x" * 300}, "which is not in the folder"),
        ({"another": "part.safetensors"}, "says that another is in part.safetensors"),
        ({"model.norm.weight": 3}, "cannot be used: TypeError"),
        ([], "cannot be used: AttributeError"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        refused(folder, says)
    index.write_text("[]")
    refused(folder, "found a JSON list, expected an object")


def test_folders_without_weights_are_refused(tmp_path, folder):
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    refused(folder, "has no model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "it is an adapter (LoRA)")
    refused(tmp_path / "model.safetensors", "found a safetensors file", "or a model's folder")
    refused(tmp_path / ("y" * 300))


def test_weights_of_other_types_and_names_are_refused(folder):
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    for change, says in (
        ({name: weights[name].to(torch.int8)}, f"{name} is of type I8, expected F32, F16, BF16"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "self_attn.q_norm.weight"),
        ({"norm.weight": torch.ones(32)}, "norm.weight, twice"),
        ({name: weights[name].bfloat16()}, ""),
    ):
        path.unlink()
        save_file(weights | change, path)
        refused(folder, says) if says else formats.open(folder)  # types may differ


def test_what_a_pickle_may_hold_is_refused(tmp_path, folder):
    weights = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    path, name = folder / "pytorch_model.bin", "model.layers.0.mlp.up_proj.weight"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content, says in (
        ([1], "found no dictionary of dense tensors"),
        ({name: Code()}, "which could run any code"),
        (weights | {1: torch.ones(1)}, "found 1, which is no weight"),
        (weights | {f"model.layers.{'1' * 5000}.mlp.up_proj.weight": torch.ones(1)}, "no weight"),
    ):
        torch.save(content, path)
        refused(folder, says)
    assert not (tmp_path / "ran").exists()
    torch.save(weights, path)
    assert_same_logits(folder, logits_of(hf_model("qwen2")))
    compressed(path)
    refused(folder, "found a compressed archive", "torch.save it again")


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that some layouts are not settled yet
@pytest.mark.parametrize("layout", ["meta", "sparse", "nested"])
def test_tensors_without_a_number_in_each_place_are_refused(folder, layout):
    weights = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = {
        "meta": lambda w: w.to("meta"),
        "sparse": lambda w: w.to_sparse(),
        "nested": lambda w: torch.nested.nested_tensor([*w]),
    }[layout](weights[name])
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(folder, "pip install safetensors")


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no params\.json"):
        formats.open(tmp_path)
