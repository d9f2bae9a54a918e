"""What the README and the pages in docs/ say can be run, and gives what they show."""

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch.distributed
from conftest import ROOT

import formats
import llama3
import tokenizer_setup
from cli.main import main
from cli.options import make_parser

README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)


def blocks(text, language):
    """The fenced blocks of a page that are in a language, "" for what a terminal shows."""
    return [content for found, content in FENCED.findall(text) if found == language]


def pages_with(has):
    """The names of the pages that have something, as parameters of a test."""
    return pytest.mark.parametrize("page", [name for name, text in PAGES.items() if has(text)])


# --- the README -----------------------------------------------------------------------------------

COMMANDS = [
    "pip install -r requirements.txt && python llama3.py --prompt "
    '"the answer to the ultimate question of life, the universe, and everything is "',
    "pip install -r tests/requirements.txt && python -m pytest",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_stand_alone_in_a_block_each(command):
    assert command + "\n" in blocks(README, "")


def test_the_first_command_prints_42():
    command = COMMANDS[0].split(" && ")[1].split(" ", 1)[1]
    result = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, check=True
    )
    assert result.stdout == b"42"


def test_what_it_is_and_a_first_result_come_within_ten_lines():
    first = "\n".join(README.splitlines()[:10])
    assert "Llama 3 in one Python file" in first
    assert "prints `42`" in first
    assert "python llama3.py --prompt" in first


def test_it_is_read_in_a_few_minutes():
    lines = len(README.splitlines())
    assert lines <= 200, f"the README has {lines} lines: what is longer goes to docs/"


def test_the_sections_of_llama3_are_those_that_it_lists():
    source = (ROOT / "llama3.py").read_text()
    sections = re.findall(r"^# --- (\d\. [\w ]+?) -+$", source, re.MULTILINE)
    rows = re.findall(r"^\| (\d\. [\w ]+?) \| (.*) \|$", README, re.MULTILINE)
    assert [title for title, _ in rows] == sections
    for _, text in rows:
        for name in re.findall(r"`(\w+)`", text):
            assert hasattr(llama3, name), name


def test_the_model_has_as_many_functions_as_it_says():
    source = (ROOT / "llama3.py").read_text()
    model = source.split("# --- 3.")[1].split("# --- 4.")[0]
    functions = sum(isinstance(node, ast.FunctionDef) for node in ast.parse("#" + model).body)
    assert (functions, "fifteen functions from tensors to tensors" in README) == (15, True)
    assert len(source.splitlines()) <= 620
    assert "Some 620 lines that import PyTorch" in README


def test_every_other_page_is_linked_from_it():
    more = README.split("\n## More\n")[1].split("\n## ")[0]
    linked = set(re.findall(r"\]\(([^)]*)\)", more))
    assert PAGES.keys() - {"README.md"} <= linked


# --- all pages ------------------------------------------------------------------------------------


def anchors_of(text):
    """What the headings of a page can be linked as, by GitHub's rule."""
    without_code = FENCED.sub("", text)
    for heading in re.findall(r"^#+ (.*)$", without_code, re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_project_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link


@pages_with(lambda text: "# The tests" not in text)
def test_every_name_of_the_project_in_code_exists(page):
    modules = {"llama3": llama3, "formats": formats, "tokenizer_setup": tokenizer_setup}
    text = FENCED.sub("", PAGES[page])
    for module, name in re.findall(r"`(\w+)\.(\w+)[^`]*`", text):
        if module in modules and name not in ("py", "json", "convert"):
            assert hasattr(modules[module], name), f"{module}.{name}"
    for path in re.findall(r"`((?:cli|formats|demo|docs|tests|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists() or (ROOT / page).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_table_has_as_many_cells_in_each_row_as_in_its_head(page):
    for table in re.findall(r"(?:^\|.*\|\n)+", FENCED.sub("", PAGES[page]), re.MULTILINE):
        rows = [row.replace("\\|", "").count("|") for row in table.splitlines()]
        assert len(set(rows)) == 1, table.splitlines()[0]


def test_every_file_of_tests_is_listed_once():
    tests = ROOT / "tests"
    there = sorted(str(path.relative_to(tests)) for path in tests.rglob("test_*.py"))
    rows = re.findall(r"^\| (`.*`) \|", PAGES["tests/README.md"], re.MULTILINE)
    assert sorted(itertools.chain(*(re.findall(r"`(.*?)`", row) for row in rows))) == there


def test_the_tables_of_options_say_what_the_program_says():
    expected = []
    for action in make_parser()._actions:
        if action.dest != "help":
            values = action.metavar or "{" + ",".join(action.choices or ()) + "}"
            names = f"{', '.join(action.option_strings)} {values}".removesuffix(" {}")
            expected.append(f"| `{names}` | {action.help} |")
    shown = re.findall(r"^\| `--.*", PAGES["docs/options.md"], re.MULTILINE)
    assert shown == expected, "docs/options.md should have these rows:\n" + "\n".join(expected)


# --- what is shown is run -------------------------------------------------------------------------


def same(printed, shown):
    """Whether two texts are the same, but for line breaks and for the rounding of numbers."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    values, expected = (map(float, re.findall(number, text)) for text in (printed, shown))
    return re.sub(number, "#", printed).split() == re.sub(number, "#", shown).split() and all(
        value == pytest.approx(other, rel=0.02, abs=1e-3)
        for value, other in zip(values, expected, strict=True)
    )


def sessions(text):
    """The commands that a page shows after "$ ", with what is typed and what is printed."""
    for block in blocks(text, ""):
        if block.startswith("$ "):
            for command, shown in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", block, re.MULTILINE):
                typed = re.findall(r"^> (.*\n)", shown, re.MULTILINE)
                yield command, "".join(typed), re.sub(r"^> .*\n", "", shown, flags=re.MULTILINE)


@pages_with(lambda text: list(sessions(text)))
def test_the_sessions_on_the_terminal_print_what_they_show(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command, typed, shown in sessions(PAGES[page]):
        echoed, arguments = command.rsplit("python llama3.py ", 1)
        given = re.sub(r'^echo "(.*)" \| $', r"\1\n", echoed) + typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        assert main(shlex.split(arguments)) == 0
        printed = capsys.readouterr().out
        assert same(printed, shown), f"{command} printed {printed}"
        if shown.startswith("{"):
            assert json.loads(printed).keys() == json.loads(shown).keys()


@pytest.fixture
def alone(monkeypatch):
    """One process, as torchrun would start it."""
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield
    with contextlib.suppress(AssertionError, ValueError):
        torch.distributed.destroy_process_group()


PRINTED = {
    "README.md": "The capital of Japan is Tokyo.\n",
    "docs/formats.md": "17 plus 8 is 25.\n",
    "docs/processes.md": "0 25\n",
}


@pages_with(lambda text: blocks(text, "python"))
def test_the_python_examples_run(page, capsys, monkeypatch, alone):
    monkeypatch.chdir(ROOT)
    names = {}
    for example in blocks(PAGES[page], "python"):
        exec(example, names)
    assert capsys.readouterr().out == PRINTED[page]


def test_with_weights_in_eight_bits_the_answer_stays_the_same(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    first, second = blocks(README, "python")
    exec(first + second, names)
    names["weights"] = names["smaller"]
    assert sum(callable(w) for w in names["smaller"].values()) == 7 * 4 + 1
    exec("".join(line + "\n" for line in first.splitlines()[-2:]), names)
    assert capsys.readouterr().out == 2 * PRINTED["README.md"]


def test_no_page_knows_the_machine_that_it_was_written_on():
    for page, text in PAGES.items():
        assert not re.search(r"/home/|/root/|/work/|/tmp/|\bshared/", text), page
