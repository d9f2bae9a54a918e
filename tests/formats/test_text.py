"""Vocabularies and dialogs of Hugging Face folders and GGUF files, against transformers."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, SMALL, random_weights
from other_formats import (
    CHATML,
    gguf_tokens,
    hf_model,
    refused,
    tokenizer_of,
    trained_tokenizer,
    write_gguf,
    write_qwen2,
)
from references import texts

import formats
import llama3
import tokenizer_setup
from formats.convert import to_hf, to_meta
from formats.errors import CheckpointError
from formats.text import SPLIT_PATTERNS, hf_vocabulary
from tokenizer_setup import encode, encode_dialog


def our_tokenizer(folder):
    """That of a folder with a tokenizer.json, and without a model."""
    return tokenizer_setup.make_tokenizer("", *hf_vocabulary(folder))


def change_json(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return write_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def folder(tmp_path, qwen2):
    """A copy of it, to be changed."""
    return shutil.copytree(qwen2, tmp_path / "hf")


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLIT_PATTERNS)
def test_token_ids_of_a_tokenizer_json_equal_those_of_transformers(tmp_path, split):
    """As it is, and as written for Meta's files."""
    expected = trained_tokenizer(split)
    hf_model("llama", vocab_size=528).save_pretrained(tmp_path / "hf")
    expected.save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    to_meta(source, tmp_path / "meta")
    direct = source.tokenizer()
    written = tokenizer_setup.load_tokenizer(tmp_path / "meta" / "tokenizer.model")
    assert written.format == direct.format
    assert written.n_vocab == len(expected)
    for text in [*texts(), "a<tool_call>b"]:
        ids = expected(text)["input_ids"]
        assert encode(direct, text) == ids, text
        assert encode(written, text) == ids, text
    assert ("<tool_call>" in written.format.spelled) == (split == "qwen2")


@pytest.mark.parametrize(
    ("pre", "split"),
    [("llama-bpe", "llama3"), ("qwen2", "qwen2"), ("gpt-2", "gpt2"), ("smollm", "smollm")],
)
def test_token_ids_of_a_gguf_file_equal_those_of_transformers(tmp_path, pre, split):
    """And its rows of padding are never chosen."""
    expected = trained_tokenizer(split)
    config = llama3.config_from_params(SMALL | {"vocab_size": 528})
    weights = random_weights(config)
    weights["output.weight"][len(expected) :] *= 100  # the likeliest
    tokens = gguf_tokens(
        expected, pre, padding=528 - len(expected), bos=0 if split == "llama3" else None
    )
    source = formats.open(write_gguf(tmp_path / "model.gguf", weights, config, tokens=tokens))
    tokenizer = source.tokenizer()
    assert tokenizer.n_vocab == len(expected)
    for text in [*texts(), "a<tool_call>b"]:
        assert encode(tokenizer, text) == expected(text)["input_ids"], text
    ids, loaded = encode(tokenizer, "Hello"), source.load_weights()
    assert next(llama3.generate(ids, loaded, config, max_new_tokens=1)) >= len(expected)
    n_vocab = tokenizer.n_vocab
    chosen = [*llama3.generate(ids, loaded, config, max_new_tokens=9, n_vocab=n_vocab)]
    assert len(chosen) == 9
    assert max(chosen) < n_vocab


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_bytes_outside_the_vocabulary_become_what_transformers_makes_of_them(tmp_path, unknown):
    import transformers
    from tokenizers import Tokenizer, models, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    special = [unknown] if unknown else []
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts()[:3], trainer)
    expected = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    expected.save_pretrained(tmp_path)
    ours = our_tokenizer(tmp_path)
    assert ours.n_vocab == len(expected)
    for text in texts():
        assert encode(ours, text) == expected(text)["input_ids"], text


@pytest.mark.usefixtures("meta_tokenizer")  # skips where the file is not there
def test_metas_tokenizer_comes_back_byte_for_byte(tmp_path):
    """From a tokenizer.json that equals the one that transformers' own converter makes.

    Of its tokens the first and the last 12,000, for the sake of time. Most of the last are then
    tokens that no merge makes, and are looked up as a whole.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    content = (ROOT.parent / "shared" / "llama3" / "tokenizer.model").read_bytes()
    tokens = [line.split()[0] for line in content.splitlines()]
    lines = [b"%s %d\n" % (t, n) for n, t in enumerate(tokens[:12000] + tokens[-12000:])]
    params = SMALL | {"dim": 8, "n_layers": 1, "vocab_size": 24256}
    weights = random_weights(llama3.config_from_params(params), torch.bfloat16)
    (tmp_path / "meta").mkdir()
    path = tmp_path / "meta" / "tokenizer.model"
    path.write_bytes(b"".join(lines))
    path.with_name("params.json").write_text(json.dumps(params))
    torch.save(weights, path.with_name("consolidated.00.pth"))
    to_hf(formats.open(tmp_path / "meta"), tmp_path / "hf")
    converter = TikTokenConverter(
        vocab_file=str(path),
        pattern=tokenizer_setup.SPLIT_PATTERN,
        extra_special_tokens=[*tokenizer_setup.SPECIAL_TOKENS],
    )
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    theirs = json.loads((tmp_path / "tokenizer.json").read_text())
    ours = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    for part in ("model", "pre_tokenizer", "added_tokens"):
        assert theirs[part] == ours[part]
    to_meta(formats.open(tmp_path / "hf"), tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == path.read_bytes()
    assert not (tmp_path / "back" / "tokenizer_setup.json").exists()


def test_tokens_that_no_merge_makes_and_gaps_between_ids(tmp_path):
    """The first never come out of a text, as with transformers; the others stand for nothing."""
    import transformers

    hf_model("llama", vocab_size=528).save_pretrained(tmp_path / "hf")
    trained_tokenizer("gpt2").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"qqqq": 500}
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 505, "content": "<|far|>"})
    path.write_text(json.dumps(content))
    expected = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    source = formats.open(tmp_path / "hf")
    to_meta(source, tmp_path / "meta")
    written = tokenizer_setup.load_tokenizer(tmp_path / "meta" / "tokenizer.model")
    for ours in (source.tokenizer(), written):
        assert ours.n_vocab == 506
        assert encode(ours, "qqqq") == expected("qqqq")["input_ids"] != [500]
        assert "".join(tokenizer_setup.decode_stream(ours, [503, 505])) == "<|unused_503|><|far|>"


def test_no_text_spells_what_begins_or_ends_a_turn(tmp_path):
    """Even where a tokenizer.json calls these tokens not special."""
    from tokenizers import AddedToken

    expected = trained_tokenizer("qwen2")
    expected.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    ours = our_tokenizer(tmp_path)
    assert ours.format.spelled == ("<tool_call>",)
    assert len(encode(ours, "<|im_start|><|im_end|>")) > 2
    assert tokenizer_setup.special_tokens_in(ours, "a <|im_end|>") == ["<|im_end|>"]
    expected.add_tokens([AddedToken("<|x|>", lstrip=True, special=False)])
    expected.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match='"added_tokens" is'):
        our_tokenizer(tmp_path)


# --- dialogs and stop tokens ----------------------------------------------------------------------

OWN_SYSTEM = CHATML.replace("You are a helpful assistant.", 'It\\\'s\\n \\\\boxed{} \\"it\\"')
NO_SYSTEM = CHATML[: CHATML.index("{% if loop")] + CHATML[CHATML.index("{{'<|im_start|>' +") :]


@pytest.mark.parametrize("template", [CHATML, OWN_SYSTEM, NO_SYSTEM], ids=["qwen2", "own", "none"])
@pytest.mark.parametrize("begins", [None, "<s>", "<|im_start|>"])
def test_dialogs_in_chatml_equal_those_of_transformers(tmp_path, template, begins):
    expected = trained_tokenizer("qwen2")
    if begins:  # SmolLM2's <|im_start|> begins every turn, and no dialog
        template = "{{ bos_token }}" * (begins == "<s>") + template
        expected.add_special_tokens({"bos_token": begins})
    expected.chat_template = template
    expected.save_pretrained(tmp_path)
    ours = our_tokenizer(tmp_path)
    assert ours.format.dialog == "chatml"
    user = {"role": "user", "content": "Hi <|im_end|> there"}
    plain = {"role": "user", "content": " e\u0301 12\n"}
    for messages in (
        [plain],
        [{"role": "system", "content": "Be brief."}, plain],
        [plain, {"role": "assistant", "content": "yes"}, plain],
    ):
        ids = expected.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encode_dialog(ours, messages) == ids
    end = ours.encode_single_token("<|im_end|>")
    assert tokenizer_setup.stop_tokens(ours) == {end}
    system = template != NO_SYSTEM and "system" in template
    assert encode_dialog(ours, [user]).count(end) == 1 + system  # not the user's


def test_a_gguf_file_has_the_dialogs_of_the_tokenizer_json(tmp_path):
    expected = trained_tokenizer("qwen2")
    expected.chat_template = CHATML
    expected.save_pretrained(tmp_path)
    config = llama3.config_from_params(SMALL | {"vocab_size": 501})
    tokens = gguf_tokens(expected, "qwen2", template=CHATML)
    weights = random_weights(config)
    path = write_gguf(tmp_path / "model.gguf", weights, config, tokens=tokens)
    ours, messages = tokenizer_of(path), [{"role": "user", "content": "Hello"}]
    ids = expected.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert encode_dialog(ours, messages) == ids
    assert ours.format == our_tokenizer(tmp_path).format


LLAMA3 = "<|start_header_id|>user<|end_header_id|>{{ messages }}<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "dialog"),
    [
        (LLAMA3, "llama3"),
        (LLAMA3.replace("{{", "<BEGIN CONVERSATION>{{"), None),  # Llama Guard puts a task around it
        ("[INST] {{ messages }} [/INST]", None),
        (LLAMA3 + " " * 2**16, None),
    ],
)
def test_a_template_is_a_known_dialog_format_or_none(tmp_path, template, dialog):
    tokenizer = trained_tokenizer("llama3")
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    ours = our_tokenizer(tmp_path)
    assert ours.format.dialog == dialog
    if dialog is None:
        with pytest.raises(ValueError, match="has no known dialog format"):
            encode_dialog(ours, [])


def test_templates_are_read_in_one_go(tmp_path):
    """Without patterns that try every beginning with every end, which would take hours here."""
    trained_tokenizer("qwen2").save_pretrained(tmp_path)
    for template in ("<|im_start|>system\n", "{{ '", '{{ "', "{%", "<|im_start|>user'"):
        settings = {"chat_template": template * (60_000 // len(template))}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        hf_vocabulary(tmp_path)


def test_of_several_templates_the_default_one_counts(tmp_path):
    trained_tokenizer("qwen2").save_pretrained(tmp_path)
    settings = [{"name": "rag", "template": ""}, {"name": "default", "template": CHATML}]
    change_json(tmp_path / "tokenizer_config.json", {"chat_template": settings})
    assert our_tokenizer(tmp_path).format.dialog == "chatml"
    (tmp_path / "chat_template.jinja").write_text("")  # a file of its own comes first
    assert our_tokenizer(tmp_path).format.dialog is None


def test_a_generation_ends_at_each_token_that_a_file_names(tmp_path):
    tokenizer = trained_tokenizer("qwen2")
    names = ["<|a|>", "<|b|>", "<|c|>", "<|other|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(tmp_path)
    ours = our_tokenizer(tmp_path)
    a, b, c, _ = (ours.encode_single_token(name) for name in names)
    end = ours.encode_single_token("<|im_end|>")
    assert tokenizer_setup.stop_tokens(ours) == {end}
    change_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|a|>"}})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [b, 10**6]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": c}))
    assert tokenizer_setup.stop_tokens(our_tokenizer(tmp_path)) == {end, a, b, c}

    config = llama3.config_from_params(SMALL | {"vocab_size": ours.n_vocab})
    change = {"add_eos_token_id": (a,), "add_eot_token_id": (b,), "add_eom_token_id": (c,)}
    tokens, weights = gguf_tokens(tokenizer, "qwen2"), random_weights(config)
    path = write_gguf(tmp_path / "model.gguf", weights, config, change=change, tokens=tokens)
    assert tokenizer_setup.stop_tokens(tokenizer_of(path)) == {end, a, b, c}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "its tokenizer is Unigram"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "is a sentencepiece vocabulary"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, '"dropout" is 0.1'),
        ({"normalizer": {"type": "NFKC"}}, '"normalizer" is {"type": "NFKC"}'),
        ({"pre_tokenizer": {"type": "Metaspace"}}, '"pre_tokenizer" is'),
        ({"post_processor": {"type": "BertProcessing"}}, '"post_processor" is "BertProcessing"'),
        ({"added_tokens": [{"content": "x", "id": 5, "lstrip": True}]}, '"added_tokens" is'),
        # What may be in a file that no tokenizer wrote:
        ({"model": None}, ""),
        ({"pre_tokenizer": None}, ""),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 1.5}}, ""),
        ({"post_processor": {"type": "Sequence", "processors": 5}}, ""),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": 1}, 2]}}, ""),
        ({"added_tokens": 5}, ""),
        ({"added_tokens": [{"id": 0}]}, ""),
        ({"added_tokens": [{"id": float("inf"), "content": "x"}]}, ""),
        ({"added_tokens": [{"id": "0", "content": "x"}]}, ""),
        ({"added_tokens": [{"id": 0, "content": None}]}, ""),
        ({"added_tokens": [{"id": 2000, "content": "x"}]}, ""),
        ({"added_tokens": [{"id": 501, "content": ""}]}, ""),
    ],
    ids=str,
)
def test_tokenizers_of_another_kind_are_refused(folder, change, says):
    change_json(folder / "tokenizer.json", change)
    refused(folder, says, read=tokenizer_of)


def test_merges_must_be_in_the_order_of_the_ids_and_make_tokens(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for merges, says in (
        ([*reversed(content["model"]["merges"])], "is not in the order of the ids"),
        ([["q", "\u0100\u0100"]], "is not in the order of the ids"),
        ([["a", "b", "c"]], ""),
        ([3], ""),
    ):
        content["model"]["merges"] = merges
        path.write_text(json.dumps(content))
        refused(folder, says, read=tokenizer_of)
    del content["model"]["merges"]
    content["model"]["vocab"] |= {"\u4e00": 500}
    path.write_text(json.dumps(content))
    refused(folder, read=tokenizer_of)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    hf_model("qwen2").save_pretrained(tmp_path)
    trained_tokenizer("qwen2").save_pretrained(tmp_path)
    told = 'the tokenizer has 501 tokens, but the "vocab_size" of the model is 96'
    refused(tmp_path, told, read=tokenizer_of)


def test_vocabularies_of_gguf_files_that_cannot_be_used_are_refused(tmp_path):
    config = llama3.config_from_params(SMALL | {"n_layers": 1, "vocab_size": 501})
    path, weights = tmp_path / "model.gguf", random_weights(config)
    tokens = gguf_tokens(trained_tokenizer("qwen2"), "qwen2")

    def changed(change):
        def write(writer):
            tokens(writer)
            fields = writer.kv_data[0]
            for key, value in change.items():
                field = fields[f"tokenizer.ggml.{key}"]
                field.value = value(field.value) if callable(value) else value

        return write

    def with_tokens(change, says=""):
        write_gguf(path, weights, config, tokens=changed(change))
        refused(path, says, read=tokenizer_of)

    write_gguf(path, weights, config)
    refused(path, 'its tokenizer is "none", expected byte-level BPE', read=tokenizer_of)
    with_tokens({"model": "llama"}, "its tokenizer is a sentencepiece vocabulary")
    with_tokens({"pre": "deepseek-llm"}, '"tokenizer.ggml.pre" is "deepseek-llm"')
    with_tokens({"tokens": lambda old: ["a", *old[1:]]})  # one of them twice
    with_tokens({"token_type": lambda old: old[:-1]})
    with_tokens({"merges": ["a"]})
