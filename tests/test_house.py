"""The house: which file does what, and what llama3.py is not to become.

These tests read the source text, because that is what they are about: a reader of llama3.py finds
the model in it, all of it, and nothing else.
"""

import ast
import re
import sys

import pytest
import torch
from conftest import ROOT

import llama3

SOURCE = (ROOT / "llama3.py").read_text()
MAY_IMPORT = {  # of the project's own files; everything else may import any of them
    "checkpoint_files": set(),
    "tokenizer_setup": {"checkpoint_files"},
    "llama3": {"checkpoint_files"},
    "convert": {"checkpoint_files", "tokenizer_setup", "llama3"},
    "command_line": {"checkpoint_files", "tokenizer_setup", "llama3", "convert"},
}


def imports(code):
    """The modules that are imported anywhere in `code`, but for what is under `if __name__`."""
    code.body = [node for node in code.body if "__name__" not in ast.unparse(node)[:20]]
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name):
    imported = set(imports(ast.parse((ROOT / f"{name}.py").read_text())))
    assert imported & MAY_IMPORT.keys() <= MAY_IMPORT[name], (
        "imports point one way, so that a file can be read without those that use it"
    )


def test_the_files_of_a_checkpoint_are_read_without_pytorch():
    imported = set(imports(ast.parse((ROOT / "checkpoint_files.py").read_text())))
    assert imported <= sys.stdlib_module_names


def test_llama3_stays_small_enough_to_be_read_in_one_sitting():
    assert len(SOURCE.splitlines()) <= 700, (
        "llama3.py has a budget of 700 lines: what is not the model, generation or loading has a "
        "file of its own"
    )


def test_the_first_tensor_operation_comes_early():
    products = (n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.MatMult))
    assert next(products, None), "llama3.py multiplies matrices with @, for all to see"
    lines = SOURCE.splitlines()
    first = next(i for i, line in enumerate(lines, start=1) if " @ w.T" in line)
    assert first < 150, "a reader of llama3.py has come for the tensors"


def test_the_model_has_no_module_and_no_fused_attention():
    names = {node.attr for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Name)}
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if name.startswith("torch")} == {
        *("torch.Tensor", "torch.nn.functional.silu")
    }, "llama3.py is made of tensors and functions: no layers of torch.nn"
    assert not names & {"nn", "Module", "Linear", "Embedding", "scaled_dot_product_attention"}


def test_llama3_knows_no_terminal():
    code = ast.parse(SOURCE)
    assert not set(imports(code)) & {"sys", "argparse", "tqdm", "logging"}, (
        "llama3.py takes tokens and gives tokens; command_line.py talks to the user"
    )
    assert not re.search(r"\bprint\(|\bsys\.|\bstdout\b|\bstderr\b", SOURCE)


def test_it_loads_and_generates_without_a_word(capfd, demo_config):
    weights = llama3.load_weights(ROOT / "demo", demo_config, dtype=torch.float32)
    assert len(list(llama3.generate([1024], weights, demo_config, max_new_tokens=3))) == 3
    assert capfd.readouterr() == ("", "")


def test_the_first_page_shows_in_five_lines_how_the_parts_are_used(monkeypatch):
    page = llama3.__doc__[:1500]
    example = re.search(r"(?:^    .*\n)+", page, flags=re.MULTILINE).group()
    lines = [line.strip() for line in example.splitlines()]
    assert len(lines) == 5, "the first page shows how the parts are used, in five lines"
    monkeypatch.chdir(ROOT)
    names = {"llama3": llama3, "torch": torch}
    exec("\n".join(lines), names)
    assert names["logits"].shape == (7, names["config"].vocab_size)
    assert names["new_tokens"] == [338]
    assert "[338]" in lines[-1]


def test_what_is_for_one_file_alone_is_not_used_by_another():
    """A name that begins with an underscore belongs to the file that it stands in."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in MAY_IMPORT:
                assert not any(alias.name.startswith("_") for alias in node.names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in MAY_IMPORT and node.attr.startswith("_")), path


def test_a_function_stands_below_those_that_it_calls():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")]:
        code = ast.parse(path.read_text())
        functions = {n.name: n.lineno for n in code.body if isinstance(n, ast.FunctionDef)}
        for function in code.body:
            if isinstance(function, ast.FunctionDef):
                called = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                for other in called & functions.keys():
                    assert functions[other] <= function.lineno, f"{other} in {path.name}"
