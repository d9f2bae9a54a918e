"""Text to token ids and back, as Llama 3 does it: tiktoken, Meta's special tokens, the dialogs.

Llama 3 cuts text with byte-pair encoding. `tokenizer.model` lists every byte string that is a
token, with its rank: the lower the rank, the earlier two neighbours are merged into it. After the
ranks come 256 special tokens, which no text can spell: they mark where a text, a turn or a header
begins and ends.

Other families' tokenizers, which formats/text.py makes of their own files, are used by the same
functions.
"""

import base64
import codecs
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken.load import read_file as read_remote

# This pattern cuts text first, and merges never cross from one part to the next:
# contractions, words with the one character before them, numbers in threes, punctuation, white
# space. From llama3/tokenizer.py in Meta's llama-models repository.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Their ids follow the last rank, in this order. An id means the same in every release, but the
# numbers in the names of the reserved tokens do not: in Llama 3.0 those at 4, 5, 8 and 10 are
# reserved tokens too, and 128010 is its <|reserved_special_token_5|>, later <|python_tag|>.
# <|eom_id|> is the end of a message whose sender waits for a tool, <|eot_id|> that of a turn.
_NAMED_SPECIAL_TOKENS = (
    *"<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|>".split(),
    *"<|reserved_special_token_1|> <|finetune_right_pad_id|> <|step_id|>".split(),
    *"<|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>".split(),
)
SPECIAL_TOKENS = _NAMED_SPECIAL_TOKENS + tuple(
    f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(_NAMED_SPECIAL_TOKENS))
)
STOP_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")


class Tokenizer(tiktoken.Encoding):
    """Llama 3's: tiktoken's Encoding. Other families' are in formats/text.py."""

    special_tokens: dict[str, int]  # the names and ids of those that no text can spell
    begin: str | None = "<|begin_of_text|>"  # the special token at the beginning of a text
    begins_with_space = False  # whether a text's tokens begin with a space that it does not have


# tiktoken's native code fails on longer input, so Meta's tokenizer splits it, and so does `encode`.
MAX_CHARS_PER_CALL, MAX_CHARS_PER_RUN = 400_000, 25_000


def read_vocabulary(path: str | os.PathLike) -> dict[bytes, int]:
    """The tokens in a `tokenizer.model` with their ranks, which are their ids too.

    `path` may be anything that blobfile opens (gs://, az://) or an http address. Raises OSError and
    ValueError.
    """
    path = os.fspath(path)
    content = read_remote(path) if "://" in path else Path(path).read_bytes()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(filter(None, content.splitlines()), start=1):
        try:
            in_base64, rank = line.split()
            token, rank = base64.b64decode(in_base64, validate=True), int(rank)
        except ValueError:
            expected = "expected a token in base64 and its rank"
            raise ValueError(f"line {number} is {line[:60]!r}, {expected}") from None
        if token in ranks:
            raise ValueError(f"line {number} lists {token[:60]!r} a second time")
        ranks[token] = rank
    return ranks


def make_tokenizer(name: str, ranks: dict[bytes, int]) -> Tokenizer:
    """Build a tokenizer from the ranks of text's tokens; the special tokens follow.

    Raises ValueError unless the ranks are 0, 1, 2, ..., any text can be encoded, and no text can
    spell a special token.
    """
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    if missing := set(range(len(ranks))).difference(ranks.values()):
        raise ValueError(f"rank {min(missing)} is missing, so there is a gap or a duplicate")
    if n_missing := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{n_missing} of the 256 single bytes are missing")
    if b"" in ranks:
        raise ValueError("it lists an empty token")
    if spelled := [token for token in special if token.encode() in ranks]:  # or text could do so
        raise ValueError(f"it lists the special token {spelled[0]} among those of text")
    tokenizer = Tokenizer(
        name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    tokenizer.special_tokens = special
    return tokenizer


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Build the tokenizer from a `tokenizer.model`. Raises what `read_vocabulary` raises."""
    try:
        return make_tokenizer(os.path.basename(path), read_vocabulary(path))
    except ValueError as error:
        raise ValueError(f"{path}: not a complete vocabulary: {error}") from None


def _split_long(text: str) -> Iterator[str]:
    """Cut `text` where Meta's tokenizer does: after 400,000 characters, and after each 25,000
    characters of a run of white space or of non-white-space."""
    for start in range(0, len(text), MAX_CHARS_PER_CALL):
        chunk = text[start : start + MAX_CHARS_PER_CALL]
        cut = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for end in range(run.start() + MAX_CHARS_PER_RUN, run.end(), MAX_CHARS_PER_RUN):
                yield chunk[cut:end]
                cut = end
        yield chunk[cut:]


@functools.singledispatch  # what is there for other families' tokenizers is in formats/text.py
def encode(tokenizer: Tokenizer, text: str, bos: bool = True, special: bool = False) -> list[int]:
    """Token ids of `text`, after <|begin_of_text|> if `bos`; some families begin with no token.

    Text is plain text unless `special`: the characters "<|eot_id|>" in it become the tokens of
    those characters, never the special token. Lone surrogates are encoded as U+FFFD.
    """
    tokens = [tokenizer.special_tokens["<|begin_of_text|>"]] if bos else []
    parts = [text]
    if special:
        names = "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
        parts = re.split(f"({names})", text)
    for i, part in enumerate(parts):
        if i % 2:
            tokens.append(tokenizer.special_tokens[part])
            continue
        for piece in _split_long(part):
            tokens += tokenizer.encode(piece, allowed_special=set(), disallowed_special=())
    return tokens


def _turn(tokenizer: Tokenizer, message: Mapping[str, Any]) -> list[int]:
    special, text = tokenizer.special_tokens, functools.partial(encode, tokenizer, bos=False)
    role = "ipython" if message["role"] == "tool" else message["role"]
    header = [special["<|start_header_id|>"], *text(role), special["<|end_header_id|>"]]
    tokens = header + text("\n\n")
    if "content" not in message:
        return tokens
    if message.get("python_tag"):
        tokens.append(special["<|python_tag|>"])
    end = "<|eom_id|>" if message.get("stop_reason") == "end_of_message" else "<|eot_id|>"
    return [*tokens, *text(message["content"]), special[end]]


def check_messages(messages: object, others: bool = False) -> list[Mapping[str, Any]]:
    """The messages of a dialog, as encode_dialog takes them. Raises ValueError.

    others: whether a message may lack a content, for other families' templates.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        expected = 'expected a list of {"role": ..., "content": ...}'
        raise ValueError(f"the dialog is a {type(messages).__name__}, {expected}")
    messages, optional = [*messages], {"stop_reason": str, "python_tag": bool}
    needed = {"role": str} if others else {"role": str, "content": str}  # or calls of tools alone
    for number, message in enumerate(messages, start=1):
        for key, kind in (needed | optional).items():
            value = message.get(key) if isinstance(message, Mapping) else None
            if not (isinstance(value, kind) or (value is None and key in optional)):
                expected = f'expected a {kind.__name__} as its "{key}"'
                raise ValueError(f"message {number} is {repr(message)[:60]}, {expected}")
    return messages


@functools.singledispatch
def encode_dialog(tokenizer: Tokenizer, messages: Iterable[dict[str, Any]]) -> list[int]:
    """Token ids of a dialog for the instruct models, up to where the assistant's answer begins.

    messages: [{"role": "system" | "user" | "assistant" | "tool" | ..., "content": text}, ...], not
    stripped (as in chat_format.py of Meta's llama-models 0.3.0, not in meta-llama/llama3).
    A tool call has "stop_reason": "end_of_message" too, for <|eom_id|> at its end, and may have
    "python_tag": True, for <|python_tag|> before the content. Other families write a dialog as
    their chat template does. Raises ValueError for messages of another form, and for a tokenizer
    without a template.
    """
    tokens = [tokenizer.special_tokens["<|begin_of_text|>"]]
    for message in check_messages(messages):
        tokens += _turn(tokenizer, message)
    return tokens + _turn(tokenizer, {"role": "assistant"})


def special_tokens_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens whose names `text` spells. It is plain text all the same."""
    return sorted((name for name in tokenizer.special_tokens if name in text), key=text.index)


@functools.singledispatch
def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a generation; of Llama 3, the ends of text, of turn and of message."""
    return frozenset(tokenizer.special_tokens[name] for name in STOP_TOKENS)


def decode_stream(
    tokenizer: Tokenizer, tokens: Iterable[int], continues: bool = False
) -> Iterator[str]:
    """The text of `tokens`, piece by piece, as they come.

    A token is a byte string and may end in the middle of a character: those bytes wait until the
    character is whole. What never becomes one comes out as U+FFFD. continues: whether the tokens
    go on from others, so that a space at their beginning is one.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    added = tokenizer.begins_with_space and not continues
    for token in tokens:
        piece = tokenizer.decode_single_token_bytes(token)
        if text := decoder.decode(piece.removeprefix(b" ") if added else piece):
            yield text
        added = False
    if text := decoder.decode(b"", final=True):
        yield text
