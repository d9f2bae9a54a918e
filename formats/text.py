"""Text as a model's own files say: what a tokenizer.json has, and a chat template.

The tokenizers package runs the one and jinja2 renders the other, as in transformers 5. Files of
other kinds become what a tokenizer.json has in vocabulary.py.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import tokenizer_setup
from formats.errors import one_line

MARK = "\ufdd0"  # never a character: it stands in the names of special tokens that a text spells
Content = dict[str, Any]  # what a tokenizer.json has
DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (encoder.py of GPT-2).

    Bytes that Latin-1 can show stand for themselves, the others for what follows U+00FF.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


def added(name: str, number: int, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, "special": special} | flags


def numbers_of(content: Content) -> dict[str, int]:
    """The ids of all tokens, by their spelling."""
    vocab = content["model"]["vocab"]
    vocab = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content["added_tokens"]}


class FileTokenizer:
    """A tokenizer as files describe it, for the functions of tokenizer_setup.

    content: what a tokenizer.json has. rows: of the embeddings; tokens added beyond them do not
    count. names: bos_token, eos_token, ..., as templates call them. ends: names and ids of tokens
    that end a generation, beside the one that ends an answer in the template, a program in Jinja.
    Raises ValueError.
    """

    def __init__(
        self,
        content: Content,
        rows: int,
        names: Mapping[str, object],
        ends: Iterable[object],
        template: object,
    ) -> None:
        entries = {t["content"]: t for t in content["added_tokens"] if t["id"] < rows}
        numbers = numbers_of(content | {"added_tokens": [*entries.values()]})
        ids = {*numbers.values()}
        if max(ids, default=0) > 2 * len(ids) + 1000:
            raise ValueError(f"its ids go up to {max(ids)}, with {len(ids)} tokens")
        for number in {*range(max(ids, default=0))} - ids:  # the package numbers without gaps
            name = f"<|unused_{number}|>"
            entries[name], numbers[name] = added(name, number), number
        entries = dict(sorted(entries.items(), key=lambda entry: entry[1]["id"]))
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if content["model"].get(key):
                raise ValueError(
                    f"its {key} is {one_line(repr(content['model'][key]), 40)}, expected none"
                )
        none = dict.fromkeys(("truncation", "padding"))
        self.content = content | none | {"added_tokens": [*entries.values()]}
        self.rules, self.template, self.render = _rules(self.content), template, compiled(template)
        for name, entry in entries.items():
            if self.rules.token_to_id(name) != entry["id"]:
                raise ValueError(f"{one_line(repr(name), 40)} cannot have the id {entry['id']}")
        decoder = json.dumps(self.content.get("decoder"))
        if unknown := {*re.findall(r'"type": "(\w+)"', decoder)} - DECODERS:
            raise ValueError(f"its decoder is {min(unknown)}, expected some of {sorted(DECODERS)}")
        self.n_vocab = max(numbers.values(), default=0) + 1
        self.names = {key: name for key, name in names.items() if name and isinstance(name, str)}
        written, after = self._example()
        ids = {numbers.get(end) if isinstance(end, str) else end for end in ends}
        ids |= {*after[:1]} & {entry["id"] for entry in entries.values()}
        self.stop = frozenset(n for n in ids if type(n) is int and 0 <= n < rows)
        turns = {*self.names.values(), *(n for n, i in numbers.items() if i in self.stop)}
        self.special_tokens = {
            name: entry["id"]
            for name, entry in entries.items()
            if entry["special"] or name in turns
        }
        turns |= {name for name, number in numbers.items() if number in written}
        self.special = _any_of(self.special_tokens)
        self.turns = _any_of(self.special_tokens.keys() & turns)
        self.normalized = any(entries[name]["normalized"] for name in self.special_tokens)
        self.in_bytes = "ByteLevel" in decoder
        metaspace = '"Metaspace"' in decoder and '"never"' not in decoder
        self.begins_with_space = '"Strip"' in decoder or metaspace
        bare, whole = self._encoded(self.rules, "a"), self._encoded(self.rules, "a", True)
        if max(whole, default=0) >= max(rows, self.n_vocab):
            raise ValueError(f"it puts the token {max(whole)} around a text, which is not there")
        self.begin = self.rules.id_to_token(whole[0]) if whole[:1] != bare[:1] else None

    def _example(self) -> tuple[set[int], list[int]]:
        """The tokens that the template writes in a dialog, and those after an answer, in order."""
        dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            text = self.render(dialog, prompt=False, **self.names)
        except Exception:  # without a template, or one that says why when it is used
            return set(), []
        before, _, after = text.partition(MARK)
        after = self._encoded(self.rules, after.lstrip())
        return {*self._encoded(self.rules, before), *after}, after

    @staticmethod
    def _encoded(rules: Any, text: str, ends: bool = False) -> list[int]:
        """The ids of a text by some rules, with what the post-processor puts around it or not."""
        return _safely(functools.partial(rules.encode, add_special_tokens=ends), text).ids

    @functools.cached_property
    def plain_rules(self) -> Any:
        """The rules for text in which MARK breaks the names of special tokens, and is gone then."""
        entries = self.content["added_tokens"]
        raw = {"normalized": False}  # found before the normalizer takes MARK away
        entries = [t | raw if t["content"] in self.special_tokens else t for t in entries]
        steps = [{"type": "Replace", "pattern": {"String": MARK}, "content": ""}]
        steps += [self.content["normalizer"]] if self.content.get("normalizer") else []
        normalizer = {"type": "Sequence", "normalizers": steps}
        return _rules(self.content | {"added_tokens": entries, "normalizer": normalizer})

    @functools.cached_property
    def cut_rules(self) -> Any:
        """The same where the model itself would make a special token of a name's characters."""
        split = {"type": "Split", "pattern": {"String": MARK}, "invert": False}
        steps = [split | {"behavior": "Removed"}]
        steps += [self.content["pre_tokenizer"]] if self.content.get("pre_tokenizer") else []
        return _rules(
            self.content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        )

    def ids(self, text: str, bos: bool = False, plain: bool = False) -> list[int]:
        """The tokens of a text whose special tokens are those, but for names with MARK in them.

        plain: whether it has none, not even after it is normalized.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if MARK not in text and not (plain and self.normalized):
            return self._encoded(self.rules, text, bos)
        found = self._encoded(self.plain_rules, text, bos)
        if MARK in text:
            due = self._encoded(self.rules, text, bos)  # where MARK still separates
            here, there = (sum(i in self.special_tokens.values() for i in t) for t in (found, due))
            found = self._encoded(self.cut_rules, text, bos) if here > there else found
        return found

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What a token stands for, as tiktoken's method of this name has it."""
        spelled = self.rules.id_to_token(token) or ""
        if self.in_bytes:
            known = all(character in BYTE_OF for character in spelled)
            return bytes(BYTE_OF[c] for c in spelled) if known else spelled.encode()
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelled)
        return bytes.fromhex(byte[1]) if byte else spelled.replace("▁", " ").encode()


def _safely(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the tokenizers package returns. ValueError, also where it panics."""
    try:
        return function(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as which Rust's panics come
        raise ValueError(one_line(error)) from None


def _any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern that finds each of some names, a longer one before those within it."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _rules(content: Content) -> Any:
    """The tokenizers package's Tokenizer of a tokenizer.json. Raises ValueError."""
    from tokenizers import Tokenizer

    return _safely(Tokenizer.from_str, json.dumps(content))


def marked(value: Any, names: re.Pattern) -> Any:
    """The same text, or texts in lists and dictionaries, with MARK within names."""
    if isinstance(value, str):
        return names.sub(lambda name: MARK.join(name[0]), value)
    if isinstance(value, Mapping):
        return {marked(key, names): marked(inner, names) for key, inner in value.items()}
    return [marked(inner, names) for inner in value] if isinstance(value, list | tuple) else value


def with_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates get it in transformers: without None, a thought by all its names."""
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[key] for key in THOUGHTS if key in message), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


@tokenizer_setup.encode.register
def _(tokenizer: FileTokenizer, text: str, bos: bool = True, special: bool = False) -> list[int]:
    text = text if special else marked(text, tokenizer.special)
    return tokenizer.ids(text, bos, plain=not special)


@tokenizer_setup.stop_tokens.register
def _(tokenizer: FileTokenizer) -> frozenset[int]:
    return tokenizer.stop


@tokenizer_setup.encode_dialog.register
def _(tokenizer: FileTokenizer, messages: Iterable[dict[str, Any]]) -> list[int]:
    if isinstance(tokenizer.render, str):
        raise ValueError(tokenizer.render)
    messages = [*map(with_thoughts, tokenizer_setup.check_messages(messages, others=True))]
    # Other special tokens in what the model said, such as those around its thoughts, are its own.
    names = (tokenizer.turns if m["role"] == "assistant" else tokenizer.special for m in messages)
    try:
        text = tokenizer.render([*map(marked, messages, names)], **tokenizer.names)
    except Exception as error:  # a template is a program
        raise ValueError(f"the model's chat template: {one_line(error)}") from None
    return tokenizer.ids(text)


def compiled(template: object) -> Callable[..., str] | str:
    """A chat template as a function of messages and names, or why there is none."""
    if not template or not isinstance(template, str):
        return "this model has no chat template: use a text"
    if "BEGIN CONVERSATION" in template:
        return "this model's template is a guard's, which judges conversations: use a text"
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        options = {"separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    # transformers marks what an assistant says by a tag of its own, which is nothing here.
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    template = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)
    options = {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(**options, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        program = environment.from_string(template)
    except Exception as error:  # it is a program
        return f"the model's chat template: {one_line(error)}"

    def render(messages: list[dict[str, Any]], prompt: bool = True, **names: str) -> str:
        given = {"tools": None, "documents": None, "add_generation_prompt": prompt} | names
        return program.render(messages=messages, **given)

    return render
