"""Meta's folders through formats.open, and what it says of bad ones: the true reason, in a line."""

import argparse
import datetime
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    DEMO,
    SMALL,
    compressed,
    config_of,
    random_tokens,
    random_weights,
    split,
)

import formats
import llama3
import tokenizer_setup
from formats import CheckpointError

NAME = "consolidated.00.pth"
HEADS = {"n_heads": 8, "n_kv_heads": 8}  # for up to 8 files
FOLDER = "expected a folder with Meta's params.json, consolidated.00.pth and tokenizer.model"
FILE = "expected a PyTorch checkpoint, a dictionary of plain tensors"


@pytest.fixture
def folder(tmp_path):
    """A folder with a small checkpoint and the demo's tokenizer."""
    torch.save(random_weights(config_of(tmp_path), torch.bfloat16), tmp_path / NAME)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Those of `folder`."""
    return random_weights(config_of(tmp_path_factory.mktemp("config")), torch.bfloat16)


def refusal(path):
    """The one line with which a path is refused, after that path."""
    with pytest.raises(CheckpointError) as error:
        formats.open(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 700
    assert message.startswith(str(path).replace("\0", " ").replace("\n", " ")) or "\0" in str(path)
    return message.removeprefix(str(path))


# --- what it finds --------------------------------------------------------------------------------


def test_the_demo_is_found_with_all_that_llama3_loads_of_it(demo_config, demo_tokenizer):
    source = formats.open(DEMO)
    assert source.config == demo_config
    assert source.found == "Meta's files, 4 layers, 1.2 million weights in bfloat16"
    assert source.tokenizer().special_tokens == demo_tokenizer.special_tokens
    text = "17 plus 8 is 25. Ünïcödé"
    assert source.tokenizer().encode(text) == demo_tokenizer.encode(text)
    for device, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cpu", None),
        ("meta", torch.float16),
        ("meta", None),
    ):
        ours = source.load_weights(device, dtype)
        expected = llama3.load_weights(DEMO, demo_config, device, dtype)
        assert ours.keys() == expected.keys()
        for name, weight in expected.items():
            assert ours[name].dtype == weight.dtype
            assert ours[name].device == weight.device
            assert device == "meta" or torch.equal(ours[name], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_files_are_joined_to_the_same_bits(tmp_path, dtype, parts):
    config = config_of(tmp_path, **HEADS)
    weights = random_weights(config, dtype)
    weights["layers.1.attention.wq.bias"] = torch.ones(64, dtype=dtype)
    weights["layers.1.attention.wo.bias"] = torch.ones(64, dtype=dtype)
    split(weights, tmp_path, parts)
    loaded = formats.open(tmp_path).load_weights(dtype=dtype)
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].dtype == weight.dtype
        assert torch.equal(loaded[name], weight)
    tokens = random_tokens(config, 11)
    expected = llama3.forward(tokens, weights, config)
    assert torch.equal(llama3.forward(tokens, loaded, config), expected)


def test_the_names_go_through_progress_while_their_weights_are_loaded(folder, weights):
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    formats.open(folder).load_weights(progress=progress)
    assert seen == list(weights)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_tied_output_is_stored_and_loaded_once(tmp_path, parts):
    weights = random_weights(config_of(tmp_path, **HEADS))
    split(weights, tmp_path, parts)
    for path in tmp_path.glob("*.pth"):
        file = torch.load(path)
        del file["output.weight"]
        torch.save(file, path)
    source = formats.open(tmp_path)
    assert "output.weight" not in source.stored
    loaded = source.load_weights()
    assert torch.equal(loaded["output.weight"], weights["tok_embeddings.weight"])
    assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_vocabulary_of_minus_one_is_that_of_the_weights(tmp_path, parts):
    config = config_of(tmp_path, **HEADS)
    split(random_weights(config), tmp_path, parts)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert formats.open(tmp_path).config == config


def test_what_is_mapped_takes_no_memory_and_what_is_joined_does(tmp_path, weights, folder):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    numbers = sum(weight.numel() for weight in weights.values())
    source = formats.open(folder)
    assert source.bytes_needed(cpu, torch.float32) == 0
    assert source.bytes_needed(cuda, torch.float32) == numbers * 4
    assert source.bytes_needed(cuda, torch.bfloat16) == numbers * 2
    split(weights, folder, 2)
    matrices = sum(weight.numel() for weight in weights.values() if weight.dim() > 1)
    source = formats.open(folder)
    assert source.bytes_needed(cpu, torch.float32) == matrices * 2  # as they are stored
    assert source.bytes_needed(cuda, torch.float32) == numbers * 4


# --- params.json and the folder -------------------------------------------------------------------


def test_folders_that_are_not_there_or_hold_something_else_are_told_apart(tmp_path):
    assert refusal(tmp_path / "none") == f": no such folder; {FOLDER}, or config.json"
    assert refusal(tmp_path) == f": has no params.json; {FOLDER}, or config.json"
    (tmp_path / "params.json").mkdir()
    assert "its params.json is not a regular file" in refusal(tmp_path)
    (tmp_path / "params.json").rmdir()
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    assert "(but its folder 'original' has: use that one)" in refusal(tmp_path)
    (tmp_path / "file").write_text("hello")
    assert "found a file of another kind, expected a GGUF file or a" in refusal(tmp_path / "file")
    for name in ("x" * 5000, "a\0b"):
        assert "no such folder" in refusal(name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "found an empty file"),
        (b'{"dim": 64', "found no JSON: Expecting"),
        (b"[1, 2]", "found a JSON list, expected an object"),
        (b"3", "found a JSON int"),
        (b"null", "found a JSON NoneType"),
        (b"\x80\x81\xff\xfe", "found a Python pickle"),
        (b"\xff\xfe\xfa", "found no JSON"),
        (b"[" * 100_000, "found no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
        (b"<html>", "found a web page"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "found no JSON"),
        (b" " * 5_000_000, "found more than 4194304 bytes"),
        (b"{}", '"dim": found None, expected a whole number'),
        (b'{"dim": ' + b"[" * 900 + b"]" * 900 + b"}", '"dim": found [[['),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, bytes) else "",
)
def test_a_params_json_that_is_none_is_described(folder, content, says):
    (folder / "params.json").write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"/params.json: {says}")
    assert "expected a" in message


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["params.json", NAME])
def test_a_file_that_cannot_be_read_is_called_so(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")  # reading it at 0 is an input/output error
    assert refusal(folder) == f"/{name}: cannot be read: Input/output error"


# --- consolidated.00.pth --------------------------------------------------------------------------

KINDS = {
    "empty": (b"", "an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "html": (b"<!doctype html><html></html>", "a web page"),
    "gguf": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0" + b'{"a":{"dtype":1}}', "a safetensors file"),
    "gzip": (b"\x1f\x8b\x08\0", "a compressed file (unpack it first)"),
    "tar": (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "neither a zip archive nor a pickle"),
    "bytes": (bytes(range(256)) * 9, "neither a zip archive nor a pickle"),
    "text": (b"once upon a time", "neither a zip archive nor a pickle"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle, as before PyTorch 1.6"),
}


@pytest.mark.parametrize(("content", "says"), KINDS.values(), ids=KINDS)
def test_another_kind_of_file_is_described(folder, content, says):
    (folder / NAME).write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"/{NAME}: found {says}")
    assert FILE in message
    downloaded = says in ("an empty file", "a Git LFS pointer", "a web page")
    assert message.endswith("download it again") == downloaded
    assert ("torch.save it again" in message) == ("PyTorch 1.6" in says)


def test_a_file_cut_off_anywhere_is_called_so(folder):
    path = folder / NAME
    whole = path.read_bytes()
    for length in (10, 1000, len(whole) // 2, *(len(whole) - n for n in (1000, 30, 1))):
        path.write_bytes(whole[:length])
        message = refusal(folder)
        assert f"/{NAME}: found a file that was cut off after {length} bytes; " in message
        assert message.endswith("download it again")


def test_what_cannot_be_mapped_is_to_be_saved_again(folder, weights):
    """Mapped, compressed bytes would be taken for numbers."""
    compressed(folder / NAME)
    message = refusal(folder)
    assert "found a compressed archive; " in message
    assert "torch.save it again" in message
    torch.save(weights, folder / NAME, _use_new_zipfile_serialization=False)
    message = refusal(folder)
    assert "found a pickle, as before PyTorch 1.6; " in message
    assert "torch.save it again" in message
    torch.save(torch.load(folder / NAME), folder / NAME)  # as it says
    assert torch.equal(formats.open(folder).load_weights()["norm.weight"], weights["norm.weight"])


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a.txt": b"a"}, "found a zip archive"),
        ({"archive/data.pkl": b"\x80\x02}q\0.", "archive/version": b"3\n"}, "is missing"),
    ],
    ids=["of text", "without tensors"],
)
def test_another_zip_archive_is_no_checkpoint(folder, entries, says):
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    message = refusal(folder)
    assert says in message
    assert "download" not in message


def test_a_part_of_an_archive_over_several_disks_is_no_checkpoint(folder):
    """Python's zipfile raises an error of its own where it is asked whether this is an archive."""
    directory = b"PK\x06\x07" + b"\x01" * 16 + b"PK\x05\x06" + bytes(18)
    (folder / NAME).write_bytes(b"PK\x03\x04" + bytes(99) + directory)
    assert "multiple disks" in refusal(folder)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(dim=1), "argparse.Namespace"),
        (datetime.date(2024, 4, 18), "datetime.date"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=["Namespace", "date", "Module"],
)
def test_a_class_in_a_pickle_is_named(folder, weights, value, name):
    torch.save(weights | {"args": value}, folder / NAME)
    message = refusal(folder)
    assert f"found a pickle that calls for {name}, which could run any code" in message
    assert message.endswith("save the state_dict alone")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_no_checkpoint(folder):
    torch.jit.save(torch.jit.script(torch.nn.Identity()), folder / NAME)
    assert FILE in refusal(folder)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unable to mmap: Cannot allocate")])
def test_memory_that_does_not_suffice_for_the_file_is_called_so(folder, error, monkeypatch):
    if isinstance(error, RuntimeError):
        error = RuntimeError(f"{error} memory (12)")  # as PyTorch says it

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    assert f"/{NAME}: not enough memory (or address space, ulimit -v) for its" in refusal(folder)


# --- what is in the file --------------------------------------------------------------------------


def renamed(weights, old, new):
    return {re.sub(old, new, name): weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda w: {"model": w}, 'a dictionary in a dictionary, as "model"'),
        (lambda w: {"epoch": 3, "state_dict": w}, 'a dictionary in a dictionary, as "state_dict"'),
        (lambda w: renamed(w, "^", "module."), "names with a prefix (module.tok_embeddings.weight"),
        (lambda w: renamed(w, "^", "_orig_mod."), "names with a prefix (_orig_mod.tok_embeddings"),
        (lambda w: renamed(w, "^", "model."), "names with a prefix (model.tok_embeddings.weight)"),
        (lambda w: {"model.embed_tokens.weight": torch.ones(2)}, "the names of a Hugging Face"),
        (lambda w: {"layers.0.self_attn.q_proj.weight": torch.ones(2)}, "the names of a Hugging"),
        (lambda w: w | {"vision_model.conv1.weight": torch.ones(2)}, "a vision checkpoint"),
        (lambda w: renamed(w, "^", "text_model."), "a vision checkpoint"),
        (lambda w: {"layers.0.attention.wq.lora_a.weight": torch.ones(2)}, "LoRA weights"),
        (lambda w: [torch.ones(2)], "a list, expected a dictionary of tensors"),
        (lambda w: torch.ones(2), "a Tensor, expected a dictionary of tensors"),
        (lambda w: None, "a NoneType, expected a dictionary of tensors"),
    ],
    ids=range(13),
)
def test_weights_under_other_names_are_told_apart(folder, weights, content, says):
    torch.save(content(weights), folder / NAME)
    message = refusal(folder)
    assert message.startswith(f"/{NAME}: found {says}")
    assert "expected a dictionary of tensors" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"norm.weight": torch.ones(65)}, "norm.weight has shape [65]"),
        ({"norm.weight": torch.ones(64, dtype=torch.int64)}, "type torch.int64"),
        ({"norm.weight": 3}, "norm.weight"),
        ({"layers.0.attention.wq.weight": torch.eye(64).to_sparse()}, "layers.0.attention.wq"),
        ({"norm.weight": torch.ones(64, device="meta")}, "norm.weight"),
        ({"norm.bias": torch.ones(64)}, "norm.bias"),
        ({"layers.2.attention.wq.weight": torch.ones(64, 64)}, "layers.2.attention.wq.weight"),
        ({7: torch.ones(2)}, "7"),
        ({"a\nb": torch.ones(2)}, "a b is unknown"),
    ],
    ids=lambda value: repr(next(iter(value))) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit_the_params_are_named_with_their_file(
    folder, weights, changes, says
):
    changed = {k: v for k, v in (weights | changes).items() if v is not None}
    torch.save(changed, folder / NAME)
    message = refusal(folder)
    assert message.startswith(f"/{NAME}: ")
    assert says in message


def test_a_vocabulary_of_minus_one_without_embeddings_is_told_truly(folder, weights):
    (folder / "params.json").write_text(json.dumps(SMALL | {"vocab_size": -1}))
    names = list(weights)
    assert names[0] == "tok_embeddings.weight"
    torch.save({name: weights[name] for name in names[1:]}, folder / NAME)
    assert "tok_embeddings.weight is missing" in refusal(folder)


# --- several files --------------------------------------------------------------------------------


@pytest.fixture
def four_files(tmp_path):
    """A model in four files, and its weights."""
    weights = random_weights(config_of(tmp_path, **HEADS))
    split(weights, tmp_path, 4)
    return tmp_path, weights


def test_files_of_other_names_are_of_no_consequence(four_files):
    folder, weights = four_files
    for name in ("consolidated.00.orig.pth", "consolidated.00 (1).pth", "consolidated.pth"):
        (folder / name).write_bytes(b"what is this")
    loaded = formats.open(folder).load_weights()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_missing_file_is_named(four_files):
    folder, _ = four_files
    (folder / "consolidated.02.pth").unlink()
    expected = ": consolidated.02.pth is missing, but there is consolidated.03.pth; expected all"
    assert refusal(folder).startswith(expected)
    (folder / "consolidated.03.pth").unlink()  # and so the two are a whole of half the size
    assert ": tok_embeddings.weight has shape [640, 64]" in refusal(folder)
    (folder / "consolidated.00.pth").unlink()
    expected = ": consolidated.00.pth is missing, but there is consolidated.01.pth; expected all"
    assert refusal(folder).startswith(expected)
    (folder / "consolidated.01.pth").unlink()
    assert refusal(folder).startswith(f": has no consolidated.00.pth; {FOLDER}")


def test_a_bad_file_among_several_is_named(four_files):
    folder, weights = four_files
    path = folder / "consolidated.02.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert "/consolidated.02.pth: found a file that was cut off after 1000" in refusal(folder)
    path.write_bytes(whole)
    content = torch.load(path)
    torch.save({"model": content}, path)
    assert "/consolidated.02.pth: found a dictionary in a dictionary" in refusal(folder)
    for name, value in (
        ("norm.weight", weights["norm.weight"] + 1e-3),
        ("output.weight", weights["output.weight"]),
        ("layers.0.attention.wq.weight", torch.ones(8, 64)),
        ("layers.0.attention.wq.bias", torch.ones(16)),
    ):
        torch.save(content | {name: value}, path)
        assert f": {name} " in refusal(folder)


# --- tokenizer.model ------------------------------------------------------------------------------

TOKENIZERS = {
    "empty": (b"", "found an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    "html": (b"<!DOCTYPE html>\n<html><body>401</body></html>", "found a web page"),
    "tokenizer.json": (b'{"model": {"type": "BPE"}}', "Hugging Face tokenizer.json"),
    "sentencepiece": (
        b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c",
        "not a whole sentencepiece model",
    ),
    "zip": (b"PK\x03\x04" + bytes(100), "found a zip archive"),
    "words": (b"hello world this is text\n", "line 1 is b'hello world this is text'"),
}


@pytest.mark.parametrize(("content", "says"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_file_that_is_no_vocabulary_is_described(folder, content, says):
    path = folder / "other.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        formats.open(folder).tokenizer(path)
    message = str(error.value)
    assert message.startswith(f"{path}: its tokenizer cannot be used: ")
    assert says in message
    assert "\n" not in message


def test_a_folders_own_file_that_is_no_vocabulary_is_described_too(folder):
    path = folder / "tokenizer.model"
    for kind in ("lfs", "html", "empty"):
        content, says = TOKENIZERS[kind]
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            formats.open(folder).tokenizer()
        assert str(error.value).startswith(f"{path}: ")
        assert says in str(error.value)


def test_a_tokenizer_that_is_not_there_is_called_so(folder):
    source = formats.open(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.model; expected a folder with"):
        source.tokenizer()
    for path in (folder / "none.model", folder, "nowhere://tokenizer.model"):
        with pytest.raises(CheckpointError) as error:
            source.tokenizer(path)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(path)[:7])


@pytest.mark.parametrize("lines", [-1, 1])
def test_a_tokenizer_of_another_size_is_refused(folder, lines):
    """The ids of Llama 3's special tokens follow from how many others there are."""
    path = folder / "tokenizer.model"
    content = path.read_text().splitlines()
    content = content[:lines] if lines < 0 else [*content, f"ISEhISEhISEhISEhIQ== {len(content)}"]
    path.write_text("\n".join(content) + "\n")
    n = tokenizer_setup.load_tokenizer(path).n_vocab
    assert n == 1280 + lines
    with pytest.raises(CheckpointError) as error:
        formats.open(folder).tokenizer()
    assert f'the tokenizer has {n} tokens, but the "vocab_size" of the model is 1280' in str(error)
    assert str(error.value).endswith("use the tokenizer that came with the weights")
