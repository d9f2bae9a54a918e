"""Conversations: on a terminal, in a pipe, or one answer to a prompt."""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llama3
import tokenizer_setup
from cli import ranks
from cli.messages import OutputError, UsageError, note, say, say_stats, steps_stats, stream, timed
from cli.model import Model, open_model
from cli.options import MAX_PROMPT_BYTES, decode, from_file, read_prompts
from formats.errors import one_line, out_of_memory

HELP = """\
/reset            start over, with the same system message
/system TEXT      start over with this system message; without a text, with none
/save FILE        write the conversation as JSON
/load FILE        continue a saved conversation
/help             show this help
/exit             quit (Ctrl-D)
A backslash at the end of a line goes on with the next one. Ctrl-C stops an answer."""


COMMAND = re.compile(r"/[a-z]+(\s|$)")  # and not a path


class Chat:
    """A conversation: its messages, and the session of what the model has read of it."""

    def __init__(self, model: Model, weights: llama3.Weights) -> None:
        self.model, self.weights = model, weights
        self.session = model.session(weights)
        self.times: list[float] = []  # of every token
        self.whole = True  # whether someone reads to the end
        self.system = model.args.system
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        first = {"role": "system", "content": self.system}
        self.messages: list[dict[str, object]] = [first] if self.system is not None else []

    def fitting(self, messages: list[dict[str, object]]) -> tuple[list[int], int]:
        """The tokens of a dialog, from which the oldest turns go if need be; how many went."""
        room = self.model.config.max_seq_len
        most = room - min(self.model.args.max_new_tokens, max(room // 4, 1))
        first = 1 if messages[0]["role"] == "system" else 0
        dropped = 0
        while True:
            try:
                tokens = tokenizer_setup.encode_dialog(self.model.tokenizer, messages)
            except ValueError as error:
                raise UsageError(error) from None
            users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > first]
            # Once some must go, enough go to leave room for a while: what stays is processed again.
            if len(tokens) <= (most if not (dropped and users) else room // 2):
                return tokens, dropped
            if not users:
                problem = f"the message has {len(tokens)} tokens, and the context has room for"
                raise UsageError(f"{problem} {most} and an answer; shorten it")
            del messages[first : users[0]]
            dropped += 1

    def answer(self, text: str) -> Iterator[str]:
        """Answer a message, piece by piece; both join the conversation, if there is an answer."""
        tokenizer, messages = self.model.tokenizer, [*self.messages]
        messages.append({"role": "user", "content": text})
        prompt, dropped = self.fitting(messages)
        self.messages = messages
        if dropped:
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            note(f"the context is full: {turns} dropped")
        stop, message, pieces = tokenizer_setup.stop_tokens(tokenizer), {"role": "assistant"}, []
        special, ended = tokenizer.special_tokens, []
        metas = isinstance(tokenizer, tokenizer_setup.Tokenizer)  # others' templates know no flags
        # The end of an answer is looked for here: what it is, is saved with the message.
        steps = self.model.steps([prompt], self.weights, session=self.session, stop_tokens=())

        def tokens() -> Iterator[int]:
            for n, (chosen, _) in enumerate(timed(steps, self.times)):
                token = chosen.item()
                if n == 0 and token == special.get("<|python_tag|>") and metas:
                    message["python_tag"] = True
                if token == special.get("<|eom_id|>") and metas:  # a tool call, its result is next
                    message["stop_reason"] = "end_of_message"
                if token in stop:
                    ended.append(token)
                    return
                yield token

        try:
            for piece in tokenizer_setup.decode_stream(tokenizer, tokens()):
                pieces.append(piece)
                yield piece
            if not ended:
                note("the answer was cut off: it reached --max-new-tokens or filled the context")
        finally:
            steps.close()
            tag = "<|python_tag|>" if message.get("python_tag") else ""
            message["content"] = "".join(pieces).removeprefix(tag)
            if pieces or ended:
                self.messages.append(message)
            else:  # stopped before there was anything
                self.messages.pop()

    def command(self, line: str) -> bool:
        """Obey a line that begins with "/"; whether to go on. Raises UsageError."""
        name, rest = (*line.split(maxsplit=1), "")[:2]
        file = Path(os.path.expanduser(rest))
        if name == "/help":
            for text in HELP.splitlines():
                say(text)
        elif name in ("/reset", "/system"):
            self.system = self.system if name == "/reset" else rest or None
            self.reset()
            note("a new conversation")
        elif name in ("/save", "/load") and not rest:
            raise UsageError(f"{name} needs the name of a file")
        elif name == "/save":
            ranks.agreed(lambda: self.save(file))
        elif name == "/load":
            self.load(file)
        elif name not in ("/exit", "/quit"):
            raise UsageError(f"unknown command {one_line(name, 40)}; see /help")
        return name not in ("/exit", "/quit")

    def save(self, path: Path) -> None:
        """Write the messages to a file. Raises UsageError."""
        text = json.dumps(self.messages, ensure_ascii=False, indent=1)
        try:
            path.write_text(text + "\n", encoding="utf-8", errors="replace")
        except (OSError, ValueError) as error:  # of a name with a NUL
            problem = getattr(error, "strerror", None) or one_line(error)
            raise UsageError(f"{path}: cannot be written: {problem}") from None
        note(f"saved {len(self.messages)} messages to {path}")

    def load(self, path: Path) -> None:
        """Go on with the messages in a file. Raises UsageError."""
        file = os.path.abspath(path)
        text = ranks.agreed(lambda: from_file("/load", file, MAX_PROMPT_BYTES, pipes=False))
        try:
            messages = tokenizer_setup.check_messages(json.loads(text), others=True)
            if messages:
                tokenizer_setup.encode_dialog(self.model.tokenizer, messages)
        except (ValueError, KeyError, RecursionError) as error:
            raise UsageError(f"{path}: found no conversation: {one_line(error)}") from None
        self.messages = [dict(message) for message in messages]
        first = self.messages[0] if self.messages else {}
        self.system = first.get("content") if first.get("role") == "system" else None
        note(f"loaded {len(self.messages)} messages from {path}")


def typed_lines() -> Iterator[str]:
    """Messages from the terminal, with editing and a history; Ctrl-C takes a line back."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    lines = []
    while True:
        try:
            line = input("... " if lines else "> ")
        except (EOFError, KeyboardInterrupt) as end:
            print(flush=True)
            if isinstance(end, EOFError):
                return
            lines = []
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(lines)
            lines = []


def piped_lines() -> Iterator[str]:
    """Messages from a pipe, one a line."""
    if sys.stdin is None:
        raise UsageError("standard input is closed, so there is nothing to read from")
    source, number = getattr(sys.stdin, "buffer", sys.stdin), 0
    while line := source.readline(MAX_PROMPT_BYTES + 1):
        number += 1
        origin = f"standard input, line {number}"
        if len(line) > MAX_PROMPT_BYTES:
            raise UsageError(f"{origin}: found more than {MAX_PROMPT_BYTES} bytes")
        line = line if isinstance(line, str) else decode(line, origin)
        yield line.removeprefix("\ufeff").rstrip("\r\n")


def converse(chat: Chat) -> int:
    """Talk until the input ends; returns the exit status, 2 if a line of a pipe had no answer."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    terminal = ranks.agreed(lambda: at_terminal)
    if terminal:
        note("/help lists the commands; Ctrl-D ends")
    status, lines = 0, typed_lines() if terminal else piped_lines()
    while (line := ranks.agreed(lambda: next(lines, None))) is not None:
        if not line.strip():
            continue
        command, read = COMMAND.match(line), True
        try:
            if command:
                if not chat.command(line.strip()):
                    break
            elif terminal:
                stream(chat.answer(line))
            else:
                read = stream([" ".join("".join(chat.answer(line)).splitlines()) + "\n"])
        except KeyboardInterrupt:  # what was written stays, and on a terminal the conversation
            if not terminal or ranks.n_ranks() > 1:
                raise
        except OutputError:
            raise
        except (UsageError, FloatingPointError, RuntimeError, MemoryError) as error:
            own = isinstance(error, UsageError | FloatingPointError)
            if not own and (ranks.n_ranks() > 1 or not out_of_memory(error)):
                raise
            note(error)
            if not (terminal or command):  # the answers stay in line with the turns
                status, read = 2, stream(["\n"])
        if not read:
            chat.whole = False
            break
    return status


def talk(args: argparse.Namespace) -> int:
    """Answer the prompt in the instruct format, or hold a conversation; returns the exit status."""
    start = time.perf_counter()
    prompts = read_prompts(args) if args.prompt or args.prompt_file else []
    model = open_model(args)
    first = [{"role": "system", "content": args.system}] * (args.system is not None)
    first.append({"role": "user", "content": prompts[0] if prompts else ""})
    try:
        n_prompt = len(tokenizer_setup.encode_dialog(model.tokenizer, first))
    except ValueError as error:
        raise UsageError(f"argument --chat: {one_line(error)}") from None
    room = model.config.max_seq_len
    chat = Chat(model, model.load(min(n_prompt, room), min(args.max_new_tokens, 1024, room)))
    load_s, status = time.perf_counter() - start, 0
    if prompts:
        chat.times.append(time.perf_counter())
        try:
            chat.whole = stream(chat.answer(prompts[0]))
        except KeyboardInterrupt:  # what was written stays
            status, chat.whole = 130, False
    else:
        status = converse(chat)
    if args.stats:
        stats = steps_stats(n_prompt, chat.times) if prompts else {"decode_tokens": len(chat.times)}
        say_stats(load_s, stats, model.device, chat.whole)
    return status
