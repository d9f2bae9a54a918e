"""tokenizer_setup.py: text to ids and back, dialogs, and files that are no vocabulary."""

import base64
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer_setup
from tokenizer_setup import (
    SPECIAL_TOKENS,
    decode_stream,
    encode,
    encode_dialog,
    load_tokenizer,
    stop_tokens,
)

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is "
ULTIMATE_IDS = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323]
ULTIMATE_IDS += [4395, 374, 220]  # as llama3-from-scratch prints them
BYTES = {bytes([byte]): byte for byte in range(256)}


def write_vocabulary(path, ranks):
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """A vocabulary of the single bytes alone: the id of every byte is the byte."""
    return load_tokenizer(write_vocabulary(tmp_path_factory.mktemp("t") / "bytes.model", BYTES))


# --- Meta's vocabulary ----------------------------------------------------------------------------


def test_metas_vocabulary_has_128256_tokens_and_the_published_special_ids(meta_tokenizer):
    assert meta_tokenizer.n_vocab == 128256
    ids = {name: meta_tokenizer.encode_single_token(name) for name in SPECIAL_TOKENS}
    assert sorted(ids.values()) == list(range(128000, 128256))
    assert (ids["<|reserved_special_token_2|>"], ids[SPECIAL_TOKENS[-1]]) == (128011, 128255)
    published = {  # special_tokens_map of the published tokenizers
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
    }
    assert published.items() <= ids.items()
    assert stop_tokens(meta_tokenizer) == {128001, 128008, 128009}


def test_the_ultimate_question_has_the_ids_of_the_study_notes(meta_tokenizer):
    assert encode(meta_tokenizer, ULTIMATE) == ULTIMATE_IDS
    assert encode(meta_tokenizer, ULTIMATE, bos=False) == ULTIMATE_IDS[1:]


def test_a_dialog_has_the_ids_of_metas_chat_format(meta_tokenizer):
    # test_encode_message in the tokenizer tests of Meta's llama3 repository expects these for a
    # user's "This is a test sentence."
    message = {"role": "user", "content": "This is a test sentence."}
    expected = [128006, 882, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009]
    assistant = [128006, 78191, 128007, 271]
    assert encode_dialog(meta_tokenizer, [message]) == [128000, *expected, *assistant]


# --- encoding -------------------------------------------------------------------------------------


def test_special_tokens_follow_the_ranks_and_have_distinct_names(byte_tokenizer):
    assert len(set(SPECIAL_TOKENS)) == 256
    assert byte_tokenizer.n_vocab == 512
    for i, name in enumerate(SPECIAL_TOKENS):
        assert byte_tokenizer.encode_single_token(name) == 256 + i
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(247)]
    assert SPECIAL_TOKENS[2:4] + SPECIAL_TOKENS[11:] == tuple(reserved)
    named = [SPECIAL_TOKENS[i] for i in (0, 1, 4, 5, 6, 7, 8, 9, 10)]
    assert named == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]


def test_a_generation_ends_at_the_end_of_a_text_a_turn_or_a_message(byte_tokenizer):
    names = {byte_tokenizer.decode([token]) for token in stop_tokens(byte_tokenizer)}
    assert names == {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [  # contractions in either case, three digits at most, a word with what stands before it
        ("I'mx WE'LLx he'Sx", ["I", "'m", "x", " WE", "'LL", "x", " he", "'S", "x"]),
        ("1234567 and 89", ["123", "456", "7", " and", " ", "89"]),
        ("٣٤٥٦", ["٣٤٥", "٦"]),
        ("(a) _b\tc", ["(a", ")", " _", "b", "\tc"]),
        ("wait... \n\n  x  ", ["wait", "...", " \n\n", " ", " x", "  "]),
        ("!?\r\n漢字 été", ["!?\r\n", "漢字", " été"]),
    ],
)
def test_text_is_split_by_metas_pattern(tmp_path, text, pieces):
    """A vocabulary that has every pair of neighbours as a token shows where none was merged."""
    encoded = text.encode()
    parts = {encoded[i:j] for i in range(len(encoded)) for j in range(i + 2, len(encoded) + 1)}
    ranks = BYTES | {part: 256 + i for i, part in enumerate(sorted(parts, key=len))}
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "tokenizer.model", ranks))
    tokens = encode(tokenizer, text, bos=False)
    assert [tokenizer.decode_single_token_bytes(token).decode() for token in tokens] == pieces


@pytest.mark.parametrize("name", SPECIAL_TOKENS[:12])
def test_text_never_becomes_a_special_token(byte_tokenizer, name):
    assert encode(byte_tokenizer, name, bos=False) == list(name.encode())
    dialog = encode_dialog(byte_tokenizer, [{"role": name, "content": name}])
    special = [token for token in dialog if token >= 256]
    bos, eot, start, end = (256 + i for i in (0, 9, 6, 7))
    assert special == [bos, start, end, eot, start, end]


def test_a_dialog_is_laid_out_as_the_instruct_models_expect(byte_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "  Hi <|eot_id|> "},
        {"role": "tool", "content": "42"},
    ]
    text = byte_tokenizer.decode(encode_dialog(byte_tokenizer, messages))
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n  Hi <|eot_id|> <|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_call_of_a_tool_ends_a_message_and_not_a_turn(byte_tokenizer):
    call = {"role": "assistant", "content": "<|eom_id|>", "stop_reason": "end_of_message"}
    header = [256 + 6, *b"assistant", 256 + 7, *b"\n\n"]
    for tag, begin in ((True, [256 + 10]), (False, []), (None, [])):
        tokens = encode_dialog(byte_tokenizer, [call | {"python_tag": tag}])
        assert tokens == [256, *header, *begin, *b"<|eom_id|>", 256 + 8, *header]
    tokens = encode_dialog(byte_tokenizer, [call | {"stop_reason": "end_of_turn"}])
    assert tokens == [256, *header, *b"<|eom_id|>", 256 + 9, *header]


@pytest.mark.parametrize(
    "messages",
    [
        "What is the capital of Japan?",
        {"role": "user", "content": "Hi"},
        None,
        3,
        [None],
        ["Hi"],
        [["user", "Hi"]],
        [{"role": "user"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": None, "content": "Hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": b"Hi"}],
        [{"role": "assistant", "content": "Hi", "stop_reason": 3}],
        [{"role": "assistant", "content": "Hi", "python_tag": "yes"}],
    ],
    ids=str,
)
def test_a_dialog_of_another_form_is_refused_in_one_line(byte_tokenizer, messages):
    with pytest.raises(ValueError, match=r"expected a (list|str|bool)") as error:
        encode_dialog(byte_tokenizer, messages)
    assert "\n" not in str(error.value)


def test_header_and_content_are_encoded_apart(demo_tokenizer):
    """Were they one text, a content that begins with a line break would merge with the header's."""
    tokens = encode_dialog(demo_tokenizer, [{"role": "user", "content": "42"}])
    parts = [encode(demo_tokenizer, part, bos=False) for part in ("user", "\n\n", "42")]
    special = {name: demo_tokenizer.encode_single_token(name) for name in SPECIAL_TOKENS}
    assert tokens[:-1] == [
        special["<|begin_of_text|>"],
        special["<|start_header_id|>"],
        *parts[0],
        special["<|end_header_id|>"],
        *parts[1],
        *parts[2],
        special["<|eot_id|>"],
        special["<|start_header_id|>"],
        *encode(demo_tokenizer, "assistant", bos=False),
        special["<|end_header_id|>"],
    ]


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_encoding_and_decoding(demo_tokenizer, text):
    tokens = encode(demo_tokenizer, text)
    assert demo_tokenizer.decode(tokens[1:]) == text
    assert "".join(decode_stream(demo_tokenizer, tokens[1:])) == text


def test_a_lone_surrogate_is_encoded_as_the_replacement_character(demo_tokenizer):
    assert encode(demo_tokenizer, "a\ud800b") == encode(demo_tokenizer, "a\ufffdb")


def split_one_by_one(text):
    """Where Meta's tokenizer cuts long text, counted out character by character."""
    pieces = []
    for start in range(0, len(text), 400_000):
        piece, run, run_is_space = "", 0, None
        for character in text[start : start + 400_000]:
            run = run + 1 if character.isspace() == run_is_space else 1
            run_is_space = character.isspace()
            if run > 25_000:
                pieces.append(piece)
                piece, run = "", 1
            piece += character
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000,
        "a" * 25_001,
        " " * 60_000 + "a" * 50_000 + "\n",
        ("word " * 90_000)[:430_000],
        "\u3000" * 25_001 + "\x1c" * 3,
        ("x" * 24_999 + " ") * 20,
        "字" * 400_001,
    ],
    ids=range(7),
)
def test_long_text_is_cut_where_metas_tokenizer_cuts_it(byte_tokenizer, text):
    pieces = split_one_by_one(text)
    assert list(tokenizer_setup._split_long(text)) == pieces
    assert encode(byte_tokenizer, text, bos=False) == list(text.encode())


def test_a_megabyte_of_one_character_is_encoded(meta_tokenizer):
    for text in ("a" * 1_000_000, " " * 1_000_000, "^" * 1_000_000):
        assert meta_tokenizer.decode(encode(meta_tokenizer, text, bos=False)) == text


# --- streaming ------------------------------------------------------------------------------------


def test_a_character_comes_out_when_its_last_byte_has_come(byte_tokenizer):
    came = []

    def tokens():
        for byte in "é🙂!".encode():
            came.append(byte)
            yield byte

    seen = [(text, len(came)) for text in decode_stream(byte_tokenizer, tokens())]
    assert seen == [("é", 2), ("🙂", 6), ("!", 7)]


@pytest.mark.parametrize(
    ("bytes_in", "text"),
    [
        (b"ok\xf0\x9f\x99", "ok\ufffd"),  # ends inside a character
        (b"\xff!", "\ufffd!"),  # never begins one
        (b"\xf0\x9fa", "\ufffda"),  # another character comes in between
        (b"", ""),
    ],
)
def test_bytes_that_never_become_a_character_come_out_as_u_fffd(byte_tokenizer, bytes_in, text):
    assert "".join(decode_stream(byte_tokenizer, bytes_in)) == text


# --- files that are no vocabulary -----------------------------------------------------------------

GAP = {**BYTES, b"ab": 257}
TWICE = {**BYTES, b"ab": 255}
BAD_FILES = {
    "words": (b"hello world this is text\n", "line 1 is b'hello world this is text'"),
    "html": (b"<!DOCTYPE html>\n<html><body>401</body></html>", "line 1 is b'<!DOCTYPE html>'"),
    "zip": (b"PK\x03\x04" + bytes(100), "line 1 is"),
    "empty": (b"", "256 of the 256 single bytes are missing"),
    "no rank": (b"IQ== 0\nIg==\n", "line 2 is b'Ig=='"),
    "bad base64": (b"I 0\n", "line 1 is b'I 0'"),
    "no base64 letter": (b"IQ=\xc3= 0\n", "line 1 is"),
    "a rank of another kind": (b"IQ== 0\nIg== 1.0\n", "line 2 is b'Ig== 1.0'"),
    "a rank beyond all": (b"IQ== " + b"9" * 5000 + b"\n", "line 1 is"),
    "an empty token": (b"==== 0\n", "line 1 is b'==== 0'"),
    "a line twice": (b"IQ== 0\nIQ== 0\n", "line 2 lists b'!' a second time"),
    "a token twice": (b"IQ== 0\nIg== 1\nIQ== 2\n", "line 3 lists b'!' a second time"),
}


@pytest.mark.parametrize(("content", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_the_first_line_that_is_no_token_and_its_rank_is_named(tmp_path, content, says):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a complete vocabulary: ") as error:
        load_tokenizer(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (GAP, "rank 256 is missing"),
        (TWICE, "rank 256 is missing"),
        ({**BYTES, b"a": 300}, "rank 97 is missing"),
        (
            {token: rank for token, rank in BYTES.items() if rank < 200},
            "56 of the 256 single bytes",
        ),
    ],
)
def test_an_incomplete_vocabulary_is_refused(tmp_path, ranks, says):
    path = write_vocabulary(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(ValueError, match=says):
        load_tokenizer(path)


def test_a_special_token_among_those_of_text_is_refused(tmp_path):
    """Text could spell it."""
    path = write_vocabulary(tmp_path / "tokenizer.model", BYTES | {b"<|eot_id|>": 256})
    with pytest.raises(ValueError, match=r"lists the special token <\|eot_id\|> among"):
        load_tokenizer(path)


def test_a_vocabulary_cut_off_inside_a_line_is_refused(tmp_path):
    path = write_vocabulary(tmp_path / "tokenizer.model", BYTES | {b"ab": 256, b"abc": 257})
    whole = path.read_text()
    last_line = whole.splitlines(keepends=True)[-1]
    for missing in range(2, len(last_line)):  # from "...25" back to the first letter
        path.write_text(whole[:-missing])
        with pytest.raises(ValueError, match="not a complete vocabulary: "):
            load_tokenizer(path)


def test_a_missing_file_a_folder_and_an_unknown_address_are_refused(tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            load_tokenizer(path)
    with pytest.raises(Exception, match=r"nowhere://tokenizer\.model"):  # blobfile's own
        load_tokenizer("nowhere://tokenizer.model")


def test_a_file_that_changed_is_read_again(tmp_path, monkeypatch):
    """tiktoken by itself would return its cached copy of what the path held before."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    path = write_vocabulary(tmp_path / "tokenizer.model", BYTES)
    assert load_tokenizer(path).n_vocab == 512
    write_vocabulary(path, BYTES | {b"ab": 256})
    assert load_tokenizer(path).n_vocab == 513
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_special_tokens_are_found_in_a_text(demo_tokenizer):
    found = tokenizer_setup.special_tokens_in(demo_tokenizer, "a <|eot_id|> b <|eom_id|>")
    assert found == ["<|eot_id|>", "<|eom_id|>"]
    assert tokenizer_setup.special_tokens_in(demo_tokenizer, "a <|EOT_ID|> b") == []
