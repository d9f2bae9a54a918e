"""load_config and load_weights: what they accept, and what they say of everything else."""

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import PARAMS_8B, SMALL, config_of, random_weights

import checkpoint_files
import llama3
from checkpoint_files import CheckpointError


def save(folder, weights):
    torch.save(weights, folder / "consolidated.00.pth")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a good checkpoint, its Config and its weights."""
    config = config_of(tmp_path)
    weights = random_weights(config, torch.bfloat16)
    save(tmp_path, weights)
    return tmp_path, config, weights


def refusal(function, *args):
    """The message with which `function` refuses its arguments: one line that names the folder."""
    with pytest.raises(CheckpointError) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    assert str(args[0]) in message
    return message.removeprefix(str(args[0]))


# --- params.json ----------------------------------------------------------------------------------


def test_the_published_params_are_read(tmp_path):
    config = config_of(tmp_path, **PARAMS_8B)
    assert {key: getattr(config, key) for key in PARAMS_8B} == PARAMS_8B
    assert (config.head_dim, config.ffn_dim, config.max_seq_len) == (128, 14336, 8192)
    assert config.use_scaled_rope is False


def test_llama_3_1_has_scaled_rope_and_a_context_of_131072(tmp_path):
    config = config_of(tmp_path, **PARAMS_8B, use_scaled_rope=True)
    assert config.use_scaled_rope is True
    assert config.rope_scaling_factor == 8
    assert config.max_seq_len == 131072


@pytest.mark.parametrize("absent", [{"n_kv_heads": None}, {}])
def test_without_n_kv_heads_every_query_head_has_its_own(tmp_path, absent):
    params = {key: value for key, value in SMALL.items() if key != "n_kv_heads"} | absent
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert llama3.load_config(tmp_path).n_kv_heads == SMALL["n_heads"]


def test_a_config_made_by_hand_has_the_defaults_of_a_file_without_those_keys(tmp_path):
    required = {key: SMALL[key] for key in REQUIRED}
    (tmp_path / "params.json").write_text(json.dumps(required))
    by_hand, loaded = llama3.Config(**required), llama3.load_config(tmp_path)
    assert llama3.weight_shapes(by_hand) == llama3.weight_shapes(loaded)
    assert by_hand._replace(n_kv_heads=loaded.n_heads) == loaded
    assert set(checkpoint_files.PARAMS_LIMITS) == set(llama3.Config._fields)


def test_unknown_keys_are_ignored_and_null_is_absent_where_a_key_is_optional(tmp_path):
    extra = {
        "max_batch_size": 4,
        "vision_chunk_size": -1,
        "quantization_args": None,
        "head_dim": 16,
    }
    nulls = dict.fromkeys(["ffn_dim_multiplier", "use_scaled_rope", "rope_scaling_factor"])
    assert config_of(tmp_path, **extra, **nulls) == config_of(tmp_path)


def test_a_whole_number_serves_as_a_float(tmp_path):
    config = config_of(tmp_path, rope_theta=500000)
    assert config.rope_theta == 500000.0
    assert type(config.rope_theta) is float


REQUIRED = ["dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path, key):
    params = {name: value for name, value in SMALL.items() if name != key}
    (tmp_path / "params.json").write_text(json.dumps(params))
    message = refusal(llama3.load_config, tmp_path)
    assert f'"{key}" is missing' in message
    (tmp_path / "params.json").write_text(json.dumps(params | {key: None}))
    assert f'"{key}" is null' in refusal(llama3.load_config, tmp_path)


BAD_VALUES = ["64", "", [64], {}, True, False, 0, -2, 0.5e-300, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("key", [*REQUIRED, "n_kv_heads", "ffn_dim_multiplier"])
def test_an_impossible_value_is_named(tmp_path, key, value):
    (tmp_path / "params.json").write_text(json.dumps(SMALL | {key: value}))
    message = refusal(llama3.load_config, tmp_path)
    assert re.search(rf'"{key}" is .*, expected a (whole )?number', message)
    assert len(message) < 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": 65}, '"n_heads" is 4, expected a number that cuts "dim" (65)'),
        ({"dim": 12}, '"n_heads" is 4, expected a number that cuts "dim" (12)'),
        ({"n_heads": 3, "n_kv_heads": 3}, '"n_heads" is 3'),
        ({"n_kv_heads": 3}, '"n_kv_heads" is 3, expected a number that divides "n_heads" (4)'),
        ({"n_kv_heads": 8}, '"n_kv_heads" is 8'),
        ({"dim": 64.5}, '"dim" is 64.5, expected a whole number'),
        ({"n_layers": 2.0}, '"n_layers" is 2.0, expected a whole number'),
        ({"use_scaled_rope": 1}, '"use_scaled_rope" is 1, expected a boolean'),
        ({"use_scaled_rope": "true"}, '"use_scaled_rope" is "true"'),
        ({"rope_scaling_factor": 0.5}, '"rope_scaling_factor" is 0.5'),
    ],
    ids=str,
)
def test_values_that_do_not_fit_together_are_named(tmp_path, changes, says):
    (tmp_path / "params.json").write_text(json.dumps(SMALL | changes))
    assert says in refusal(llama3.load_config, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b'{"dim": 64', "no JSON"),
        (b"[1, 2]", "a JSON list"),
        (b"3", "a JSON int"),
        (b"null", "a JSON NoneType"),
        (b"\x80\x81\xff\xfe", "Python pickle"),
        (b"\xff\xfe\xfa", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "web page"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
    ids=range(11),
)
def test_a_params_json_that_is_no_json_object_is_refused(tmp_path, content, says):
    (tmp_path / "params.json").write_bytes(content)
    assert says in refusal(llama3.load_config, tmp_path)


def test_folders_that_are_not_there_or_hold_something_else_are_told_apart(tmp_path):
    assert "no such folder" in refusal(llama3.load_config, tmp_path / "none")
    assert "has no params.json;" in refusal(llama3.load_config, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "Hugging Face" in refusal(llama3.load_config, tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    assert "its folder 'original'" in refusal(llama3.load_config, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_a_file_that_cannot_be_read_is_refused(checkpoint):
    folder, config, _ = checkpoint
    for name in ("params.json", "consolidated.00.pth"):
        (folder / name).unlink()
        (folder / name).symlink_to("/proc/self/mem")  # reading it at 0 is an input/output error
    assert "params.json: cannot be read" in refusal(llama3.load_config, folder)
    assert "consolidated.00.pth: cannot be read" in refusal(llama3.load_weights, folder, config)


def test_a_name_that_no_folder_can_have_is_refused():
    for name in ("x" * 5000, "a\0b"):
        assert "no such folder" in refusal(llama3.load_config, name)


# --- consolidated.00.pth --------------------------------------------------------------------------


def test_weights_come_under_metas_names_in_the_files_order_and_dtype(checkpoint):
    folder, config, weights = checkpoint
    loaded = llama3.map_weights(folder, config)
    assert list(loaded) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight)
        assert loaded[name].dtype == torch.bfloat16


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_on_the_cpu_are_mapped_from_the_file(checkpoint, dtype):
    folder, config, _ = checkpoint
    weights = llama3.load_weights(folder, config, dtype=dtype)
    path = str((folder / "consolidated.00.pth").resolve())
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path):
            ranges.append([int(address, 16) for address in line.split()[0].split("-")])
    assert ranges
    for weight in weights.values():
        mapped = any(low <= weight.data_ptr() < high for low, high in ranges)
        assert mapped or (weight.dim() == 1 and dtype == torch.float32)


def test_what_is_done_to_the_weights_does_not_reach_the_file(checkpoint):
    folder, config, _ = checkpoint
    before = (folder / "consolidated.00.pth").read_bytes()
    for weight in llama3.load_weights(folder, config).values():
        weight.zero_()
    assert (folder / "consolidated.00.pth").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_another_type_the_norms_are_converted_and_matrices_stay_as_they_are(checkpoint, dtype):
    folder, config, weights = checkpoint
    loaded = llama3.load_weights(folder, config, dtype=dtype)
    for name, weight in weights.items():
        expected = weight.to(dtype) if weight.dim() == 1 else weight
        assert loaded[name].dtype == expected.dtype  # which torch.equal does not compare
        assert torch.equal(loaded[name], expected)


def test_on_another_device_every_weight_has_the_type_that_is_computed_in(checkpoint):
    folder, config, _ = checkpoint
    for dtype in (torch.float32, torch.float16, None):
        loaded = llama3.load_weights(folder, config, device="meta", dtype=dtype)
        assert {weight.dtype for weight in loaded.values()} == {dtype or torch.bfloat16}
        assert {weight.device.type for weight in loaded.values()} == {"meta"}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("multiplied", [(), ("bf16",), ("fp16",), ("bf16", "fp16"), None])
def test_the_type_computed_in_is_the_stored_one_or_float32_where_it_has_no_products(
    monkeypatch, stored, multiplied
):
    """None: a build of PyTorch that cannot tell."""
    for name in ("bf16", "fp16"):
        check = f"_is_mkldnn_{name}_supported"
        if multiplied is None:
            monkeypatch.delattr(torch.ops.mkldnn, check, raising=False)
            monkeypatch.setattr(torch._ops._OpNamespace, "__getattr__", object.__getattribute__)
        else:
            there = name in multiplied
            monkeypatch.setattr(torch.ops.mkldnn, check, lambda there=there: there, raising=False)
    weights = {"norm.weight": torch.ones(9), "output.weight": torch.ones(9, 9, dtype=stored)}
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: None}
    has = stored == torch.float32 or names[stored] in (multiplied or ())
    expected = stored if has else torch.float32
    assert llama3.default_dtype(weights, torch.device("cpu")) == expected
    assert llama3.default_dtype(weights, torch.device("cuda")) == stored


def test_the_names_go_through_progress_while_their_weights_are_placed(checkpoint):
    folder, config, weights = checkpoint
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    mapped = llama3.map_weights(folder, config)
    llama3.place_weights(mapped, torch.device("cpu"), torch.float32, progress)
    assert seen == list(weights)


def test_tied_weights_are_placed_once(checkpoint):
    folder, config, weights = checkpoint
    save(folder, weights | {"output.weight": weights["tok_embeddings.weight"]})
    loaded = llama3.load_weights(folder, config, dtype=torch.float32)
    assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()


def test_rope_freqs_is_accepted_and_parameters_are_plain_tensors_without_gradients(checkpoint):
    folder, config, weights = checkpoint
    extra = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    save(folder, OrderedDict(extra) | {"rope.freqs": torch.ones(8)})
    loaded = llama3.load_weights(folder, config)
    assert list(loaded) == list(weights)
    assert not any(weight.requires_grad for weight in loaded.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm.weight": None}, "norm.weight is missing, expected a tensor of shape [64]"),
        ({"layers.1.ffn_norm.weight": None}, "layers.1.ffn_norm.weight is missing"),
        ({"norm.weight": 3}, "norm.weight is no dense tensor"),
        ({"output.weight": [1]}, "output.weight is no dense tensor"),
        ({"norm.weight": torch.eye(64).to_sparse()}, "norm.weight is no dense tensor"),
        ({"norm.weight": torch.ones(65)}, "norm.weight has shape [65], expected [64]"),
        ({"norm.weight": torch.ones(())}, "norm.weight has shape [], expected [64]"),
        ({"norm.weight": torch.ones(64, dtype=torch.int64)}, "norm.weight is of type int64"),
        ({"norm.weight": torch.ones(64, dtype=torch.float64)}, "norm.weight is of type float64"),
        ({"norm.weight": torch.ones(1).expand(64)}, "norm.weight shows fewer stored numbers"),
        ({"norm.weight": torch.ones(64, device="meta")}, "norm.weight is no dense tensor"),
        ({"layers.2.attention.wq.weight": torch.ones(64, 64)}, "layers.2.attention.wq.weight"),
        ({"vision_model.weight": torch.ones(2)}, "vision_model.weight"),
        ({7: torch.ones(2)}, "found 7,"),
        ({"a\nb": torch.ones(2)}, "'a\\nb'"),
    ],
    ids=range(15),
)
def test_weights_that_do_not_fit_the_params_are_named(checkpoint, changes, says):
    folder, config, weights = checkpoint
    changed = {k: v for k, v in (weights | changes).items() if v is not None}
    save(folder, changed)
    assert says in refusal(llama3.load_weights, folder, config)


def test_a_checkpoint_of_another_type_throughout_is_refused(checkpoint):
    folder, config, weights = checkpoint
    save(folder, {name: weight.to(torch.int8) for name, weight in weights.items()})
    assert "of type int8, expected one of float32" in refusal(llama3.load_weights, folder, config)


def test_params_of_another_model_are_noticed(checkpoint):
    folder, config, _ = checkpoint
    message = refusal(llama3.load_weights, folder, config._replace(vocab_size=1281))
    assert "tok_embeddings.weight has shape [1280, 64], expected [1281, 64]" in message


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, None, "text"], ids=str)
def test_a_file_that_holds_no_dictionary_is_refused(checkpoint, content):
    folder, config, _ = checkpoint
    save(folder, content)
    assert "expected a dictionary of tensors" in refusal(llama3.load_weights, folder, config)


class Malicious:
    """Unpickling this would create the file `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_does_not_run(checkpoint):
    folder, config, weights = checkpoint
    target = folder / "owned"
    path = folder / "consolidated.00.pth"
    path.write_bytes(pickle.dumps({"norm.weight": Malicious(target)}))
    refusal(llama3.load_weights, folder, config)
    save(folder, weights | {"norm.weight": Malicious(target)})
    refusal(llama3.load_weights, folder, config)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Malicious(target)))
        archive.writestr("archive/version", "3\n")
    refusal(llama3.load_weights, folder, config)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()  # so the test could have failed


BAD_FILES = {
    "empty": (b"", "an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "html": (b"<!doctype html><html></html>", "web page"),
    "random": (bytes(range(256)) * 9, "not a PyTorch checkpoint"),
    "pickle": (pickle.dumps({"a": 1}), "Python pickle"),
}


@pytest.mark.parametrize(("content", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_refused(checkpoint, content, says):
    folder, config, _ = checkpoint
    (folder / "consolidated.00.pth").write_bytes(content)
    assert says in refusal(llama3.load_weights, folder, config)


def test_a_file_cut_off_anywhere_is_refused(checkpoint):
    folder, config, _ = checkpoint
    path = folder / "consolidated.00.pth"
    whole = path.read_bytes()
    for length in [
        1,
        10,
        1000,
        len(whole) // 2,
        len(whole) - 1000,
        len(whole) - 30,
        len(whole) - 1,
    ]:
        path.write_bytes(whole[:length])
        assert "download it again" in refusal(llama3.load_weights, folder, config)


def test_a_folder_without_weights_is_refused(checkpoint):
    folder, config, _ = checkpoint
    (folder / "consolidated.00.pth").unlink()
    assert "has no consolidated.00.pth" in refusal(llama3.load_weights, folder, config)
