"""Text to token ids and back, as Llama 3 does it: tiktoken, Meta's special tokens, the dialogs.

Llama 3 cuts text with byte-pair encoding. `tokenizer.model` lists every byte string that is a
token, with its rank: the lower the rank, the earlier two neighbours are merged into it. After the
ranks come 256 special tokens, which no text can spell: they mark where a text, a turn or a header
begins and ends.

Where another family does something else, the difference is data: a TextFormat, which stands in
tokenizer_setup.json beside its tokenizer.model.
"""

import base64
import codecs
import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import regex  # tiktoken's own
import tiktoken
from tiktoken.load import read_file as read_remote

# This pattern cuts text first, and merges never cross from one part to the next:
# contractions, words with the one character before them, numbers in threes, punctuation, white
# space. From llama3/tokenizer.py in Meta's llama-models repository.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # its encoder.py
)
SPLIT_PATTERNS = {
    "llama3": SPLIT_PATTERN,
    "qwen2": SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),  # digits one by one
    "gpt2": _GPT2,
    # GPT-2's between the digits, which are taken out one by one first (SmolLM2): no other piece has
    # a digit, and white space before one is white space at the end of what is cut.
    "smollm": _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])"),
}

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


class TextFormat(NamedTuple):
    """The conventions of a family of tokenizers beside its vocabulary; by default, Llama 3's."""

    special_tokens: dict[str, int]  # names and ids
    split: str = "llama3"  # one of SPLIT_PATTERNS
    normalization: str | None = None  # of Unicode, before text is cut: "NFC"
    spelled: tuple[str, ...] = ()  # special tokens that stand for their own names in a text
    begin: str | None = "<|begin_of_text|>"  # the special token at the beginning of a text
    begin_dialog: str | None = "<|begin_of_text|>"  # and of a dialog
    stop: tuple[str, ...] = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")  # end a generation
    dialog: str | None = "llama3"  # or "chatml": how encode_dialog writes a dialog
    system: str | None = None  # the first message of a dialog that begins without a "system"
    unknown: str | None = None  # special token for bytes outside the vocabulary; "" drops them


def llama3_format(n_ranks: int) -> TextFormat:
    """Llama 3's, whose special tokens follow as many tokens of text."""
    return TextFormat({name: n_ranks + i for i, name in enumerate(SPECIAL_TOKENS)})


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, with the TextFormat of its family."""

    format: TextFormat
    n_vocab: int = 0  # beyond are only placeholders for bytes outside the vocabulary


# tiktoken's native code fails on longer input, so Meta's tokenizer splits it, and so does `encode`.
MAX_CHARS_PER_CALL, MAX_CHARS_PER_RUN = 400_000, 25_000


def read_vocabulary(path: str | os.PathLike) -> tuple[dict[bytes, int], TextFormat]:
    """The tokens in a `tokenizer.model` with their ranks, which are their ids too, and its family.

    `path` may be anything that blobfile opens (gs://, az://) or an http address. With a
    tokenizer_setup.json beside it, that is its family. Raises OSError and ValueError.
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
    setup = Path(path).with_name("tokenizer_setup.json")
    if not setup.is_file():
        return ranks, llama3_format(len(ranks))
    values = json.loads(setup.read_bytes())
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return ranks, TextFormat(**values | lists)


def make_tokenizer(name: str, ranks: dict[bytes, int], text_format: TextFormat) -> Tokenizer:
    """Build a tokenizer from the ranks of text's tokens, and special tokens.

    Raises ValueError unless all ids together are 0, 1, 2, ..., any text can be encoded, and no text
    can spell a special token.
    """
    special, n_vocab = text_format.special_tokens, len(ranks) + len(text_format.special_tokens)
    missing_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing_ids := set(range(n_vocab)).difference(ranks.values(), special.values()):
        raise ValueError(f"rank {min(missing_ids)} is missing, so there is a gap or a duplicate")
    if missing_bytes and text_format.unknown is None:
        raise ValueError(f"{len(missing_bytes)} of the 256 single bytes are missing")
    placeholders = {bytes([byte]): n_vocab + i for i, byte in enumerate(missing_bytes)}
    if b"" in ranks or "" in special:
        raise ValueError("it lists an empty token")
    for token in special:
        if token.encode(errors="replace") in ranks | placeholders:  # or text could spell it
            raise ValueError(f"it lists the special token {token} among those of text")
    f = text_format
    turn = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", None: None}.get(f.dialog, "")
    for token in {f.begin, f.begin_dialog, f.unknown or None, turn, *f.stop, *f.spelled} - {None}:
        if token not in special:
            raise ValueError(f"{token} is not one of its special tokens")
    if f.normalization not in (None, "NFC") or not isinstance(f.system, str | None):
        raise ValueError(f"its normalization is {f.normalization}, its system message {f.system}")
    tokenizer = Tokenizer(
        name,
        pat_str=SPLIT_PATTERNS[text_format.split],
        mergeable_ranks=ranks | placeholders,
        special_tokens=special,
    )
    tokenizer.format, tokenizer.n_vocab = text_format, n_vocab
    return tokenizer


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Build the tokenizer from a `tokenizer.model`. Raises what `read_vocabulary` raises."""
    try:
        return make_tokenizer(os.path.basename(path), *read_vocabulary(path))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
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


def _encode_known_bytes(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """Token ids of `text` without bytes outside the vocabulary; what is around them may merge."""
    placeholders = range(tokenizer.n_vocab, tokenizer.max_token_value + 1)
    unknown = b"".join(tokenizer.decode_single_token_bytes(number) for number in placeholders)
    for piece in regex.findall(SPLIT_PATTERNS[tokenizer.format.split], text):
        known = piece.encode(errors="replace").translate(None, unknown)
        if known:
            yield from tokenizer._encode_single_piece(known)


def encode(tokenizer: Tokenizer, text: str, bos: bool = True) -> list[int]:
    """Token ids of `text`, after <|begin_of_text|> if `bos`; some families begin with no token.

    The text is always plain text: the characters "<|eot_id|>" in it become the tokens of those
    characters, never the special token. Lone surrogates are encoded as U+FFFD.
    """
    text_format = tokenizer.format
    tokens = []
    if bos and text_format.begin:
        tokens.append(tokenizer.encode_single_token(text_format.begin))
    parts = [text]
    if text_format.spelled:
        names = sorted(text_format.spelled, key=len, reverse=True)
        parts = re.split("({})".format("|".join(map(re.escape, names))), text)
    for part in parts:
        if part in text_format.spelled:
            tokens.append(tokenizer.encode_single_token(part))
            continue
        if text_format.normalization:
            part = unicodedata.normalize(text_format.normalization, part)
        for piece in _split_long(part):
            new = tokenizer.encode(piece, allowed_special=set(), disallowed_special=())
            if max(new, default=0) < tokenizer.n_vocab:
                tokens += new
            elif text_format.unknown:  # for bytes outside the vocabulary
                unknown = tokenizer.encode_single_token(text_format.unknown)
                tokens += [token if token < tokenizer.n_vocab else unknown for token in new]
            else:
                tokens += _encode_known_bytes(tokenizer, piece)
    return tokens


def _llama3_turn(tokenizer: Tokenizer, message: Mapping[str, Any]) -> list[int]:
    special, text = tokenizer.encode_single_token, functools.partial(encode, tokenizer, bos=False)
    role = "ipython" if message["role"] == "tool" else message["role"]
    header = [special("<|start_header_id|>"), *text(role), special("<|end_header_id|>")]
    tokens = header + text("\n\n")
    if "content" not in message:
        return tokens
    if message.get("python_tag"):
        tokens.append(special("<|python_tag|>"))
    end = "<|eom_id|>" if message.get("stop_reason") == "end_of_message" else "<|eot_id|>"
    return [*tokens, *text(message["content"]), special(end)]


def _chatml_turn(tokenizer: Tokenizer, message: Mapping[str, Any]) -> list[int]:
    start = [tokenizer.encode_single_token("<|im_start|>")]
    if "content" not in message:
        return start + encode(tokenizer, message["role"] + "\n", bos=False)
    end = tokenizer.encode_single_token("<|im_end|>")
    turn = encode(tokenizer, f"{message['role']}\n{message['content']}", bos=False)
    return [*start, *turn, end, *encode(tokenizer, "\n", bos=False)]


def check_messages(messages: object) -> list[Mapping[str, Any]]:
    """The messages of a dialog, as encode_dialog takes them. Raises ValueError."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        expected = 'expected a list of {"role": ..., "content": ...}'
        raise ValueError(f"the dialog is a {type(messages).__name__}, {expected}")
    messages, optional = [*messages], {"stop_reason": str, "python_tag": bool}
    for number, message in enumerate(messages, start=1):
        for key, kind in ({"role": str, "content": str} | optional).items():
            value = message.get(key) if isinstance(message, Mapping) else None
            if not (isinstance(value, kind) or (value is None and key in optional)):
                expected = f'expected a {kind.__name__} as its "{key}"'
                raise ValueError(f"message {number} is {repr(message)[:60]}, {expected}")
    return messages


def encode_dialog(tokenizer: Tokenizer, messages: Iterable[dict[str, Any]]) -> list[int]:
    """Token ids of a dialog for the instruct models, up to where the assistant's answer begins.

    messages: [{"role": "system" | "user" | "assistant" | "tool" | ..., "content": text}, ...], not
    stripped (as in chat_format.py of Meta's llama-models 0.3.0, not in meta-llama/llama3).
    A tool call has "stop_reason": "end_of_message" too, for <|eom_id|> at its end, and may have
    "python_tag": True, for <|python_tag|> before the content. In ChatML a dialog that does not
    begin with a system message gets the family's own. Raises ValueError for messages of another
    form, and for a family without dialogs.
    """
    text_format = tokenizer.format
    if text_format.dialog is None:
        raise ValueError("this tokenizer's family has no known dialog format: use a text")
    turn = _llama3_turn if text_format.dialog == "llama3" else _chatml_turn
    messages = check_messages(messages)
    begin = text_format.begin_dialog
    tokens = [tokenizer.encode_single_token(begin)] if begin else []
    if text_format.system is not None and not (messages and messages[0]["role"] == "system"):
        tokens += turn(tokenizer, {"role": "system", "content": text_format.system})
    for message in messages:
        tokens += turn(tokenizer, message)
    return tokens + turn(tokenizer, {"role": "assistant"})


def special_tokens_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens whose names `text` spells. It is plain text all the same."""
    names = tokenizer.format.special_tokens.keys() - set(tokenizer.format.spelled)
    return sorted((name for name in names if name in text), key=text.index)


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a generation; of Llama 3, the ends of text, of turn and of message."""
    return frozenset(tokenizer.encode_single_token(name) for name in tokenizer.format.stop)


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, piece by piece, as they come.

    A token is a byte string and may end in the middle of a character: those bytes wait until the
    character is whole. What never becomes one comes out as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = (decoder.decode(tokenizer.decode_single_token_bytes(token)) for token in tokens)
    yield from filter(None, pieces)
    yield from filter(None, [decoder.decode(b"", final=True)])
