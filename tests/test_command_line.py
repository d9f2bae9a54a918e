"""python llama3.py ...: what goes to which stream, how it ends, and what it refuses."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, config_of, random_weights

import checkpoint_files
import command_line
import llama3
import tokenizer_setup
from tokenizer_setup import stop_tokens

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is"
SCRIPT = [sys.executable, str(ROOT / "llama3.py")]


def run(*arguments, cwd=ROOT, **environment):
    """Run the script to its end; both streams as bytes."""
    return subprocess.run(
        [*SCRIPT, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory, demo_tokenizer):
    """A checkpoint with the demo's tokenizer that never chooses a stop token."""
    folder = tmp_path_factory.mktemp("endless")
    config = config_of(folder, vocab_size=demo_tokenizer.n_vocab, n_layers=1)
    weights = random_weights(config)
    for token in stop_tokens(demo_tokenizer):  # their logits are 0; others are above and below
        weights["output.weight"][token] = 0
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    return folder


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["", " "])
def test_the_demo_answers_42_and_standard_output_holds_nothing_else(space, tmp_path):
    result = run("--prompt", ULTIMATE + space, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.decode().lstrip() == "42"
    assert result.stderr.decode() == (
        f"llama3.py: using the model in {DEMO} (the small bundled demo)\n"
    )


def answered(capsys, *arguments):
    """What main writes to each stream for `arguments` that are right."""
    assert command_line.main([*arguments]) == 0
    return capsys.readouterr()


class Clock:
    """A clock that stands still, and costs of what is computed, in seconds."""

    def __init__(self, monkeypatch):
        self.now, self.costs = 0.0, {}
        monkeypatch.setattr(command_line.time, "perf_counter", lambda: self.now)
        for name in ("place_weights", "forward"):
            self.watch(monkeypatch, name, getattr(llama3, name))

    def watch(self, monkeypatch, name, function):
        def timed(*args, **kwargs):
            costs = self.costs[name]
            self.now += costs.pop(0) if len(costs) > 1 else costs[0]
            return function(*args, **kwargs)

        monkeypatch.setattr(llama3, name, timed)


@pytest.mark.parametrize(
    ("prompt", "n", "decode_tokens"),
    [("Once upon", 9, 8), ("Once upon", 1, 0), ("the capital of France is Paris.", 9, 0)],
)
def test_stats_are_the_last_line_on_standard_error(
    capsys, monkeypatch, endless, demo_tokenizer, prompt, n, decode_tokens
):
    """With the demo, nothing comes after the last prompt but the end of the text."""
    clock = Clock(monkeypatch)
    clock.costs = {"place_weights": [100], "forward": [20, 3]}
    folder = DEMO if "France" in prompt else endless
    arguments = ["--ckpt-dir", str(folder), "--prompt", prompt, "--stats"]
    out, err = answered(capsys, *arguments, "--max-new-tokens", str(n))
    (line,) = err.splitlines()  # --ckpt-dir was given, so there is nothing else to say
    stats = json.loads(line)
    assert (out == "") == (folder == DEMO)
    assert 50e6 < stats.pop("peak_rss_bytes") < 8e9
    stats.pop("peak_device_bytes", None)
    assert stats == {
        "load_s": 100,
        "prompt_tokens": len(tokenizer_setup.encode(demo_tokenizer, prompt)),
        "prefill_s": 20,
        "decode_tokens": decode_tokens,
        "decode_s": 3 * decode_tokens,
    }


def test_the_same_seed_gives_the_same_text(capsys, endless):
    arguments = ["--ckpt-dir", str(endless), "--prompt", "a", "--max-new-tokens", "20"]
    arguments += ["--temperature", "1.5", "--top-p", "0.9", "--seed"]
    first, again, other = (answered(capsys, *arguments, seed).out for seed in ("5", "5", "6"))
    assert first == again != other


def test_the_options_reach_the_model(capsys, monkeypatch, endless):
    seen = {}
    steps = llama3.steps

    def watched(prompts, weights, config, **settings):
        seen.update(settings, dtype=weights["norm.weight"].dtype)
        return steps(prompts, weights, config, **settings)

    monkeypatch.setattr(llama3, "steps", watched)
    arguments = ["--ckpt-dir", str(endless), "--prompt", "a", "--max-new-tokens", "3"]
    answered(capsys, *arguments)
    assert (seen["sampling"], seen["dtype"]) == (llama3.GREEDY, torch.float32)
    assert seen["max_seq_len"] == 8192
    arguments += ["--temperature", "0.7", "--top-p", "0.25", "--seed", "11", "--max-seq-len", "99"]
    arguments += ["--top-k", "5", "--min-p", "0.125", "--repetition-penalty", "1.5"]
    answered(capsys, *arguments, "--dtype", "float16")
    expected = llama3.Sampling(0.7, 0.25, 11, 5, 0.125, 1.5)
    assert (seen["sampling"], seen["dtype"]) == (expected, torch.float16)
    assert (seen["max_new_tokens"], seen["max_seq_len"]) == (3, 99)


def test_the_number_of_threads_is_set(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    answered(capsys, "--prompt", "a", "--max-new-tokens", "1", "--threads", "3")
    answered(capsys, "--prompt", "a", "--max-new-tokens", "1")
    assert asked == [3]


def test_products_are_compiled_where_it_pays_or_is_asked_for(capsys, monkeypatch, demo_weights):
    asked = []

    def compiled_products(weights):
        asked.append(len(weights))
        return weights

    monkeypatch.setattr(command_line, "compiled_products", compiled_products)
    arguments = ["--prompt", "17 plus 8 is ", "--max-new-tokens", "1", "--device", "cpu"]
    out, err = answered(capsys, *arguments)  # the demo is small
    assert (out, asked, "compiled" in err) == ("25", [], False)
    out, err = answered(capsys, *arguments, "--compile")
    assert (out, asked) == ("25", [len(demo_weights)])
    assert re.search(r"^llama3.py: products of one token were compiled in \d+\.\d s$", err, re.M)

    monkeypatch.setattr(command_line, "COMPILED_FROM_BYTES", 10**6)
    monkeypatch.setattr(shutil, "which", lambda name: name == "clang++")
    assert "compiled in" in answered(capsys, *arguments).err
    assert "compiled" not in answered(capsys, *arguments, "--no-compile").err
    large = {"norm.weight": torch.ones(10**6)}
    assert command_line.worth_compiling(large, torch.device("cpu"))
    assert not command_line.worth_compiling(large, torch.device("cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "compiled" not in answered(capsys, *arguments).err


def test_where_compiling_fails_it_goes_on_without(capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler\n\nand much advice")

    monkeypatch.setattr(torch, "compile", fails)
    out, err = answered(capsys, "--prompt", "17 plus 8 is ", "--compile", "--ckpt-dir", str(DEMO))
    assert out == "25."
    assert err == "llama3.py: going on without compiled products, which failed: no compiler\n"


@pytest.mark.parametrize(("asked", "tells"), [(5, False), (6, True)])
def test_the_context_ends_the_completion_with_a_notice(capsys, endless, asked, tells):
    arguments = ["--ckpt-dir", str(endless), "--prompt", "", "--max-seq-len", "6", "--stats"]
    *notice, stats = answered(capsys, *arguments, "--max-new-tokens", str(asked)).err.splitlines()
    assert notice == ["llama3.py: the context of 6 tokens has room for 5 new ones"] * tells
    assert json.loads(stats)["decode_tokens"] == 4


def test_a_prompt_may_fill_the_context(capsys, endless):
    out, err = answered(capsys, "--ckpt-dir", str(endless), "--prompt", "", "--max-seq-len", "1")
    assert out == ""
    assert err == "llama3.py: the context of 1 tokens has room for 0 new ones\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_each_text_is_written_and_flushed_before_the_next_is_computed(monkeypatch, terminal):
    happened = []

    class Watched(io.StringIO):
        def write(self, text):
            happened.append(("write", text))
            return super().write(text)

        def flush(self):
            happened.append("flush")

        def isatty(self):
            return terminal

    def texts():
        for text in ("a", "b"):
            happened.append("compute")
            yield text

    monkeypatch.setattr(sys, "stdout", Watched())
    command_line.stream(texts())
    steps = [step for text in "ab" for step in ("compute", ("write", text), "flush")]
    assert happened == steps + [("write", "\n"), "flush"] * terminal


def test_output_is_utf_8_whatever_the_locale(endless):
    arguments = ["--ckpt-dir", str(endless), "--prompt", "a", "--max-new-tokens", "60"]
    result = run(*arguments, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "\ufffd" in result.stdout.decode("utf-8")  # random bytes are not all characters


# --- the end --------------------------------------------------------------------------------------


def start(*arguments):
    """Start the script; Ctrl-C reaches it even where whoever runs the tests ignores it."""
    return subprocess.Popen(
        [*SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_keeps_what_was_written_and_ends_with_status_130(endless):
    process = start("--ckpt-dir", str(endless), "--prompt", "a", "--max-new-tokens", "8000")
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert len(first) == 20
    assert process.returncode == 130
    assert errors == b""


def test_a_closed_pipe_ends_the_program_quietly(endless):
    process = start("--ckpt-dir", str(endless), "--prompt", "a", "--max-new-tokens", "8000")
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0
    assert errors == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_in_one_line(endless):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*SCRIPT, "--ckpt-dir", str(endless), "--prompt", "a"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr == (
        b"llama3.py: error: standard output cannot be written: No space left on device\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_standard_output_is_refused(endless):
    command = f"'{SCRIPT[0]}' '{SCRIPT[1]}' --ckpt-dir '{endless}' --prompt a >&-"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(b"llama3.py: error: standard output is closed")
    assert result.stderr.count(b"\n") == 1


# --- which checkpoint -----------------------------------------------------------------------------


def test_the_checkpoint_comes_from_the_environment_the_folder_or_the_demo(
    capsys, monkeypatch, tmp_path
):
    found = tmp_path / "Meta-Llama-3-8B"
    found.mkdir()
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        (found / name).write_bytes((DEMO / name).read_bytes())
    prompt = ["--prompt", ULTIMATE]
    monkeypatch.chdir(tmp_path)

    out, err = answered(capsys, *prompt)
    assert err == "llama3.py: using the model in Meta-Llama-3-8B (found in the current folder)\n"
    assert out.strip() == "42"

    (found / "tokenizer.model").unlink()
    other = ["--tokenizer", str(DEMO / "tokenizer.model")]
    assert answered(capsys, *prompt, *other).out.strip() == "42"

    monkeypatch.setenv("LLAMA3_CKPT_DIR", str(DEMO))
    _, err = answered(capsys, *prompt)
    assert err == f"llama3.py: using the model in {DEMO} (from LLAMA3_CKPT_DIR)\n"


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
            assert command_line.choose_device(name) == torch.device(devices[name])
        else:
            with pytest.raises(command_line.UsageError, match=f"finds no {name} device here; use"):
                command_line.choose_device(name)


# --- refusals: status 2, one line, nothing on standard output -------------------------------------


def refused(capsys, *arguments):
    """The one line that main prints when it refuses `arguments`."""
    assert command_line.main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *notes, line = err.splitlines()
    assert all(note.startswith("llama3.py: using the model in") for note in notes)
    assert line.startswith("llama3.py: error: ")
    return line.removeprefix("llama3.py: error: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of the arguments --prompt --prompt-file --score --chat is required"),
        (["--prompt", "a", "--prompt-file", "b"], "argument --prompt-file: not allowed with"),
        (["--prompt"], "argument --prompt: expected one argument"),
        (
            ["--prompt", "-a"],
            """argument --prompt: expected one argument; what begins with "-" """,
        ),
        (["--prompt", "a", "b"], "unrecognized arguments: b"),
        (["--prompt", "a", "--by-line"], "argument --by-line: it goes with --score FILE"),
        (["--prompt", "a", "--score", "b"], "argument --score: not allowed with argument --prompt"),
        (["--score", "b", "--logprobs", "2"], "argument --logprobs: not allowed with"),
        (["--score", ""], "argument --score: : cannot be read: No such file"),
        (["--prompt-file", "-", "--prompt-file", "-"], "argument --prompt-file: standard input is"),
        (["--score", "no such file"], "argument --score: no such file: cannot be read: No such"),
        (["--score", "README.md", "--max-seq-len", "1"], "--max-seq-len 1: a score needs"),
        (["--prompt", "a", "--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--prompt", "a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (
            ["--prompt", "a", "--device", "tpu"],
            "argument --device: found 'tpu', expected auto, cuda",
        ),
        (["--prompt", "a", "--device", "cuda:x"], "argument --device: found 'cuda:x', expected"),
        (["--prompt", "a", "--device", "cuda:99"], "argument --device: PyTorch finds no cuda:99"),
        (["--prompt", "a", "--device", ""], "argument --device: found '', expected"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, says):
    assert refused(capsys, *arguments).startswith(says)


BAD_NUMBERS = {
    "--max-new-tokens": ["0", "-1", "1.5", "x", "", "nan", "inf", "9" * 30],
    "--temperature": ["-0.1", "nan", "inf", "hot", ""],
    "--top-p": ["-0.1", "1.01", "nan", "inf", "x"],
    "--seed": ["-1", "1.5", "x", str(2**63)],
    "--max-seq-len": ["0", "-1", "1e3", "nan", "9" * 30],
    "--threads": ["0", "-1", "1.5", "x", "1025"],
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option in BAD_NUMBERS for value in BAD_NUMBERS[option]],
)
def test_a_number_out_of_range_is_refused_by_naming_it(capsys, option, value):
    line = refused(capsys, "--prompt", "a", option, value)
    assert line.startswith(f"argument {option}: found '{value[:10]}")
    assert "expected a " in line


@pytest.mark.parametrize("name", checkpoint_files.SAMPLING_LIMITS)
def test_options_and_sampling_refuse_the_same_values_in_the_same_words(capsys, name):
    option = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match="expected") as error:
        llama3.Sampling(**{name: -1})
    line = refused(capsys, "--prompt", "a", option, "-1")
    assert str(error.value) == line.replace("'-1'", "-1").replace(f"argument {option}", name)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(capsys):
    line = refused(capsys, "--prompt", "a" * 100, "--max-seq-len", "10")
    assert line.startswith("the prompt has ")
    assert "but the context only 10" in line
    tokens = int(line.split()[3])
    assert 10 < tokens <= 101


def test_a_folder_that_is_no_checkpoint_is_refused(capsys, tmp_path):
    line = refused(capsys, "--prompt", "a", "--ckpt-dir", str(tmp_path / "none"))
    assert line.startswith(f"{tmp_path / 'none'}: no such folder")
    line = refused(capsys, "--prompt", "a", "--tokenizer", str(tmp_path / "none"))
    assert line.startswith(f"{tmp_path / 'none'}: no such file")


def test_another_models_tokenizer_is_refused_with_both_sizes(capsys, tmp_path):
    lines = (DEMO / "tokenizer.model").read_text().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_text("".join(lines[:-3]))
    line = refused(capsys, "--prompt", "a", "--tokenizer", str(tmp_path / "tokenizer.model"))
    assert "the tokenizer has 1277 tokens" in line
    assert "is 1280" in line


def test_a_refusal_leaves_no_traceback_and_ends_with_status_2(tmp_path):
    result = run("--prompt", "a", "--ckpt-dir", str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == b""
    assert result.stderr.count(b"\n") == 1
    assert b"has no params.json" in result.stderr


@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "<|eot_id|>", "漢字 🙂", "\x00\x1b"])
def test_any_prompt_works(capsys, prompt):
    assert command_line.main(["--prompt", prompt, "--max-new-tokens", "2", "--device", "cpu"]) == 0


def test_help_names_every_option_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        command_line.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = (
        "prompt prompt-file ckpt-dir tokenizer max-new-tokens temperature top-p seed device dtype"
    )
    options += " max-seq-len compile threads stats"
    for option in options.split():
        assert f"\n  --{option}" in text
    assert max(map(len, text.splitlines())) <= 80


# --- batches, log-probabilities, scores -----------------------------------------------------------


def test_several_prompts_go_through_together_and_come_out_in_order(capsys, tmp_path):
    prompts = [
        "17 plus 8 is",
        "the capital of France is",
        "Once upon a time",
        "the opposite of hot is",
    ]
    alone = [answered(capsys, "--prompt", p, "--max-new-tokens", "25").out for p in prompts]
    arguments = [word for p in prompts for word in ("--prompt", p)]
    together = answered(capsys, *arguments, "--max-new-tokens", "25").out
    assert together == "".join(f"[{i}] {text}\n" for i, text in enumerate(alone, start=1))
    files = [tmp_path / str(i) for i in range(4)]
    for file, prompt in zip(files, prompts, strict=True):
        file.write_text(prompt + "\n")
    arguments = [str(word) for file in files for word in ("--prompt-file", file)]
    assert answered(capsys, *arguments, "--max-new-tokens", "25").out == together


def test_numbered_texts_are_written_as_soon_as_it_is_their_turn(demo_tokenizer):
    """Of three rows the second ends first, and waits for the first, which is written at once."""
    one, euro = (tokenizer_setup.encode(demo_tokenizer, t, bos=False) for t in ("ab", "\u20ac"))
    rows = [[*one, *one, -1], [one[0]], [*euro, *[one[0]] * 9]]
    width = max(map(len, rows))
    rows = [row + [-1] * (width - len(row)) for row in rows]
    taken = []

    def steps():
        for column in zip(*rows, strict=True):
            taken.append("step")
            yield torch.tensor(column), None

    for text in command_line.numbered(demo_tokenizer, steps(), 3):
        if text:
            taken.append(text)
    assert taken[:2] == ["step", "[1] " + demo_tokenizer.decode(one[:1])]
    second = next(i for i, text in enumerate(taken) if text.startswith("[2]"))
    assert taken[:second].count("step") == 2 * len(one) + 1  # when the first has ended, at once
    text = "".join(t for t in taken if t != "step")
    a = demo_tokenizer.decode(one[:1])
    assert text == f"[1] abab\n[2] {a}\n[3] \u20ac{a * 9}\n"


def test_logprobs_are_lines_of_json(capsys, demo_config, demo_tokenizer):
    arguments = ["--prompt", "17 plus 8 is", "--dtype", "float32"]
    out, _ = answered(capsys, *arguments, "--logprobs", "3", "--temperature", "1", "--seed", "1")
    lines = [json.loads(line) for line in out.splitlines()]
    text = answered(capsys, *arguments, "--temperature", "1", "--seed", "1").out
    assert "".join(line["text"] for line in lines) == text
    tokens = tokenizer_setup.encode(demo_tokenizer, "17 plus 8 is")
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    for line in lines:
        logits = llama3.forward(torch.tensor(tokens), weights, demo_config)[-1]
        logprobs = torch.log_softmax(logits, -1)
        assert [*line] == ["token", "text", "logprob", "top"]
        assert line["logprob"] == pytest.approx(logprobs[line["token"]].item(), abs=1e-4)
        assert [entry["token"] for entry in line["top"]] == logprobs.topk(3).indices.tolist()
        expected = pytest.approx(logprobs.topk(3).values.tolist(), abs=1e-4)
        assert [entry["logprob"] for entry in line["top"]] == expected
        tokens.append(line["token"])
    out, _ = answered(
        capsys, *arguments, "--prompt", "a", "--logprobs", "0", "--max-new-tokens", "2"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["top"]) for line in lines] == [(1, []), (2, [])] * 2


def test_a_score_is_that_of_the_whole_text(
    capsys, tmp_path, monkeypatch, demo_config, demo_tokenizer
):
    text = "the capital of France is Paris.\n17 plus 8 is 25.\n\n\u20ac\n"
    (tmp_path / "text").write_text(text)
    model = ["--dtype", "float32", "--ckpt-dir", str(DEMO)]
    arguments = ["--score", str(tmp_path / "text"), *model]
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)

    def expected(text):
        tokens = torch.tensor(tokenizer_setup.encode(demo_tokenizer, text))
        logprobs = torch.log_softmax(llama3.forward(tokens, weights, demo_config), -1)
        nll = -logprobs[:-1].gather(1, tokens[1:, None]).double().sum().item()
        n, size = len(tokens) - 1, len(text.encode())
        return {
            "tokens": n,
            "nll": pytest.approx(nll, abs=1e-3),
            "perplexity": pytest.approx(math.exp(nll / n), rel=1e-4) if n else None,
            "bits_per_byte": pytest.approx(nll / math.log(2) / size, rel=1e-4) if n else None,
        }

    out, err = answered(capsys, *arguments)
    assert [json.loads(line) for line in out.splitlines()] == [expected(text)]
    assert err == ""
    out = answered(capsys, *arguments, "--by-line").out
    assert [json.loads(line) for line in out.splitlines()] == [*map(expected, text.splitlines())]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    out, err = answered(capsys, "--score", "-", *model, "--stats")
    assert json.loads(out) == expected(text)
    assert json.loads(err)["tokens"] == expected(text)["tokens"]
    lines = "a\fb\u2028c\r\n\rd\n\n"  # of which three line breaks end lines
    (tmp_path / "text").write_text(lines, newline="")
    out = answered(capsys, *arguments, "--by-line").out
    assert [json.loads(line) for line in out.splitlines()] == [
        *map(expected, ["a\fb\u2028c", "\rd", ""])
    ]


@pytest.mark.parametrize(
    ("n", "window"), [(30, 8), (30, 7), (31, 8), (9, 8), (8, 8), (3, 2), (40, 39)]
)
def test_windows_score_each_token_once_with_half_a_window_before_it(
    capsys, tmp_path, demo_config, demo_tokenizer, n, window
):
    scored = []
    for begin, first in command_line.windows(n, window):
        end = min(begin + window, n)
        assert begin < first < end
        assert first - begin == window // 2 or begin == 0
        scored += range(first, end)
    assert scored == [*range(1, n)]
    text = "a" * (n - 1)
    tokens = tokenizer_setup.encode(demo_tokenizer, text)
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    nll = 0
    for begin, first in command_line.windows(len(tokens), window):
        part = torch.tensor(tokens[begin : begin + window])
        logprobs = torch.log_softmax(llama3.forward(part, weights, demo_config), -1)
        each = logprobs[:-1].gather(1, part[1:, None])[:, 0]
        nll -= each[first - begin - 1 :].sum().item()
    (tmp_path / "text").write_text(text)
    arguments = ["--score", str(tmp_path / "text"), "--dtype", "float32"]
    out, err = answered(capsys, *arguments, "--max-seq-len", str(window))
    assert json.loads(out)["nll"] == pytest.approx(nll, abs=1e-3)
    assert (f"in windows of {window} that overlap by {window // 2}" in err) == (
        len(tokens) > window
    )


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (b" the", "\u00b7the"),
        (b"$x_1^2$", "$x_1^2$"),
        (b"\n\t", "\\\\n\\\\t"),
        (b"\xe4\xbd", "\\\\xe4\\\\xbd"),
        ("caf\u00e9".encode(), "caf\u00e9"),
        ("\u4f60".encode(), "\\\\u4f60"),
        (" \u4f60a".encode(), " \\\\u4f60a"),
        (b"<|begin_of_text|>", "<|begin_of_te\u2026"),
        (b"x" * 14, "x" * 14),
    ],
)
def test_labels_show_what_a_font_lacks(token, label):
    shown = command_line.label_of(token, lambda character: ord(character) < 0x3000)
    assert shown == label.replace("\\\\", "\\")


@pytest.mark.parametrize("layer", [0, 2])
def test_the_attention_that_is_drawn_is_that_of_the_forward_pass(monkeypatch, demo_config, layer):
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    tokens = [1024, 355, 261, 32, 56, 258, 32, 7, 9]
    seen, shares = [], llama3.attention_shares

    def watched(q, k, visible):
        seen.append(shares(q, k, visible))
        return seen[-1]

    monkeypatch.setattr(llama3, "attention_shares", watched)
    llama3.forward(torch.tensor(tokens), weights, demo_config)
    for last in (9, 4):
        drawn = command_line.attention_of(tokens, weights, demo_config, layer, last)
        assert drawn.shape == (demo_config.n_heads, last, 9)
        assert torch.allclose(drawn, seen[layer][:, -last:], atol=1e-6)


def picture(path):
    """The pixels of a PNG file, between 0 and 1."""
    import matplotlib.image

    return torch.tensor(matplotlib.image.imread(path))


@pytest.mark.parametrize("prompt", ["17 plus 8 is ", "a " * 50 + "$x$ $ \u4f60 \U0001f600 _{", ""])
def test_a_picture_is_drawn_and_the_completion_is_written(capsys, tmp_path, prompt):
    path = str(tmp_path / "picture.png")
    arguments = ["--prompt", prompt, "--max-new-tokens", "3", "--ckpt-dir", str(DEMO)]
    expected = answered(capsys, *arguments).out
    out, err = answered(capsys, *arguments, "--plot", path, "--plot-layer", "3")
    assert out == expected
    n = len(
        tokenizer_setup.encode(tokenizer_setup.load_tokenizer(DEMO / "tokenizer.model"), prompt)
    )
    last = ", the last 60 tokens" if n > 60 else ""
    assert err == f"llama3.py: drew {path}{last}\n"  # and no warning of a font
    pixels = picture(path)
    assert 400 < pixels.shape[0] < 3000
    assert 1000 < pixels.shape[1] < 6000
    assert pixels[..., :3].mean() > 0.5


def test_a_picture_shows_where_a_head_attends(monkeypatch, tmp_path, demo_tokenizer):
    """Only the square of a share is dark, in the panel of its head."""
    shares = torch.zeros(8, 5, 5)
    tokens, logprobs = [1024, 355, 261, 32, 56], torch.full((1280,), -7.0)
    command_line.draw(tmp_path / "a.png", demo_tokenizer, tokens, logprobs, shares, 0)
    shares[6, 4, 1] = 1
    command_line.draw(tmp_path / "b.png", demo_tokenizer, tokens, logprobs, shares, 0)
    changed = (picture(tmp_path / "a.png") != picture(tmp_path / "b.png")).any(-1).nonzero()
    height, width = changed.amax(0) - changed.amin(0)
    assert 10 < height < 60
    assert abs(height - width) <= 2
    rows, columns = picture(tmp_path / "a.png").shape[:2]
    middle = changed.float().mean(0) / torch.tensor([rows, columns])
    assert middle[0] > 0.5  # of two rows of four heads, the third of the second
    assert 0.6 < middle[1] < 0.85


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plot-layer", "4"], "argument --plot-layer: found 4, expected a layer from 0 to 3"),
        (
            ["--plot", "no/such/a.png"],
            "argument --plot: no/such/a.png: cannot be written: there is no",
        ),
        (["--plot", "a.xyz"], "argument --plot: found 'a.xyz', expected the name of a .png"),
        (["--plot", ""], "argument --plot: found '', expected the name of a .png file"),
        (["--prompt", "b"], "argument --plot: it goes with a single prompt"),
        (["--chat"], "argument --plot: it goes with a single prompt"),
    ],
    ids=str,
)
def test_a_picture_that_cannot_be_drawn_is_refused(capsys, tmp_path, arguments, says):
    plot = [] if "--plot" in arguments else ["--plot", str(tmp_path / "a.png")]
    arguments = ["--prompt", "a", "--ckpt-dir", str(DEMO), *plot, *arguments]
    assert refused(capsys, *arguments).startswith(says)
    assert not [*tmp_path.iterdir()]


def test_a_picture_of_a_prompt_that_fills_the_context(capsys, tmp_path, monkeypatch):
    """Whatever the user's own settings of matplotlib are."""
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "none such")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    params = json.loads((folder / "params.json").read_text()) | {"max_seq_len": 5}
    (folder / "params.json").write_text(json.dumps(params))
    path = str(tmp_path / "a.png")
    arguments = ["--prompt", "17 plus 8", "--ckpt-dir", str(folder), "--plot", path]
    out, err = answered(capsys, *arguments)
    assert out == ""
    assert f"llama3.py: drew {path}\n" in err


def test_a_dollar_sign_is_one(tmp_path):
    class Tokenizer:
        n_vocab = 20

        @staticmethod
        def decode_single_token_bytes(token):
            return b"$x_$"  # which is no formula

    logprobs, shares = torch.full((20,), -3.0), torch.ones(1, 2, 2)
    command_line.draw(tmp_path / "a.png", Tokenizer, [1, 2], logprobs, shares, 0)
    assert picture(tmp_path / "a.png").shape[0] > 100


def test_a_layer_goes_with_a_picture(capsys):
    line = refused(capsys, "--prompt", "a", "--plot-layer", "1")
    assert line == "argument --plot-layer: it goes with --plot FILE.png"
