"""llama3.load_weights: what it makes of Meta's files, one or several, and what it refuses.

The diagnosis of bad files is in the folder formats, and tested in formats/test_meta.py: here they
only have to be refused, with the file or folder and the weight that is off.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import (
    DEMO,
    ROOT,
    compressed,
    config_of,
    peak_of,
    random_tokens,
    random_weights,
    split,
    with_biases,
)

import llama3
from llama3 import CheckpointError

HEADS = {"n_heads": 8, "n_kv_heads": 8}  # for up to 8 files
PROMPT = [1024, 355, 261, 32, 56, 258, 32]  # "17 plus 8 is "


def save(folder, weights):
    torch.save(weights, folder / "consolidated.00.pth")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a good checkpoint, its Config and its weights."""
    config = config_of(tmp_path)
    weights = random_weights(config, torch.bfloat16)
    save(tmp_path, weights)
    return tmp_path, config, weights


@pytest.fixture
def four_files(tmp_path):
    """The same in four files."""
    config = config_of(tmp_path, **HEADS)
    weights = random_weights(config)
    split(weights, tmp_path, 4)
    return tmp_path, config, weights


def change(path, entries):
    """Change entries of a file; what becomes None is taken out."""
    file = torch.load(path) | entries
    torch.save({name: value for name, value in file.items() if value is not None}, path)


def refusal(folder, config):
    """The message with which a checkpoint is refused: one line that names folder or file."""
    with pytest.raises(CheckpointError) as error:
        llama3.load_weights(folder, config)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message.removeprefix(str(folder))


# --- one file -------------------------------------------------------------------------------------


def test_weights_come_under_metas_names_as_they_are_stored(checkpoint):
    folder, config, weights = checkpoint
    save(folder, dict(reversed(weights.items())))
    loaded = llama3.load_weights(folder, config, dtype=torch.bfloat16)
    assert list(loaded) == list(llama3.weight_shapes(config))
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
@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
def test_in_another_type_the_norms_are_converted_and_matrices_stay_as_they_are(
    checkpoint, dtype, norms
):
    """Norms in float32 may lie beside matrices in bfloat16."""
    folder, config, weights = checkpoint
    stored = {name: w.to(norms) if w.dim() == 1 else w for name, w in weights.items()}
    save(folder, stored)
    loaded = llama3.load_weights(folder, config, dtype=dtype)
    for name, weight in stored.items():
        expected = weight.to(dtype) if weight.dim() == 1 else weight
        assert loaded[name].dtype == expected.dtype  # which torch.equal does not compare
        assert torch.equal(loaded[name], expected)


def test_without_a_dtype_that_of_the_matrices_decides(checkpoint):
    folder, config, weights = checkpoint
    save(folder, {name: w.float() if w.dim() == 1 else w for name, w in weights.items()})
    norm = llama3.load_weights(folder, config)["norm.weight"]
    assert norm.dtype == llama3.default_dtype(torch.bfloat16, torch.device("cpu"))


def test_on_another_device_every_weight_has_the_type_that_is_computed_in(checkpoint):
    folder, config, _ = checkpoint
    for dtype in (torch.float32, torch.float16, None):
        loaded = llama3.load_weights(folder, config, device="meta", dtype=dtype)
        assert {weight.dtype for weight in loaded.values()} == {dtype or torch.bfloat16}
        assert {weight.device.type for weight in loaded.values()} == {"meta"}


@pytest.mark.parametrize(
    ("able", "native"),
    [
        ({"avx512_bf16": True}, ["bfloat16"]),
        ({"amx_bf16": True, "avx512_bf16": False}, ["bfloat16"]),
        ({"avx512_f": True, "avx512_bf16": False}, []),  # oneDNN converts, each time anew
        ({"avx512_fp16": True, "amx_bf16": True}, ["bfloat16", "float16"]),
        ({"bf16": True, "fp16_arith": True}, ["bfloat16", "float16"]),  # Arm
        ({"bf16": False, "fp16_arith": False}, []),
        (None, []),  # a PyTorch that does not say
    ],
    ids=str,
)
def test_the_type_computed_in_is_the_stored_one_or_float32_where_it_has_no_products(
    monkeypatch, able, native
):
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    for name, stored in llama3.DTYPES.items():
        expected = stored if name in (*native, "float32") else torch.float32
        assert llama3.default_dtype(stored, torch.device("cpu")) == expected
        assert llama3.default_dtype(stored, torch.device("cuda")) == stored


@pytest.mark.parametrize("output", ["the embeddings", "left out"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_output_is_the_embeddings_and_takes_no_memory_of_its_own(
    tmp_path, output, parts, device
):
    config = config_of(tmp_path, **HEADS)
    weights = random_weights(config)
    embeddings = weights["output.weight"] = weights["tok_embeddings.weight"]
    split(weights, tmp_path, parts)
    for path in tmp_path.glob("*.pth"):
        file = torch.load(path)
        file["output.weight"] = file["tok_embeddings.weight"]
        if output == "left out":
            del file["output.weight"]
        torch.save(file, path)
    loaded = llama3.load_weights(tmp_path, config, device=device)
    assert loaded["output.weight"] is loaded["tok_embeddings.weight"]
    assert device == "meta" or torch.equal(loaded["output.weight"], embeddings)


def test_frequencies_of_rope_are_ignored_and_parameters_are_tensors_without_gradients(checkpoint):
    folder, config, weights = checkpoint
    extra = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    save(folder, OrderedDict(extra) | {"rope.freqs": torch.ones(8)})
    loaded = llama3.load_weights(folder, config)
    assert loaded.keys() == weights.keys()
    assert not any(weight.requires_grad for weight in loaded.values())


def test_weights_that_are_views_of_others_are_told_apart(tmp_path):
    config = config_of(tmp_path, n_kv_heads=None)
    made = random_weights(config)
    q, k, v = (f"layers.0.attention.w{kind}.weight" for kind in "qkv")
    made[k] = made[q].T
    made[v] = made[v].T.contiguous().T
    made["norm.weight"] = torch.stack([made["norm.weight"]] * 2, dim=1)[:, 0]
    save(tmp_path, made)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = llama3.load_weights(tmp_path, config, dtype=dtype)
        assert torch.equal(loaded[k], loaded[q].T)
        assert not torch.equal(loaded[k], loaded[q])
        assert torch.equal(loaded[v], made[v])
        assert torch.equal(loaded["norm.weight"], made["norm.weight"].to(dtype))


@pytest.mark.parametrize(
    "bias",
    [
        "layers.0.attention.wq.bias",
        "layers.1.attention.wo.bias",
        "layers.1.feed_forward.w2.bias",
        "output.bias",
    ],
)
def test_a_bias_beside_a_matrix_is_loaded_and_added(checkpoint, bias):
    folder, config, weights = checkpoint
    weights = {name: weight.float() for name, weight in weights.items()}
    more = weights | {bias: torch.ones(len(weights[bias.replace("bias", "weight")]))}
    save(folder, more)
    loaded, tokens = llama3.load_weights(folder, config), random_tokens(config, 5)
    logits = llama3.forward(tokens, loaded, config)
    assert torch.equal(logits, llama3.forward(tokens, more, config))
    assert not torch.equal(logits, llama3.forward(tokens, weights, config))


# --- one file that is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"layers.1.ffn_norm.weight": None}, "layers.1.ffn_norm.weight is missing"),
        ({"tok_embeddings.weight": None}, "tok_embeddings.weight is missing"),
        ({"norm.weight": 3}, ""),
        ({"output.weight": [1]}, ""),
        ({"norm.weight": torch.ones(64, device="meta")}, ""),
        ({"norm.weight": torch.ones(65)}, "norm.weight has shape [65]"),
        ({"norm.weight": torch.ones(())}, "norm.weight has shape []"),
        ({"norm.weight": torch.ones(64, dtype=torch.int64)}, "norm.weight has shape [64] and type"),
        ({"norm.weight": torch.ones(64, dtype=torch.float64)}, "type torch.float64"),
        ({"tok_embeddings.weight": torch.ones(3)}, "tok_embeddings.weight has shape [3]"),
        ({"layers.2.attention.wq.weight": torch.ones(64, 64)}, "layers.2.attention.wq.weight"),
        ({"layers.0.attention.wq.bias": torch.ones(65)}, "layers.0.attention.wq.bias has shape"),
        ({"norm.bias": torch.ones(64)}, "norm.bias"),  # which nothing would add
        ({"layers.0.ffn_norm.bias": torch.ones(64)}, "layers.0.ffn_norm.bias"),
        ({"tok_embeddings.bias": torch.ones(1280)}, "tok_embeddings.bias"),
        ({"other.bias": torch.ones(64)}, "other.bias"),
        ({"vision_model.weight": torch.ones(2)}, "vision_model.weight is unknown"),
        ({"epoch": 3}, "epoch is unknown"),
        ({7: torch.ones(2)}, ""),
        ({"a\nb": torch.ones(2)}, "a b is unknown"),
    ],
    ids=lambda value: repr(next(iter(value))) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit_the_params_are_named(checkpoint, changes, says):
    folder, config, weights = checkpoint
    save(folder, {k: v for k, v in (weights | changes).items() if v is not None})
    assert says in refusal(folder, config)


def test_a_checkpoint_of_another_type_throughout_is_refused(checkpoint):
    folder, config, weights = checkpoint
    save(folder, {name: weight.to(torch.int8) for name, weight in weights.items()})
    expected = (
        "type torch.int8 in 1 file(s), expected [1280, 64] and float32 or bfloat16 or float16"
    )
    assert expected in refusal(folder, config)


def test_params_of_another_model_are_noticed(checkpoint):
    folder, config, _ = checkpoint
    expected = "tok_embeddings.weight has shape [1280, 64] and type torch.bfloat16 in 1 file(s), "
    assert expected + "expected [1281, 64]" in refusal(folder, config._replace(vocab_size=1281))
    assert "layers.0." in refusal(folder, config._replace(n_heads=8))
    assert "layers.1." in refusal(folder, config._replace(n_layers=1))
    assert "layers.2." in refusal(folder, config._replace(n_layers=3))


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, None, "text", {}], ids=str)
def test_a_file_that_holds_no_dictionary_of_weights_is_refused(checkpoint, content):
    folder, config, _ = checkpoint
    save(folder, content)
    refusal(folder, config)


def test_another_kind_of_file_a_cut_off_one_or_none_is_refused(checkpoint):
    folder, config, weights = checkpoint
    path = folder / "consolidated.00.pth"
    whole = path.read_bytes()
    ends = (0, 1, 10, 1000, len(whole) // 2, *(len(whole) - n for n in (1000, 30, 1)))
    contents = [whole[:end] for end in ends]
    contents += [b"<!doctype html>", bytes(range(256)) * 9, pickle.dumps({"a": 1})]
    for content in contents:
        path.write_bytes(content)
        assert refusal(folder, config).startswith("/consolidated.00.pth: ")
    torch.save(weights, path, _use_new_zipfile_serialization=False)  # of before PyTorch 1.6
    assert refusal(folder, config).startswith("/consolidated.00.pth: ")
    path.unlink()
    assert refusal(folder, config).startswith("/consolidated.00.pth: ")


def test_a_folder_that_is_not_there_is_refused(demo_config, tmp_path):
    for name in (tmp_path / "none", "a\0b"):
        with pytest.raises(CheckpointError):
            llama3.load_weights(name, demo_config)


def test_a_compressed_archive_is_refused(checkpoint):
    """Mapped, its compressed bytes would be taken for numbers."""
    folder, config, _ = checkpoint
    compressed(folder / "consolidated.00.pth")
    expected = "a compressed archive; load and torch.save it again"
    assert expected in refusal(folder, config)


class Malicious:
    """Unpickling this would create the folder `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_does_not_run(checkpoint):
    folder, config, weights = checkpoint
    target = folder / "owned"
    path = folder / "consolidated.00.pth"
    path.write_bytes(pickle.dumps({"norm.weight": Malicious(target)}))
    refusal(folder, config)
    for new_format in (True, False):
        content = weights | {"norm.weight": Malicious(target)}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        refusal(folder, config)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Malicious(target)))
        archive.writestr("archive/version", "3\n")
    refusal(folder, config)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()  # so the test could have failed


def test_an_error_of_a_checkpoint_knows_its_file_and_survives_pickling(tmp_path):
    with pytest.raises(CheckpointError) as error:
        llama3.load_config(tmp_path)
    assert error.value.path == tmp_path / "params.json"
    assert str(error.value) == f"{error.value.path}: {error.value.problem}"
    assert issubclass(CheckpointError, ValueError)
    for again in (pickle.loads(pickle.dumps(error.value)), copy.copy(error.value)):
        assert (again.path, str(again)) == (error.value.path, str(error.value))


# --- several files --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_files_are_joined_to_the_same_bits(tmp_path, dtype, parts):
    config = config_of(tmp_path, **HEADS)
    weights = with_biases(random_weights(config, dtype))
    split(weights, tmp_path, parts)
    loaded = llama3.load_weights(tmp_path, config, dtype=dtype)
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].dtype == weight.dtype
        assert torch.equal(loaded[name], weight)
    tokens = random_tokens(config, 11)
    expected = llama3.forward(tokens, weights, config)
    assert torch.equal(llama3.forward(tokens, loaded, config), expected)


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_of_more_files_than_key_heads_several_hold_the_same_head(tmp_path, n_kv_heads):
    config = config_of(tmp_path, **HEADS | {"n_kv_heads": n_kv_heads})
    weights = random_weights(config)
    split(weights, tmp_path, 8)
    for part in range(8):
        path = tmp_path / f"consolidated.{part:02}.pth"
        file = torch.load(path)
        for name, weight in weights.items():
            if name.endswith(("wk.weight", "wv.weight")):
                file[name] = weight.chunk(n_kv_heads)[part * n_kv_heads // 8].clone()
        torch.save(file, path)
    loaded = llama3.load_weights(tmp_path, config)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_joining_takes_the_memory_of_the_model_once(tmp_path):
    config = config_of(tmp_path, **HEADS, dim=512, n_layers=4, ffn_dim=4096)
    weights = random_weights(config)
    split(weights, tmp_path, 4)
    size = sum(weight.nbytes for weight in weights.values())
    largest = max(weight.nbytes for weight in weights.values())
    del weights
    loaded = {}
    peak = peak_of(lambda: loaded.update(llama3.load_weights(tmp_path, config)))
    mapped = size  # the pages that were read stay in memory as long as it is free
    assert peak < mapped + size + 1.5 * largest + 2**24


def test_norms_are_not_copied_out_of_their_file(four_files):
    folder, config, _ = four_files
    files = llama3.map_files(folder)
    assert len(files) == 4
    shards = llama3.shards_of(files, config)
    for name, parts in shards.items():
        assert len(parts) == (1 if "norm" in name else 4)
        assert [part.data_ptr() for part in parts] == [
            file[name].data_ptr() for file in files[: len(parts)]
        ]


def test_files_of_other_names_are_of_no_consequence(four_files):
    folder, config, weights = four_files
    for name in ("consolidated.backup.pth", "consolidated.00 (1).pth", "consolidated.pth"):
        (folder / name).write_bytes(b"what is this")
    loaded = llama3.load_weights(folder, config)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_missing_file_is_noticed(four_files):
    folder, config, _ = four_files
    (folder / "consolidated.02.pth").unlink()
    assert refusal(folder, config).startswith("/consolidated.02.pth: ")
    (folder / "consolidated.03.pth").unlink()  # and so the two are a whole of half the size
    expected = "tok_embeddings.weight has shape [640, 64] and type torch.float32 in 2 file(s), "
    assert expected + "expected [1280, 64]" in refusal(folder, config)


def test_a_file_of_another_model_is_refused(four_files):
    folder, config, weights = four_files
    path = folder / "consolidated.02.pth"
    norm, bias = weights["norm.weight"], "layers.0.attention.wq.bias"
    whole = path.read_bytes()
    other = "is not dense, or the 4 files are not of one model"
    for name, value, says in (
        ("norm.weight", norm + 1e-3, other),
        ("norm.weight", norm.half(), other),
        ("norm.weight", norm.to_sparse(), other),
        ("output.weight", torch.zeros(320, 64).half(), other),
        ("output.weight", weights["output.weight"], other),
        ("layers.1.attention.wo.weight", torch.ones(16, 64), other),
        ("layers.1.ffn_norm.weight", None, "is missing"),
        (bias, torch.zeros(16), "is unknown"),
    ):
        change(path, {name: value})
        assert f": {name} {says}" in refusal(folder, config)
        path.write_bytes(whole)
    shutil.copy(folder / "consolidated.01.pth", path)  # which would give other numbers, silently
    assert f"layers.0.attention.wq.weight {other}" in refusal(folder, config)
    path.write_bytes(whole)
    change(folder / "consolidated.00.pth", {bias: torch.zeros(16)})
    assert f"{bias} is missing" in refusal(folder, config)


# --- alone ----------------------------------------------------------------------------------------

ALONE = """
import importlib.util, json, sys
import llama3
ours = [name for name in ("cli", "formats", "tokenizer_setup") if importlib.util.find_spec(name)]
config = llama3.load_config(".")
weights = llama3.load_weights(".", config)
prompt = json.loads(sys.argv[1])
greedy = llama3.generate(prompt, weights, config, max_new_tokens=20)
drawn = llama3.generate(prompt, weights, config, max_new_tokens=20, temperature=1.0, seed=1)
print(json.dumps([llama3.__file__, ours, [*greedy], [*drawn]]))
"""


@pytest.mark.parametrize("parts", [1, 2])
def test_the_file_works_alone_beside_metas_files(tmp_path, demo_config, demo_weights, parts):
    """As it does where someone has copied nothing else."""
    shutil.copy(ROOT / "llama3.py", tmp_path)
    shutil.copy(DEMO / "params.json", tmp_path)
    if parts == 1:
        shutil.copy(DEMO / "consolidated.00.pth", tmp_path)
    else:
        split(demo_weights, tmp_path, parts)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-s", "-c", ALONE, json.dumps(PROMPT)],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    file, ours, greedy, drawn = json.loads(done.stdout)
    assert Path(file).resolve() == (tmp_path / "llama3.py").resolve()
    assert ours == []
    weights = llama3.load_weights(DEMO, demo_config)
    options = {"max_new_tokens": 20}
    assert greedy == [*llama3.generate(PROMPT, weights, demo_config, **options)]
    options |= {"temperature": 1.0, "seed": 1}
    assert drawn == [*llama3.generate(PROMPT, weights, demo_config, **options)]
