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
        ids = {*numbers_of(content | {"added_tokens": [*entries.values()]}).values()}
        if max(ids, default=0) > 2 * len(ids) + 1000:
            raise ValueError(f"its ids go up to {max(ids)}, with {len(ids)} tokens")
        for number in {*range(max(ids, default=0))} - ids:  # the package numbers without gaps
            entries[f"<|unused_{number}|>"] = added(f"<|unused_{number}|>", number)
        entries = dict(sorted(entries.items(), key=lambda entry: entry[1]["id"]))
        none = dict.fromkeys(("truncation", "padding"))
        self.content = content | none | {"added_tokens": [*entries.values()]}
        self.rules, self.template, self.render = _rules(self.content), template, compiled(template)
        for name, entry in entries.items():
            if self.rules.token_to_id(name) != entry["id"]:
                raise ValueError(f"{one_line(repr(name), 40)} cannot have the id {entry['id']}")
        numbers = numbers_of(self.content)
        self.n_vocab = max(numbers.values(), default=0) + 1
        self.names = {key: name for key, name in names.items() if isinstance(name, str)}
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
        decoder = json.dumps(self.content.get("decoder"))
        self.in_bytes = "ByteLevel" in decoder
        metaspace = '"Metaspace"' in decoder and '"never"' not in decoder
        self.begins_with_space = '"Strip"' in decoder or metaspace
        first, bare = (self.rules.encode("a", add_special_tokens=b).ids[:1] for b in (True, False))
        self.begin = self.rules.id_to_token(first[0]) if first != bare else None

    def _example(self) -> tuple[set[int], list[int]]:
        """The tokens that the template writes in a dialog, and those after an answer, in order."""
        dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            text = self.render(dialog, prompt=False, **self.names)
        except Exception:  # without a template, or one that says why when it is used
            return set(), []
        before, _, after = text.partition(MARK)
        before, after = (
            self.rules.encode(t, add_special_tokens=False).ids for t in (before, after.lstrip())
        )
        return {*before, *after}, after

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

    def ids(self, text: str, bos: bool = False) -> list[int]:
        """The tokens of a text whose special tokens are those, but for names with MARK in them."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        rules = self.plain_rules if MARK in text else self.rules
        return rules.encode(text, add_special_tokens=bos).ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What a token stands for, as tiktoken's method of this name has it."""
        spelled = self.rules.id_to_token(token) or ""
        if self.in_bytes:
            known = all(character in BYTE_OF for character in spelled)
            return bytes(BYTE_OF[c] for c in spelled) if known else spelled.encode()
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelled)
        return bytes.fromhex(byte[1]) if byte else spelled.replace("▁", " ").encode()


def _any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern that finds each of some names, a longer one before those within it."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _rules(content: Content) -> Any:
    """The tokenizers package's Tokenizer of a tokenizer.json. Raises ValueError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # it raises no other
        raise ValueError(one_line(error)) from None


def marked(value: Any, names: re.Pattern) -> Any:
    """The same text, or texts in lists and dictionaries, with MARK within names."""
    if isinstance(value, str):
        return names.sub(lambda name: MARK.join(name[0]), value)
    if isinstance(value, Mapping):
        return {key: marked(inner, names) for key, inner in value.items() if inner is not None}
    return [marked(inner, names) for inner in value] if isinstance(value, list | tuple) else value


@tokenizer_setup.encode.register
def _(tokenizer: FileTokenizer, text: str, bos: bool = True, special: bool = False) -> list[int]:
    return tokenizer.ids(text if special else marked(text, tokenizer.special), bos)


@tokenizer_setup.stop_tokens.register
def _(tokenizer: FileTokenizer) -> frozenset[int]:
    return tokenizer.stop


@tokenizer_setup.encode_dialog.register
def _(tokenizer: FileTokenizer, messages: Iterable[dict[str, Any]]) -> list[int]:
    if isinstance(tokenizer.render, str):
        raise ValueError(tokenizer.render)
    messages = tokenizer_setup.check_messages(messages, others=True)
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

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

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
