"""Compiled products: where they are made, that they are right, and what happens if not."""

import logging
import re
import shutil
import warnings

import pytest
import torch
from conftest import apart
from program import SUM, run_main

from cli import products

FAILED = "llama3.py: compilation failed, continuing without it: "


def as_it_is(function, **_):
    """In place of torch.compile: the function itself."""
    return function


# --- when -----------------------------------------------------------------------------------------


def test_products_are_compiled_where_it_pays_or_is_asked_for(capsys, monkeypatch):
    asked = []

    def compiled_products(weights):
        asked.append(len(weights))
        return {}

    monkeypatch.setattr(products, "compiled_products", compiled_products)
    # In float32 the demo's matrices, stored in bfloat16, are converted for each product.
    arguments = [*SUM, "--device", "cpu", "--dtype", "float32"]
    assert run_main(capsys, *arguments) == ("25.", "")  # the demo is small
    assert asked == []
    out, err = run_main(capsys, *arguments, "--compile")
    assert (out, len(asked)) == ("25.", 1)
    assert re.fullmatch(r"llama3.py: compiled the decode kernels in \d+\.\d s\n", err)

    monkeypatch.setattr(products, "COMPILED_FROM_BYTES", 10**6)
    monkeypatch.setattr(shutil, "which", lambda name: name == "clang++")
    assert "compiled the" in run_main(capsys, *arguments)[1]
    assert run_main(capsys, *arguments, "--no-compile") == ("25.", "")
    assert run_main(capsys, *arguments[:-1], "bfloat16") == ("25.", "")  # nothing is converted
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run_main(capsys, *arguments) == ("25.", "")


def test_only_large_matrices_on_a_processor_that_are_converted_are_worth_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name == "g++")
    monkeypatch.setattr(products, "COMPILED_FROM_BYTES", 900)
    stored = torch.zeros(50, 10, dtype=torch.bfloat16)
    weights = {"norm.weight": torch.ones(3), "output.weight": stored}
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert products.worth_compiling(weights, cpu)
    assert not products.worth_compiling(weights, cuda)
    assert not products.worth_compiling(weights | {"output.weight": stored[:40]}, cpu)
    assert not products.worth_compiling(weights | {"output.weight": stored.float()}, cpu)
    assert not products.worth_compiling(weights | {"output.weight": lambda x: x}, cpu)
    table = {"norm.weight": torch.ones(3), "tok_embeddings.weight": stored}
    assert not products.worth_compiling(table, cpu)


# --- what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [1, 7, 4096, 4097, 8192, 11008, 14336])
def test_a_sum_of_one_token_is_the_product_for_any_number_of_inputs(inputs):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, inputs, generator=generator).bfloat16()
    x = torch.randn(1, inputs, generator=generator)
    assert apart(products.multiply_and_sum(x, w), x.double() @ w.double().T) < 1e-5


def test_really_compiled_products_are_the_products():
    """Of three matrices: two with as many inputs, and one whose sums are taken in parts."""
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler is at hand")
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (48, 64), "b.weight": (7, 64), "c.weight": (9, 5000)}
    stored = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    with warnings.catch_warnings(action="ignore"):
        functions = products.compiled_products({"norm.weight": torch.ones(3)} | stored)
        assert functions.keys() == shapes.keys()
        for name, w in stored.items():
            for batch in [(1,), (1, 1), (2,)]:
                x = torch.randn(*batch, w.shape[1], generator=generator)
                with torch.inference_mode():
                    y = functions[name](x)
                assert y.shape == (*batch, len(w))
                assert apart(y, x.double() @ w.double().T) < 1e-5


def test_compiled_products_are_used_for_one_token_and_nothing_else(monkeypatch):
    used = []
    weights = {"norm.weight": torch.ones(3), "a.weight": torch.randn(4, 6).bfloat16()}
    weights |= {"same.weight": torch.randn(4, 6), "tok_embeddings.weight": weights["a.weight"]}
    monkeypatch.setattr(torch, "compile", as_it_is)
    multiply = products.multiply_and_sum
    monkeypatch.setattr(
        products, "multiply_and_sum", lambda x, w: used.append(x.shape) or multiply(x, w)
    )
    functions = products.compiled_products(weights)
    assert functions.keys() == {"a.weight"}
    used.clear()
    for batch in [(), (1,), (1, 1), (2,), (1, 2), (0,)]:
        x = torch.randn(*batch, 6)
        expected = x @ weights["a.weight"].float().T
        assert torch.allclose(functions["a.weight"](x), expected, atol=1e-5)
    assert used == [(6,)] * 3


def test_the_decode_steps_of_a_completion_use_them(capsys, monkeypatch):
    """Each of four layers has seven matrices, and there is the output matrix."""
    used, multiply = [], products.multiply_and_sum
    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr(
        products, "multiply_and_sum", lambda x, w: used.append(len(w)) or multiply(x, w)
    )
    arguments = [*SUM, "--device", "cpu", "--dtype", "float32"]
    expected, _ = run_main(capsys, *arguments)
    assert used == []
    out, _ = run_main(capsys, *arguments, "--compile")
    assert out == expected == "25."
    checks, prompt, steps = 2, 1, 2 * 29  # of the two widths, the prompt's last logits, the steps
    assert len(used) == checks + prompt + steps


# --- where that fails -----------------------------------------------------------------------------


def test_where_compiling_fails_it_goes_on_without(capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler\n\nand much advice")

    monkeypatch.setattr(torch, "compile", fails)
    arguments = [*SUM, "--device", "cpu", "--dtype", "float32", "--compile"]
    assert run_main(capsys, *arguments) == ("25.", f"{FAILED}no compiler\n")


def test_a_compiler_that_fails_at_the_first_step_is_told_in_one_line_too(capsys, monkeypatch):
    """As torch.compile may, which makes another function for each number of dimensions."""
    compiled_for = []

    def compile_once(function, **_):
        def multiply(x, w):
            compiled_for.append(x.dim())
            if len(set(compiled_for)) > 1:
                raise RuntimeError("no more memory to compile in")
            return function(x, w)

        return multiply

    monkeypatch.setattr(torch, "compile", compile_once)
    arguments = [*SUM, "--device", "cpu", "--dtype", "float32", "--compile"]
    out, err = run_main(capsys, *arguments)
    assert out == "25."
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["everywhere", "in the last row", "of one kind"])
@pytest.mark.parametrize("wrong", [lambda y: 0 * y, lambda y: y * torch.nan, lambda y: -y])
def test_a_compiled_product_that_is_wrong_is_noticed_and_not_used(
    capsys, monkeypatch, demo_config, place, wrong
):
    """As where a compiler's cache holds what was made for another processor."""

    def compile_wrongly(function, **_):
        def multiply(x, w):
            y = function(x, w).clone()
            if place != "of one kind":
                part = y[..., -1:] if place == "in the last row" else y
                part.copy_(wrong(part))
            elif w.shape[1] == demo_config.ffn_dim:  # as w2 alone has it
                y = wrong(y)
            return y

        return multiply

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    arguments = [*SUM, "--device", "cpu", "--dtype", "float32", "--compile"]
    out, err = run_main(capsys, *arguments)
    assert out == "25."
    assert re.fullmatch(re.escape(FAILED) + r"the compiled product with \S+ is wrong\n", err)


def test_a_compilers_own_words_are_not_shown(capsys, monkeypatch):
    def compile_aloud(function, **_):
        warnings.warn("this will be slow", stacklevel=1)
        logging.getLogger("torch._inductor").error("a long story")
        return function

    monkeypatch.setattr(torch, "compile", compile_aloud)
    arguments = [*SUM, "--device", "cpu", "--dtype", "float32", "--compile"]
    out, err = run_main(capsys, *arguments)
    assert out == "25."
    assert re.fullmatch(r"llama3.py: compiled the decode kernels in \d+\.\d s\n", err)
    assert logging.getLogger("torch._inductor").isEnabledFor(logging.ERROR)


def test_matrices_that_are_computed_in_as_they_are_stored_stay_tensors(demo_weights, monkeypatch):
    monkeypatch.setattr(torch, "compile", as_it_is)
    assert products.with_compiled_products(demo_weights) == demo_weights
