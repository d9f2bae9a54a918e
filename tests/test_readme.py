"""What the README says can be run, and gives what it says."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import command_line

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "command",
    [
        "pip install -r requirements.txt && python llama3.py --prompt "
        '"the answer to the ultimate question of life, the universe, and everything is "',
        "pip install -r tests/requirements.txt && python -m pytest",
    ],
)
def test_the_two_commands_stand_alone_in_a_block_each(command):
    assert ("", command + "\n") in BLOCKS


def test_what_it_is_and_a_first_result_come_within_ten_lines():
    first = "\n".join(README.splitlines()[:10])
    assert "Llama 3 in one Python file" in first
    assert "this prints `42`" in first
    assert "python llama3.py --prompt" in first


def test_the_options_are_those_of_the_program(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", README, flags=re.MULTILINE))


def test_the_sessions_on_the_terminal_print_what_they_show():
    sessions = [block for _, block in BLOCKS if block.startswith("$ ")]
    assert sessions
    for session in sessions:
        for command, shown in re.findall(r"^\$ (.*)\n([^$]*)", session, flags=re.MULTILINE):
            assert command.startswith("python llama3.py ")
            command = command.replace("python", f"'{sys.executable}'", 1)
            typed = "\n".join(re.findall(r"^> (.*)$", shown, flags=re.MULTILINE))
            shown = re.sub(r"^> .*$", "", shown, flags=re.MULTILINE)
            result = subprocess.run(
                command,
                shell=True,
                cwd=ROOT,
                input=typed,
                capture_output=True,
                text=True,
                check=True,
            )
            assert result.stdout.split() == shown.split()


def test_the_python_example_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = (b for language, b in BLOCKS if language == "python" and "smollm2" not in b)
    exec(example, {})
    assert capsys.readouterr().out == "The capital of Japan is Tokyo.\n"
