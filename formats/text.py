"""Text as a model's own files say: tokenizer.json, sentencepiece models, GGUF, chat templates.

Whatever a vocabulary comes from, it becomes what a tokenizer.json has, and the tokenizers package
runs it; jinja2 renders chat templates. What follows from which file is as in transformers 5, and
for GGUF files as in llama.cpp.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import tokenizer_setup
from formats.errors import (
    one_line,
)

NO_TOKENIZER = "python -m formats.convert --no-tokenizer converts its weights, to use on token ids"
JSON_LIMIT = 2**26  # bytes of a tokenizer.json; Llama 3's has 17 million
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
        ids = {numbers.get(end) if isinstance(end, str) else end for end in ends}
        ids |= {*self._after_an_answer()} & {entry["id"] for entry in entries.values()}
        self.stop = frozenset(n for n in ids if type(n) is int and 0 <= n < rows)
        named = {*self.names.values()}
        self.special_tokens = {
            name: entry["id"]
            for name, entry in entries.items()
            if entry["special"] or name in named or entry["id"] in self.stop
        }
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        decoder = json.dumps(self.content.get("decoder"))
        self.in_bytes, self.begins_with_space = "ByteLevel" in decoder, '"Strip"' in decoder
        first, bare = (self.rules.encode("a", add_special_tokens=b).ids[:1] for b in (True, False))
        self.begin = self.rules.id_to_token(first[0]) if first != bare else None

    def _after_an_answer(self) -> list[int]:
        """The first token that the template writes after what the assistant says, if any."""
        dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            text = self.render(dialog, prompt=False, **self.names)
        except Exception:  # without a template, or one that says why when it is used
            return []
        return self.rules.encode(text.partition(MARK)[2].lstrip(), add_special_tokens=False).ids[:1]

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

    def marked(self, value: Any) -> Any:
        """The same text, or texts in lists and dictionaries, with MARK in special tokens' names."""
        if isinstance(value, str):
            return self.pattern.sub(lambda name: MARK.join(name[0]), value)
        if isinstance(value, Mapping):
            return {key: self.marked(inner) for key, inner in value.items() if inner is not None}
        return [*map(self.marked, value)] if isinstance(value, list | tuple) else value

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


def _rules(content: Content) -> Any:
    """The tokenizers package's Tokenizer of a tokenizer.json. Raises ValueError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # it raises no other
        raise ValueError(one_line(error)) from None


@tokenizer_setup.encode.register
def _(tokenizer: FileTokenizer, text: str, bos: bool = True, special: bool = False) -> list[int]:
    return tokenizer.ids(text if special else tokenizer.marked(text), bos)


@tokenizer_setup.stop_tokens.register
def _(tokenizer: FileTokenizer) -> frozenset[int]:
    return tokenizer.stop


@tokenizer_setup.encode_dialog.register
def _(tokenizer: FileTokenizer, messages: Iterable[dict[str, Any]]) -> list[int]:
    if isinstance(tokenizer.render, str):
        raise ValueError(tokenizer.render)
    messages = tokenizer_setup.check_messages(messages)
    try:
        text = tokenizer.render(tokenizer.marked(messages), **tokenizer.names)
    except Exception as error:  # a template is a program
        raise ValueError(f"the model's chat template: {one_line(error)}") from None
    return tokenizer.ids(text)


def compiled(template: object) -> Callable[..., str] | str:
    """A chat template as a function of messages and names, or why there is none. ValueError."""
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
    except jinja2.TemplateError as error:
        return f"the model's chat template: {one_line(error)}"

    def render(messages: list[dict[str, Any]], prompt: bool = True, **names: str) -> str:
        given = {"tools": None, "documents": None, "add_generation_prompt": prompt} | names
        return program.render(messages=messages, **given)

    return render
