"""Scores: against the log-probabilities of whole texts, in windows, and in blocks."""

import io
import json
import math
import sys

import pytest
import torch
from conftest import DEMO, apart, config_of, random_tokens, random_weights
from program import refused, run_main

import llama3
import tokenizer_setup
from cli import score


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("model"))
    return random_weights(config), config


@pytest.fixture(scope="module")
def demo_in_float32(demo_config):
    return llama3.load_weights(DEMO, demo_config, dtype=torch.float32)


def logprobs_of(tokens, weights, config):
    """The log-probability of each token but the first, from the logits of the whole sequence."""
    tokens = torch.as_tensor(tokens)
    logprobs = torch.log_softmax(llama3.forward(tokens, weights, config), -1)
    return logprobs[:-1].gather(1, tokens[1:, None])[:, 0]


def test_a_score_is_that_of_the_whole_text(
    capsys, tmp_path, monkeypatch, demo_in_float32, demo_config, demo_tokenizer
):
    text = "the capital of France is Paris.\n17 plus 8 is 25.\n\n\u20ac\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    model = ["--dtype", "float32", "--ckpt-dir", DEMO]
    arguments = ["--score", tmp_path / "text", *model]

    def expected(text):
        tokens = tokenizer_setup.encode(demo_tokenizer, text)
        nll = -logprobs_of(tokens, demo_in_float32, demo_config).double().sum().item()
        n, size = len(tokens) - 1, len(text.encode())
        return {
            "tokens": n,
            "nll": pytest.approx(nll, abs=1e-3),
            "perplexity": pytest.approx(math.exp(nll / n), rel=1e-4) if n else None,
            "bits_per_byte": pytest.approx(nll / math.log(2) / size, rel=1e-4) if n else None,
        }

    def lines_of(*arguments):
        out, err = run_main(capsys, *arguments)
        assert err == ""
        return [json.loads(line) for line in out.splitlines()]

    assert lines_of(*arguments) == [expected(text)]
    assert lines_of(*arguments, "--by-line") == [*map(expected, text.splitlines())]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    out, err = run_main(capsys, "--score", "-", *model, "--stats")
    assert json.loads(out) == expected(text)
    stats = json.loads(err)
    assert list(stats) == ["load_s", "tokens", "score_s", "peak_rss_bytes"]
    assert stats["tokens"] == expected(text)["tokens"]
    lines = "a\fb\u2028c\r\n\rd\n\n"  # of which three line breaks end lines
    (tmp_path / "text").write_text(lines, encoding="utf-8", newline="")
    assert lines_of(*arguments, "--by-line") == [*map(expected, ["a\fb\u2028c", "\rd", ""])]


@pytest.mark.parametrize(
    ("n", "window"), [(30, 8), (30, 7), (31, 8), (9, 8), (8, 8), (3, 2), (40, 39)]
)
def test_windows_score_each_token_once_with_half_a_window_before_it(
    capsys, tmp_path, demo_in_float32, demo_config, demo_tokenizer, n, window
):
    scored = []
    for begin, first in score.windows(n, window):
        end = min(begin + window, n)
        assert begin < first < end
        assert first - begin == window // 2 or begin == 0
        scored += range(first, end)
    assert scored == [*range(1, n)]
    text = "a" * (n - 1)
    tokens = tokenizer_setup.encode(demo_tokenizer, text)
    nll = 0
    for begin, first in score.windows(len(tokens), window):
        each = logprobs_of(tokens[begin : begin + window], demo_in_float32, demo_config)
        nll -= each[first - begin - 1 :].sum().item()
    (tmp_path / "text").write_text(text)
    arguments = ["--score", tmp_path / "text", "--dtype", "float32"]
    out, err = run_main(capsys, *arguments, "--max-seq-len", window)
    assert json.loads(out)["nll"] == pytest.approx(nll, abs=1e-3)
    assert (f"in windows of {window} that overlap by {window // 2}" in err) == (
        len(tokens) > window
    )


def test_a_score_is_the_log_probability_of_each_token_after_those_before(model):
    tokens = random_tokens(model[1], 70)
    expected = logprobs_of(tokens, *model)
    assert apart(score.scored_tokens(tokens.tolist(), *model), expected) < 1e-5
    assert score.scored_tokens([5, 6], *model).shape == (1,)


@pytest.mark.parametrize("rows", [1, 9, 69, 100])
def test_only_so_many_logits_are_computed_at_a_time(model, monkeypatch, rows):
    """The scores are the same for any number of them."""
    tokens = random_tokens(model[1], 70)
    expected = logprobs_of(tokens, *model)
    read, lengths, told = llama3.Session.read, [], []

    def watched(self, tokens, **options):
        logits = read(self, tokens, **options)
        assert logits.numel() <= score.SCORED_LOGITS
        lengths.append(tokens.shape[1])
        return logits

    monkeypatch.setattr(llama3.Session, "read", watched)
    monkeypatch.setattr(score, "SCORED_LOGITS", rows * model[1].vocab_size)
    assert apart(score.scored_tokens(tokens.tolist(), *model, told.append), expected) < 1e-5
    assert lengths == told == [rows] * (69 // rows) + [69 % rows] * (69 % rows > 0)


def test_a_long_text_is_read_in_blocks_that_the_attention_is_made_for(model, monkeypatch):
    """Also where few logits are computed for each: of a small vocabulary."""
    lengths = []
    read = llama3.Session.read
    monkeypatch.setattr(
        llama3.Session,
        "read",
        lambda self, tokens: lengths.append(tokens.shape[1]) or read(self, tokens),
    )
    monkeypatch.setattr(llama3, "PREFILL_TOKENS", 40)
    score.scored_tokens(random_tokens(model[1], 90).tolist(), *model)
    assert lengths == [40, 40, 9]


def test_scores_that_are_not_finite_are_refused_by_naming_the_weight(
    capsys, tmp_path, demo_weights
):
    for name in ("params.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    changed = demo_weights["layers.1.attention.wv.weight"] * float("nan")
    weights = demo_weights | {"layers.1.attention.wv.weight": changed}
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "text").write_text("abc")
    line = refused(capsys, "--ckpt-dir", tmp_path, "--score", tmp_path / "text")
    name = "layers.1.attention.wv.weight"
    assert line == f"the scores are not finite: {name} contains NaN or infinity"


def test_ctrl_c_keeps_the_lines_that_were_written(capsys, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("a\nb\nc\n")
    arguments = ["--score", tmp_path / "text", "--by-line"]
    expected, _ = run_main(capsys, *arguments)
    scored, calls = score.scored_tokens, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(score, "scored_tokens", interrupted)
    out, _ = run_main(capsys, *arguments, status=130)
    assert out.splitlines() == expected.splitlines()[:2]
