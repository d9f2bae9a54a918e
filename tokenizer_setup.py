"""Text to token ids and back, as Llama 3 does it: tiktoken, Meta's special tokens, the dialogs.

Llama 3 cuts text with byte-pair encoding. `tokenizer.model` lists every byte string that is a
token, with its rank: the lower the rank, the earlier two neighbours are merged into it. After the
ranks come 256 special tokens, which no text can spell: they mark where a text, a turn or a header
begins and ends.
"""

import base64
import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import tiktoken
from tiktoken.load import read_file as read_remote

from checkpoint_files import CheckpointError, describe_file, one_line

# Text is cut into pieces by this pattern first, and merges never cross from one piece to the next:
# contractions, words with the one character before them, numbers in threes, punctuation, white
# space. From llama3/tokenizer.py in Meta's llama-models repository.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Their ids follow the last rank, in this order. Llama 3.0 called those at 4, 5, 8 and 10 reserved
# tokens; the ids are the same, so one table serves every release.
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


def load_tokenizer(path: str | os.PathLike) -> tiktoken.Encoding:
    """Build the tokenizer from a `tokenizer.model` in tiktoken's format.

    A line of the file is a token's bytes in base64, a space, and its rank. The ranks must be
    0, 1, 2, ... and the 256 single bytes must be among the tokens, so that any text can be encoded.
    `path` may also be anything that blobfile opens (gs://, az://) or an http address.

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

    missing_ranks = set(range(len(ranks))).difference(ranks.values())
    missing_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing_ranks:
        refuse(f"rank {min(missing_ranks)} is missing, so there is a gap or a duplicate")
    if missing_bytes:
        refuse(f"{len(missing_bytes)} of the 256 single bytes are missing")
    for name in SPECIAL_TOKENS:
        if name.encode() in ranks:  # or text could spell it
            refuse(f"it lists the special token {name} among those of text")

    return tiktoken.Encoding(
        name=os.path.basename(path),
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
    )


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


def encode(tokenizer: tiktoken.Encoding, text: str, bos: bool = True) -> list[int]:
    """Token ids of `text`, after <|begin_of_text|> if `bos`.

    The text is always plain text: the characters "<|eot_id|>" in it become the tokens of those
    characters, never the special token. Lone surrogates are encoded as U+FFFD.
    """
    tokens = [tokenizer.encode_single_token("<|begin_of_text|>")] if bos else []
    for piece in _split_long(text):
        tokens += tokenizer.encode(piece, allowed_special=set(), disallowed_special=())
    return tokens


def encode_dialog(tokenizer: tiktoken.Encoding, messages: Iterable[dict[str, str]]) -> list[int]:
    """Token ids of a dialog for the instruct models, up to where the assistant's answer begins.

    messages: [{"role": "system" | "user" | "assistant" | "tool" | ..., "content": text}, ...]. Each
    becomes <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|>, with "ipython"
    for the role "tool"; role and content are plain text. The format is that of chat_format.py in
    Meta's llama-models 0.3.0, which takes the content as it is; the older repository
    meta-llama/llama3 stripped it of white space at both ends.

    Raises ValueError for messages that are not of this form.
    """
    special = tokenizer.encode_single_token

    def header(role: str) -> list[int]:
        return [
            special("<|start_header_id|>"),
            *encode(tokenizer, "ipython" if role == "tool" else role, bos=False),
            special("<|end_header_id|>"),
            *encode(tokenizer, "\n\n", bos=False),
        ]

    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        found = type(messages).__name__
        raise ValueError(
            f'the dialog is a {found}, expected a list of {{"role": ..., "content": ...}}'
        )
    tokens = [special("<|begin_of_text|>")]
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not (isinstance(message, Mapping) and isinstance(message.get(key), str)):
                found = one_line(repr(message), 60)
                raise ValueError(f'message {number} is {found}, expected a text as its "{key}"')
        tokens += header(message["role"])
        tokens += encode(tokenizer, message["content"], bos=False)
        tokens.append(special("<|eot_id|>"))
    return tokens + header("assistant")


def special_tokens_in(text: str) -> list[str]:
    """The special tokens whose names `text` spells. It is plain text all the same."""
    return [name for name in SPECIAL_TOKENS if name in text]


def stop_tokens(tokenizer: tiktoken.Encoding) -> frozenset[int]:
    """The tokens that end a generation: end of text, end of turn, end of message."""
    names = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    return frozenset(tokenizer.encode_single_token(name) for name in names)


# --- tokens to text -------------------------------------------------------------------------------


def decode_stream(tokenizer: tiktoken.Encoding, tokens: Iterable[int]) -> Iterator[str]:
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
