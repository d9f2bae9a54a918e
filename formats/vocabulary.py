"""The tokenizers of Hugging Face's folders, of GGUF files, and of sentencepiece models.

Whatever they are, they become what a tokenizer.json has. What follows from which file is as in
transformers 5, and for GGUF files as in llama.cpp.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizer_setup
from formats.errors import (
    CheckpointError,
    describe_file,
    one_line,
    quoted,
    read_file,
    read_json_object,
    refuse,
)
from formats.sentencepiece import by_scores, fallback_decoder, sentencepiece
from formats.text import Content, FileTokenizer, added, numbers_of
from tokenizer_setup import SPLIT_PATTERN

NO_TOKENIZER = "python -m formats.convert --no-tokenizer converts its weights, to use on token ids"
JSON_LIMIT = 2**26  # bytes of a tokenizer.json; Llama 3's has 17 million


def begun_by(content: Content, bos: str | None, eos: str | None) -> Content:
    """The same with these tokens around each text, or without."""
    number = numbers_of(content)
    ends = [{"SpecialToken": {"id": t, "type_id": 0}} if t in number else None for t in (bos, eos)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    found = {t: {"id": t, "ids": [number[t]], "tokens": [t]} for t in (bos, eos) if t in number}
    single = [part for part in (ends[0], text, ends[1]) if part]
    template = {"type": "TemplateProcessing", "single": single, "pair": [text, text]}
    return content | {"post_processor": template | {"special_tokens": found}}


QWEN2_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_PATTERN = (  # of Mistral's later models
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    vocab: dict[str, int],
    merges: list[list[str]],
    pattern: str,
    nfc: bool = False,
    whole: bool = False,
) -> Content:
    """A byte-level vocabulary. pattern: cuts text, or "gpt2", or "smollm", GPT-2's after digits.

    nfc: whether text is normalized; whole: whether tokens are looked up before they are merged.
    """
    in_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = [split, in_bytes | {"use_regex": False}]
    if pattern in ("gpt2", "smollm"):
        digits = [{"type": "Digits", "individual_digits": True}] * (pattern == "smollm")
        steps = [*digits, in_bytes | {"use_regex": True}]
    return {
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": in_bytes | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": whole},
    }


def model_tokenizer(path: str | Path, rows: int) -> tokenizer_setup.Tokenizer | FileTokenizer:
    """The tokenizer in a tokenizer.model, Llama 3's or sentencepiece's. Raises CheckpointError."""
    file = None if "://" in str(path) else Path(path)
    looks = describe_file(read_file(file, 4096)) if file and file.is_file() else ""
    try:
        if file and file.exists() and not file.is_file():  # it may never end
            raise ValueError("it is not a regular file")
        if "sentencepiece" not in looks:
            ranks = tokenizer_setup.read_vocabulary(path)
            return tokenizer_setup.make_tokenizer(Path(path).name, ranks)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        content = begun_by(sentencepiece(read_file(file)), "<s>", None)
        return FileTokenizer(content, rows, names, ["</s>"], None)
    except CheckpointError:
        raise
    except Exception as error:  # an address can fail in any of its libraries' ways
        looks = "" if "sentencepiece" in looks else looks
        reason = f"found {looks}" if looks else getattr(error, "strerror", None) or error
        problem = f"its tokenizer cannot be used: {one_line(reason)}"
        raise CheckpointError(path, problem) from None


def folder_tokenizer(folder: Path, rows: int) -> tokenizer_setup.Tokenizer | FileTokenizer:
    """The tokenizer of a Hugging Face folder. Raises CheckpointError and ValueError."""

    def optional(name: str) -> dict[str, Any]:
        return read_json_object(folder / name) if (folder / name).is_file() else {}

    settings = optional("special_tokens_map.json") | optional("tokenizer_config.json")
    config = optional("config.json")
    kind = str(settings.get("tokenizer_class") or config.get("tokenizer_class"))
    kind = kind.removesuffix("Fast")
    if (folder / "tokenizer.json").is_file():
        content = read_json_object(folder / "tokenizer.json", JSON_LIMIT)
    elif (folder / "merges.txt").is_file() and (folder / "vocab.json").is_file():
        patterns = {"Qwen2Tokenizer": QWEN2_PATTERN, "GPT2Tokenizer": "gpt2"}
        if kind not in patterns:
            refuse(folder, "tokenizer_class", kind, f"{' or '.join(patterns)}, or a tokenizer.json")
        lines = read_file(folder / "merges.txt").decode().splitlines()
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
        vocab = read_json_object(folder / "vocab.json", JSON_LIMIT)
        content = byte_level(vocab, merges, patterns[kind], nfc=kind == "Qwen2Tokenizer")
    elif (folder / "tokenizer.model").is_file():
        found = model_tokenizer(folder / "tokenizer.model", rows)
        if isinstance(found, tokenizer_setup.Tokenizer):
            return found
        content = found.content | {"post_processor": None}
    else:
        raise CheckpointError(folder, f"has no tokenizer.json; {NO_TOKENIZER}")
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    is_llama = kind == "LlamaTokenizer" and "ByteLevel" not in json.dumps(content.get("decoder"))
    if is_llama and config.get("model_type") != "mistral":  # this class ignores some of the file
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | named
        space = settings.get("add_prefix_space") in (None, True)
        scheme = "never" if not space else "always" if settings.get("legacy") else "first"
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}
        model = {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
        content |= {"normalizer": None, "pre_tokenizer": metaspace | {"split": False}}
        content |= {"decoder": fallback_decoder(space), "model": content["model"] | model}
    named = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}

    entries = {token["id"]: token for token in content.get("added_tokens") or ()}
    for name, number in optional("added_tokens.json").items():
        entries.setdefault(number, added(name, number, special=False))
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        entries[int(number)] = added(token["content"], int(number)) | token
    extra = settings.get("extra_special_tokens") or ()
    extra = extra.values() if isinstance(extra, dict) else extra
    more = [*(settings.get("additional_special_tokens") or ()), *extra]
    more = [token.get("content") if isinstance(token, dict) else token for token in more]
    numbers = numbers_of(content | {"added_tokens": [*entries.values()]})
    for name in (name for name in [*named.values(), *more] if name and isinstance(name, str)):
        if name not in numbers:
            numbers[name] = max(numbers.values(), default=-1) + 1
        number = numbers[name]
        entries[number] = entries.get(number, added(name, number)) | {"special": True}
    content["added_tokens"] = [*entries.values()]
    processor, bos = content.get("post_processor"), named.get("bos_token")
    if not settings.get("add_bos_token", is_llama and not (folder / "tokenizer.json").is_file()):
        bos = None
    if not processor or (bos and json.dumps(bos) not in json.dumps(processor)):
        content = begun_by(content, bos, None)

    ends = [named.get("eos_token")]
    for found in (optional("generation_config.json"), config):
        ids = found.get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {found["name"]: found["template"] for found in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = read_file(folder / "chat_template.jinja").decode()
    return FileTokenizer(content, rows, named, ends, template)


# --- GGUF files -----------------------------------------------------------------------------------

GGUF_SPLITS = {  # by tokenizer.ggml.pre: arguments of byte_level
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (SPLIT_PATTERN, False, True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (SPLIT_PATTERN,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2_PATTERN, True)),
    **{"smollm": ("smollm",), "gpt-2": ("gpt2",), "tekken": (TEKKEN_PATTERN, False, True)},
}


def known_by(tokens: list[str]) -> str:
    """The tokenizer.ggml.pre of a vocabulary in a file that does not say, or "default"."""
    place = {token: i for i, token in enumerate(tokens)}
    if {"<|begin_of_text|>", "<|start_header_id|>"} <= place.keys():
        return "llama-bpe"
    end, start = place.get("<|endoftext|>", 0), place.get("<|im_start|>", 0)
    return "qwen2" if len(tokens) / 2 < end == start - 1 else "default"


GGUF_ENDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(path: Path, fields: Mapping[str, Any], rows: int) -> FileTokenizer:
    """The tokenizer of a GGUF file. Raises CheckpointError and ValueError."""

    def field(key: str, default: object = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    model, tokens, kinds = field("model"), field("tokens") or [], field("token_type")
    if model not in ("gpt2", "llama"):
        problem = f"its tokenizer is {quoted(model)}, expected byte-level or sentencepiece BPE"
        raise CheckpointError(path, f"{problem}; {NO_TOKENIZER}")
    usual = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = ((key, field(f"{end}_token_id", usual.get(end))) for key, end in GGUF_ENDS.items())
    names = {key: tokens[i] for key, i in ids if type(i) is int and 0 <= i < len(tokens)}
    if not kinds:
        special, byte = re.compile("<[|\uff5c].*[|\uff5c]>"), re.compile("<0x[0-9A-F]{2}>")
        special = {*filter(special.fullmatch, tokens), *names.values()}
        kinds = [3 if t in special else 6 if byte.fullmatch(t) else 1 for t in tokens]
    if len({*tokens}) < len(tokens) or len(kinds) != len(tokens):
        raise ValueError("its tokens are not one of each, or their types are as many")
    used = max((i for i, kind in enumerate(kinds, start=1) if kind != 5), default=0)
    tokens, kinds, begins = tokens[:used], kinds[:used], True  # the rest are not used
    if model == "llama":
        scores = field("scores") or [0.0] * used
        pieces = [*zip(tokens, scores[:used], kinds, strict=True)]
        space = bool(field("add_space_prefix", True))
        content = by_scores(pieces, names.get("unk_token"), [], space)
    else:
        pre = field("pre", "default")
        pre = known_by(tokens) if pre == "default" else pre
        if pre not in GGUF_SPLITS:
            expected = f"one of {', '.join(GGUF_SPLITS)}; {NO_TOKENIZER}"
            refuse(path, "tokenizer.ggml.pre", pre, expected)
        merges = [merge.split(" ", 1) for merge in field("merges") or ()]
        vocab = {token: i for i, token in enumerate(tokens)}
        content = byte_level(vocab, merges, *GGUF_SPLITS[pre])
        each = zip(tokens, range(used), kinds, strict=True)
        content["added_tokens"] = [
            added(t, i, kind != 4) for t, i, kind in each if kind in (2, 3, 4)
        ]
        begins = GGUF_SPLITS[pre][2:] == (True,)
    bos = names.get("bos_token") if field("add_bos_token", begins) else None
    eos = names.get("eos_token") if field("add_eos_token", False) else None
    ends = [names.get("eos_token"), *(field(f"{end}_token_id") for end in ("eos", "eot", "eom"))]
    template = fields.get("tokenizer.chat_template")
    return FileTokenizer(begun_by(content, bos, eos), rows, names, ends, template)
