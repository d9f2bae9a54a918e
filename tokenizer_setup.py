"""Text to token ids and back, as Llama 3 does it: tiktoken, Meta's special tokens, the dialogs.

Llama 3 cuts text with byte-pair encoding. `tokenizer.model` lists every byte string that is a
token, with its rank: the lower the rank, the earlier two neighbours are merged into it. After the
ranks come 256 special tokens, which no text can spell: they mark where a text, a turn or a header
begins and ends.

Where another family of models does something else, the difference is data: a TextFormat, which
stands in tokenizer_setup.json beside its tokenizer.model.
"""

import base64
import codecs
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import regex  # tiktoken's own
import tiktoken
from tiktoken.load import read_file as read_remote

from checkpoint_files import CheckpointError, describe_file, one_line, quoted, read_json_object

# Text is cut into pieces by this pattern first, and merges never cross from one piece to the next:
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
    # GPT-2's between the digits, which are taken out one by one first (SmolLM2): a digit is no part
    # of another piece, and white space before one is white space at the end of what is cut.
    "smollm": _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])"),
}

# Their ids follow the last rank, in this order. An id means the same in every release, but the
# numbers in the names of the reserved tokens do not: in Llama 3.0 those at 4, 5, 8 and 10 are
# reserved tokens too, and 128010 is its <|reserved_special_token_5|>, later <|python_tag|>.
_NAMED_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",  # end of message: the model waits for the result of a tool
    "<|eot_id|>",  # end of turn
    "<|python_tag|>",
)
SPECIAL_TOKENS = _NAMED_SPECIAL_TOKENS + tuple(
    f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(_NAMED_SPECIAL_TOKENS))
)


class TextFormat(NamedTuple):
    """What a family of models has beside its vocabulary; by default, what Llama 3 has."""

    special_tokens: dict[str, int]  # names and ids
    split: str = "llama3"  # one of SPLIT_PATTERNS
    normalization: str | None = None  # of Unicode, before text is cut: "NFC"
    spelled: tuple[str, ...] = ()  # special tokens that stand for their own names in a text
    begin: str | None = "<|begin_of_text|>"  # the special token at the beginning of a text
    begin_dialog: str | None = "<|begin_of_text|>"  # and of a dialog
    stop: tuple[str, ...] = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")  # end a generation
    dialog: str | None = "llama3"  # or "chatml": how encode_dialog writes a dialog
    system: str | None = None  # the first message of a dialog that begins without a "system"
    unknown: str | None = None  # special token for bytes that are no tokens; "": they are left out


def llama3_format(n_ranks: int) -> TextFormat:
    """Llama 3's, whose special tokens follow as many tokens of text."""
    return TextFormat({name: n_ranks + i for i, name in enumerate(SPECIAL_TOKENS)})


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, with the TextFormat of its family."""

    format: TextFormat
    n_vocab: int = 0  # beyond are only placeholders for bytes that are no tokens, see `encode`


# tiktoken's native code fails on longer input, so Meta's tokenizer splits it, and so does `encode`.
MAX_CHARS_PER_CALL = 400_000
MAX_CHARS_PER_RUN = 25_000


# --- loading --------------------------------------------------------------------------------------


def _refuse_vocabulary(path: str, content: bytes, problem: str) -> NoReturn:
    """Raise the CheckpointError for a file that was read but is not a complete vocabulary."""
    looks_like = describe_file(content[:4096])
    if content.lstrip()[:1] == b"{":
        looks_like = "JSON, such as a Hugging Face tokenizer.json"
    found = f"it looks like {looks_like}" if looks_like else one_line(problem)
    needed = "Llama 3's tokenizer.model, lines of a base64 token and its rank"
    problem = f"not a complete tiktoken vocabulary: {found}; needed is {needed}"
    raise CheckpointError(path, problem) from None


def _read(path: str) -> bytes:
    """The bytes of a regular file, or of what blobfile or an http server has. CheckpointError."""
    needed = "it should be Llama 3's tokenizer.model, which Meta ships beside the weights"
    try:
        if "://" in path and not os.path.exists(path):
            return read_remote(path)
        if not os.path.exists(path):
            raise CheckpointError(path, f"no such file; {needed}")
        if not os.path.isfile(path):  # a folder, or a device or a pipe that may never end
            raise CheckpointError(path, f"no regular file; {needed}")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror or one_line(error)}"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # a remote path can fail in any of its libraries' ways
        raise CheckpointError(path, f"cannot be read: {one_line(error)}") from None


def make_tokenizer(name: str, ranks: dict[bytes, int], text_format: TextFormat) -> Tokenizer:
    """A tokenizer of the tokens of text in `ranks`, and of special tokens.

    A rank is the token's id too. Raises ValueError unless all ids together are 0, 1, 2, ..., any
    text can be encoded, and no text can spell a special token.
    """
    special, n_vocab = text_format.special_tokens, len(ranks) + len(text_format.special_tokens)
    missing_ids = set(range(n_vocab)).difference(ranks.values(), special.values())
    missing_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing_ids:
        raise ValueError(f"rank {min(missing_ids)} is missing, so there is a gap or a duplicate")
    if missing_bytes and text_format.unknown is None:
        raise ValueError(f"{len(missing_bytes)} of the 256 single bytes are missing")
    placeholders = {bytes([byte]): n_vocab + i for i, byte in enumerate(missing_bytes)}
    if b"" in ranks or "" in special:
        raise ValueError("it lists an empty token")
    for token in special:
        if token.encode(errors="replace") in ranks | placeholders:  # or text could spell it
            raise ValueError(f"it lists the special token {token} among those of text")
    tokenizer = Tokenizer(
        name,
        pat_str=SPLIT_PATTERNS[text_format.split],
        mergeable_ranks=ranks | placeholders,
        special_tokens=special,
    )
    tokenizer.format, tokenizer.n_vocab = text_format, n_vocab
    return tokenizer


def is_llama3(tokenizer: Tokenizer) -> bool:
    """Whether it has Llama 3's special tokens and does all as Llama 3 does."""
    n_special = len(tokenizer.format.special_tokens)
    return tokenizer.format == llama3_format(tokenizer.n_vocab - n_special)


def read_format(path: Path) -> TextFormat:
    """The TextFormat in a tokenizer_setup.json. Raises CheckpointError."""
    found = read_json_object(path)

    def check(key: str, allow: Callable[[object], bool], expected: str) -> object:
        value = found.get(key, TextFormat._field_defaults.get(key))
        if not allow(value):
            raise CheckpointError(path, f'"{key}" is {quoted(value)}, expected {expected}')
        return value

    def are_names(value: object) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)

    for key in found.keys() - set(TextFormat._fields):
        raise CheckpointError(
            path, f"found {quoted(key)}, expected {', '.join(TextFormat._fields)}"
        )
    special = check(
        "special_tokens",
        lambda v: (
            isinstance(v, dict) and all(type(i) is int and 0 <= i < 2**24 for i in v.values())
        ),
        "the ids of special tokens by their names",
    )
    if len(set(special.values())) < len(special):
        raise CheckpointError(path, '"special_tokens" has one id twice, expected one a name')

    def are_special(value: object) -> bool:
        return are_names(value) and special.keys() >= set(value)

    splits = ", ".join(SPLIT_PATTERNS)
    return TextFormat(
        special,
        check("split", lambda v: isinstance(v, str) and v in SPLIT_PATTERNS, f"one of {splits}"),
        check("normalization", lambda v: v in (None, "NFC"), 'null or "NFC"'),
        tuple(check("spelled", are_special, "a list of special tokens")),
        check("begin", lambda v: v is None or are_special([v]), "null or a special token"),
        check("begin_dialog", lambda v: v is None or are_special([v]), "null or a special token"),
        tuple(check("stop", are_special, "a list of special tokens")),
        check("dialog", lambda v: v in (None, "llama3", "chatml"), 'null, "llama3" or "chatml"'),
        check("system", lambda v: v is None or isinstance(v, str), "null or a text"),
        check("unknown", lambda v: v in (None, "") or are_special([v]), "null or a special token"),
    )


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Build the tokenizer from a `tokenizer.model` in tiktoken's format.

    A line of the file is a token's bytes in base64, a space, and its rank. The ranks must be
    0, 1, 2, ... and the 256 single bytes must be among the tokens, so that any text can be encoded.
    `path` may also be anything that blobfile opens (gs://, az://) or an http address. With a
    tokenizer_setup.json beside the file, see TextFormat, its special tokens fill the gaps between
    the ranks or follow them; without one, Llama 3's follow.

    Raises CheckpointError if there is no such file or it is not a complete vocabulary.
    """
    path = os.fspath(path)
    content = _read(path)

    def refuse(problem: str) -> NoReturn:
        _refuse_vocabulary(path, content, problem)

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            in_base64, rank = line.split()
            token = base64.b64decode(in_base64, validate=True)
            if not (token and rank.isdigit()):
                raise ValueError
            rank = int(rank)
        except ValueError:
            refuse(f"line {number} is {one_line(repr(line)[1:], 60)}")
        if token in ranks:
            refuse(f"line {number} lists {one_line(repr(token)[1:], 60)} a second time")
        ranks[token] = rank
    setup = Path(path).with_name("tokenizer_setup.json")
    text_format = read_format(setup) if setup.is_file() else llama3_format(len(ranks))
    try:
        return make_tokenizer(os.path.basename(path), ranks, text_format)
    except ValueError as error:
        refuse(str(error))


# --- text to tokens -------------------------------------------------------------------------------


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
    """Token ids of `text` without the bytes that are no tokens; what is around them may merge."""
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
            if max(new, default=0) >= tokenizer.n_vocab:  # bytes that are no tokens
                if text_format.unknown:
                    unknown = tokenizer.encode_single_token(text_format.unknown)
                    new = [token if token < tokenizer.n_vocab else unknown for token in new]
                else:
                    new = _encode_known_bytes(tokenizer, piece)
            tokens += new
    return tokens


def _llama3_turn(tokenizer: Tokenizer, message: Mapping[str, Any]) -> list[int]:
    special, role = tokenizer.encode_single_token, message["role"]
    tokens = [
        special("<|start_header_id|>"),
        *encode(tokenizer, "ipython" if role == "tool" else role, bos=False),
        special("<|end_header_id|>"),
        *encode(tokenizer, "\n\n", bos=False),
    ]
    if "content" not in message:
        return tokens
    if message.get("python_tag"):
        tokens.append(special("<|python_tag|>"))
    more = message.get("stop_reason") == "end_of_message"
    end = special("<|eom_id|>" if more else "<|eot_id|>")
    return [*tokens, *encode(tokenizer, message["content"], bos=False), end]


def _chatml_turn(tokenizer: Tokenizer, message: Mapping[str, Any]) -> list[int]:
    start = [tokenizer.encode_single_token("<|im_start|>")]
    if "content" not in message:
        return start + encode(tokenizer, message["role"] + "\n", bos=False)
    end = tokenizer.encode_single_token("<|im_end|>")
    turn = encode(tokenizer, f"{message['role']}\n{message['content']}", bos=False)
    return [*start, *turn, end, *encode(tokenizer, "\n", bos=False)]


def check_messages(messages: object) -> list[Mapping[str, Any]]:
    """The messages of a dialog, as encode_dialog takes them. Raises ValueError for other things."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        found = type(messages).__name__
        raise ValueError(
            f'the dialog is a {found}, expected a list of {{"role": ..., "content": ...}}'
        )
    messages = [*messages]
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not (isinstance(message, Mapping) and isinstance(message.get(key), str)):
                found = one_line(repr(message), 60)
                raise ValueError(f'message {number} is {found}, expected a text as its "{key}"')
        for key, kind in (("stop_reason", str), ("python_tag", bool)):
            if not isinstance(message.get(key), kind | None):
                found = f'"{key}": {one_line(repr(message[key]), 40)}'
                raise ValueError(f"message {number} has {found}, expected a {kind.__name__}")
    return messages


def encode_dialog(tokenizer: Tokenizer, messages: Iterable[dict[str, Any]]) -> list[int]:
    """Token ids of a dialog for the instruct models, up to where the assistant's answer begins.

    messages: [{"role": "system" | "user" | "assistant" | "tool" | ..., "content": text}, ...]. In
    Llama 3's format each becomes <|start_header_id|> role <|end_header_id|> "\\n\\n" content
    <|eot_id|>, with "ipython" for the role "tool"; role and content are plain text. That is
    chat_format.py in Meta's llama-models 0.3.0, which takes the content as it is; the older
    repository meta-llama/llama3 stripped it of white space at both ends. A call of a tool has
    "stop_reason": "end_of_message" too, for <|eom_id|> at its end, and may have "python_tag": True,
    for <|python_tag|> before the content. In ChatML, as Qwen2 and SmolLM2 have it, each becomes
    <|im_start|> role "\\n" content <|im_end|> "\\n", and a dialog that does not begin with a
    system message gets the family's own.

    Raises ValueError for messages that are not of this form, and for a family without dialogs.
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


# --- tokens to text -------------------------------------------------------------------------------


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, piece by piece, as they come.

    A token is a byte string and may end in the middle of a character: those bytes wait until the
    character is whole. What never becomes one comes out as U+FFFD, at the end at the latest.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        text = decoder.decode(tokenizer.decode_single_token_bytes(token))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
