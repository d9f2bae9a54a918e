"""Options: what each means, which values and combinations are refused, and the texts they bring."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from program import SUM, refused, run_main, write_endless_model

import cli.sampling
import llama3
from cli import options
from cli.main import main
from cli.messages import UsageError
from cli.model import choose_device

GROUPS = {
    "text": "prompt prompt-file score by-line special chat system",
    "model": "ckpt-dir tokenizer max-seq-len",
    "sampling": "max-new-tokens temperature top-k top-p min-p repetition-penalty seed",
    "output": "logprobs plot plot-layer stats",
    "machine": "device dtype quantize compile threads",
}


# --- help -----------------------------------------------------------------------------------------


def test_help_lists_every_option_in_its_group_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    heading, listed = None, {}
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line.removesuffix(":")
        elif line.startswith("  --"):
            listed.setdefault(heading, []).append(line.split()[0].removeprefix("--").rstrip(","))
    assert listed == {group: names.split() for group, names in GROUPS.items()}


def test_every_option_that_is_read_is_one_of_those():
    known = {name for names in GROUPS.values() for name in names.split()}
    args = vars(options.parse_arguments(["--prompt", "a"]))
    assert {name.replace("_", "-") for name in args} == known


# --- what they mean -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory, demo_tokenizer):
    return write_endless_model(tmp_path_factory.mktemp("endless"), demo_tokenizer)


def test_the_options_reach_the_model(capsys, monkeypatch, endless):
    seen = {}
    generate_batch = llama3.generate_batch

    def watched(prompts, weights, config, **settings):
        seen.update(settings, config=config, dtype=weights["norm.weight"].dtype)
        return generate_batch(prompts, weights, config, **settings)

    monkeypatch.setattr(llama3, "generate_batch", watched)

    def sampling():
        args = seen["choose"].args
        filters = args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
        return *filters, args.seed

    arguments = ["--ckpt-dir", endless, "--prompt", "a", "--max-new-tokens", "3"]
    run_main(capsys, *arguments)
    assert isinstance(seen["choose"], cli.sampling.Sampler)
    assert sampling() == (0, 0, 1, 0, 1, None)
    assert (seen["max_new_tokens"], seen["config"].max_seq_len) == (3, 8192)
    assert seen["dtype"] == torch.float32
    arguments += ["--temperature", "0.7", "--top-p", "0.25", "--seed", "11", "--max-seq-len", "99"]
    arguments += ["--top-k", "5", "--min-p", "0.125", "--repetition-penalty", "1.5"]
    run_main(capsys, *arguments, "--dtype", "float16")
    assert sampling() == (0.7, 5, 0.25, 0.125, 1.5, 11)
    assert (seen["max_new_tokens"], seen["config"].max_seq_len) == (3, 99)
    assert seen["dtype"] == torch.float16


def test_without_max_new_tokens_an_answer_may_be_longer_than_a_completion():
    assert options.parse_arguments(["--prompt", "a"]).max_new_tokens == 128
    assert options.parse_arguments(["--chat"]).max_new_tokens == 1024
    assert options.parse_arguments(["--chat", "--max-new-tokens", "7"]).max_new_tokens == 7


def test_the_number_of_threads_is_set_only_if_it_is_asked_for(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run_main(capsys, *SUM, "--threads", "3")
    run_main(capsys, *SUM)
    assert asked == [3]


@pytest.mark.parametrize(
    ("cuda", "mps", "devices"),
    [  # of what a machine has, what each name means there
        (0, False, {"auto": "cpu", "cpu": "cpu"}),
        (0, True, {"auto": "mps", "cpu": "cpu", "mps": "mps"}),
        (2, False, {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:1": "cuda:1"}),
        (1, True, {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "mps": "mps"}),
    ],
)
def test_the_best_device_is_taken_or_the_one_that_is_named(monkeypatch, cuda, mps, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name in ("auto", "cpu", "mps", "cuda", "cuda:1", "cuda:2"):
        if name in devices:
            assert choose_device(name) == torch.device(devices[name])
        else:
            with pytest.raises(UsageError, match=rf"--device: .*\b{name} .*--device cpu"):
                choose_device(name)


def test_the_checkpoint_comes_from_the_environment_the_folder_or_the_demo(
    capsys, monkeypatch, tmp_path, demo_weights
):
    """And each time a line says which it is, and what was found there."""
    millions = sum(weight.numel() for weight in demo_weights.values()) / 1e6
    found = f"Meta's files, 4 layers, {millions:.1f} million weights in bfloat16"

    def first_lines(*arguments):
        assert main([*SUM, *arguments]) == 0
        out, err = capsys.readouterr()
        assert out == "25."
        return err

    monkeypatch.chdir(tmp_path)
    demo = f"llama3.py: using the model in {DEMO} (the small bundled demo)\n"
    assert first_lines() == demo + f"llama3.py: found in {DEMO}: {found}\n"
    assert first_lines("--ckpt-dir", str(DEMO)) == f"llama3.py: found in {DEMO}: {found}\n"

    folder = Path("Meta-Llama-3-8B")
    folder.mkdir()
    for name in ("params.json", "consolidated.00.pth"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    here = f"llama3.py: using the model in {folder} (found in the current folder)\n"
    here += f"llama3.py: found in {folder}: {found}\n"
    assert first_lines("--tokenizer", str(DEMO / "tokenizer.model")) == here

    monkeypatch.setenv("LLAMA3_CKPT_DIR", str(DEMO))
    named = f"llama3.py: using the model in {DEMO} (from LLAMA3_CKPT_DIR)\n"
    assert first_lines() == named + f"llama3.py: found in {DEMO}: {found}\n"


# --- refusals: status 2, one line, nothing on standard output -------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "one of the arguments --prompt --prompt-file --score --chat is required"),
        ("--prompt a --prompt-file b", "argument --prompt-file: not allowed with argument --pro"),
        ("--prompt a --score b", "argument --score: not allowed with argument --prompt"),
        ("--prompt", "argument --prompt: expected one argument; write values that begin with"),
        ("--prompt -a", 'argument --prompt: expected one argument; write values that begin with "'),
        ("--prompt a b", "unrecognized arguments: b"),
        ("--prompt a --temp 1", "unrecognized arguments: --temp 1"),
        ("--prompt a --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--prompt-file - --prompt-file -", "argument --prompt-file: standard input can be used "),
        ("--prompt-file none", "argument --prompt-file: none: cannot be read: No such file"),
        ("--score=", "argument --score: : cannot be read: No such file"),
        ("--score none", "argument --score: none: cannot be read: No such file"),
        ("--score README.md --max-seq-len 1", "--max-seq-len 1: a score needs a context of 2 toke"),
        ("--score b --logprobs 2", "argument --score: not allowed with --logprobs"),
        ("--chat --special", "argument --special: not allowed with --chat"),
        ("--prompt a --by-line", "argument --by-line: only valid with --score"),
        ("--prompt a --system b", "argument --system: only valid with --chat"),
        ("--chat --score b", "argument --chat: not allowed with --score"),
        ("--chat --logprobs 2", "argument --chat: not allowed with --logprobs"),
        ("--chat --prompt a --prompt b", "argument --chat: not allowed with several prompts"),
        ("--prompt a --plot-layer 1", "argument --plot-layer: only valid with --plot"),
        ("--prompt a --plot a.xyz", "argument --plot: found 'a.xyz', expected the name of a .png"),
        ("--prompt a --plot=", "argument --plot: found '', expected the name of a .png file"),
        ("--chat --plot a.png", "argument --plot: not allowed with --chat"),
        ("--score b --plot a.png", "argument --plot: not allowed with --score"),
        ("--prompt a --prompt b --plot a.png", "argument --plot: not allowed with several prompts"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(DEMO.parent)
    assert refused(capsys, *arguments.split()).startswith(says)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "", "CPU", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(capsys, name):
    line = refused(capsys, "--prompt", "a", f"--device={name}")
    assert line.startswith("argument --device: ")
    assert name in line
    assert "cpu" in line.replace(name or " ", "")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--max-new-tokens", ["0", "-1", "1.5", "x", "", "nan", "inf", "9" * 30]),
        ("--max-seq-len", ["0", "-1", "1e3", "nan", "9" * 30]),
        ("--temperature", ["-0.1", "nan", "inf", "1e7", "hot", ""]),
        ("--top-k", ["-1", "1.5", "nan"]),
        ("--top-p", ["-0.1", "1.01", "nan", "inf", "x"]),
        ("--min-p", ["-0.1", "1.1", "nan"]),
        ("--repetition-penalty", ["0", "-1", "inf", "nan"]),
        ("--seed", ["-1", "1.5", "x", str(2**63)]),
        ("--logprobs", ["-1", "1001", "x"]),
        ("--plot-layer", ["-1", "4097", "x"]),
        ("--threads", ["0", "-1", "1.5", "x", "1025"]),
    ],
)
def test_a_number_out_of_range_is_refused_by_naming_it(capsys, option, values):
    for value in values:
        line = refused(capsys, "--prompt", "a", option, value)
        assert line.startswith(f"argument {option}: found '{value[:10]}")
        assert "expected a " in line
        assert " from 0" in line or " from 1 to " in line


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--temperature", ["0", "1e6"]),
        ("--top-k", ["0", str(2**24)]),
        ("--top-p", ["0", "1"]),
        ("--min-p", ["0", "1"]),
        ("--repetition-penalty", ["0.01", "100"]),
        ("--seed", ["0", str(2**63 - 1)]),
    ],
)
def test_the_least_and_the_greatest_number_are_taken(capsys, option, values):
    for value in values:
        drawn = [] if option == "--temperature" else ["--temperature", "1"]
        run_main(capsys, *SUM, *drawn, option, value, "--max-new-tokens", "2")


def test_a_folder_that_is_no_checkpoint_is_refused(capsys, tmp_path):
    line = refused(capsys, "--prompt", "a", "--ckpt-dir", tmp_path / "none")
    assert line.startswith(f"{tmp_path / 'none'}: no such folder; expected a folder with Meta's")
    line = refused(capsys, "--prompt", "a", "--ckpt-dir", tmp_path)
    assert line.startswith(f"{tmp_path}: has no params.json; expected a folder with Meta's")
    line = refused(capsys, "--prompt", "a", "--tokenizer", tmp_path / "none")
    assert line.startswith(f"{tmp_path / 'none'}: ")
    assert "No such file" in line


def test_another_models_tokenizer_is_refused_with_both_sizes(capsys, tmp_path):
    lines = (DEMO / "tokenizer.model").read_text().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_text("".join(lines[:-3]))
    line = refused(capsys, "--prompt", "a", "--tokenizer", tmp_path / "tokenizer.model")
    assert "the tokenizer has 1277 tokens" in line
    assert "is 1280" in line


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"17 plus 8 is ", b"17 plus 8 is \n", b"17 plus 8 is \r\n", b"\xef\xbb\xbf17 plus 8 is "],
)
def test_a_prompt_comes_from_a_file_or_from_standard_input(capsys, monkeypatch, tmp_path, content):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert run_main(capsys, "--prompt-file", path)[0] == "25."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert run_main(capsys, "--prompt-file", "-")[0] == "25."


def test_a_file_keeps_every_line_break_but_the_last(tmp_path):
    path = tmp_path / "prompt.txt"
    for content, expected in [("a\n\n", "a\n"), ("\na\r\nb\r\n", "\na\r\nb"), ("a\r", "a\r")]:
        path.write_bytes(content.encode())
        args = options.parse_arguments(["--prompt-file", str(path)])
        assert options.read_prompts(args) == [expected]


def test_a_closed_standard_input_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for option in ("--prompt-file", "--score"):
        assert refused(capsys, option, "-").startswith("standard input is closed, so there is")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\xffb", "found the byte 0xff at position 1, expected text in UTF-8"),
        (b"caf\xc3", "found the byte 0xc3 at position 3, expected text in UTF-8"),
        (b"\xed\xa0\x80", "found the byte 0xed at position 0, expected text in UTF-8"),
        ("hi".encode("utf-16"), "found the byte 0xff at position 0, as UTF-16 has it"),
    ],
)
def test_bytes_that_are_no_text_are_refused(capsys, tmp_path, content, says):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    for option in ("--prompt-file", "--score"):
        assert f"argument {option}: {path}: {says}" in refused(capsys, option, path)
    if b"\0" not in content:
        line = refused(capsys, "--prompt", os.fsdecode(content))
        assert line == "argument --prompt: found bytes that are not UTF-8, expected text"


def test_half_a_character_is_refused(capsys):
    line = refused(capsys, "--prompt", "a\ud800b")
    assert line.startswith("argument --prompt: found ")
    assert line.endswith(", expected text")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_file_without_an_end_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(options, "MAX_PROMPT_BYTES", 1000)
    assert "found more than 1000 bytes" in refused(capsys, "--prompt-file", "/dev/zero")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_tokenizer_without_an_end_is_refused(capsys, monkeypatch):
    # Whoever reads it as a whole gets a part, or this test would fill the memory.
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read(10**6))
    assert "regular file" in refused(capsys, *SUM, "--tokenizer", "/dev/zero")


def test_a_prompt_may_begin_with_a_dash(capsys):
    assert '; write values that begin with "-" as --prompt="-..."' in refused(
        capsys, "--prompt", "-x"
    )
    run_main(capsys, "--prompt=-x", "--max-new-tokens", "1")
