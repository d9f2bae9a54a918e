"""params.json: which constants it gives a model, and what is said of one that is off."""

import json
import math

import pytest
import torch
from conftest import DEMO, PARAMS_8B, SMALL, config_of

import llama3
from llama3 import CheckpointError, config_from_params

REQUIRED = ["dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta"]


def refusal(params):
    """What is said of SMALL with these changes: one short line."""
    with pytest.raises(ValueError, match='"') as error:
        config_from_params(SMALL | params)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


# --- what a file gives ----------------------------------------------------------------------------


def test_the_published_params_of_8b_are_read(tmp_path):
    assert config_of(tmp_path, **PARAMS_8B) == llama3.Config(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        vocab_size=128256,
        norm_eps=1e-05,
        rope_theta=500000.0,
        rope_scaling_factor=None,
        rope_divisors=None,
        rope_attention_factor=1.0,
        max_seq_len=8192,
    )


@pytest.mark.parametrize(
    ("params", "ffn_dim"),
    [  # from the published weights: w1 of 8B, 70B, 405B, and the 3.2 models of 1B and 3B
        (PARAMS_8B, 14336),
        ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"dim": 16384, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),
        ({"dim": 2048, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),
        ({"dim": 3072, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 8192),
    ],
    ids=lambda value: value["dim"] if isinstance(value, dict) else value,
)
def test_ffn_dim_is_that_of_the_published_models(params, ffn_dim):
    assert config_from_params(SMALL | params | {"n_kv_heads": 8}).ffn_dim == ffn_dim


@pytest.mark.parametrize(("dim", "factor"), [(4096, 8), (8192, 8), (2048, 32), (3072, 32)])
def test_from_llama_3_1_on_rope_is_scaled_by_each_models_factor(dim, factor):
    params = PARAMS_8B | {"dim": dim, "n_heads": dim // 128, "use_scaled_rope": True}
    config = config_from_params(params)
    assert (config.rope_scaling_factor, config.max_seq_len) == (factor, 131072)
    assert config_from_params(params | {"rope_scaling_factor": 16}).rope_scaling_factor == 16


@pytest.mark.parametrize("absent", [{"n_kv_heads": None}, {}])
def test_without_n_kv_heads_every_query_head_has_its_own(absent):
    params = {key: value for key, value in SMALL.items() if key != "n_kv_heads"} | absent
    assert config_from_params(params).n_kv_heads == SMALL["n_heads"]


def test_the_required_keys_alone_make_a_config_and_null_stands_for_an_absent_key():
    required = {key: SMALL[key] for key in REQUIRED}
    config = config_from_params(required)
    assert (config.n_kv_heads, config.head_dim, config.ffn_dim) == (4, 16, 256)
    assert config.max_seq_len == 8192
    optional = {*llama3.Config._fields[:-1], *llama3.PARAMS} - set(REQUIRED)
    assert config_from_params(required | dict.fromkeys(optional)) == config


@pytest.mark.parametrize(
    "change", [{"head_dim": 32}, {"ffn_dim": 100}, {"max_seq_len": 77}, {"n_kv_heads": 1}], ids=str
)
def test_what_follows_from_other_keys_may_be_given(change):
    config = config_from_params(SMALL)
    assert config_from_params(SMALL | change) == config._replace(**change)


def test_other_models_may_have_divisors_of_ropes_frequencies():
    divisors = (1.0, 1, 2, 4, 8, 8, 8, 8)
    config = config_from_params(SMALL)._replace(rope_divisors=divisors)
    plain = llama3.rope_frequencies(config_from_params(SMALL))
    assert torch.equal(llama3.rope_frequencies(config), plain / torch.tensor(divisors))


def test_a_whole_number_serves_as_a_float():
    whole, real = (
        config_from_params(SMALL | {"rope_theta": kind(500000)}) for kind in (int, float)
    )
    assert whole == real
    assert torch.equal(llama3.rope_frequencies(whole), llama3.rope_frequencies(real))


def test_a_config_is_a_plain_record_that_is_made_whole_or_with_a_change(demo_config):
    assert demo_config == config_from_params(json.loads((DEMO / "params.json").read_text()))
    assert demo_config == llama3.Config(**demo_config._asdict())
    assert demo_config._replace(n_layers=1).n_layers == 1
    with pytest.raises(TypeError):
        llama3.Config(dim=64)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key):
    assert refusal({key: None}).startswith(f'"{key}": found None, expected a ')
    params = {name: value for name, value in SMALL.items() if name != key}
    with pytest.raises(ValueError, match=f'^"{key}": found None, expected a '):
        config_from_params(params)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", "64"),
        ("dim", 64.5),
        ("dim", 10**400),
        ("dim", [64]),
        ("dim", -2),
        ("n_layers", 2.0),
        ("n_layers", True),
        ("n_layers", 0),
        ("n_heads", {}),
        ("n_kv_heads", 0),
        ("n_kv_heads", False),
        ("head_dim", -1),
        ("ffn_dim", 2**40),
        ("vocab_size", ""),
        ("vocab_size", -1),
        ("max_seq_len", 0),
        ("multiple_of", 0),
        ("multiple_of", math.inf),
        ("ffn_dim_multiplier", -1),
        ("ffn_dim_multiplier", math.inf),
        ("norm_eps", math.nan),
        ("norm_eps", 0),
        ("norm_eps", 10**400),
        ("rope_theta", 0.5e-300),
        ("rope_theta", "500000"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_an_impossible_value_is_named(key, value):
    message = refusal({key: value})
    assert message.startswith(f'"{key}": found {repr(value)[:40]}, expected a ')
    assert "number from " in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": 65}, '"n_heads", "head_dim": found 4, 16, expected heads of an even width that'),
        ({"dim": 12}, '"n_heads", "head_dim": found 4, 3, expected heads of an even width that'),
        ({"n_heads": 3, "n_kv_heads": 3}, '"n_heads", "head_dim": found 3, 21'),
        ({"n_kv_heads": 3}, '"n_kv_heads": found 3, expected a divisor of 4'),
        ({"n_kv_heads": 8}, '"n_kv_heads": found 8'),
        ({"head_dim": 15}, '"head_dim"'),
        ({"use_scaled_rope": 1}, '"use_scaled_rope": found 1, expected a boolean'),
        ({"use_scaled_rope": "true"}, "\"use_scaled_rope\": found 'true'"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0.5}, '"rope_scaling_factor": found 0.5'),
        ({"rope_scaling_factor": 32}, '"use_scaled_rope": found False'),
        ({"rope_scaling_factor": 32, "use_scaled_rope": False}, '"use_scaled_rope": found False'),
        (
            {"rope_divisors": [2] * 8},
            '"rope_divisors" is [2, 2, 2, 2, 2, 2, 2, 2], which is unknown',
        ),
    ],
    ids=str,
)
def test_values_that_do_not_fit_together_are_named(changes, says):
    assert says in refusal(changes)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"factor": 32, "rope_type": "llama3"}},
        {"rope_scale_factor": 32},
        {"rope_freq_base": 10000},
        {"yarn_factor": 4},
        {"original_max_position_embeddings": 4096},
        {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}},
        {"n_experts": 8},
        {"moe_args": {"num_experts": 16}},
        {"vision_chunk_size": 448},
        {"vision_model": {"cross_attention_adapter": {"num_layers": 8}}},
        {"lora_args": {"rank": 16, "scale": 2.0}},
        {"use_qk_norm": True},
        {"sliding_window": 4096},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"what\nis this": [1] * 1000},
    ],
    ids=lambda change: next(iter(change)).replace("\n", " "),
)
def test_a_key_that_may_change_what_is_computed_is_refused_by_name(tmp_path, change):
    with pytest.raises(CheckpointError) as error:
        config_of(tmp_path, **change)
    message = str(error.value)
    assert f"{json.dumps(*change)} is " in message
    assert message.endswith("; remove it if it does not")
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch_size": 32},
        {"vision_chunk_size": -1, "vision_num_cross_attention_layers": -1},
        {"rope_scaling": None, "quantization_args": {}, "lora_args": None, "n_experts": 0},
        {"use_qk_norm": False, "hidden_act": "", "adapters": []},
    ],
    ids=str,
)
def test_a_key_that_changes_nothing_is_ignored(change):
    assert config_from_params(SMALL | change) == config_from_params(SMALL)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"dim": 64',
        b"[1, 2]",
        b"[]",
        b"3",
        b"null",
        b'"dim"',
        b"\x80\x81\xff\xfe",
        b"[" * 100_000,
        b'{"dim": ' + b"9" * 5000 + b"}",
        json.dumps(SMALL).encode()[:-1] + b', "dim": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"<html>",
        None,  # no such file
    ],
    ids=lambda content: str(content)[:12],
)
def test_a_params_json_that_is_no_json_object_of_constants_is_refused(tmp_path, content):
    path = tmp_path / "params.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        llama3.load_config(tmp_path)
    assert error.value.path == path
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(error.value.problem) < 700


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for folder in (tmp_path / "none", "x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError):
            llama3.load_config(folder)
