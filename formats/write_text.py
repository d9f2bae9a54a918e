"""Tokenizers to write: Llama 3's for other programs, and any that came from files."""

import json

import tokenizer_setup
from formats.text import BYTE_OF, FileTokenizer, added
from formats.vocabulary import begun_by, byte_level
from tokenizer_setup import SPLIT_PATTERN, encode_dialog, stop_tokens

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


def llama3_ranks(tokenizer: tokenizer_setup.Tokenizer | FileTokenizer) -> dict[bytes, int] | None:
    """The ranks of Llama 3's tokenizer, if it is that, with dialogs as Meta writes them."""
    if isinstance(tokenizer, tokenizer_setup.Tokenizer):
        return tokenizer._mergeable_ranks
    content, special, encode = tokenizer.content, tokenizer.special_tokens, encode_dialog
    dialog = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    vocab, merges = content["model"]["vocab"], content["model"].get("merges", ())
    try:
        ranks = {bytes(BYTE_OF[c] for c in t): vocab[t] for t in vocab if t not in special}
        metas = tokenizer_setup.make_tokenizer("", ranks)
        made = [
            merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
            for merge in merges
        ]
        order = [vocab[token] for token in made]
        same = isinstance(tokenizer.render, str) or all(
            encode(tokenizer, d) == encode(metas, d) for d in (dialog, dialog[1:2])
        )
    except (ValueError, KeyError, TypeError):  # of a vocabulary of another kind
        return None
    # Only the names of reserved tokens may differ.
    named = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    same &= all(special.get(name) == metas.special_tokens[name] for name in named)
    same &= sorted(special.values()) == sorted(metas.special_tokens.values())
    same &= tokenizer.stop <= stop_tokens(metas) and order == sorted(order)
    same &= json.dumps(SPLIT_PATTERN) in json.dumps(content["pre_tokenizer"])
    return ranks if same and not content["normalizer"] and tokenizer.begin == metas.begin else None


def as_files(tokenizer: tokenizer_setup.Tokenizer | FileTokenizer) -> FileTokenizer:
    """The same tokenizer as Hugging Face's files would describe it."""
    if isinstance(tokenizer, FileTokenizer):
        return tokenizer
    vocab, merges = merges_of(tokenizer._mergeable_ranks)
    content = byte_level(vocab, merges, SPLIT_PATTERN, whole=True)
    content["added_tokens"] = [added(name, i) for name, i in tokenizer.special_tokens.items()]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    content, ends = begun_by(content, names["bos_token"], None), tokenizer_setup.STOP_TOKENS
    return FileTokenizer(content, tokenizer.n_vocab, names, ends, CHAT_TEMPLATE)


def tokenizer_files(tokenizer: FileTokenizer) -> dict[str, dict[str, object]]:
    """The files of a Hugging Face folder that say what this tokenizer does."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.names}
    settings["clean_up_tokenization_spaces"] = False
    if not isinstance(tokenizer.render, str):
        settings["chat_template"] = tokenizer.template
    ids = {"eos_token_id": sorted(tokenizer.stop)}
    if tokenizer.begin:
        ids["bos_token_id"] = tokenizer.rules.token_to_id(tokenizer.begin)
    return {
        "tokenizer.json": json.loads(tokenizer.rules.to_str()),
        "tokenizer_config.json": settings,
        "generation_config.json": ids,
    }
