"""The house: which file does what, and what llama3.py is not to become.

These tests read the source text, because that is what they are about: a reader of llama3.py finds
the model in it, all of it, and nothing else.
"""

import ast
import re

import pytest
import torch
from conftest import PARAMS_8B, ROOT

import llama3

SOURCE = (ROOT / "llama3.py").read_text()
PRODUCT = [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py"), *ROOT.glob("cli/*.py")]
OURS = {"llama3", "tokenizer_setup", "formats", "cli"}
MAY_IMPORT = {  # each room of the others; a module of it may import any of its room
    "llama3.py": set(),
    "tokenizer_setup.py": set(),
    "formats": {"llama3", "tokenizer_setup", "formats"},
    "cli": OURS,
}


def imports(code):
    """The modules that are imported anywhere in `code`, but for what is under `if __name__`."""
    code.body = [node for node in code.body if "__name__" not in ast.unparse(node)[:20]]
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    files = [ROOT / room] if room.endswith(".py") else ROOT.glob(f"{room}/*.py")
    for path in files:
        imported = set(imports(ast.parse(path.read_text())))
        assert imported & OURS <= MAY_IMPORT[room], (
            f"{path.name}: imports point one way, so that a file can be read without those above it"
        )


def test_only_the_star_has_more_than_300_lines():
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in PRODUCT}
    assert sum(lines.values()) <= 5664
    assert lines.pop(next(path for path in lines if path.name == "llama3.py")) <= 620, (
        "llama3.py is read in one sitting: what is not the model, generation or loading has a "
        "file of its own"
    )
    assert {path: n for path, n in lines.items() if n > 300} == {}


def test_what_makes_a_llama_3_is_in_llama3():
    """A limit of lines must not be met by moving the model next door."""
    names = {
        *("config_from_params", "weight_shapes", "linear", "rms_norm", "rope_frequencies"),
        *("rotate", "causal_mask", "attention_pattern", "grouped_query_attention", "attention"),
        *("feed_forward", "block", "forward", "new_cache", "Session", "nucleus", "sample"),
        *("generate", "map_file", "split_axis", "load_config", "load_weights", "CheckpointError"),
    }
    defined = {node.name for node in ast.parse(SOURCE).body if hasattr(node, "name")}
    assert names <= defined
    assert all(getattr(llama3, name).__module__ == "llama3" for name in names)
    assert "mmap=True, weights_only=True" in SOURCE
    assert llama3.config_from_params(PARAMS_8B).ffn_dim == 14336, "SwiGLU's width"


def test_only_a_session_has_state():
    classes = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef)]
    assert {node.name for node in classes} == {"Config", "Session", "CheckpointError"}
    assert "global " not in SOURCE


def test_the_first_tensor_operation_comes_early():
    products = (n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.MatMult))
    assert next(products, None), "llama3.py multiplies matrices with @, for all to see"
    first = SOURCE[: SOURCE.index(" @ ")].count("\n")
    assert first < 170, "a reader of llama3.py has come for the tensors"


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
        *("torch.Generator", "torch.Tensor", "torch.nn.functional.silu")
    }, "llama3.py is made of tensors and functions: no layers of torch.nn"
    assert not names & {"nn", "Module", "Linear", "Embedding", "scaled_dot_product_attention"}
    everywhere = "".join(path.read_text() for path in PRODUCT)
    assert not re.search(r"nn\.(Module|Linear|Embedding)|scaled_dot_product_attention", everywhere)


def test_llama3_knows_no_terminal_and_no_processes():
    code = ast.parse(SOURCE)
    assert not set(imports(code)) & {"sys", "argparse", "tqdm", "logging"}, (
        "llama3.py takes tokens and gives tokens; cli/ talks to the user"
    )
    assert not re.search(r"\bprint\(|\bsys\.|\bstdout\b|\bstderr\b|distributed|compile", SOURCE)


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
    for path in [*PRODUCT, *ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
                assert not any(alias.name.startswith("_") for alias in node.names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in OURS and node.attr.startswith("_")), path


def test_a_function_stands_below_those_that_it_calls():
    for path in [*PRODUCT, *ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")]:
        code = ast.parse(path.read_text())
        functions = {n.name: n.lineno for n in code.body if isinstance(n, ast.FunctionDef)}
        for function in code.body:
            if isinstance(function, ast.FunctionDef):
                called = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                for other in called & functions.keys():
                    assert functions[other] <= function.lineno, f"{other} in {path.name}"
