"""Products of one token with a matrix of another dtype, compiled for the processor."""

import functools
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import llama3
from cli.messages import note
from formats.errors import one_line

COMPILED_FROM_BYTES = 5e8  # of weights: below, compiling takes longer than it saves


def multiply_and_sum(x: Tensor, w: Tensor) -> Tensor:
    """w @ x for one vector x [inputs], as it compiles to a loop that reads w once.

    It converts, multiplies and sums in float32 on the way. Of sums of more than 4096 numbers
    PyTorch's compiler makes a slower loop: they are taken in equal parts.
    """
    inputs = w.shape[1]
    parts = next(n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= 4096)
    products = x.float().view(parts, -1) * w.float().unflatten(1, (parts, -1))
    return products.sum(-1).sum(-1).to(x.dtype)


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T, of a single vector as w @ x, which reads w at the speed of the memory."""
    if x.numel() == w.shape[1] and x.dtype == w.dtype:
        return (w @ x.flatten()).view(*x.shape[:-1], -1)
    return llama3.product(x, w)


def matrices_of(weights: llama3.Weights) -> dict[str, Tensor]:
    """The matrices that are stored in another dtype than is computed in."""
    dtype, found = weights["norm.weight"].dtype, {}
    for name, w in weights.items():
        if isinstance(w, Tensor) and w.dim() == 2 and w.dtype != dtype and "embed" not in name:
            found[name] = w
    return found


def worth_compiling(weights: llama3.Weights, device: torch.device) -> bool:
    """Return whether compiling pays: for large weights, with a C++ compiler at hand."""
    size = sum(w.nbytes for w in matrices_of(weights).values())
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    at_hand = any(shutil.which(name) for name in compilers if name)
    return device.type == "cpu" and size > COMPILED_FROM_BYTES and at_hand


@torch.inference_mode()
def compiled_products(weights: llama3.Weights) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions that multiply by the matrices of another dtype; RuntimeError for wrong ones."""
    compiled = torch.compile(multiply_and_sum, dynamic=False)

    def times(x: Tensor, w: Tensor) -> Tensor:
        if x.numel() != w.shape[1]:
            return llama3.product(x, w)
        return compiled(x.flatten(), w).view(*x.shape[:-1], -1)

    matrices, kinds = matrices_of(weights), {}
    for name, w in matrices.items():
        torch._dynamo.mark_dynamic(w, 0)  # one loop for all matrices with as many inputs
        kinds[w.dtype, w.shape[1]] = name
    for (_, inputs), name in kinds.items():
        x = torch.linspace(-1, 1, inputs).to(weights["norm.weight"])
        y, expected = compiled(x, weights[name]), llama3.product(x, weights[name])
        near = 0.02 * expected.nan_to_num(0, 0, 0).abs().max().item()
        if not torch.allclose(y, expected, rtol=0, atol=near, equal_nan=True):
            raise RuntimeError(f"the compiled product with {name} is wrong")
    return {name: functools.partial(times, w=w) for name, w in matrices.items()}


def with_compiled_products(weights: llama3.Weights) -> llama3.Weights:
    """The weights with compiled products of one token, or as they are where that fails."""
    start = time.perf_counter()
    logging.disable(logging.ERROR)  # what the compiler has to say is for those who develop it
    try:
        with warnings.catch_warnings(action="ignore"):
            weights = {**weights, **compiled_products(weights)}
        note(f"compiled the decode kernels in {time.perf_counter() - start:.1f} s")
    except Exception as error:  # it fails in many ways
        reason = one_line(str(error).partition("\n")[0] or error)
        note(f"compilation failed, continuing without it: {reason}")
    finally:
        logging.disable(logging.NOTSET)
    return weights
