"""Quantized blocks, against the gguf package: to the last bit, for any bytes."""

import warnings

import gguf
import numpy as np
import pytest
import torch

from formats import gguf as our_gguf
from formats.blocks import DEQUANTIZE

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
@pytest.mark.parametrize("name", [*DEQUANTIZE, "TQ2_0"])  # one that the package alone knows
def test_a_matrix_is_dequantized_a_piece_at_a_time(monkeypatch, name, at_once):
    monkeypatch.setattr(our_gguf, "DEQUANTIZED_AT_ONCE", at_once)
    kind = gguf.GGMLQuantizationType[name]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (7, 768)
    raw = np.random.default_rng(0).integers(0, 256, (7, 768 // numbers * size), dtype=np.uint8)
    with warnings.catch_warnings(action="error"):
        found = our_gguf.dequantized(raw.reshape(-1), kind, shape)
    assert found.dtype == torch.bfloat16
    expected = as_the_package_does(raw, kind).bfloat16()
    assert found.shape == expected.shape == shape
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
