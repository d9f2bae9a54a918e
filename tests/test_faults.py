"""What users of such programs report, and what a stranger's files or text may hold.

For every input here the result is right, or the program ends with status 2, one line on standard
error that says what was found, and nothing on standard output.
"""

import argparse
import datetime
import io
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from conftest import DEMO, ROOT, compressed, config_of, peak_of, random_weights

import checkpoint_files
import command_line
import llama3
import tokenizer_setup
from checkpoint_files import CheckpointError

SCRIPT = [sys.executable, str(ROOT / "llama3.py")]
PARAMS = json.loads((DEMO / "params.json").read_text())
SUM = ["--prompt", "17 plus 8 is "]


@pytest.fixture(scope="module")
def weights():
    """The demo's, to be changed one at a time."""
    return torch.load(DEMO / "consolidated.00.pth", weights_only=True)


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo."""
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def answer(capsys, *arguments):
    """What the program prints for `arguments`; all that it says beside it is notes."""
    status = command_line.main([*arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "error" not in err
    return out, err


def refused(capsys, *arguments):
    """The one line with which the program refuses `arguments`."""
    status = command_line.main([*arguments])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    *notes, line = err.splitlines()
    assert all(note.startswith("llama3.py: ") and "error" not in note for note in notes)
    assert line.startswith("llama3.py: error: ")
    return line


# --- whole files that PyTorch cannot map, or not read ---------------------------------------------


def test_a_compressed_archive_is_read_with_a_note(capsys, folder):
    """Mapped, its compressed bytes would be taken for numbers."""
    compressed(folder / "consolidated.00.pth")
    out, err = answer(capsys, *SUM, "--ckpt-dir", str(folder))
    assert out == "25."
    assert "is a compressed zip archive: it is read as a whole, not mapped" in err


def test_a_file_of_before_pytorch_1_6_is_read_with_a_note(capsys, folder, weights):
    path = folder / "consolidated.00.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    out, err = answer(capsys, *SUM, "--ckpt-dir", str(folder))
    assert out == "25."
    assert "as checkpoints were before PyTorch 1.6: it is read as a whole, not mapped" in err
    whole = path.read_bytes()
    for length in (40, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        line = refused(capsys, *SUM, "--ckpt-dir", str(folder))
        assert f"a file that was cut off after {length} bytes" in line
        assert line.endswith("download it again")


def test_a_small_file_that_would_fill_the_memory_is_refused(capsys, folder, monkeypatch):
    """A compressed archive may hold more than its size tells."""
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 40e6)
    line = refused(capsys, *SUM, "--ckpt-dir", str(folder))
    assert "cannot be mapped, and to read it takes 50 MB of memory, but 40 MB are free" in line
    old = folder / "consolidated.00.pth"
    torch.save({"a": torch.ones(11_000_000)}, old, _use_new_zipfile_serialization=False)
    assert "to read it takes 44 MB" in refused(capsys, *SUM, "--ckpt-dir", str(folder))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(dim=1), "argparse.Namespace"),
        (datetime.date(2024, 4, 18), "datetime.date"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=["Namespace", "date", "Module"],
)
def test_a_class_in_a_pickle_is_named(capsys, folder, weights, value, name, new_format):
    path = folder / "consolidated.00.pth"
    content = weights | {"args": value}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    line = refused(capsys, *SUM, "--ckpt-dir", str(folder))
    assert f"a pickle that calls for {name}" in line
    assert "download" not in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF\x03\0\0\0", "found a GGUF file"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"a":{"dtype":1}}', "found a safetensors file"),
        (b"\x1f\x8b\x08\0", "found a compressed file (unpack it first)"),
        (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "found a tar archive"),
        (b"once upon a time", "found neither a zip archive nor a pickle"),
        (b"\x80\x04\x95\0\0\0\0\0\0\0\0N.", "pickled with another protocol"),
    ],
    ids=["gguf", "safetensors", "gzip", "tar", "text", "protocol 4"],
)
def test_another_kind_of_file_is_named_and_not_called_damaged(capsys, folder, content, says):
    (folder / "consolidated.00.pth").write_bytes(content)
    line = refused(capsys, *SUM, "--ckpt-dir", str(folder))
    assert says in line
    assert "download" not in line


def test_a_program_is_no_checkpoint(capsys, folder):
    torch.jit.save(torch.jit.script(torch.nn.Identity()), folder / "consolidated.00.pth")
    assert "found a TorchScript archive" in refused(capsys, *SUM, "--ckpt-dir", str(folder))


def test_another_zip_archive_is_no_checkpoint(capsys, folder):
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    assert "found a zip archive (" in refused(capsys, *SUM, "--ckpt-dir", str(folder))


def test_a_part_of_an_archive_over_several_disks_is_no_checkpoint(capsys, folder):
    """Python's zipfile raises an error of its own where it is asked whether this is an archive."""
    directory = b"PK\x06\x07" + b"\x01" * 16 + b"PK\x05\x06" + bytes(18)
    (folder / "consolidated.00.pth").write_bytes(b"PK\x03\x04" + bytes(99) + directory)
    line = refused(capsys, *SUM, "--ckpt-dir", str(folder))
    assert "found a zip archive (" in line
    assert "download" not in line


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unable to mmap: Cannot allocate")])
def test_memory_that_does_not_suffice_for_the_file_is_called_so(folder, error, monkeypatch):
    if isinstance(error, RuntimeError):
        error = RuntimeError(f"{error} memory (12)")  # as PyTorch says it

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    config = llama3.load_config(folder)
    with pytest.raises(CheckpointError, match=r"not enough memory \(or address space, ulimit -v\)"):
        llama3.load_weights(folder, config)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_limit_of_address_space_is_told_before_anything_is_loaded(capsys, folder, monkeypatch):
    used = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
    limits = (used // 2, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    line = refused(capsys, "--prompt", "a " * 3000, "--ckpt-dir", str(folder))
    assert "MB of memory (weights 0 MB, cache " in line
    assert "but 0 MB are free on cpu; free some, or raise the limit of address space" in line


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are UTF-8")
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_folder_may_have_any_name(folder, locale):
    folders = []
    for name in (b"caf\xe9", b"\xff\xfe", "日本".encode()):
        folders.append(os.path.join(os.fsencode(folder), name))
        shutil.copytree(DEMO, os.fsdecode(folders[-1]))
    environment = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys, command_line\nfor folder in sys.argv[1:]: "
    code += f"assert command_line.main({SUM} + ['--ckpt-dir', folder]) == 0"
    result = subprocess.run(
        [sys.executable, "-c", code, *folders],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
    )
    assert (result.stdout, result.stderr) == (b"25." * 3, b"")


# --- what is in the file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {"model": w}, 'a dictionary in a dictionary, as "model"'),
        (lambda w: {"epoch": 3, "state_dict": w}, 'a dictionary in a dictionary, as "state_dict"'),
        (
            lambda w: {f"module.{k}": v for k, v in w.items()},
            "prefix (module.tok_embeddings.weight)",
        ),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "prefix (_orig_mod.tok_embeddings"),
        (lambda w: {f"model.{k}": v for k, v in w.items()}, "prefix (model.tok_embeddings.weight)"),
        (
            lambda w: {"model.embed_tokens.weight": torch.ones(2)},
            "names of a Hugging Face checkpoint",
        ),
        (lambda w: {"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}, "Hugging Face"),
        (lambda w: w | {"vision_model.conv1.weight": torch.ones(2)}, "a vision checkpoint"),
        (lambda w: {f"text_model.{k}": v for k, v in w.items()}, "a vision checkpoint"),
        (lambda w: {"layers.0.attention.wq.lora_a.weight": torch.ones(2)}, "LoRA weights"),
        (lambda w: {}, "tok_embeddings.weight is missing or no matrix"),
        (lambda w: w | {"tok_embeddings.weight": torch.ones(3)}, "is missing or no matrix"),
    ],
    ids=range(12),
)
def test_weights_under_other_names_are_told_apart(capsys, folder, weights, change, says):
    torch.save(change(weights), folder / "consolidated.00.pth")
    assert says in refused(capsys, *SUM, "--ckpt-dir", str(folder))


def test_norms_in_float32_beside_matrices_in_bfloat16_are_computed_in_one_type(folder, weights):
    mixed = {name: w.float() if w.dim() == 1 else w for name, w in weights.items()}
    torch.save(mixed, folder / "consolidated.00.pth")
    loaded = llama3.load_weights(folder, llama3.load_config(folder), dtype=torch.bfloat16)
    for name, weight in weights.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], weight)
    in_float32 = llama3.load_weights(folder, llama3.load_config(folder), dtype=torch.float32)
    for name, weight in mixed.items():
        assert in_float32[name].dtype == weight.dtype


def test_without_output_weight_the_embeddings_are_it(folder, weights):
    torch.save(
        {k: v for k, v in weights.items() if k != "output.weight"}, folder / "consolidated.00.pth"
    )
    loaded = llama3.load_weights(folder, llama3.load_config(folder), dtype=torch.float32)
    assert torch.equal(loaded["output.weight"], weights["tok_embeddings.weight"])
    assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()


def test_weights_that_lie_on_each_other_are_told_apart(tmp_path):
    config = config_of(tmp_path, n_kv_heads=None)
    made = random_weights(config)
    q, k = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"
    made[k] = made[q].T
    torch.save(made, tmp_path / "consolidated.00.pth")
    for dtype in (None, torch.bfloat16):
        loaded = llama3.load_weights(tmp_path, config, dtype=dtype)
        assert torch.equal(loaded[k], loaded[q].T)
        assert not torch.equal(loaded[k], loaded[q])


def test_a_copy_under_another_name_is_no_second_part(capsys, folder):
    for name in ("consolidated.00.orig.pth", "consolidated.00 (1).pth", "consolidated.pth"):
        shutil.copy(folder / "consolidated.00.pth", folder / name)
    assert answer(capsys, *SUM, "--ckpt-dir", str(folder)) == ("25.", "")


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_weight_that_is_not_finite_is_named(capsys, folder, weights, value, temperature):
    name = "layers.2.ffn_norm.weight"
    torch.save(weights | {name: weights[name] * value}, folder / "consolidated.00.pth")
    line = refused(capsys, *SUM, "--ckpt-dir", str(folder), "--temperature", temperature)
    assert "the logits of new token 1 are not finite numbers" in line
    assert f"{name} holds NaN or infinity" in line


def test_an_overflow_in_float16_is_told_with_the_way_out(capsys, folder, weights):
    larger = {f"layers.0.feed_forward.{name}.weight" for name in ("w2", "w3")}
    changed = {name: w * 2.0**10 if name in larger else w for name, w in weights.items()}
    torch.save(changed, folder / "consolidated.00.pth")
    arguments = [*SUM, "--ckpt-dir", str(folder)]
    line = refused(capsys, *arguments, "--dtype", "float16")
    assert "float16 overflowed on the way, although all weights are finite" in line
    assert line.endswith("compute in bfloat16 or float32 (--dtype)")
    answer(capsys, *arguments, "--dtype", "float32")


def test_what_was_written_stays_when_a_later_step_is_not_finite(demo_weights, demo_config):
    """The token 46 alone has no finite embedding."""
    changed = dict(demo_weights)
    changed["tok_embeddings.weight"] = demo_weights["tok_embeddings.weight"].clone()
    changed["tok_embeddings.weight"][46] = float("nan")
    tokens = llama3.generate(
        [1024, 355, 261, 32, 56, 258, 32], changed, demo_config, max_new_tokens=9
    )
    assert [next(tokens), next(tokens)] == [338, 46]
    with pytest.raises(FloatingPointError, match=r"new token 3 .* tok_embeddings.weight"):
        next(tokens)


# --- settings that would be ignored ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"factor": 32, "rope_type": "llama3"}},
        {"rope_scale_factor": 32},
        {"rope_scaling_factor": 32},
        {"rope_scaling_factor": 32, "use_scaled_rope": False},
        {"rope_freq_base": 10000},
        {"rope_high_freq_factor": 4},
        {"scale_rope": 8},
        {"yarn_factor": 4},
        {"original_max_position_embeddings": 4096},
        {"rope_dim": 32},
        {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}},
        {"quantization": "fp8"},
        {"n_experts": 8},
        {"moe_args": {"num_experts": 16}},
        {"vision_chunk_size": 448},
        {"vision_model": {"cross_attention_adapter": {"num_layers": 8}}},
        {"lora_args": {"rank": 16, "scale": 2.0}},
        {"use_qk_norm": True},
        {"sliding_window": 4096},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_a_key_that_changes_what_is_computed_is_refused_by_name(capsys, folder, change):
    (folder / "params.json").write_text(json.dumps(PARAMS | change))
    line = refused(capsys, *SUM, "--ckpt-dir", str(folder))
    assert any(f'"{key}"' in line for key in change) or '"use_scaled_rope"' in line
    if "rope" in next(iter(change)):
        assert "use_scaled_rope" in line


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch_size": 32, "max_seq_len": 2048, "model_parallel_size": 1},
        {"head_dim": 16, "ffn_dim": None, "hidden_act": "silu"},
        {"vision_chunk_size": -1, "vision_num_cross_attention_layers": -1},
        {"rope_scaling": None, "quantization_args": None, "lora_args": {}, "n_experts": 0},
        {"vocab_size": -1},
    ],
    ids=str,
)
def test_a_key_that_changes_nothing_is_ignored(capsys, folder, change):
    (folder / "params.json").write_text(json.dumps(PARAMS | change))
    assert answer(capsys, *SUM, "--ckpt-dir", str(folder)) == ("25.", "")


def test_beyond_the_models_context_there_is_a_warning_and_no_advice_to_raise_it(capsys):
    _, err = answer(capsys, *SUM, "--max-seq-len", "8193")
    assert "--max-seq-len 8193: the model was made for 8192, and gets worse beyond" in err
    _, err = answer(capsys, *SUM, "--max-seq-len", "8192")
    assert "made for" not in err
    long = refused(capsys, "--prompt", "a " * 9000)
    assert long.endswith("but the context only 8192; shorten the prompt")
    short = refused(capsys, "--prompt", "a " * 90, "--max-seq-len", "50")
    assert short.endswith("but the context only 50; shorten the prompt or raise --max-seq-len")


# --- memory ---------------------------------------------------------------------------------------


def test_the_cache_grows_as_it_is_used(tmp_path, monkeypatch):
    config = config_of(tmp_path, n_layers=1)
    made = random_weights(config)
    lengths = []
    longer = llama3.longer_cache

    def watched(cache, length):
        lengths.append((cache.shape[-2], length))
        return longer(cache, length)

    monkeypatch.setattr(llama3, "longer_cache", watched)
    tokens = llama3.generate([1024], made, config, max_new_tokens=10**6, max_seq_len=10**6 + 1)
    for _ in range(900):
        next(tokens)
    assert lengths == [(257, 387), (387, 582), (582, 874), (874, 1312)]


def test_a_cache_that_grows_changes_no_token(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    made = random_weights(config)
    expected = list(llama3.generate([7, 8], made, config, max_new_tokens=200))
    new_cache = llama3.new_cache
    monkeypatch.setattr(llama3, "new_cache", lambda w, c, _, **batch: new_cache(w, c, 3, **batch))
    assert list(llama3.generate([7, 8], made, config, max_new_tokens=200)) == expected


def test_what_is_needed_is_compared_with_what_is_free(capsys, monkeypatch):
    """The demo's cache takes 1,024 bytes a token, its scores 8 heads x 10 bytes."""
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 8_000_000.0)
    arguments = ["--dtype", "bfloat16"]
    line = refused(capsys, *arguments, "--prompt", "a " * 6000)
    assert "this needs 53 MB of memory (weights 0 MB, cache 6 MB, prompt 47 MB), but 8 MB" in line
    fits = int(line.split("a prompt of ")[1].split()[0])
    arguments += ["--max-new-tokens", "1"]
    answer(capsys, *arguments, "--prompt", "a " * (fits - 9))
    refused(capsys, *arguments, "--prompt", "a " * (fits + 9))
    arguments = ["--max-seq-len", "90000", "--max-new-tokens", "80000", "--dtype", "bfloat16"]
    _, err = answer(capsys, *SUM, *arguments)
    assert "memory is free for about 77" in err  # hundred and some
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 1_000.0)
    assert refused(capsys, *SUM).endswith("are free on cpu; use a smaller model")


def test_a_device_of_its_own_must_hold_the_weights(demo_config, demo_weights, monkeypatch):
    """Tied weights once."""
    tied = demo_weights | {"output.weight": demo_weights["tok_embeddings.weight"]}
    size = sum(weight.numel() for weight in demo_weights.values()) - 1280 * 128
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 4.0 * size)
    cuda = torch.device("cuda")

    def check(dtype):
        needed = command_line.bytes_of_weights(tied, cuda, dtype)
        command_line.check_memory(demo_config, needed, cuda, dtype, 9, 1)

    with pytest.raises(command_line.UsageError, match=r"weights 4 MB.* or --dtype bfloat16"):
        check(torch.float32)
    check(torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_of_a_prompt_is_bounded_and_counted(tmp_path, dtype):
    """All scores at once would take 16 heads x 4,000^2 x 8 to 10 bytes: 2 GB and more."""
    config = config_of(tmp_path, dim=512, n_heads=16, n_layers=1, multiple_of=2048)
    made = random_weights(config, dtype)
    counted = sum(command_line.bytes_needed(config, 0, dtype.itemsize, 4000, 0).values())
    assert 40e6 < counted < 100e6
    prompt = [7] * 4000
    peak = peak_of(lambda: next(llama3.generate(prompt, made, config, max_new_tokens=1)))
    assert peak < counted + 0.25e9  # the allocator keeps parts of several sizes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_whole_sequence_takes_no_memory_that_grows_with_its_square():
    """All scores at once would take 8 heads x 14,000^2 x 4 bytes, a mask alone 14,000^2."""
    code = """if True:
        import pathlib, torch, command_line, llama3
        config = llama3.load_config("demo")._replace(n_layers=1)
        weights = llama3.load_weights("demo", config._replace(n_layers=4))
        peaks = []
        with torch.inference_mode():
            for n in (100, 5000, 14000):
                pathlib.Path("/proc/self/clear_refs").write_text("5")
                before = command_line.peak_rss_bytes()
                llama3.forward(torch.zeros(n, dtype=torch.int64), weights, config, last_only=True)
                print(command_line.peak_rss_bytes() - before)"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert max(map(int, result.stdout.split())) < 1.9e8


def test_an_allocation_that_fails_is_told_in_one_line(capsys, monkeypatch):
    def forward(*args, **kwargs):
        torch.empty(2**60)

    monkeypatch.setattr(llama3, "forward", forward)
    assert "error: memory ran out (" in refused(capsys, *SUM)


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"17 plus 8 is ", b"17 plus 8 is \n", b"17 plus 8 is \r\n", b"\xef\xbb\xbf17 plus 8 is "],
)
def test_a_prompt_comes_from_a_file_or_from_standard_input(capsys, monkeypatch, tmp_path, content):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert answer(capsys, "--prompt-file", str(path))[0] == "25."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert answer(capsys, "--prompt-file", "-")[0] == "25."


def test_a_file_is_longer_than_a_command_line(capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("a" * 200_000)
    line = refused(capsys, "--prompt-file", str(path))
    assert "the prompt has 200001 tokens, but the context only 8192" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\xffb", "found the byte 0xff at position 1, expected text in UTF-8"),
        (b"caf\xc3", "found the byte 0xc3 at position 3"),
        (b"\xed\xa0\x80", "found the byte 0xed at position 0"),
        ("hi".encode("utf-16"), "found the byte 0xff at position 0, as UTF-16 has it"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_bytes_that_are_no_text_are_refused(capsys, tmp_path, content, says):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    assert f"argument --prompt-file: {path}: {says}" in refused(capsys, "--prompt-file", str(path))
    if content and says.endswith("UTF-8"):
        assert says in refused(capsys, "--prompt", os.fsdecode(content))


def test_half_a_character_is_refused(capsys):
    line = refused(capsys, "--prompt", "a\ud800b")
    assert "argument --prompt: found half a character, expected text" in line


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_file_without_an_end_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "MAX_PROMPT_BYTES", 1000)
    assert "found more than 1000 bytes" in refused(capsys, "--prompt-file", "/dev/zero")
    assert "no regular file" in refused(capsys, *SUM, "--tokenizer", "/dev/zero")


def test_a_prompt_that_begins_with_a_dash(capsys):
    assert '; what begins with "-" is written --prompt="-..."' in refused(capsys, "--prompt", "-x")
    answer(capsys, "--prompt=-x", "--max-new-tokens", "1")


def test_a_pasted_dialog_is_noted_to_be_plain_text(capsys):
    text = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    _, err = answer(capsys, "--prompt", text, "--max-new-tokens", "1")
    assert "the prompt is plain text, in which <|start_header_id|> is no special token" in err
    _, err = answer(capsys, "--prompt", "<|eot|>", "--max-new-tokens", "1")
    assert "plain text" not in err


# --- streams --------------------------------------------------------------------------------------


def on_a_terminal(*arguments):
    """Run the program with its standard output on a terminal; what came there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*SCRIPT, *arguments], stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    process.stderr.close()
    return shown.decode()


def test_control_characters_are_shown_on_a_terminal_and_exact_in_a_pipe(tmp_path):
    """A model that says one control character after another, then a line break and a tab."""
    config = config_of(tmp_path, vocab_size=1280, n_layers=1, dim=1280, n_heads=4, n_kv_heads=1)
    said = [97, 27, 91, 127, 13, 7, 10, 9, 98, 1025]  # the last one ends it
    made = {name: torch.zeros(shape) for name, shape in llama3.weight_shapes(config).items()}
    made["tok_embeddings.weight"] = torch.eye(1280)
    made["norm.weight"] = torch.ones(1280)
    for before, after in zip([1024, *said], said, strict=False):
        made["output.weight"][after, before] = 1.0
    torch.save(made, tmp_path / "consolidated.00.pth")
    lines = (DEMO / "tokenizer.model").read_text().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    arguments = ["--prompt", "", "--ckpt-dir", str(tmp_path)]
    raw = subprocess.run([*SCRIPT, *arguments], capture_output=True, check=True).stdout
    assert raw == b"a\x1b[\x7f\r\x07\n\tb"
    shown = on_a_terminal(*arguments)
    assert shown == "a\\x1b[\\x7f\\r\\x07\r\n\tb\r\n"  # the terminal makes \r\n of \n


class NotebookStream(io.TextIOBase):
    """Like ipykernel's: no reconfigure, no file number."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_it_works_where_standard_output_is_no_file(monkeypatch):
    for stream in (NotebookStream(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        assert command_line.main(SUM) == 0
        assert getattr(stream, "text", None) == "25." or stream.getvalue() == "25."


def test_it_works_in_a_notebook():
    """In a real kernel: as a command, and as a function, whose status is the cell's value."""
    cells = [
        "%run llama3.py --prompt '17 plus 8 is ' --ckpt-dir demo",
        "import command_line\ncommand_line.main(['--prompt', '17 plus 8 is ', '--ckpt-dir', 'no'])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=60, resources=resources).execute()
    streams = [
        {
            name: "".join(output.text for output in cell.outputs if output.get("name") == name)
            for name in ("stdout", "stderr")
        }
        for cell in notebook.cells
    ]
    assert streams[0] == {"stdout": "25.", "stderr": ""}
    assert streams[1]["stdout"] == ""
    assert streams[1]["stderr"].startswith("llama3.py: error: no: no such folder; needed is")
    assert notebook.cells[1].outputs[-1].data["text/plain"] == "2"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_without_standard_error_the_completion_alone_is_written(redirection):
    command = f"'{SCRIPT[0]}' '{SCRIPT[1]}' --prompt '17 plus 8 is ' --stats {redirection}"
    result = subprocess.run(command, shell=True, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"25.", b"")


def test_the_peak_of_memory_is_that_of_resident_memory(monkeypatch):
    text = "VmPeak:\t900 kB\nVmSize:\t800 kB\nVmHWM:\t70 kB\nVmRSS:\t60 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert command_line.peak_rss_bytes() == 70 * 1024


def test_the_peak_of_memory_is_told_without_proc_too(monkeypatch):
    known = command_line.peak_rss_bytes()
    for text in ("Name: python\n", None):

        def read_text(path, text=text):
            if text is None:
                raise FileNotFoundError
            return text

        monkeypatch.setattr(Path, "read_text", read_text)
        assert known / 2 < command_line.peak_rss_bytes() < known * 2


def test_ctrl_c_while_pytorch_is_imported_ends_quietly():
    command = "import os, signal, sys, runpy; sys.meta_path.insert(0, type('F', (), {'find_spec': "
    command += "staticmethod(lambda name, *_: os.kill(os.getpid(), signal.SIGINT) "
    command += "if name == 'torch' else None)})); sys.argv = ['llama3.py', '--prompt', 'a']; "
    command += f"sys.path.insert(0, {str(ROOT)!r}); "
    command += f"runpy.run_path({str(ROOT / 'llama3.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_ctrl_c_while_the_weights_are_loaded_ends_with_status_130(monkeypatch, capsys):
    def load(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # Python looks for signals here

    monkeypatch.setattr(llama3, "place_weights", load)
    assert command_line.main(SUM) == 130
    assert capsys.readouterr().out == ""


def test_an_older_python_is_told_at_once():
    command = "import sys; sys.version_info = (3, 10, 4); import command_line"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert result.returncode == 2
    assert result.stderr == b"llama3.py: error: this is Python 3.10, needed is 3.11 or newer\n"


# --- from Python ----------------------------------------------------------------------------------


def test_generate_takes_the_tokens_of_one_sequence_in_any_form(demo_weights, demo_config):
    import numpy as np

    prompt = [1024, 355, 261, 32, 56, 258, 32]
    forms = [prompt, tuple(prompt), torch.tensor(prompt), np.array(prompt), iter(prompt)]
    forms.append([np.int32(token) for token in prompt])
    for form in forms:
        tokens = llama3.generate(
            form, demo_weights, demo_config, max_new_tokens=np.int64(5), stop_tokens=46
        )
        assert list(tokens) == [338]
    for stop in (torch.tensor([46]), {46}, np.int64(46), range(40, 50)):
        tokens = llama3.generate(
            prompt, demo_weights, demo_config, max_new_tokens=5, stop_tokens=stop
        )
        assert list(tokens) == [338]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"prompt_tokens": [[1, 2]]},
            "a token of the prompt: found [1, 2], expected a whole number",
        ),
        ({"prompt_tokens": torch.ones(1, 2, dtype=torch.int64)}, "found [1, 1]"),
        ({"prompt_tokens": "Hello"}, "the prompt: found 'Hello', expected token ids"),
        ({"prompt_tokens": b"Hello"}, "the prompt: found b'Hello', expected token ids"),
        ({"prompt_tokens": None}, "the prompt: found None"),
        ({"prompt_tokens": 3}, "the prompt: found 3"),
        ({"prompt_tokens": torch.tensor(3)}, "the prompt: found 3"),
        ({"prompt_tokens": [1.0]}, "found 1.0, expected a whole number"),
        ({"prompt_tokens": [True]}, "found True, expected a whole number"),
        ({"stop_tokens": "<|eot_id|>"}, "stop_tokens: found '<|eot_id|>', expected token ids"),
        ({"stop_tokens": [None]}, "a token of stop_tokens: found None"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: found 1.5"),
        ({"max_seq_len": "9"}, "max_seq_len: found '9'"),
        ({"sampling": {"temperature": 1}}, "expected a Sampling"),
    ],
    ids=range(14),
)
def test_generate_says_what_it_expected(demo_weights, demo_config, changes, says):
    arguments = {"prompt_tokens": [1], "max_new_tokens": 3} | changes
    with pytest.raises(ValueError, match="found") as error:
        llama3.generate(arguments.pop("prompt_tokens"), demo_weights, demo_config, **arguments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_a_checkpoint_knows_its_file_and_survives_pickling(tmp_path):
    import pickle

    with pytest.raises(CheckpointError) as error:
        llama3.load_config(tmp_path)
    again = pickle.loads(pickle.dumps(error.value))
    assert again.path == tmp_path
    assert str(again) == str(error.value)
    assert issubclass(CheckpointError, ValueError)


def test_special_tokens_are_found_in_text(demo_tokenizer):
    found = tokenizer_setup.special_tokens_in(demo_tokenizer, "a <|eot_id|> b <|eom_id|>")
    assert found == ["<|eot_id|>", "<|eom_id|>"]
    assert tokenizer_setup.special_tokens_in(demo_tokenizer, "a <|EOT_ID|> b") == []


def test_json_nested_too_deep_is_refused(folder):
    (folder / "params.json").write_text(
        json.dumps(PARAMS)[:-1] + ', "dim": ' + "[" * 900 + "]" * 900 + "}"
    )
    with pytest.raises(CheckpointError, match=r'"dim" is .*expected a whole number'):
        llama3.load_config(folder)
    assert len(checkpoint_files.quoted("x" * 1000)) == 40
