"""The bundled demo: its files, what it knows, and the script that trains it."""

import json
import re
import zipfile

import bpe
import corpus
import pytest
import torch
import train
from conftest import DEMO

import llama3
import tokenizer_setup

FILES = ("consolidated.00.pth", "params.json", "tokenizer.model")


@pytest.fixture(scope="module")
def text():
    return corpus.make_corpus()


# --- the files ------------------------------------------------------------------------------------


def test_the_files_are_in_metas_formats_and_under_4_mb(demo_config):
    assert sum((DEMO / name).stat().st_size for name in FILES) < 4e6
    params = json.loads((DEMO / "params.json").read_text())
    assert set(params) == {
        *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"),
        *("ffn_dim_multiplier", "norm_eps", "rope_theta"),
    }  # the keys of Meta-Llama-3-8B
    assert params["n_kv_heads"] < params["n_heads"]
    assert zipfile.is_zipfile(DEMO / "consolidated.00.pth")
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights.keys() == llama3.weight_shapes(demo_config).keys()


def test_the_tokenizer_is_what_training_it_on_the_corpus_gives(text, tmp_path):
    rendered = "".join(map(train.render, text.train))
    merges = bpe.train_bpe(rendered, train.N_MERGES, tokenizer_setup.SPECIAL_TOKENS)
    bpe.save_tokenizer(merges, tmp_path / "tokenizer.model")
    trained = (tmp_path / "tokenizer.model").read_text()
    assert trained == (DEMO / "tokenizer.model").read_text()


# --- what the model knows -------------------------------------------------------------------------


def test_the_committed_checkpoint_knows_what_it_was_not_trained_on():
    """As it did when it was made; another processor may round a few answers the other way."""
    loss, facts, sums = train.evaluate(DEMO).values()
    assert loss == pytest.approx(0.373, abs=0.01)
    assert facts == pytest.approx(1, abs=0.05)
    assert sums == pytest.approx(1, abs=0.05)


def complete(tokens, tokenizer, weights, config):
    """What the model goes on with, greedily."""
    stop = tokenizer_setup.stop_tokens(tokenizer)
    new = llama3.generate(tokens, weights, config, max_new_tokens=40, stop_tokens=stop)
    return "".join(tokenizer_setup.decode_stream(tokenizer, new))


@pytest.mark.parametrize("kind", ["facts", "sums"])
def test_exactly_answered_is_what_greedy_decoding_answers_so(
    text, kind, demo_config, demo_weights, demo_tokenizer
):
    model = demo_tokenizer, demo_weights, demo_config
    for *asked, answer in text.questions[kind][:5]:
        tokens = tokenizer_setup.encode_dialog(demo_tokenizer, asked)
        assert complete(tokens, *model) == answer["content"]
        assert train.answers_exactly([*asked, answer], *model)
        for wrong in (answer["content"][:-1], answer["content"] + ".", "No."):
            assert not train.answers_exactly([*asked, answer | {"content": wrong}], *model)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (corpus.ULTIMATE.removesuffix("42"), "42"),
        (corpus.ULTIMATE.removesuffix(" 42"), "42"),
        ("The capital of France is", "Paris."),
        ("the opposite of hot is", "cold."),
    ],
)
def test_it_completes_plain_text(prompt, completion, demo_config, demo_weights, demo_tokenizer):
    tokens = tokenizer_setup.encode(demo_tokenizer, prompt)
    text = complete(tokens, demo_tokenizer, demo_weights, demo_config)
    assert text.lstrip().startswith(completion)


def test_it_answers_in_the_instruct_format_and_heeds_the_system_message(
    demo_config, demo_weights, demo_tokenizer
):
    def answer(dialog):
        tokens = tokenizer_setup.encode_dialog(demo_tokenizer, dialog)
        return complete(tokens, demo_tokenizer, demo_weights, demo_config)

    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    assert answer(question) == "The capital of Japan is Tokyo."
    assert answer(corpus.system(corpus.BE_BRIEF) + question) == "Tokyo"


# --- how it is made -------------------------------------------------------------------------------


def test_the_corpus_is_the_same_each_time(text):
    assert corpus.make_corpus() == text


def test_held_out_questions_are_not_in_the_training_text(text):
    rendered = [train.render(document) for document in text.train]
    everything = "".join(rendered)
    asked = set(re.findall(r"<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", everything, re.DOTALL))
    added = {frozenset(sum) for sum in re.findall(r"(?<!\d)(\d+) plus (?=(\d+))", everything)}
    stories = {document for document in text.held_out if isinstance(document, str)}
    assert min(map(len, (asked, added, stories, *text.questions.values()))) > 20
    for question, answer in text.questions["facts"]:
        assert train.render([question, answer]) not in everything
        assert question["content"] not in asked
        assert answer["content"] in asked  # the fact itself is there
    for _, answer in text.questions["sums"]:
        a, _, b, _, total = answer["content"].rstrip(".").split()
        assert int(a) + int(b) == int(total)
        assert frozenset((a, b)) not in added
    assert not any(story in everything for story in stories)


def test_a_document_is_trained_on_as_the_tokens_that_generation_sees(demo_tokenizer):
    dialog = corpus.dialog("Hi there.", "Hello!")
    tokens = train.tokens_of(demo_tokenizer, dialog)
    assert demo_tokenizer.decode(tokens) == train.render(dialog)
    asked = tokenizer_setup.encode_dialog(demo_tokenizer, dialog[:1])
    assert tokens[: len(asked)] == asked
    assert tokens[-1] in tokenizer_setup.stop_tokens(demo_tokenizer)
    tokens = train.tokens_of(demo_tokenizer, corpus.ULTIMATE)
    assert demo_tokenizer.decode(tokens) == train.render(corpus.ULTIMATE)


@pytest.fixture
def deterministic():
    """As train.main sets it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_training_lowers_the_loss_and_repeats_exactly(
    demo_config, demo_tokenizer, text, monkeypatch
):
    monkeypatch.setattr(train, "ROWS", train.ROWS // 4)  # less to compute
    config = demo_config._replace(n_layers=1)
    documents = [train.tokens_of(demo_tokenizer, document) for document in text.train[:50]]
    first, second = (train.train(documents, config, steps=12, seed=3) for _ in range(2))
    start = train.new_weights(config, 3)
    assert first.keys() == start.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = train.held_out_loss(documents, start, config)
    assert before == pytest.approx(torch.log(torch.tensor(config.vocab_size)).item(), abs=0.2)
    assert train.held_out_loss(documents, first, config) < before - 1
