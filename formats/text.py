"""Vocabularies and dialogs of Hugging Face's tokenizer.json and of GGUF files, for tiktoken."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizer_setup
from formats.errors import CheckpointError, one_line, quoted, read_file, read_json_object, refuse
from tokenizer_setup import SPLIT_PATTERNS, TextFormat

Vocabulary = tuple[dict[bytes, int], TextFormat]  # ranks, which are ids too, and the rest
NO_TOKENIZER = "python -m formats.convert --no-tokenizer converts its weights, to use on token ids"
DIALOG_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>")
JSON_LIMIT = 2**26  # bytes of a tokenizer.json; Llama 3's has 17 million


def dialog_of(template: object, special: dict[str, int], bos: str | None) -> dict[str, str | None]:
    """The dialog format that a chat template (in Jinja) is an instance of, and its own message."""
    none = {"dialog": None, "begin_dialog": bos, "system": None}
    template = template if isinstance(template, str) and len(template) < 2**16 else ""
    begins = "bos_token" in template or (bos not in (None, *DIALOG_TOKENS) and bos in template)
    if "BEGIN CONVERSATION" in template:  # Llama Guard's, which put a task around a dialog
        return none
    if "<|start_header_id|>" in template and {*DIALOG_TOKENS[:2], "<|eot_id|>"} <= special.keys():
        return none | {"dialog": "llama3"}
    if "<|im_start|>" not in template or not {*DIALOG_TOKENS[2:]} <= special.keys():
        return none
    # The texts that it writes, of which one may be a whole message: quoted in its tags, where a
    # backslash escapes, or outside of them.
    literals = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", template, re.DOTALL)
    escapes = {"n": "\n", "t": "\t"}
    texts = [
        re.sub(r"\\(.)", lambda escaped: escapes.get(escaped[1], escaped[1]), one or two)
        for one, two in literals
    ]
    texts += [re.split(r"[}%#]\}", part, maxsplit=1)[-1] for part in re.split(r"\{[{%#]", template)]
    own = None
    for text in texts:
        _, begun, message = text.partition("<|im_start|>system\n")
        message, ended, _ = message.partition("<|im_end|>")
        if own is None and begun and ended and message:
            own = message
    return {"dialog": "chatml", "begin_dialog": bos if begins else None, "system": own}


def stop_of(ends: Iterable[object], special: dict[str, int]) -> tuple[str, ...]:
    """The special tokens that end a generation: `ends`, names or ids, and those of any dialog."""
    name_of = {number: name for name, number in special.items()}
    usual = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")
    names = {name for name in usual if name in special}
    for end in ends:
        name = name_of.get(end) if isinstance(end, int) else end
        if isinstance(name, str) and name in special:
            names.add(name)
    return tuple(sorted(names, key=special.get))


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (encoder.py of GPT-2).

    Bytes that Latin-1 can show stand for themselves, the others for what follows U+00FF.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHAT_TEMPLATE = (  # Llama 3's
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>"
    "{{ 'ipython' if message['role'] == 'tool' else message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def merges_of(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary as it is spelled in that alphabet; tiktoken's merges are all cuts in two."""
    character_of = {byte: character for character, byte in BYTE_OF.items()}
    spelled = {token: "".join(character_of[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in cuts]
    return {spelled[token]: rank for token, rank in ranks.items()}, merges


def make_vocabulary(
    tokens: dict[str, int],
    merges: Iterable[tuple[str, str]],
    special: dict[str, int],
    ignore_merges: bool,
    **text_format: Any,
) -> Vocabulary:
    """Ranks and format of a byte-level vocabulary: the ids of tokens are the order of merges.

    tokens and merges are spelled in the alphabet of bytes. Tokens that no merge makes, and that are
    not looked up as a whole either (ignore_merges), can never come out of a text: they are listed
    with the special tokens. Raises ValueError.
    """
    special, made, last = dict(special), set(), -1
    for left, right in merges:
        number = tokens.get(left + right)
        if number is None or number < last:
            where = f"the merge of {one_line(repr(left), 40)} and {one_line(repr(right), 40)}"
            raise ValueError(f"{where} is not in the order of the ids, which tiktoken needs")
        made.add(left + right)
        last = number
    ranks = {}
    for token, number in tokens.items():
        if token in special:
            continue
        if not BYTE_OF.keys() >= set(token):
            raise ValueError(f"{one_line(repr(token), 40)} is not spelled in bytes, as in GPT-2")
        spelled = bytes(BYTE_OF[character] for character in token)
        if len(spelled) > 1 and token not in made and not ignore_merges:
            special[token] = number
        else:
            ranks[spelled] = number
    taken = {*ranks.values(), *special.values()}
    if max(taken, default=0) > 2 * len(taken) + 1000:
        raise ValueError(f"its ids go up to {max(taken)}, with {len(taken)} tokens")
    for number in set(range(max(taken, default=0))) - taken:
        special[f"<|unused_{number}|>"] = number

    text_format = TextFormat(special, **text_format)
    ends = {*text_format.stop, text_format.begin, *DIALOG_TOKENS}  # no text may spell these
    spelled = tuple(name for name in text_format.spelled if name not in ends)
    text_format = text_format._replace(spelled=spelled)
    if all(bytes([byte]) in ranks for byte in range(256)):
        text_format = text_format._replace(unknown=None)
    llama3 = tokenizer_setup.llama3_format(len(ranks))
    named = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    same = {key: getattr(llama3, key) for key in ("special_tokens", "stop", "begin_dialog")}
    if (
        set(special.values()) == set(llama3.special_tokens.values())
        and all(special.get(name) == llama3.special_tokens[name] for name in named)
        and text_format._replace(dialog=text_format.dialog or "llama3", **same) == llama3
    ):
        return ranks, llama3  # only names of reserved tokens may differ
    return ranks, text_format


def _steps(found: object, key: str) -> list[object]:
    """The steps of a sequence in a tokenizer.json, or the only one."""
    inner = found.get(key) if isinstance(found, dict) else None
    return inner if isinstance(inner, list) else [found]


def _split_of(path: Path, found: object) -> str:
    """Return the name in SPLIT_PATTERNS of a pre_tokenizer of tokenizer.json."""
    steps = _steps(found, "pretokenizers")
    kinds, last = [step.get("type") for step in steps], steps[-1]
    regex = last.get("use_regex", True)
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and regex:
            return "gpt2"
        if kinds == ["Digits", "ByteLevel"] and regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex:
            behavior = str(steps[0].get("behavior")).lower(), bool(steps[0].get("invert"))
            for name, pattern in SPLIT_PATTERNS.items():
                isolated = behavior in (("isolated", False), ("removed", True))
                if steps[0]["pattern"].get("Regex") == pattern and isolated:
                    return name
    refuse(path, "pre_tokenizer", found, "the pattern of Llama 3, Qwen2, GPT-2 or SmolLM2")


def _begin_of(path: Path, found: object) -> str | None:
    """The token that a post_processor of tokenizer.json puts before a text."""
    begin = None
    for step in _steps(found, "processors") if found else ():
        if step["type"] == "TemplateProcessing":
            parts = [next(iter(part.items())) for part in step["single"]]
            names = [part["id"] for kind, part in parts if kind == "SpecialToken"]
            if [kind for kind, _ in parts] != ["SpecialToken"] * len(names[:1]) + ["Sequence"]:
                refuse(path, "post_processor", step["single"], "at most one token before a text")
            begin = names[0] if names else begin
        elif step["type"] != "ByteLevel":
            refuse(path, "post_processor", step["type"], "ByteLevel or TemplateProcessing")
    return begin


def _read_tokenizer(path: Path, content: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of make_vocabulary that a tokenizer.json has."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        kind = "a sentencepiece vocabulary" if model.get("byte_fallback") else model.get("type")
        problem = f"its tokenizer is {one_line(kind)}, expected byte-level BPE; {NO_TOKENIZER}"
        raise CheckpointError(path, problem)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk"):
        if model.get(key):
            refuse(path, key, model[key], "none")
    normalizer = content.get("normalizer")
    steps = _steps(normalizer, "normalizers") if normalizer else []
    if [step["type"] for step in steps] not in ([], ["NFC"]):
        refuse(path, "normalizer", normalizer, "NFC, or none")
    added = content.get("added_tokens") or []
    spelled = [entry for entry in added if not entry.get("special")]
    flags = ("lstrip", "rstrip", "single_word")
    if any(entry.get(flag) for entry in spelled for flag in flags):
        refuse(path, "added_tokens", spelled, "tokens without a strip")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    text_format = {
        "split": _split_of(path, content.get("pre_tokenizer")),
        "normalization": "NFC" if steps else None,
        "spelled": tuple(entry["content"] for entry in spelled),
        "begin": _begin_of(path, content.get("post_processor")),
        "unknown": model.get("unk_token"),
    }
    special = {entry["content"]: entry["id"] for entry in added}
    return model["vocab"], pairs, special, bool(model.get("ignore_merges")), text_format


def hf_vocabulary(folder: Path) -> Vocabulary:
    """Ranks and format of the tokenizer.json in a Hugging Face folder. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(folder, f"has no tokenizer.json; {NO_TOKENIZER}")

    def optional(name: str) -> dict[str, Any]:
        return read_json_object(folder / name) if (folder / name).is_file() else {}

    settings, template = optional("tokenizer_config.json"), folder / "chat_template.jinja"
    content = read_json_object(path, JSON_LIMIT)
    tokens, pairs, special, whole, text_format = _read_tokenizer(path, content)
    dialog = settings.get("chat_template")
    if isinstance(dialog, list):  # several, by name
        dialog = {found["name"]: found["template"] for found in dialog}.get("default")
    if template.is_file():
        dialog = read_file(template).decode(errors="replace")
    bos, end = (
        token.get("content") if isinstance(token, dict) else token
        for token in (settings.get("bos_token"), settings.get("eos_token"))
    )
    bos, ends = bos or text_format["begin"], [end]
    for name in ("generation_config.json", "config.json"):
        ids = optional(name).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    for key, default in (("begin", None), ("unknown", "")):
        text_format[key] = text_format[key] if text_format[key] in special else default
    text_format |= dialog_of(dialog, special, bos if bos in special else None)
    return make_vocabulary(
        tokens, pairs, special, whole, stop=stop_of(ends, special), **text_format
    )


GGUF_SPLITS = {  # by tokenizer.ggml.pre
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), ("llama3", None)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), ("qwen2", "NFC")),
    **{"smollm": ("smollm", None), "gpt-2": ("gpt2", None)},
}


def gguf_vocabulary(path: Path, fields: dict[str, Any]) -> Vocabulary:
    """Ranks and format of the vocabulary of a GGUF file. Raises CheckpointError."""

    def field(key: str, default: object = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    model, pre = field("model"), field("pre", "default")
    if model != "gpt2":
        kind = "a sentencepiece vocabulary" if model == "llama" else quoted(model)
        problem = f"its tokenizer is {kind}, expected byte-level BPE; {NO_TOKENIZER}"
        raise CheckpointError(path, problem)
    if pre not in GGUF_SPLITS:
        refuse(path, "tokenizer.ggml.pre", pre, f"one of {', '.join(GGUF_SPLITS)}")
    split, normalization = GGUF_SPLITS[pre]
    tokens, kinds = field("tokens"), field("token_type") or [1] * len(field("tokens"))
    if len(set(tokens)) < len(tokens):
        raise ValueError("its tokens are not one of each")
    used = max((i for i, kind in enumerate(kinds, start=1) if kind != 5), default=0)
    kind_of = dict([*zip(tokens, kinds, strict=True)][:used])  # the rest are not used
    ids = {token: number for number, token in enumerate(tokens[:used])}
    special = {token: ids[token] for token, kind in kind_of.items() if kind != 1}
    bos = field("bos_token_id")
    bos = tokens[bos] if bos is not None and tokens[bos] in special else None
    return make_vocabulary(
        ids,
        [tuple(merge.split(" ", 1)) for merge in field("merges", [])],
        special,
        split == "llama3",
        split=split,
        normalization=normalization,
        spelled=tuple(token for token, kind in kind_of.items() if kind == 4),
        begin=bos if field("add_bos_token", split == "llama3") else None,
        unknown="",
        stop=stop_of((field(f"{end}_token_id") for end in ("eos", "eot", "eom")), special),
        **dialog_of(fields.get("tokenizer.chat_template"), special, bos),
    )
