"""Quantized matrices in words: what they stand for, their products, and when they are made."""

import weakref

import gguf
import pytest
import torch
from conftest import apart, random_blocks, random_tokens, random_weights
from other_formats import write_gguf

import formats
import llama3
from cli import build, step, words
from formats.blocks import BYTES, DEQUANTIZE, SIZES, Blocks

KINDS = [*DEQUANTIZE]


@pytest.fixture(params=[(torch.float16, 16), (torch.float32, 8)], ids=str)
def scales(request, monkeypatch):
    """Both forms that words may have, which one is a matter of the processor."""
    monkeypatch.setattr(words, "SCALES", request.param[0])
    monkeypatch.setattr(words, "LANES", request.param[1])


# --- what words stand for -------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 16, 70])  # which 16 divides, or not
@pytest.mark.parametrize("kind", KINDS)
def test_words_stand_for_the_numbers_of_the_blocks(monkeypatch, scales, kind, outputs):
    """To the last bit, however many rows are repacked at a time."""
    raw, dense = random_blocks(kind, outputs, 768)
    for at_once in (1, 32 * 768, 2**22):
        monkeypatch.setattr(words, "REPACKED_AT_ONCE", at_once)
        m = words.repacked(Blocks(raw, kind))
        found = words.dequantized(m, torch.float32)
        assert m.shape == (outputs, 768)
        assert torch.equal(found[:, :outputs].T, dense)
        assert not found[:, outputs:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_any_bytes_stand_for_the_same(kind):
    """Scales that are zero, subnormal, infinite or NaN among them."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (480, 2 * BYTES[kind]), generator=generator).byte()
    blocks = Blocks(raw, kind)
    found = words.dequantized(words.repacked(blocks), torch.float32).T
    expected = blocks.to(torch.float32)
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert same.all()
    assert not expected.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_as_large_as_the_blocks(monkeypatch, kind):
    monkeypatch.setattr(words, "SCALES", torch.float16)
    raw, _ = random_blocks(kind, 160, 1024)
    m = words.repacked(Blocks(raw, kind))
    more = {"Q4_K": 144 + 4, "Q5_K": 176 + 4}.get(kind, BYTES[kind])  # 8 bits for a scale, not 6
    assert m.scales.nbytes + m.words.nbytes == 160 * 1024 // SIZES[kind] * more


@pytest.mark.parametrize("outputs", [16, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_times_words_is_the_product(scales, kind, outputs):
    """Against float64, with numbers that differ in size by 1000 from input to input."""
    raw, dense = random_blocks(kind, outputs, 768)
    m = words.repacked(Blocks(raw, kind))
    x = torch.randn(1, 1, 768, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-1, 2, 768)[torch.randperm(768)]
    found = words.multiply_words(x, m)
    assert found.shape == (1, 1, outputs)
    assert apart(found.double(), x.double() @ dense.double().T) < 1e-5
    halved = words.multiply_words(x.bfloat16(), m)
    assert halved.dtype == torch.bfloat16
    assert apart(halved.double(), x.bfloat16().double() @ dense.double().T) < 0.01


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_several_vectors_are_multiplied_by_some_rows_at_a_time(monkeypatch, kind, rows):
    monkeypatch.setattr(words, "DEQUANTIZED_AT_ONCE", rows * words.LANES * 768)
    raw, dense = random_blocks(kind, 70, 768)
    m = words.repacked(Blocks(raw, kind))
    part = words.part_of(m, torch.float32)
    product = words.Product(m, lambda tensors: [part.function(*tensors)])
    x = torch.randn(2, 3, 768, generator=torch.Generator().manual_seed(1))
    assert apart(product(x).double(), x.double() @ dense.double().T) < 3e-6


# --- in a model -----------------------------------------------------------------------------------


def quantized(path, kind, **params):
    """A small model of random weights in a GGUF file."""
    sizes = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 200}
    sizes |= {"ffn_dim": 512, "norm_eps": 1e-5, "rope_theta": 1e4, "max_seq_len": 64} | params
    config = llama3.config_from_params(sizes)
    return formats.open(write_gguf(path / "model.gguf", random_weights(config), config, kind))


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_steps_of_quantized_models_are_built_of_words(tmp_path, tried, kind, layers):
    source = quantized(tmp_path, kind, dim=512, ffn_dim=1024)
    weights = source.load_weights(dtype=torch.float32)
    built = step.with_built_steps({**weights}, source.config, True, layers)
    assert isinstance(built["tok_embeddings.weight"], Blocks)
    assert not any(isinstance(w, Blocks) for n, w in built.items() if "embed" not in n)
    # What dequantizes; then a layer and the output, or matrices of 512 and of 1024 inputs.
    assert len(tried) == 3
    assert tried[0].constants == f"dequantize {kind} torch.float32"
    assert built.keys() - weights.keys() == ({"layers.0", "layers.1"} if layers else set())
    found, plain = llama3.Session(built, source.config), llama3.Session(weights, source.config)
    for tokens in ([3, 1, 4, 1], [5], [9], [2, 6]):
        tokens = torch.tensor([tokens])
        assert apart(found.read(tokens), plain.read(tokens)) < 1e-5


def test_batches_and_scores_need_what_dequantizes_alone(tmp_path, tried):
    source = quantized(tmp_path, "Q8_0")
    weights = source.load_weights(dtype=torch.float32)
    built = step.with_built_steps({**weights}, source.config, None, steps=False)
    assert tried == []  # it is small
    assert isinstance(built["output.weight"], Blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "BUILT_FROM_BYTES", 1000)
        built = step.with_built_steps({**weights}, source.config, None, steps=False)
    assert [part.constants for part in tried] == ["dequantize Q8_0 torch.float32"]
    assert isinstance(built["output.weight"], words.Product)
    tokens = random_tokens(source.config, 2, 9)
    expected = llama3.forward(tokens, weights, source.config)
    assert apart(llama3.forward(tokens, built, source.config), expected) < 1e-5


def test_a_small_model_is_dequantized_where_nothing_is_built(tmp_path, monkeypatch):
    source = quantized(tmp_path, "Q8_0")
    weights = source.load_weights(dtype=torch.float32)
    dense = words.expanded(weights)
    assert {w.dtype for n, w in dense.items() if "embed" not in n} == {torch.float32}
    tokens = random_tokens(source.config, 9)
    expected = llama3.forward(tokens, weights, source.config)
    assert apart(llama3.forward(tokens, dense, source.config), expected) < 1e-5
    monkeypatch.setattr(words, "BUILT_FROM_BYTES", 1000)
    assert isinstance(words.expanded(weights)["output.weight"], Blocks)


def test_blocks_go_when_their_words_are_made(tmp_path, tried, monkeypatch):
    """One after the other: at any time there is one copy of a matrix, and one more."""
    source = quantized(tmp_path, "Q8_0")
    weights, there = source.load_weights(dtype=torch.float32), []
    blocks = [weakref.ref(w) for n, w in weights.items() if isinstance(w, Blocks)]
    made = words.repacked

    def counting(b):
        there.append(sum(ref() is not None for ref in blocks))
        return made(b)

    monkeypatch.setattr(words, "repacked", counting)
    step.with_built_steps(weights, source.config, True)
    n = len(blocks) - 1  # but for the embeddings
    assert there == [n + 1] * n + [*range(n + 1, 1, -1)]  # first a few rows of each are tried
    assert sum(ref() is not None for ref in blocks) == 1


def test_what_is_really_built_is_right(tmp_path, monkeypatch):
    """A product, for another number of rows than it was tried with: it takes 10 to 20 s.

    Layers and what dequantizes are really built in tests/test_real_model.py.
    """
    if build.compiler() is None:
        pytest.skip("no C++ compiler is at hand")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    raw, dense = random_blocks("Q4_K", 70, 768)
    with torch.inference_mode():
        m = words.repacked(Blocks(raw, "Q4_K"))
        run = build.build(step.matrix_part(m, torch.float32))
        x = torch.randn(1, 1, 768)
        expected = x.double() @ dense.double().T
        for rows in (5, 2, 1):
            found = run([x, m.scales[:rows], m.words[:rows]])[0][..., :70].double()
            assert apart(found, expected[..., : words.LANES * rows]) < 1e-5


def test_the_kinds_are_those_that_have_blocks():
    sizes = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in KINDS}
    assert sizes == {kind: (SIZES[kind], BYTES[kind]) for kind in KINDS}
    assert words.REPACK.keys() == SIZES.keys() == BYTES.keys() == DEQUANTIZE.keys()
