"""Quantized blocks, against the gguf package: to the last bit, for any bytes."""

import gguf
import numpy as np
import pytest
import torch
from conftest import apart, config_of, random_blocks, random_weights, split

import formats
from formats import blocks
from formats.blocks import DEQUANTIZE
from formats.source import Stored

QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # which the package can make too


def as_the_package_does(raw, kind):
    with np.errstate(all="ignore"):  # of scales that are infinite
        return torch.from_numpy(gguf.quants.dequantize(raw, kind))


def same_bits(x, y):
    """NaN is NaN, whatever its sign and payload."""
    return ((x.view(torch.int32) == y.view(torch.int32)) | (x.isnan() & y.isnan())).all()


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_blocks_of_any_bytes_stand_for_the_numbers_that_the_package_says(name):
    """Random scales have all exponents: zeros, subnormal numbers, infinity and NaN among them."""
    kind = gguf.GGMLQuantizationType[name]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3000, size), dtype=np.uint8)
    expected = as_the_package_does(raw, kind)
    found = DEQUANTIZE[name](torch.from_numpy(raw))
    assert found.shape == (3000, numbers)
    assert same_bits(found, expected)
    assert expected.isfinite().sum() > 2000 * numbers
    assert not expected.isfinite().all()
    several = DEQUANTIZE[name](torch.from_numpy(raw).view(3, 10, 100, size))
    assert same_bits(several.flatten(0, 2), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_numbers_that_were_quantized_come_back_near(name):
    """Which does not depend on how the package reads: only on how it writes."""
    kind = gguf.GGMLQuantizationType[name]
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    raw = torch.from_numpy(gguf.quants.quantize(x.numpy(), kind))
    blocks = raw.unflatten(-1, (-1, gguf.GGML_QUANT_SIZES[kind][1]))
    error = (DEQUANTIZE[name](blocks).flatten(-2) - x).abs().mean() / x.abs().mean()
    assert error < {"4": 0.1, "5": 0.05, "8": 0.01}[name[1]]


@pytest.mark.parametrize("at_once", [256, 1024, 2**18])
@pytest.mark.parametrize("name", DEQUANTIZE)
def test_a_matrix_in_blocks_is_a_function(monkeypatch, name, at_once):
    """And a table whose rows can be looked up. Nothing is rounded where float32 is asked for."""
    monkeypatch.setattr(blocks, "AT_ONCE", at_once)
    raw, dense = random_blocks(name, 7, 768)
    w = blocks.Blocks(raw, name)
    assert w.shape == dense.shape == (7, 768)
    assert torch.equal(w.to(torch.float32), dense)
    assert torch.equal(w.to(torch.bfloat16), dense.bfloat16())
    rows = torch.tensor([[6, 0, 6], [2, 3, 4]])
    assert torch.equal(w[rows], dense[rows])
    x = torch.randn(2, 3, 768, generator=torch.Generator().manual_seed(0))
    assert apart(w(x).double(), x.double() @ dense.double().T) < 1e-6
    assert w(x.bfloat16()).dtype == torch.bfloat16
    assert apart(w(x.bfloat16()), x @ dense.T) < 0.02


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_a_part_of_blocks_is_blocks_where_none_is_cut(name):
    raw, dense = random_blocks(name, 6, 1536)
    stored = Stored(dense.shape, torch.bfloat16, lambda: [raw], stored_as=name, blocks=True)
    assert torch.equal(stored.weight(0, torch.float32, 2, 5).to(torch.float32), dense[2:5])
    columns = stored.weight(1, torch.float32, 256, 768)
    assert isinstance(columns, blocks.Blocks)
    assert torch.equal(columns.to(torch.float32), dense[:, 256:768])
    assert torch.equal(stored.weight(1, torch.float32, 8, 1000), dense[:, 8:1000])
    assert torch.equal(stored.tensor(1), dense.bfloat16())
    assert torch.equal(torch.cat([*stored.tensors()]), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_numbers_are_quantized_to_the_packages_bits(monkeypatch, name, dtype):
    """Of any size, and where the farthest from zero is there with both signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1024, generator=generator) * torch.logspace(-9, 4, 300)[:, None]
    x[3], x[4] = 0, torch.tensor([0.5, -0.5]).repeat(512)
    x[5], x[6], x[7] = -x[4], torch.arange(1024) / 2 - 256, x[7].round()
    x[8:40] = torch.randint(-3, 4, (32, 1024), generator=generator).float()
    x = x.to(dtype)
    expected = gguf.quants.quantize(x.float().numpy(), gguf.GGMLQuantizationType[name])
    for at_once in (1, 4096, 2**18):
        monkeypatch.setattr(blocks, "AT_ONCE", at_once)
        assert torch.equal(blocks.to_blocks(x, name), torch.from_numpy(expected))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_a_model_is_quantized_as_it_loads(tmp_path, name, parts):
    """Embeddings and norms stay; of several files, parts are put together before."""
    config = config_of(tmp_path, dim=64, n_layers=1)
    weights = random_weights(config)
    split(weights, tmp_path, parts)
    source = formats.quantized(formats.open(tmp_path), name)
    assert source.found.endswith(f", made {name}")
    loaded = source.load_weights(dtype=torch.float32)
    number = gguf.GGMLQuantizationType[name]
    for key, w in weights.items():
        if w.dim() == 1 or "embed" in key:
            assert torch.equal(loaded[key], w)
        else:
            raw = torch.from_numpy(gguf.quants.quantize(w.numpy(), number))
            assert torch.equal(loaded[key].raw, raw)
    with pytest.raises(ValueError, match="nothing of it can become Q4_0"):
        formats.quantized(source, "Q4_0")


def test_a_tied_output_is_quantized_and_the_embeddings_are_not(tmp_path):
    weights = random_weights(config_of(tmp_path, dim=64, n_layers=1))
    del weights["output.weight"]
    torch.save(weights, tmp_path / "consolidated.00.pth")
    source = formats.quantized(formats.open(tmp_path), "Q8_0")
    loaded, table = source.load_weights(dtype=torch.float32), weights["tok_embeddings.weight"]
    assert torch.equal(loaded["tok_embeddings.weight"], table)
    assert torch.equal(loaded["output.weight"].raw, blocks.to_blocks(table, "Q8_0"))
    needed = source.bytes_needed(torch.device("cpu"), torch.float32)
    assert needed == 34 / 32 * (sum(w.numel() for w in weights.values() if w.dim() == 2))
