"""Conversations: in a pipe, on a terminal, too long for the context, saved, with calls of tools."""

import io
import json
import os
import select
import sys

import pytest
import torch
from conftest import DEMO, ROOT
from other_formats import hf_model, trained_tokenizer
from program import run_main, write_endless_model

import llama3
import tokenizer_setup
from cli import chat
from cli.messages import UsageError
from cli.model import open_model
from cli.options import parse_arguments
from cli.sampling import Sampler

JAPAN = {"role": "user", "content": "What is the capital of Japan?"}
TOKYO = {"role": "assistant", "content": "The capital of Japan is Tokyo."}
DEMO_CHAT = ["--chat", "--ckpt-dir", str(DEMO)]


def said(capsys, *arguments, lines=None, status=0):
    """What a conversation of these lines wrote to standard output and to standard error."""
    with pytest.MonkeyPatch.context() as patch:
        if lines is not None:
            content = "".join(line + "\n" for line in lines).encode()
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run_main(capsys, *DEMO_CHAT, *arguments, status=status)


def chat_of(*arguments):
    """A conversation with the demo, or another model that `arguments` name."""
    model = open_model(parse_arguments([*DEMO_CHAT, *map(str, arguments)]))
    return chat.Chat(model, model.load(1, model.config.max_seq_len - 1))


def interrupted_at_the_fifth_token(monkeypatch):
    """Ctrl-C comes when five tokens were drawn; returns the list of them."""
    choose, drawn = Sampler.__call__, []

    def interrupted(self, logits):
        drawn.append(choose(self, logits))
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return drawn[-1]

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    return drawn


# --- turns ----------------------------------------------------------------------------------------


def test_one_exchange_is_a_dialog_of_one_message(capsys, demo_config, demo_tokenizer):
    weights = llama3.load_weights(DEMO, demo_config)
    stop = tokenizer_setup.stop_tokens(demo_tokenizer)
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        prompt = tokenizer_setup.encode_dialog(demo_tokenizer, [*system, JAPAN])
        tokens = llama3.generate(prompt, weights, demo_config, max_new_tokens=100, stop_tokens=stop)
        arguments = ["--system", "Be brief."] if system else []
        out, err = said(capsys, "--prompt", JAPAN["content"], *arguments)
        assert (out, err) == (demo_tokenizer.decode([*tokens]), "")
    out, err = said(capsys, "--prompt", JAPAN["content"], "--stats", "--max-new-tokens", "4")
    cut, stats = err.splitlines()
    assert cut.startswith("llama3.py: the answer was cut off: ")
    stats = json.loads(stats)
    assert stats["prompt_tokens"] == len(tokenizer_setup.encode_dialog(demo_tokenizer, [JAPAN]))
    assert stats["decode_tokens"] == 3


def test_turns_are_answered_as_whole_dialogs_and_only_what_is_new_is_read(
    capsys, monkeypatch, demo_tokenizer
):
    """The longest beginning that two dialogs share is read once."""
    read, prompts, forward, generate_batch = [], [], llama3.forward, llama3.generate_batch

    def counting(tokens, *args, **kwargs):
        read.append(tokens.shape[-1])
        return forward(tokens, *args, **kwargs)

    def watched(batch, *args, **kwargs):
        prompts.append((batch[0], sum(read)))
        return generate_batch(batch, *args, **kwargs)

    monkeypatch.setattr(llama3, "forward", counting)
    monkeypatch.setattr(llama3, "generate_batch", watched)
    lines = [JAPAN["content"], "What is 3 plus 4?", "What is the opposite of hot?"]
    answers = said(capsys, lines=lines)[0].splitlines()
    messages, earlier, answered = [], [], []
    for line, answer, (prompt, _) in zip(lines, answers, prompts, strict=True):
        messages.append({"role": "user", "content": line})
        assert prompt == tokenizer_setup.encode_dialog(demo_tokenizer, messages)
        assert prompt[: len(earlier)] == earlier
        messages.append({"role": "assistant", "content": answer})
        earlier = prompt
        answered.append(len(tokenizer_setup.encode(demo_tokenizer, answer, bos=False)))
    # A turn reads what its dialog has more than the one before and its answer, and each token of
    # the answer; the last one is followed by the end of the turn, which is not read.
    read_before = [n for _, n in prompts] + [sum(read)]
    lengths = [0] + [len(prompt) for prompt, _ in prompts]
    for i in range(3):
        known = lengths[i] + (answered[i - 1] if i else 0)
        new = lengths[i + 1] - known
        assert read_before[i + 1] - read_before[i] == new + answered[i]


def test_the_oldest_turns_go_when_the_context_is_full(capsys, demo_tokenizer):
    system = {"role": "system", "content": "Be brief."}
    arguments = ["--max-seq-len", "100", "--max-new-tokens", "20", "--system", "Be brief."]
    talk = chat_of(*arguments)
    for i in range(6):
        assert "".join(talk.answer(f"What is {i} plus 4?")) == f"{i} plus 4 is {i + 4}."
        assert talk.messages[0] == system
        assert len(tokenizer_setup.encode_dialog(demo_tokenizer, talk.messages)) <= 100
    assert talk.messages[1]["role"] == "user"
    assert talk.messages[-2]["content"] == "What is 5 plus 4?"
    assert len(talk.messages) < 13
    err = capsys.readouterr().err
    assert "llama3.py: the context is full: the 2 oldest turns were dropped\n" in err
    assert err.count("dropped") < 4  # half of the context goes at a time, not a turn at each
    with pytest.raises(UsageError, match="has room for 80 and an answer; shorten it"):
        next(talk.answer("word " * 100))
    assert talk.messages[-2]["content"] == "What is 5 plus 4?"
    lines = ["word " * 100, JAPAN["content"]]
    out, err = said(capsys, "--max-seq-len", 60, lines=lines, status=2)
    assert out == "\n" + TOKYO["content"] + "\n"  # a line for each turn
    assert "shorten it" in err
    _, err = said(capsys, "--max-seq-len", 60, "--prompt", "word " * 100, status=2)
    assert err.startswith("llama3.py: error: ")
    assert "shorten it" in err


def test_a_model_that_never_ends_is_stopped_by_the_number_of_tokens(
    tmp_path, capsys, demo_tokenizer
):
    """And at the end of the context."""
    write_endless_model(tmp_path, demo_tokenizer)
    talk = chat_of("--ckpt-dir", tmp_path, "--max-seq-len", 60, "--max-new-tokens", 5)
    assert len("".join(talk.answer("a"))) > 0
    assert len(talk.times) == 5
    talk.model.args.max_new_tokens = 100
    [*talk.answer("b")]
    assert talk.session.tokens.shape == (1, 59)  # of the 60th the logits were computed, and no more
    cut = "llama3.py: the answer was cut off: it reached --max-new-tokens or filled the context\n"
    assert capsys.readouterr().err.count(cut) == 2


def test_an_answer_that_is_stopped_stays_and_the_conversation_goes_on(capsys, monkeypatch):
    talk = chat_of()
    drawn = interrupted_at_the_fifth_token(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        [*talk.answer(JAPAN["content"])]
    assert talk.messages[0] == JAPAN
    assert TOKYO["content"].startswith(talk.messages[1]["content"])
    assert 0 < len(talk.messages[1]["content"]) < 20
    assert "".join(talk.answer("What is 3 plus 4?")) == "3 plus 4 is 7."
    before = [*talk.messages]
    drawn[:] = drawn[:4]  # the next one is interrupted, before there is anything of an answer
    with pytest.raises(KeyboardInterrupt):
        [*talk.answer("What is 1 plus 1?")]
    assert talk.messages == before


@pytest.mark.parametrize("piped", [False, True])
def test_ctrl_c_in_an_answer_keeps_what_was_written_and_ends_with_status_130(
    capsys, monkeypatch, piped
):
    """But for a pipe, where an answer is written as a whole."""
    interrupted_at_the_fifth_token(monkeypatch)
    prompt = [] if piped else ["--prompt", JAPAN["content"]]
    out, err = said(capsys, *prompt, lines=[JAPAN["content"]] * 2, status=130)
    assert err == ""
    assert TOKYO["content"].startswith(out)
    assert (out == "") == piped


def test_calls_of_tools_end_their_turn_and_stay_in_the_transcript(monkeypatch, demo_tokenizer):
    """<|python_tag|>, the call, <|eom_id|>, as Llama 3.1 has them."""
    special = demo_tokenizer.encode_single_token
    call = tokenizer_setup.encode(demo_tokenizer, 'get("x")', bos=False)
    spoken = [special("<|python_tag|>"), *call, special("<|eom_id|>"), 7, 7]
    talk = chat_of()
    steps = ((torch.tensor([token]), None) for token in spoken)
    monkeypatch.setattr(llama3, "generate_batch", lambda *_, **__: steps)
    assert "".join(talk.answer("a")) == '<|python_tag|>get("x")'
    expected = {"role": "assistant", "content": 'get("x")', "python_tag": True}
    assert talk.messages[1] == expected | {"stop_reason": "end_of_message"}
    tokens = tokenizer_setup.encode_dialog(
        demo_tokenizer, [*talk.messages, {"role": "tool", "content": "1"}]
    )
    text = demo_tokenizer.decode(tokens)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '<|python_tag|>get("x")<|eom_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\n1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokens.count(special("<|python_tag|>")) == tokens.count(special("<|eom_id|>")) == 1
    plain = [{"role": "user", "content": "<|python_tag|>"}]
    encoded = tokenizer_setup.encode_dialog(demo_tokenizer, plain)
    assert special("<|python_tag|>") not in encoded


def test_an_answer_that_fails_leaves_the_conversation(capsys, monkeypatch):
    """In a pipe with an empty line, so that the others keep their places."""
    answer = chat.Chat.answer

    def failing(self, text):
        if text == "overflow":
            raise FloatingPointError("the logits are not finite")
        if text == "large":
            raise MemoryError
        return answer(self, text)

    monkeypatch.setattr(chat.Chat, "answer", failing)
    lines = ["overflow", JAPAN["content"], "large"]
    out, err = said(capsys, "--stats", lines=lines, status=2)
    assert out == f"\n{TOKYO['content']}\n\n"
    *notes, stats = err.splitlines()
    assert notes == ["llama3.py: the logits are not finite", "llama3.py: MemoryError"]
    assert json.loads(stats)["decode_tokens"] > 5


# --- lines of a pipe ------------------------------------------------------------------------------


def test_in_a_pipe_a_line_is_a_turn_and_an_answer_is_a_line(capsys, monkeypatch):
    lines = [JAPAN["content"], "", "What is 3 plus 4?", "/reset", "/nope", "What is 17 plus 8?"]
    out, err = said(capsys, lines=["\ufeff" + lines[0], *lines[1:], "/exit", "What is 1 plus 1?"])
    assert out == "The capital of Japan is Tokyo.\n3 plus 4 is 7.\n17 plus 8 is 25.\n"
    assert err == "llama3.py: a new conversation\nllama3.py: unknown command /nope; see /help\n"
    monkeypatch.setattr(chat.Chat, "answer", lambda self, text: iter(["a\n", "b ", text]))
    assert said(capsys, lines=["c"])[0] == "a b c\n"


def test_a_line_that_begins_with_a_path_is_a_message(capsys):
    out, err = said(capsys, lines=["/etc/hosts what?", "/usr"])
    assert (out.count("\n"), err) == (1, "llama3.py: unknown command /usr; see /help\n")


def test_input_that_cannot_be_read_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(chat, "MAX_PROMPT_BYTES", 1000)
    _, err = said(capsys, lines=["a", "b" * 1001], status=2)
    assert "standard input, line 2: found more than 1000 bytes" in err
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in said(capsys, status=2)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    assert "standard input, line 1: found the byte 0xff" in said(capsys, status=2)[1]


def test_a_system_message_that_is_no_text_is_refused(capsys):
    _, err = said(capsys, "--system", "\udcff", "--prompt", "a", status=2)
    assert "argument --system: found bytes that are not UTF-8, expected text" in err


def test_a_model_without_a_chat_template_cannot_chat(capsys, tmp_path):
    hf_model("llama", vocab_size=528).save_pretrained(tmp_path)
    trained_tokenizer("qwen2").save_pretrained(tmp_path)
    _, err = run_main(capsys, "--chat", "--prompt", "a", "--ckpt-dir", tmp_path, status=2)
    assert "argument --chat: this model has no chat template: use a text" in err


# --- commands -------------------------------------------------------------------------------------


def test_a_conversation_is_saved_and_gone_on_with(capsys, tmp_path):
    path = tmp_path / "a conversation.json"
    lines = ["/system Be brief.", JAPAN["content"], f"/save {path}", "/reset", f"/load {path}"]
    out, err = said(capsys, lines=[*lines, "What is 3 plus 4?", f"/save {path}"])
    assert out == TOKYO["content"] + "\n3 plus 4 is 7.\n"
    assert f"llama3.py: saved 3 messages to {path}\n" in err
    assert f"llama3.py: loaded 3 messages from {path}\n" in err
    system = {"role": "system", "content": "Be brief."}
    messages = json.loads(path.read_text())
    assert messages[:3] == [system, JAPAN, TOKYO]
    assert len(messages) == 5
    other = tmp_path / "other.json"
    lines = [f"/load {path}", "/reset", f"/save {other}", "/system", f"/save {tmp_path / 'none'}"]
    said(capsys, lines=lines)
    assert json.loads(other.read_text()) == [system]
    assert json.loads((tmp_path / "none").read_text()) == []


def test_what_is_no_conversation_is_not_loaded(capsys, tmp_path):
    """And the one that there is goes on."""
    bad = [
        '[{"role": "user", "content": "a", "stop_reason": 3}]',
        '[{"role": "user", "content": "a", "python_tag": "no"}]',
        "",
        "{",
        "3",
        '{"role": "user"}',
        '[{"role": "user"}]',
        "[[]]",
        '["a"]',
        "[" * 9999,
    ]
    files = [tmp_path / f"bad{i}" for i in range(len(bad))]
    for file, content in zip(files, bad, strict=True):
        file.write_text(content)
    loads = [f"/load {file}" for file in files]
    lines = [JAPAN["content"], *loads, f"/save {tmp_path / 'kept'}"]
    *notes, saved = said(capsys, lines=lines)[1].splitlines()
    for line, file in zip(notes, files, strict=True):
        assert line.startswith(f"llama3.py: {file}: found no conversation: ")
    assert saved.startswith("llama3.py: saved 2 messages")
    assert json.loads((tmp_path / "kept").read_text()) == [JAPAN, TOKYO]


def test_commands_that_cannot_be_obeyed_say_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "MAX_PROMPT_BYTES", 10_000)
    expected = {
        "/load": "/load needs the name of a file",
        "/save ": "/save needs the name of a file",
        f"/load {tmp_path / 'no'}": "cannot be read: No such file",
        f"/load {tmp_path}": "cannot be read: ",
        "/load standard output": "standard output: cannot be read: No such file",
        "/load -": "cannot be read: No such file",
        "/load /dev/zero": "/dev/zero: ",  # which has no end
        "/save a\0b": "cannot be written: embedded null byte",
        f"/save {tmp_path / 'no' / 'no'}": "cannot be written: No such file",
        f"/save {tmp_path}": "cannot be written: Is a directory",
    }
    out, err = said(capsys, lines=expected)
    assert out == ""
    for line, says in zip(err.splitlines(), expected.values(), strict=True):
        assert line.startswith("llama3.py: ")
        assert says in line


def test_help_lists_the_commands(capsys):
    _, err = said(capsys, lines=["/help"])
    for command in ("/reset", "/system TEXT", "/save FILE", "/load FILE", "/help", "/exit"):
        assert f"\n{command} " in "\n" + err


# --- a terminal, and a reader that ends -----------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a terminal of its own (pty)")
def test_a_conversation_on_a_terminal(tmp_path):
    """A line that goes on, a paste of two lines, Ctrl-C in an answer, Ctrl-D."""
    import pty

    # An answer without end, to be stopped: the one to "stop me" waits until it is.
    code = f"""if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(ROOT)!r})
        from cli.chat import Chat
        from cli.main import main
        answer = Chat.answer
        def patched(self, text):
            if text != "stop me":
                yield from answer(self, text)
                return
            yield "waiting"
            while True:  # a wait in the system could begin just after the signal, and miss it
                pass
        Chat.answer = patched
        sys.exit(main({DEMO_CHAT!r}))"""
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""

    def until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 120)[0], shown  # or a fault would wait forever
            shown += os.read(terminal, 4096)
        before, _, shown = shown.partition(text)
        return before.replace(b"\r\n", b"\n")

    def type_in(text, wait=b"> "):
        os.write(terminal, text)
        return until(wait)

    assert b"/help lists the commands; Ctrl-D ends" in until(b"> ")
    assert b"The capital of Japan is Tokyo.\n" in type_in(b"What is the capital of Japan?\n")
    type_in(b"What is 3 \\\n", wait=b"... ")
    type_in(b"plus 4?\n")
    assert b"17 plus 8 is 25.\n" in type_in(b"\x1b[200~What is\n17 plus 8?\x1b[201~\n")
    type_in(b"stop me\n", wait=b"waiting")
    type_in(b"\x03")
    assert b"unknown command /nope" in type_in(b"/nope\n")
    type_in(f"/save {tmp_path / 'saved'}\n".encode())
    os.write(terminal, b"\x04")
    assert os.waitpid(process, 0)[1] == 0
    os.close(terminal)
    contents = [message["content"] for message in json.loads((tmp_path / "saved").read_text())]
    assert contents[::2] == [JAPAN["content"], "What is 3 \nplus 4?", "What is\n17 plus 8?"]


def test_a_reader_that_has_enough_ends_the_conversation(capsys, monkeypatch):
    class Reader(io.StringIO):
        def write(self, text):
            if self.getvalue().count("\n") == 2:
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Reader())
    answered, answer = [], chat.Chat.answer
    monkeypatch.setattr(
        chat.Chat, "answer", lambda self, text: answered.append(text) or answer(self, text)
    )
    assert said(capsys, lines=[JAPAN["content"]] * 9)[1] == ""
    assert sys.stdout.getvalue() == (TOKYO["content"] + "\n") * 2
    assert len(answered) == 3  # until nobody read the answer
