"""demo/bpe.py against a version that counts everything anew, and against tiktoken."""

import itertools
import random
from collections import Counter

import pytest
from bpe import ranks, save_tokenizer, split, train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_setup import SPECIAL_TOKENS, encode, load_tokenizer

# Few different letters make many equal counts and overlapping pairs; the rest crosses byte lengths,
# pieces of the split pattern, and special tokens. Of Unicode, what Python knows as assigned: newer
# characters are letters to one regular expression engine and not yet to another.
TEXTS = st.one_of(
    st.text(alphabet="ab", max_size=200),
    st.text(alphabet="abc \n1é漢'", max_size=200),
    st.lists(st.sampled_from(["<|a|>", "<|a|><", "aa", " b", "ab"]), max_size=40).map("".join),
    st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=60),
)


def brute_force(text, n_merges, special_tokens=()):
    """The same by the definition: count all pairs, merge the best one everywhere, repeat."""
    words = Counter(split(text, special_tokens))
    words = [([bytes([byte]) for byte in piece], count) for piece, count in words.items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for tokens, count in words:
            for pair in itertools.pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [(apply_merge(tokens, merges[-1]), count) for tokens, count in words]
    return merges


def apply_merge(tokens, pair):
    """Merge `pair` wherever it stands, from left to right."""
    merged, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


@given(TEXTS, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_merges_are_those_of_counting_anew_each_time(text, n_merges):
    assert train_bpe(text, n_merges, ["<|a|>"]) == brute_force(text, n_merges, ["<|a|>"])


def test_equal_counts_go_to_the_greater_pair_of_byte_strings():
    assert train_bpe("ab cd", 1) == [(b"c", b"d")]
    assert train_bpe("ab ac", 1) == [(b"a", b"c")]
    # Each occurs three times in the end: "bz" + "a" and "b" + "zz". The first strings decide.
    text = "\n".join(["zz"] * 20 + ["bz"] * 2 + ["bza"] * 3 + ["bzz"] * 3)
    merges = [(b"z", b"z"), (b"b", b"z"), (b"bz", b"a"), (b"b", b"zz")]
    assert train_bpe(text, 9) == merges == brute_force(text, 9)


def test_merges_never_cross_pieces_or_special_tokens():
    assert train_bpe("a1a1a1", 9) == []  # letters and digits are different pieces
    assert train_bpe("x<|eot_id|>" * 9, 9, SPECIAL_TOKENS) == []
    assert train_bpe("x<|eot_id|>" * 9, 9) != []
    assert train_bpe("<|a|>bcd" * 9, 9, ["<|a|>", "<|a|>bcd"]) == []  # longest first, or "bcd"
    assert train_bpe("<|a|>bcd" * 9, 9, ["<|a|>"]) != []


@given(TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_tiktoken_splits_text_as_the_merges_in_order_do(tmp_path_factory, corpus, text):
    merges = train_bpe(corpus, 60)
    assert len(ranks(merges)) == 256 + len(merges)  # no token is made twice
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    save_tokenizer(merges, path)
    tokenizer = load_tokenizer(path)
    for text_to_split in (corpus, text):
        expected = []
        for piece in split(text_to_split):
            tokens = [bytes([byte]) for byte in piece]
            for pair in merges:
                tokens = apply_merge(tokens, pair)
            expected += tokens
        ids = encode(tokenizer, text_to_split, bos=False)
        assert [tokenizer.decode_single_token_bytes(i) for i in ids] == expected


@pytest.mark.parametrize("kind", ["one long word", "one letter", "short words"])
def test_1000_merges_are_learned_from_100_000_letters_of_any_shape(kind):
    """Recounting the pairs for every merge would take minutes, and so would walking the word."""
    rng, n = random.Random(0), 100_000
    letters = "a" if kind == "one letter" else "abcdefghij"
    text = "".join(rng.choices(letters, k=n))
    if kind == "short words":
        text = " ".join(text[i : i + 6] for i in range(0, len(text), 7))
    merges = train_bpe(text, 1000)
    assert merges[:2] == brute_force(text, 2)
    assert len(merges) == len(ranks(merges)) - 256
    # One letter doubles as long as two of a length are left; then the binary digits are added up.
    one_letter = (n.bit_length() - 1) + (n.bit_count() - 1)
    assert len(merges) == (one_letter if kind == "one letter" else 1000)
