"""Pictures: what is drawn, where, with which labels, and what is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, config_of, random_weights
from program import refused, run_main

import llama3
import tokenizer_setup
from cli.plot import attention_of, draw, label_of


def picture(path):
    """The pixels of a PNG file, between 0 and 1."""
    import matplotlib.image

    return torch.tensor(matplotlib.image.imread(path))


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (b" the", "\u00b7the"),
        (b"$x_1^2$", "$x_1^2$"),
        (b"\n\t", "\\n\\t"),
        (b"\xe4\xbd", "\\xe4\\xbd"),
        (b"\n\xe4", "\\n\\xe4"),
        ("caf\u00e9".encode(), "caf\u00e9"),
        ("\u4f60".encode(), "\\u4f60"),
        (" \u4f60a".encode(), "\u00b7\\u4f60a"),
        (b"<|begin_of_text|>", "<|begin_of_te\u2026"),
        (b"x" * 14, "x" * 14),
    ],
)
def test_labels_show_what_a_font_lacks(token, label):
    assert label_of(token, lambda character: ord(character) < 0x3000) == label


@pytest.mark.parametrize("layer", [0, 2])
def test_the_attention_that_is_drawn_is_that_of_the_forward_pass(monkeypatch, demo_config, layer):
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    tokens = [1024, 355, 261, 32, 56, 258, 32, 7, 9]
    seen, attention_pattern = [], llama3.attention_pattern

    def watched(q, k, mask):
        seen.append(attention_pattern(q, k, mask))
        return seen[-1]

    monkeypatch.setattr(llama3, "attention_pattern", watched)
    llama3.forward(torch.tensor(tokens), weights, demo_config)
    for last in (9, 4):
        drawn = attention_of(tokens, weights, demo_config, layer, last)
        assert drawn.shape == (demo_config.n_heads, last, 9)
        assert torch.allclose(drawn, seen[layer][:, -last:], atol=1e-6)


@pytest.fixture
def two_heads(tmp_path):
    """A small model with the demo's tokenizer, of which a picture is soon drawn."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(random_weights(config_of(folder, n_heads=2)), folder / "consolidated.00.pth")
    shutil.copy(DEMO / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("prompt", ["a " * 50 + "$x$ $ \u4f60 \U0001f600 _{", ""])
def test_a_picture_is_drawn_and_the_completion_is_written(
    capsys, tmp_path, two_heads, demo_tokenizer, prompt
):
    path = tmp_path / "picture.png"
    arguments = ["--prompt", prompt, "--max-new-tokens", "3", "--ckpt-dir", two_heads]
    expected, _ = run_main(capsys, *arguments)
    out, err = run_main(capsys, *arguments, "--plot", path, "--plot-layer", "1")
    assert out == expected
    long = len(tokenizer_setup.encode(demo_tokenizer, prompt)) > 60
    assert err == f"llama3.py: wrote {path}{' (the last 60 tokens)' * long}\n"  # no word of fonts
    pixels = picture(path)
    assert 400 < pixels.shape[0] < 3000
    assert 700 < pixels.shape[1] < 6000
    assert pixels[..., :3].mean() > 0.5


def test_a_picture_shows_where_a_head_attends(tmp_path, demo_tokenizer):
    """Only the square of a share is dark, in the panel of its head."""
    pattern = torch.zeros(5, 5, 5)
    model = SimpleNamespace(tokenizer=demo_tokenizer)
    tokens, logprobs = [1024, 355, 261, 32, 56], torch.full((1280,), -7.0)
    draw(tmp_path / "a.png", model, tokens, logprobs, pattern, 0)
    pattern[4, 4, 1] = 1
    draw(tmp_path / "b.png", model, tokens, logprobs, pattern, 0)
    changed = (picture(tmp_path / "a.png") != picture(tmp_path / "b.png")).any(-1).nonzero()
    height, width = changed.amax(0) - changed.amin(0)
    assert 10 < height < 60
    assert abs(height - width) <= 2
    rows, columns = picture(tmp_path / "a.png").shape[:2]
    middle = changed.float().mean(0) / torch.tensor([rows, columns])
    assert middle[0] > 0.5  # of two rows of three heads, the second of the second
    assert 0.55 < middle[1] < 0.78


def test_a_dollar_sign_is_one(tmp_path):
    class Tokenizer:
        n_vocab = 20

        @staticmethod
        def decode_single_token_bytes(token):
            return b"$x_$"  # which is no formula

    logprobs, pattern = torch.full((20,), -3.0), torch.ones(1, 2, 2)
    draw(tmp_path / "a.png", SimpleNamespace(tokenizer=Tokenizer), [1, 2], logprobs, pattern, 0)
    assert picture(tmp_path / "a.png").shape[0] > 100


def test_a_picture_of_a_prompt_that_fills_the_context(capsys, tmp_path, two_heads, monkeypatch):
    """Whatever the user's own settings of matplotlib are."""
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "none such")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    path = tmp_path / "a.png"
    arguments = ["--prompt", "", "--max-seq-len", "1", "--ckpt-dir", two_heads]
    out, err = run_main(capsys, *arguments, "--plot", path)
    assert out == ""
    assert err.endswith(f"llama3.py: wrote {path}\n")
    assert picture(path).shape[0] > 100


def test_a_layer_or_a_folder_that_is_not_there_is_refused_before_anything_is_computed(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(llama3, "forward", None)
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompt", "a", "--ckpt-dir", DEMO, "--plot"]
    line = refused(capsys, *arguments, "a.png", "--plot-layer", "4")
    assert line == "argument --plot-layer: found 4, expected a layer from 0 to 3"
    line = refused(capsys, *arguments, "no/such/a.png")
    assert line.startswith("argument --plot: no/such/a.png: ")
    assert line.endswith("there is no such folder")
    assert [*tmp_path.iterdir()] == []


def test_a_picture_that_cannot_be_written_is_told_in_one_line(capsys, tmp_path, two_heads):
    path = tmp_path / "folder.png"
    path.mkdir()
    line = refused(capsys, "--prompt", "a", "--ckpt-dir", two_heads, "--plot", path)
    assert line == f"argument --plot: {path}: cannot be written: Is a directory"
