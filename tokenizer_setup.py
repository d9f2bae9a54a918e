"""Text to token ids and back, as Llama 3 does it: tiktoken, Meta's special tokens, the dialogs.

Llama 3 cuts text with byte-pair encoding. `tokenizer.model` lists every byte string that is a
token, with its rank: the lower the rank, the earlier two neighbours are merged into it. After the
ranks come 256 special tokens, which no text can spell: they mark where a text, a turn or a header
begins and ends.
"""

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import tiktoken
from tiktoken.load import load_tiktoken_bpe, read_file

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


@contextmanager
def _tiktoken_cache_off() -> Iterator[None]:
    """tiktoken keeps copies of vocabularies by path and would return the old copy of a new file."""
    variable = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(variable)
    os.environ[variable] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _refuse_vocabulary(path: str, problem: str) -> NoReturn:
    """Raise the CheckpointError for a file that can be read but is not a complete vocabulary."""
    head = read_file(path)[:4096]
    looks_like = describe_file(head)
    if head.lstrip().startswith(b"{"):
        looks_like = "JSON, such as a Hugging Face tokenizer.json"
    found = f"it looks like {looks_like}" if looks_like else one_line(problem)
    needed = "Llama 3's tokenizer.model, lines of a base64 token and its rank"
    problem = f"not a complete tiktoken vocabulary: {found}; needed is {needed}"
    raise CheckpointError(path, problem) from None


def load_tokenizer(path: str | os.PathLike) -> tiktoken.Encoding:
    """Build the tokenizer from a `tokenizer.model` in tiktoken's format.

    A line of the file is a token's bytes in base64, a space, and its rank. The ranks must be
    0, 1, 2, ... and the 256 single bytes must be among the tokens, so that any text can be encoded.
    `path` may also be anything that blobfile opens (gs://, az://) or an http address.

    Raises CheckpointError if there is no such file or it is not a complete vocabulary.
    """
    path = os.fspath(path)
    try:
        with _tiktoken_cache_off():
            ranks = load_tiktoken_bpe(path)
    except (FileNotFoundError, NotADirectoryError):
        expected = "it should be Llama 3's tokenizer.model, which Meta ships beside the weights"
        raise CheckpointError(path, f"no such file; {expected}") from None
    except ValueError as error:
        _refuse_vocabulary(path, str(error))
    except Exception as error:  # a remote path can fail in any of its libraries' ways
        raise CheckpointError(path, f"cannot be read: {one_line(error)}") from None

    missing_ranks = set(range(len(ranks))).difference(ranks.values())
    missing_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if b"" in ranks:
        _refuse_vocabulary(path, "it lists an empty token")
    if missing_ranks:
        problem = f"rank {min(missing_ranks)} is missing, so there is a gap or a duplicate"
        _refuse_vocabulary(path, problem)
    if missing_bytes:
        _refuse_vocabulary(path, f"{len(missing_bytes)} of the 256 single bytes are missing")

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

    messages: [{"role": "system" | "user" | "assistant" | ..., "content": text}, ...]. Each becomes
    <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|>, with the content
    stripped of white space at both ends; role and content are plain text. The format is that of
    llama3/chat_format.py in Meta's llama-models repository.
    """
    special = tokenizer.encode_single_token

    def header(role: str) -> list[int]:
        return [
            special("<|start_header_id|>"),
            *encode(tokenizer, role, bos=False),
            special("<|end_header_id|>"),
            *encode(tokenizer, "\n\n", bos=False),
        ]

    tokens = [special("<|begin_of_text|>")]
    for message in messages:
        tokens += header(message["role"])
        tokens += encode(tokenizer, message["content"].strip(), bos=False)
        tokens.append(special("<|eot_id|>"))
    return tokens + header("assistant")


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
