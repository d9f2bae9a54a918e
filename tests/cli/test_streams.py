"""What goes to which stream, and how the program ends: files, pipes, terminals, signals."""

import io
import os
import pty
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, config_of
from program import SUM, run_main, write_endless_model

import cli.main
import llama3
from cli.main import main
from cli.messages import stream
from formats import Source

SCRIPT = [sys.executable, str(ROOT / "llama3.py")]


@pytest.fixture(scope="module")
def endless(tmp_path_factory, demo_tokenizer):
    return write_endless_model(tmp_path_factory.mktemp("endless"), demo_tokenizer)


# --- whole processes, which take seconds to start: each shows what it alone can -------------------


def test_a_process_writes_its_completion_in_utf_8_and_nothing_else(capsys, endless, tmp_path):
    """In any folder and any locale."""
    arguments = ["--ckpt-dir", str(endless), "--prompt", "caf\u00e9 \u20ac", "--max-new-tokens", 60]
    arguments = [str(argument).encode() for argument in arguments]  # whatever the tests' locale is
    expected, _ = run_main(capsys, *(argument.decode() for argument in arguments))
    assert "\ufffd" in expected  # random bytes are not all characters
    locale = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [*SCRIPT, *arguments],
        cwd=tmp_path,
        env=os.environ | locale | {"PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout.decode()) == (0, expected)
    assert result.stderr.startswith(b"llama3.py: found in ")
    assert result.stderr.count(b"\n") == 1


def start(*arguments):
    """Start the script; Ctrl-C reaches it even where whoever runs the tests ignores it."""
    return subprocess.Popen(
        [*SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_keeps_what_was_written_and_ends_with_status_130(endless):
    process = start("--ckpt-dir", endless, "--prompt", "a", "--max-new-tokens", 8000)
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert len(first) == 20
    assert process.returncode == 130
    assert errors.count(b"\n") == 1
    assert errors.startswith(b"llama3.py: found in ")


def test_a_closed_pipe_ends_the_program_quietly(endless):
    process = start("--ckpt-dir", endless, "--prompt", "a", "--max-new-tokens", 8000)
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert errors.count(b"\n") == 1
    assert errors.startswith(b"llama3.py: found in ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_in_one_line():
    with open("/dev/full", "w") as full:
        command = [*SCRIPT, "--prompt", "a", "--ckpt-dir", DEMO]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert result.returncode == 2
    found, error = result.stderr.splitlines()
    assert found.startswith(b"llama3.py: found in ")
    reason = b"standard output cannot be written: No space left on device"
    assert error == b"llama3.py: error: " + reason


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_without_standard_input_and_error_the_completion_alone_is_written():
    command = f"'{SCRIPT[0]}' '{SCRIPT[1]}' --prompt '17 plus 8 is ' --stats <&- 2>&-"
    result = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"25.", b"")


def test_ctrl_c_while_pytorch_is_imported_ends_quietly():
    code = f"""if True:
        import os, runpy, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Interrupted:
            def find_spec(name, *_):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupted)
        sys.path.insert(0, {str(ROOT)!r})
        sys.argv = ["llama3.py", "--prompt", "a"]
        runpy.run_path({str(ROOT / "llama3.py")!r}, run_name="__main__")"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_an_older_python_is_told_at_once():
    code = f"""if True:
        import runpy, sys
        sys.version_info = (3, 10, 4)
        sys.path.insert(0, {str(ROOT)!r})
        runpy.run_path({str(ROOT / "llama3.py")!r}, run_name="__main__")"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == b"llama3.py: error: this is Python 3.10, expected 3.11 or newer\n"


# --- standard output ------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_each_text_is_written_and_flushed_before_the_next_is_computed(monkeypatch, terminal):
    happened = []

    class Watched(io.StringIO):
        def write(self, text):
            happened.append(("write", text))
            return super().write(text)

        def flush(self):
            happened.append("flush")

        def isatty(self):
            return terminal

    def texts():
        for text in ("a", "b"):
            happened.append("compute")
            yield text

    monkeypatch.setattr(sys, "stdout", Watched())
    assert stream(texts())
    steps = [step for text in "ab" for step in ("compute", ("write", text), "flush")]
    assert happened == steps + [("write", "\n"), "flush"] * terminal


def written_to_a_terminal(monkeypatch, *arguments):
    """What the program shows where standard output is a terminal."""
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="ascii") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main([*map(str, arguments)]) == 0
    shown = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as screen:  # once all is read
        while more := screen.read(4096):
            shown += more
    return shown.decode()


def test_control_characters_are_shown_on_a_terminal_and_exact_in_a_pipe(
    capsysbinary, monkeypatch, tmp_path
):
    """A model that says one control character after another, then a line break and a tab."""
    config = config_of(tmp_path, vocab_size=1280, n_layers=1, dim=1280, n_heads=4, n_kv_heads=1)
    said = [97, 27, 91, 127, 13, 7, 10, 9, 98, 1025]  # the last one ends it
    made = {name: torch.zeros(shape) for name, shape in llama3.weight_shapes(config).items()}
    made["tok_embeddings.weight"] = torch.eye(1280)
    made["norm.weight"] = torch.ones(1280)
    for before, after in zip([1024, *said], said, strict=False):
        made["output.weight"][after, before] = 1.0
    torch.save(made, tmp_path / "consolidated.00.pth")
    (tmp_path / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    arguments = ["--prompt", "", "--ckpt-dir", tmp_path]
    assert main([*map(str, arguments)]) == 0
    assert capsysbinary.readouterr().out == b"a\x1b[\x7f\r\x07\n\tb"
    shown = written_to_a_terminal(monkeypatch, *arguments)
    assert shown == "a\\x1b[\\x7f\\r\\x07\r\n\tb\r\n"  # the terminal makes \r\n of \n


def test_on_a_terminal_a_line_break_comes_last_even_where_there_is_nothing(monkeypatch):
    nothing = ["--prompt", "the capital of France is Paris."]
    assert written_to_a_terminal(monkeypatch, *nothing) == "\r\n"
    assert written_to_a_terminal(monkeypatch, *SUM) == "25.\r\n"


class NotebookStream(io.TextIOBase):
    """Like ipykernel's: no reconfigure, no file number."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_it_works_where_standard_output_is_no_file(monkeypatch):
    for out in (NotebookStream(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", out)
        assert main(SUM) == 0
        assert getattr(out, "text", None) == "25." or out.getvalue() == "25."


def test_a_closed_standard_output_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(SUM) == 2
    expected = "standard output is closed, so there is nowhere to write to"
    assert capsys.readouterr().err == f"llama3.py: error: {expected}\n"


# --- standard error, and the end ------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_without_room_for_standard_error_the_completion_is_written(capsys, monkeypatch):
    """And nothing is left for Python to write, and to complain of, when it ends."""
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert main([*SUM, "--stats"]) == 0
    assert capsys.readouterr() == ("25.", "")


def test_a_warning_of_a_library_is_one_line_like_any_other_note(capsys, monkeypatch):
    load_weights = Source.load_weights

    def load(*args, **kwargs):
        warnings.warn("this is old,\n  use that", stacklevel=1)
        return load_weights(*args, **kwargs)

    monkeypatch.setattr(Source, "load_weights", load)
    assert run_main(capsys, *SUM) == ("25.", "llama3.py: this is old, use that\n")


def test_a_note_cannot_command_a_terminal(capsys):
    _, err = run_main(capsys, "--ckpt-dir", "\x1b[2Jgone\nllama3.py: error: no", *SUM, status=2)
    assert "\x1b" not in err
    assert "\\x1b[2Jgone llama3.py: error: no" in err
    assert err.count("\n") == 1


def test_ctrl_c_while_the_weights_are_loaded_ends_with_status_130(monkeypatch, capsys):
    def load(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "load_weights", load)
    assert run_main(capsys, *SUM, status=130) == ("", "")


def test_a_mistake_of_the_program_is_not_made_to_look_like_one_of_its_user(monkeypatch):
    def mistaken(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.main, "complete", mistaken)
    with pytest.raises(ZeroDivisionError):
        main(SUM)
