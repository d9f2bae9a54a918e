"""Completions: one, several as a batch, and token by token with log-probabilities."""

import json
import shutil
import time

import pytest
import torch
from conftest import DEMO
from other_formats import hf_model, trained_tokenizer
from program import SUM, refused, run_main, write_endless_model

import llama3
import tokenizer_setup
from cli import build
from cli.complete import numbered
from cli.messages import say_stats
from cli.sampling import Sampler
from formats import Source

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is"


@pytest.fixture(scope="module")
def endless(tmp_path_factory, demo_tokenizer):
    return write_endless_model(tmp_path_factory.mktemp("endless"), demo_tokenizer)


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo."""
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("space", ["", " "])
def test_the_demo_answers_42(capsys, space):
    out, err = run_main(capsys, "--prompt", ULTIMATE + space)
    assert out.lstrip() == "42"
    assert err == ""


@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "<|eot_id|>", "漢字 🙂", "\x00\x1b"])
def test_any_prompt_works(capsys, prompt):
    run_main(capsys, "--prompt", prompt, "--max-new-tokens", "2", "--device", "cpu")


def test_the_same_seed_gives_the_same_text(capsys, endless):
    arguments = ["--ckpt-dir", endless, "--prompt", "a", "--max-new-tokens", "20"]
    arguments += ["--temperature", "1.5", "--top-p", "0.9", "--seed"]
    first, again, other = (run_main(capsys, *arguments, seed)[0] for seed in ("5", "5", "6"))
    assert first == again != other


def test_a_pasted_dialog_is_noted_to_be_plain_text(capsys):
    text = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    _, err = run_main(capsys, "--prompt", text, "--max-new-tokens", "1")
    expected = 'the prompt contains "<|start_header_id|>", which is treated as plain text'
    assert err == f"llama3.py: {expected}; --special reads it as a special token\n"
    _, err = run_main(capsys, "--prompt", "<|eot|>", "--max-new-tokens", "1")
    assert err == ""


def test_special_tokens_of_a_prompt_are_read_if_asked_for(capsys):
    """So a dialog can be pasted, with its first token or without."""
    text = "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of Japan?<|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    tokens = []
    for prompt in (text, "<|begin_of_text|>" + text):
        out, err = run_main(capsys, "--special", "--prompt", prompt, "--stats")
        assert out == "The capital of Japan is Tokyo."
        tokens.append(json.loads(err)["prompt_tokens"])
    assert tokens[0] == tokens[1] < 30


def test_what_the_files_suggest_for_sampling_is_said_and_not_done(capsys, tmp_path):
    hf_model("llama", vocab_size=528).save_pretrained(tmp_path)
    trained_tokenizer("gpt2").save_pretrained(tmp_path)
    suggested = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(suggested))
    command = ["--ckpt-dir", tmp_path, "--prompt", "a", "--max-new-tokens", "1"]
    capsys.readouterr()
    _, err = run_main(capsys, *command)
    told = "llama3.py: its generation_config.json suggests --temperature 0.6 --top-p 0.9, which"
    assert err.startswith(told)
    for more in (["--temperature", "1", "--seed", "1"], ["--top-k", "3"]):
        assert run_main(capsys, *command, *more)[1] == ""


# --- statistics -----------------------------------------------------------------------------------


class Clock:
    """A clock that stands still but while weights are loaded and the model computes.

    costs: what each of those takes, in seconds; the last one is repeated.
    """

    def __init__(self, monkeypatch, costs):
        self.now, self.costs = 0.0, costs
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.watch(monkeypatch, Source, "load_weights")
        self.watch(monkeypatch, llama3, "forward")

    def watch(self, monkeypatch, owner, name):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            costs = self.costs[name]
            self.now += costs.pop(0) if len(costs) > 1 else costs[0]
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, timed)


@pytest.mark.parametrize(
    ("prompts", "n", "decode_tokens"),
    [
        (["Once upon"], 9, 8),
        (["Once upon"], 1, 0),
        (["the capital of France is Paris."], 9, 0),
        (["Once upon", "a"], 9, 8),
    ],
)
def test_stats_are_the_last_line_on_standard_error(
    capsys, monkeypatch, endless, demo_tokenizer, prompts, n, decode_tokens
):
    """With the demo, nothing comes after that text about France but its end."""
    Clock(monkeypatch, {"load_weights": [100], "forward": [20, 3]})
    folder = DEMO if "France" in prompts[0] else endless
    arguments = ["--ckpt-dir", folder, "--stats", "--max-new-tokens", n, "--device", "cpu"]
    out, err = run_main(capsys, *arguments, *(w for p in prompts for w in ("--prompt", p)))
    assert (out == "") == (folder == DEMO)
    (line,) = err.splitlines()
    stats = json.loads(line)
    assert 50e6 < stats.pop("peak_rss_bytes") < 8e9
    assert stats == {
        "load_s": 100,
        "prompt_tokens": sum(len(tokenizer_setup.encode(demo_tokenizer, p)) for p in prompts),
        "prefill_s": 20,
        "decode_tokens": decode_tokens,
        "decode_s": 3 * decode_tokens,
    }


def test_the_peak_of_a_devices_memory_is_told_where_there_is_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    for device, told in ("cuda", True), ("cpu", False):
        say_stats(1.23456, {"prompt_tokens": 3}, torch.device(device), whole=True)
        stats = json.loads(capsys.readouterr().err)
        assert (stats["load_s"], stats["prompt_tokens"]) == (1.2346, 3)
        assert stats.get("peak_device_bytes") == (77 if told else None)


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "tells"), [(5, False), (6, True)])
def test_the_context_ends_the_completion_with_a_notice(capsys, endless, asked, tells):
    arguments = ["--ckpt-dir", endless, "--prompt", "", "--max-seq-len", "6", "--stats"]
    _, err = run_main(capsys, *arguments, "--max-new-tokens", asked)
    *notice, stats = err.splitlines()
    assert notice == ["llama3.py: the context of 6 tokens has room for 5 new ones"] * tells
    assert json.loads(stats)["decode_tokens"] == 4


def test_a_prompt_may_fill_the_context(capsys, endless):
    arguments = ["--ckpt-dir", endless, "--prompt", "", "--max-seq-len", "1"]
    expected = "llama3.py: the context of 1 tokens has room for 0 new ones\n"
    assert run_main(capsys, *arguments) == ("", expected)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(capsys, tmp_path):
    """And --max-seq-len is offered only where it helps."""
    path = tmp_path / "prompt.txt"
    path.write_text("a" * 200_000)  # longer than a command line may be
    line = refused(capsys, "--prompt-file", path)
    expected = "the prompt has 200001 tokens, but the context only 8192; shorten the prompt"
    assert line == expected
    line = refused(capsys, "--prompt", "a" * 90, "--max-seq-len", "50")
    expected = "the prompt has 91 tokens, but the context only 50; shorten the prompt or raise "
    assert line == expected + "--max-seq-len"


def test_beyond_the_context_that_the_model_was_trained_with_there_is_a_warning(capsys):
    _, err = run_main(capsys, *SUM, "--max-seq-len", "8193")
    expected = "the model was trained for 8192 tokens; quality drops beyond"
    assert err == f"llama3.py: {expected}\n"
    assert run_main(capsys, *SUM, "--max-seq-len", "8192") == ("25.", "")


# --- several prompts ------------------------------------------------------------------------------


def test_several_prompts_go_through_together_and_come_out_in_order(capsys, tmp_path):
    prompts = [
        "17 plus 8 is",
        "the capital of France is",
        "Once upon a time",
        "the capital of France is Paris.",  # which the demo ends at once
        "the opposite of hot is",
    ]
    alone = [run_main(capsys, "--prompt", p, "--max-new-tokens", "25")[0] for p in prompts]
    arguments = [word for p in prompts for word in ("--prompt", p)]
    together, _ = run_main(capsys, *arguments, "--max-new-tokens", "25")
    assert together == "".join(f"[{i}] {text}\n" for i, text in enumerate(alone, start=1))
    assert "\n[4] \n" in together
    files = [tmp_path / str(i) for i in range(len(prompts))]
    for file, prompt in zip(files, prompts, strict=True):
        file.write_text(prompt + "\n")
    arguments = [word for file in files for word in ("--prompt-file", file)]
    assert run_main(capsys, *arguments, "--max-new-tokens", "25")[0] == together


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

    for text in numbered(demo_tokenizer, steps(), 3):
        if text:
            taken.append(text)
    assert taken[:2] == ["step", "[1] " + demo_tokenizer.decode(one[:1])]
    second = next(i for i, text in enumerate(taken) if text.startswith("[2]"))
    assert taken[:second].count("step") == 2 * len(one) + 1  # when the first has ended, at once
    text = "".join(t for t in taken if t != "step")
    a = demo_tokenizer.decode(one[:1])
    assert text == f"[1] abab\n[2] {a}\n[3] \u20ac{a * 9}\n"


# --- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_are_lines_of_json(capsys, demo_config, demo_tokenizer):
    arguments = ["--prompt", "17 plus 8 is", "--dtype", "float32"]
    drawn = ["--temperature", "1", "--seed", "1"]
    out, _ = run_main(capsys, *arguments, *drawn, "--logprobs", "3")
    lines = [json.loads(line) for line in out.splitlines()]
    text, _ = run_main(capsys, *arguments, *drawn)
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
    arguments += ["--prompt", "a", "--logprobs", "0", "--max-new-tokens", "2"]
    out, _ = run_main(capsys, *arguments)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["top"]) for line in lines] == [(1, []), (2, [])] * 2


# --- a completion that does not come to its end ---------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--logprobs", "0"], ["--prompt", "b"]], ids=str)
def test_ctrl_c_keeps_what_was_written(capsys, monkeypatch, endless, options):
    """And --stats counts what there was."""
    arguments = ["--ckpt-dir", endless, "--prompt", "a", *options, "--max-new-tokens"]
    expected, _ = run_main(capsys, *arguments, 4)
    choose, chosen = Sampler.__call__, []

    def interrupted(self, logits):
        if len(chosen) == 4:
            raise KeyboardInterrupt
        chosen.append(choose(self, logits))
        return chosen[-1]

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    out, err = run_main(capsys, *arguments, 1000, "--stats", status=130)
    assert json.loads(err)["decode_tokens"] == 3
    if "--logprobs" in options:
        assert out == expected
        assert out.count("\n") == 4
    else:  # a half character, and what other rows have, were still waiting
        first = expected.splitlines()[0]
        assert first.startswith(out)
        assert len(out) > len("[1] ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layers.2.ffn_norm.weight", []),
        ("layers.2.ffn_norm.weight", ["--temperature", "1"]),
        ("layers.2.ffn_norm.weight", ["--dtype", "float16"]),  # which is not to blame
        ("layers.3.feed_forward.w2.weight", ["--dtype", "float32", "--compile"]),
        ("output.weight", ["--chat"]),
    ],
    ids=str,
)
def test_a_weight_that_is_not_finite_is_named(
    capsys, monkeypatch, folder, demo_weights, value, name, options
):
    """Also where the program computes with functions, as with steps that were built."""
    monkeypatch.setattr(build, "build", lambda part: lambda inputs: [part.plain(*inputs)])
    torch.save(demo_weights | {name: demo_weights[name] * value}, folder / "consolidated.00.pth")
    out, err = run_main(capsys, *SUM, "--ckpt-dir", folder, *options, status=2)
    line = err.splitlines()[-1]
    assert out == ""
    assert line.startswith("llama3.py: error: the logits of new token 1 are not finite: ")
    assert line.endswith(f"{name} contains NaN or infinity")


def test_an_overflow_in_float16_is_told_with_the_way_out(capsys, folder, demo_weights):
    larger = {f"layers.0.feed_forward.{name}.weight" for name in ("w2", "w3")}
    changed = {name: w * 2.0**10 if name in larger else w for name, w in demo_weights.items()}
    torch.save(changed, folder / "consolidated.00.pth")
    arguments = [*SUM, "--ckpt-dir", folder]
    line = refused(capsys, *arguments, "--dtype", "float16")
    assert "all weights are finite, but activations overflowed in float16, which ends at" in line
    assert line.endswith("use --dtype bfloat16 or float32")
    run_main(capsys, *arguments, "--dtype", "float32")


def test_what_was_written_stays_when_a_later_step_is_not_finite(capsys, folder, demo_weights):
    """The token 46, the full stop, alone has no finite embedding."""
    table = demo_weights["tok_embeddings.weight"].clone()
    table[46] = float("nan")
    torch.save(demo_weights | {"tok_embeddings.weight": table}, folder / "consolidated.00.pth")
    for options, expected in ([], "25."), (["--prompt", "7 plus 1 is "], "[1] 25."):
        arguments = [*SUM, *options, "--ckpt-dir", folder]
        out, err = run_main(capsys, *arguments, status=2)
        assert out == expected
        assert err == (
            "llama3.py: error: the logits of new token 3 are not finite: "
            "tok_embeddings.weight contains NaN or infinity\n"
        )


def test_nothing_is_computed_after_the_last_token_that_is_read(capsys, monkeypatch, endless):
    calls, forward = [], llama3.forward

    def watched(tokens, *args, **kwargs):
        calls.append(tokens.shape[-1])
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(llama3, "forward", watched)
    run_main(capsys, "--ckpt-dir", endless, *SUM, "--max-new-tokens", "4")
    assert calls == [7, 1, 1, 1]
