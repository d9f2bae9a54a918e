"""python -m formats.convert: models of other kinds as Meta's files, and Meta's for transformers."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, apart
from other_formats import (
    KINDS,
    TOKENS,
    hf_model,
    logits_of,
    write_gguf,
    write_qwen2,
)
from references import texts

import formats
import llama3
import tokenizer_setup
from cli.main import main as llama3_main
from formats import convert
from formats.blocks import Blocks
from formats.errors import CheckpointError
from formats.gguf import read_header


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return write_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def folder(tmp_path, qwen2):
    """A copy of it, to be changed."""
    return shutil.copytree(qwen2, tmp_path / "hf")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo for transformers."""
    folder = tmp_path_factory.mktemp("exported") / "demo"
    assert convert.main(["--to-hf", str(DEMO), str(folder)]) == 0
    return folder


def said(capfd, status, main, *arguments):
    """What a command wrote to standard output and to standard error."""
    capfd.readouterr()
    assert main([*map(str, arguments)]) == status
    return capfd.readouterr()


def error_of(capfd, main, *arguments):
    """The one line with which a command ends, after what it found."""
    out, err = said(capfd, 2, main, *arguments)
    *notes, line = err.splitlines()
    assert ": error: " in line
    assert all(": found " in note for note in notes)
    assert out == ""
    return line


# --- to Meta's files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_metas_files_hold_the_same_config_and_weights(tmp_path, kind):
    hf_model(kind).save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    if kind in ("scaled", "linear", "yarn"):  # other constants than Meta's
        with pytest.raises(CheckpointError, match="cannot say how its RoPE is scaled"):
            convert.to_meta(source, tmp_path / "meta", tokenizer=False)
        return
    convert.to_meta(source, tmp_path / "meta", tokenizer=False)
    assert sorted(os.listdir(tmp_path)) == ["hf", "meta"]
    config = llama3.load_config(tmp_path / "meta")
    assert config == source.config
    weights, converted = source.load_weights(), llama3.load_weights(tmp_path / "meta", config)
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    opened = formats.open(tmp_path / "meta").load_weights()
    for weights in (converted, opened):
        logits = llama3.forward(TOKENS, weights, config)
        assert apart(logits, logits_of(hf_model(kind))) < 1e-4


def test_a_gguf_file_keeps_its_types_but_for_quantized_ones(tmp_path, demo_config, demo_weights):
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)):
        path = write_gguf(tmp_path / f"{kind}.gguf", demo_weights, demo_config, kind)
        source = formats.open(path)
        convert.to_meta(source, tmp_path / kind, tokenizer=False)
        content = torch.load(tmp_path / kind / "consolidated.00.pth", weights_only=True)
        assert {w.dtype for w in content.values() if w.dim() == 2} == {dtype}
        weights = source.load_weights(dtype=torch.float32)
        for name, w in weights.items():
            w = w.to(torch.bfloat16) if isinstance(w, Blocks) else w
            assert torch.equal(content[name], w), name


def test_what_metas_formulas_give_is_not_spelled_out():
    """The published sizes: their params.json is Meta's own."""
    for dim, heads, ffn_dim, formula in (
        (2048, 32, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),
        (3072, 24, 8192, {"multiple_of": 256}),
        (4096, 32, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),
        (8192, 64, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        (16384, 128, 53248, {"multiple_of": 4096, "ffn_dim_multiplier": 1.2}),
        (896, 14, 4864, {"ffn_dim": 4864}),
    ):
        params = {"dim": dim, "n_layers": 1, "n_heads": heads, "n_kv_heads": 2, "vocab_size": 300}
        params |= {"norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
        config = llama3.config_from_params(params | formula)
        assert (config.ffn_dim, config.max_seq_len) == (ffn_dim, 131072)
        factor = {"rope_scaling_factor": 32 if dim in (2048, 3072) else 8}
        assert convert.params_of(config) == params | formula | factor


def test_the_archive_is_a_whole_one(tmp_path, folder):
    """With the checksums of what is in it, each tensor once, and read by torch.load unmapped."""
    convert.to_meta(formats.open(folder), tmp_path / "meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    content = torch.load(path, weights_only=True, mmap=False)
    weights = formats.open(folder).load_weights(dtype=torch.bfloat16)
    assert content.keys() == weights.keys()
    assert all(torch.equal(content[name], weights[name]) for name in weights)
    model = hf_model("tied")
    model.save_pretrained(tmp_path / "tied")
    convert.to_meta(formats.open(tmp_path / "tied"), tmp_path / "t", tokenizer=False)
    path = tmp_path / "t" / "consolidated.00.pth"
    content = torch.load(path, weights_only=True)
    output, embeddings = content["output.weight"], content["tok_embeddings.weight"]
    assert output.data_ptr() == embeddings.data_ptr()  # Meta's own code asks for both
    numbers = sum(weight.numel() for weight in model.parameters())
    assert path.stat().st_size < 4 * numbers + 20000


# --- and back -------------------------------------------------------------------------------------


def test_the_demo_says_the_same_in_transformers(exported, demo_tokenizer, demo_config):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    for text in texts():
        assert tokenizer(text)["input_ids"] == tokenizer_setup.encode(demo_tokenizer, text), text
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    stop = tokenizer_setup.stop_tokens(demo_tokenizer)
    for prompt in ("17 plus 8 is ", "the capital of France is", "Once upon a time"):
        ids = tokenizer_setup.encode(demo_tokenizer, prompt)
        found = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0].tolist()
        found = found[len(ids) :]
        found = found[:-1] if found[-1] in stop else found
        ours = llama3.generate(ids, weights, demo_config, max_new_tokens=30, stop_tokens=stop)
        assert found == [*ours]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is the capital of Japan?\n"},
        {"role": "assistant", "content": "Tokyo."},
        {"role": "tool", "content": "{}"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer_setup.encode_dialog(demo_tokenizer, messages)


def test_there_and_back_is_the_same_to_the_bit(tmp_path, exported, demo_config, demo_weights):
    convert.to_meta(formats.open(exported), tmp_path / "meta")
    assert llama3.load_config(tmp_path / "meta") == demo_config
    back = llama3.load_weights(tmp_path / "meta", demo_config, dtype=torch.bfloat16)
    assert back.keys() == demo_weights.keys()
    assert all(torch.equal(demo_weights[name], back[name]) for name in back)
    again = (tmp_path / "meta" / "tokenizer.model").read_bytes()
    assert again == (DEMO / "tokenizer.model").read_bytes()
    names = ["consolidated.00.pth", "params.json", "tokenizer.model"]
    assert sorted(os.listdir(tmp_path / "meta")) == names


def test_one_model_in_three_kinds_of_files_gives_the_same_logits(
    tmp_path, exported, demo_config, demo_weights
):
    gguf = write_gguf(tmp_path / "demo.gguf", demo_weights, demo_config, "BF16")
    tokens = torch.tensor([1024, 355, 261, 32, 56, 258, 32])
    expected = llama3.forward(tokens, demo_weights | norms(demo_weights), demo_config)
    for path in (DEMO, exported, gguf):
        source = formats.open(path)
        weights = source.load_weights(dtype=torch.float32)
        logits = llama3.forward(tokens, weights, source.config)
        assert apart(logits, expected) < 1e-6


def norms(weights):
    """Norms in the type that is computed in."""
    return {name: w.float() for name, w in weights.items() if w.dim() == 1}


@pytest.mark.parametrize("kind", ["scaled as Meta's", "tied", "biased, as InternLM", "head_dim"])
def test_models_of_other_sizes_go_there_and_back(tmp_path, kind, monkeypatch):
    """In several files."""
    import transformers

    model = hf_model(kind)
    model.save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    convert.to_meta(source, tmp_path / "meta", tokenizer=False)
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    convert.to_hf(formats.open(tmp_path / "meta"), tmp_path / "back", tokenizer=False)
    assert len([*(tmp_path / "back").glob("*.safetensors")]) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.float32
    assert torch.equal(logits_of(again), logits_of(model))
    assert formats.open(tmp_path / "back").config == source.config


def test_what_hugging_faces_llama_does_not_have_is_not_exported(tmp_path):
    for kind, says in (
        ("scaled", "found RoPE that is scaled otherwise"),
        ("yarn", "found RoPE that is scaled otherwise"),
        ("qwen3", r"found attention\.k_norm\.weight, attention\.q_norm\.weight"),
        ("qwen2", r"found attention\.wk, attention\.wq, attention\.wv"),
        ("biases everywhere", r"found attention\.wk, .*feed_forward\.w3"),
    ):
        hf_model(kind).save_pretrained(tmp_path / "hf")
        with pytest.raises(CheckpointError, match=says):
            convert.to_hf(formats.open(tmp_path / "hf"), tmp_path / "back", tokenizer=False)
    convert.to_meta(formats.open(tmp_path / "hf"), tmp_path / "meta", tokenizer=False)
    path = tmp_path / "meta" / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    one_layer = {
        name: w
        for name, w in weights.items()
        if "bias" not in name or (name.startswith("layers.0.attention"))
    }
    torch.save(one_layer, path)
    with pytest.raises(CheckpointError, match=r"found attention\.wk"):
        convert.to_hf(formats.open(tmp_path / "meta"), tmp_path / "back", tokenizer=False)
    assert sorted(os.listdir(tmp_path)) == ["hf", "meta"]


def test_another_tokenizer_than_llama_3s_is_not_written_to_gguf(tmp_path, folder, capfd):
    hf_model("llama", vocab_size=528).save_pretrained(folder)
    line = error_of(capfd, convert.main, folder, tmp_path / "a.gguf")
    assert "its tokenizer is not Llama 3's; leave it out with --no-tokenizer" in line
    said(capfd, 0, convert.main, folder, tmp_path / "a.gguf", "--no-tokenizer")
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "hf"]


def test_any_tokenizer_is_written_as_hugging_face_has_it(tmp_path, folder, capfd):
    """By both folders that are written, with its template and its stop tokens."""
    import transformers

    hf_model("llama", vocab_size=528).save_pretrained(folder)
    said(capfd, 0, convert.main, folder, tmp_path / "meta")
    said(capfd, 0, convert.main, "--to-hf", tmp_path / "meta", tmp_path / "back")
    ours = [formats.open(tmp_path / name).tokenizer() for name in ("hf", "meta", "back")]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    dialog = [{"role": "user", "content": "Hi <tool_call> 12"}]
    expected = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
    for tokenizer in ours:
        assert tokenizer_setup.encode_dialog(tokenizer, dialog) == expected
        assert tokenizer_setup.stop_tokens(tokenizer) == tokenizer_setup.stop_tokens(ours[0])
        for text in texts():
            assert tokenizer_setup.encode(tokenizer, text) == theirs(text)["input_ids"]


# --- GGUF files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_a_gguf_file_has_the_models_numbers_and_its_tokens(
    tmp_path, capfd, kind, demo_config, demo_weights, demo_tokenizer
):
    path = tmp_path / "demo.gguf"
    options = ["--type", kind] if kind != "BF16" else []
    said(capfd, 0, convert.main, DEMO, path, *options)
    source = formats.open(path)
    assert source.config == demo_config
    for name, w in demo_weights.items():
        stored, expected = source.stored[name], w.float()
        if w.dim() == 2 and kind != "BF16":
            number = gguf.GGMLQuantizationType[kind]
            raw = gguf.quants.quantize(expected.numpy(), number)
            assert torch.equal(stored.parts()[0], torch.from_numpy(raw))
            expected = torch.from_numpy(gguf.quants.dequantize(raw, number))
        assert torch.equal(torch.cat([*stored.tensors()]).float(), expected)
    tokenizer = source.tokenizer()
    assert tokenizer.special_tokens == demo_tokenizer.special_tokens
    assert tokenizer_setup.stop_tokens(tokenizer) == tokenizer_setup.stop_tokens(demo_tokenizer)
    for text in texts():
        encoded = tokenizer_setup.encode(tokenizer, text)
        assert encoded == tokenizer_setup.encode(demo_tokenizer, text)


def test_transformers_reads_a_gguf_file_as_the_demo(tmp_path, demo_tokenizer, demo_config):
    import transformers

    path = tmp_path / "demo.gguf"
    assert convert.main([str(DEMO), str(path), "--type", "Q8_0"]) == 0
    options = {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, **options
    ).eval()
    source = formats.open(path)
    tokens = torch.tensor(tokenizer_setup.encode(demo_tokenizer, "17 plus 8 is "))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    logits = llama3.forward(tokens, source.load_weights(dtype=torch.float32), demo_config)
    assert apart(logits, expected) < 1e-4
    assert demo_tokenizer.decode([logits[-1].argmax().item()]) == "25"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, **options)
    for text in texts():
        assert theirs(text)["input_ids"] == tokenizer_setup.encode(demo_tokenizer, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_sizes_become_gguf_files(tmp_path, kind):
    """Scaled, tied, with biases; Q8_0 where its blocks of 32 divide the rows."""
    hf_model(kind).save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    for kind_of_blocks in ("BF16", "Q8_0"):
        path = tmp_path / f"{kind_of_blocks}.gguf"
        arguments = ["--no-tokenizer", "--type", kind_of_blocks]
        if kind in ("yarn", "qwen3"):
            assert convert.main([str(tmp_path / "hf"), str(path), *arguments]) == 2
            continue
        assert convert.main([str(tmp_path / "hf"), str(path), *arguments]) == 0
        again = formats.open(path)
        config = again.config._replace(rope_divisors=source.config.rope_divisors)
        assert config == source.config
        a = llama3.forward(TOKENS, again.load_weights(dtype=torch.float32), again.config)
        b = llama3.forward(TOKENS, source.load_weights(dtype=torch.float32), source.config)
        assert apart(a, b) < 0.1


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_named_when_it_is_computed_with(tmp_path, capfd, value):
    path = tmp_path / "demo.gguf"
    assert convert.main([str(DEMO), str(path), "--type", "Q8_0"]) == 0
    _, places = read_header(path, gguf.GGML_QUANT_SIZES)
    content, start = bytearray(path.read_bytes()), places["blk.2.ffn_down.weight"][2]
    content[start : start + 2] = np.float16(value).tobytes()
    path.write_bytes(content)
    for options in ([], ["--no-compile"]):
        arguments = ["--ckpt-dir", path, "--prompt", "17 plus 8 is ", "--device", "cpu", *options]
        line = error_of(capfd, llama3_main, *arguments)
        named = "not finite: layers.2.feed_forward.w2.weight contains NaN or infinity"
        assert line.endswith(named)


def test_a_gguf_file_that_is_changed_after_it_was_opened(tmp_path, demo_config):
    """One that was put in its place, or removed, is not seen; one that was cut is refused."""
    path = tmp_path / "demo.gguf"
    assert convert.main([str(DEMO), str(path), "--type", "Q8_0"]) == 0
    source, again = formats.open(path), formats.open(path)
    expected = source.load_weights()["output.weight"].raw.clone()
    os.unlink(path)
    assert torch.equal(again.load_weights()["output.weight"].raw, expected)
    assert convert.main([str(DEMO), str(path), "--type", "Q8_0"]) == 0
    source = formats.open(path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match="greater than file size"):
        source.load_weights()


def test_a_gguf_file_is_not_written_in_the_place_of_a_folder(tmp_path, capfd):
    (tmp_path / "out.gguf").mkdir()
    line = error_of(capfd, convert.main, DEMO, tmp_path / "out.gguf")
    assert "already exists and is not overwritten; choose a new name" in line


def test_a_type_is_for_gguf_files_which_need_llama_3s_tokenizer(tmp_path, folder, capfd):
    hf_model("llama", vocab_size=528).save_pretrained(folder)
    line = error_of(capfd, convert.main, folder, tmp_path / "out.gguf")
    assert "its tokenizer is not Llama 3's; leave it out with --no-tokenizer" in line
    for arguments in (["--type", "Q8_0", tmp_path / "out"], ["--to-hf", tmp_path / "out.gguf"]):
        with pytest.raises(SystemExit) as ended:
            convert.main([str(folder), *map(str, arguments)])
        assert ended.value.code == 2
        told = "--type is for an OUT that ends in .gguf, --to-hf for another one"
        assert told in capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["hf"]


# --- the command ----------------------------------------------------------------------------------


def test_a_folder_is_run_as_it_is_and_converted(tmp_path, folder, capfd):
    prompt = ["--prompt", "Hello, 12", "--max-new-tokens", "8", "--dtype", "float32"]
    out, err = said(capfd, 0, llama3_main, *prompt, "--ckpt-dir", folder)
    about = "Hugging Face, qwen2, 2 layers, 0.0 million weights in bfloat16"
    assert err == f"llama3.py: found in {folder}: {about}\n"
    assert out  # rows beyond the vocabulary are never chosen: they could not be written
    _, err = said(capfd, 0, convert.main, folder, tmp_path / "meta")
    assert err == f"convert: found {about}\nconvert: wrote {tmp_path / 'meta'}\n"
    again, err = said(capfd, 0, llama3_main, *prompt, "--ckpt-dir", tmp_path / "meta")
    assert again == out
    source = formats.open(folder)
    ids = tokenizer_setup.encode(source.tokenizer(), "Hello, 12")
    weights = source.load_weights()
    assert next(llama3.generate(ids, weights, source.config, max_new_tokens=1)) > 500


def test_both_commands_say_in_one_line_what_is_wrong_with_a_source(tmp_path, folder, capfd):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    (tmp_path / "file").write_bytes(b"GGUF")
    for path, says in (
        (folder, '"hidden_act" is "gelu"'),
        (tmp_path / "file", "not a whole GGUF file"),
        (tmp_path / ("y" * 300), ""),
        (tmp_path / "no such", "no such folder"),
    ):
        assert says in error_of(capfd, convert.main, path, tmp_path / "out")
        assert says in error_of(capfd, llama3_main, "--prompt", "a", "--ckpt-dir", path)
    assert sorted(os.listdir(tmp_path)) == ["file", "hf"]


def test_a_name_in_a_file_cannot_write_to_the_terminal(tmp_path, folder, capfd):
    """Whatever it holds, nothing that a terminal would obey."""
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save({"\x1b]0;a title\x07\x9b31m": torch.ones(2)}, path)
    for main, arguments in (
        (convert.main, [folder, tmp_path / "out"]),
        (llama3_main, ["--prompt", "a", "--ckpt-dir", folder]),
    ):
        assert error_of(capfd, main, *arguments).isprintable()


def test_without_a_tokenizer_the_weights_are_converted_alone(tmp_path, folder, capfd):
    (folder / "tokenizer.json").unlink()
    for main, arguments in (
        (convert.main, [folder, tmp_path / "meta"]),
        (llama3_main, ["--ckpt-dir", folder, "--prompt", "a"]),
    ):
        line = error_of(capfd, main, *arguments)
        assert "has no tokenizer.json" in line
        assert "--no-tokenizer" in line
    said(capfd, 0, convert.main, folder, tmp_path / "meta", "--no-tokenizer")
    assert sorted(os.listdir(tmp_path / "meta")) == ["consolidated.00.pth", "params.json"]


# --- OUT_DIR --------------------------------------------------------------------------------------


def test_nothing_is_written_over_and_nothing_is_left_behind(tmp_path, folder, capfd, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    said(capfd, 0, convert.main, folder, out)  # an empty folder will do
    before = {path: path.read_bytes() for path in out.iterdir()}
    line = error_of(capfd, convert.main, folder, out)
    told = "already exists and is not overwritten; choose a new name"
    assert line == f"convert: error: {out}: {told}"
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    assert "already exists" in error_of(capfd, convert.main, folder, tmp_path / "file")
    error_of(capfd, convert.main, folder, tmp_path / "file" / "x")
    error_of(capfd, convert.main, folder, tmp_path / ("y" * 300))

    for error, status in ((KeyboardInterrupt, 130), (MemoryError, 2)):

        def fails(names, error=error):
            yield next(iter(names))
            raise error

        monkeypatch.setattr(convert, "tqdm", lambda names, fails=fails, **_: fails(names))
        said(capfd, status, convert.main, folder, tmp_path / "more")
        said(capfd, status, convert.main, "--to-hf", DEMO, tmp_path / "more")
        said(capfd, status, convert.main, DEMO, tmp_path / "more.gguf")
    assert sorted(os.listdir(tmp_path)) == ["file", "hf", "out"]


@contextlib.contextmanager
def files_of_at_most(size):
    """No process may write more to a file: to this one, too, a full disk looks like that."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, folder, capfd):
    out = tmp_path / "out"
    for arguments in ([folder, out], ["--to-hf", DEMO, out], [DEMO, tmp_path / "out.gguf"]):
        with files_of_at_most(50_000):
            line = error_of(capfd, convert.main, *arguments)
        assert line.startswith(f"convert: error: {arguments[-1]}: cannot be written: ")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_a_signal_leaves_nothing_behind(tmp_path, folder, monkeypatch):
    def killed(names, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return names

    monkeypatch.setattr(convert, "tqdm", killed)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            convert.main([str(folder), str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_it_runs_as_a_module_even_without_standard_error(tmp_path, folder):
    command = [sys.executable, "-m", "formats.convert", folder, tmp_path / "out"]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    result = subprocess.run(closed, cwd=ROOT, stdout=subprocess.PIPE)
    assert (result.returncode, result.stdout) == (0, b"")
    assert formats.open(tmp_path / "out").config == formats.open(folder).config


def test_links_are_followed_and_shared_tensors_are_written(tmp_path, folder, capfd, demo_weights):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    said(capfd, 0, convert.main, folder, tmp_path / "link")
    assert (tmp_path / "real" / "params.json").exists()
    first, second = (f"layers.0.feed_forward.{w}.weight" for w in ("w1", "w3"))
    weights = demo_weights | {second: demo_weights[first]}
    shutil.copytree(DEMO, tmp_path / "demo")
    torch.save(weights, tmp_path / "demo" / "consolidated.00.pth")
    said(capfd, 0, convert.main, "--to-hf", tmp_path / "demo", tmp_path / "demo-hf")
    again = formats.open(tmp_path / "demo-hf").load_weights()
    assert torch.equal(again[second], weights[first])
