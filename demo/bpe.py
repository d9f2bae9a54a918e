"""Byte-pair encoding, trained by hand: from a text to the merges of a tokenizer.

Start from single bytes; again and again, find the pair of neighbouring tokens that occurs most
often and make it one token (Sennrich et al. 2016, on bytes as in GPT-2). The merges in the order in
which they were found are the tokenizer: the earlier one wins.
"""

import base64
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex  # tiktoken depends on it: unlike re, it knows \p{L} and \p{N}
from tqdm import trange

from tokenizer_setup import SPLIT_PATTERN

NONE = -1  # no such token, no such place


def split(text: str, special_tokens: Iterable[str] = ()) -> Iterator[bytes]:
    """The parts of `text` that merges stay inside of: cut at special tokens, then by the pattern.

    The special tokens themselves are left out: they are never made of bytes.
    """
    longest_first = sorted(special_tokens, key=len, reverse=True)
    parts = re.split("|".join(map(re.escape, longest_first)), text) if longest_first else [text]
    for part in parts:
        for piece in regex.findall(SPLIT_PATTERN, part):
            yield piece.encode()


def train_bpe(
    text: str, n_merges: int, special_tokens: Iterable[str] = (), progress: bool = False
) -> list[tuple[bytes, bytes]]:
    """Find the first `n_merges` merges of `text`, fewer if nothing is left to merge.

    The most frequent pair is merged first; among equals, the greater pair of byte strings.

    Each distinct piece of the text stands once, with how often it occurs, in one long row of
    tokens that are linked to their neighbours. Every pair knows the places where it has begun, so
    that a merge visits those and changes the counts of the pairs around them; nothing is recounted.
    """
    vocabulary = [bytes([byte]) for byte in range(256)]
    row: list[int] = []  # a token at each place; NONE once it was merged into the one before
    before: list[int] = []  # the place of its neighbour within the piece, or NONE
    after: list[int] = []
    weight: list[int] = []  # how often the piece occurs
    for piece, count in Counter(split(text, special_tokens)).items():
        first, last = len(row), len(row) + len(piece) - 1
        row.extend(piece)
        before.extend([NONE, *range(first, last)])
        after.extend([*range(first + 1, last + 1), NONE])
        weight.extend([count] * len(piece))

    counts: Counter[tuple[int, int]] = Counter()
    places: dict[tuple[int, int], list[int]] = defaultdict(list)  # in ascending order, some stale
    for place, following in enumerate(after):
        if following != NONE:
            pair = row[place], row[following]
            counts[pair] += weight[place]
            places[pair].append(place)

    # A heap of pairs, the one to merge next on top. Counts that have changed since are put right
    # when they come up. heapq puts the least on top, so counts and bytes are turned round; 256
    # ends a byte string, so that of two, one the beginning of the other, the longer comes first.
    def entry(pair: tuple[int, int]) -> tuple:
        turned = ((*(255 - byte for byte in vocabulary[token]), 256) for token in pair)
        return -counts[pair], *turned, pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)

    merges = []
    for _ in trange(n_merges, desc="merges", leave=False, disable=None if progress else True):
        while heap and -heap[0][0] != counts[heap[0][-1]]:
            stale = heapq.heappop(heap)[-1]
            if counts[stale] > 0:
                heapq.heappush(heap, entry(stale))
        if not heap:
            break
        pair = left, right = heapq.heappop(heap)[-1]
        merged = len(vocabulary)
        vocabulary.append(vocabulary[left] + vocabulary[right])
        merges.append((vocabulary[left], vocabulary[right]))

        grown = set()
        for place in places.pop(pair):
            second = after[place]
            if row[place] != left or second == NONE or row[second] != right:
                continue  # an earlier merge has taken one of the two
            previous, following = before[place], after[second]
            if previous != NONE:
                counts[row[previous], left] -= weight[place]
                counts[row[previous], merged] += weight[place]
                places[row[previous], merged].append(previous)
                grown.add((row[previous], merged))
            if following != NONE:
                counts[right, row[following]] -= weight[place]
                counts[merged, row[following]] += weight[place]
                places[merged, row[following]].append(place)
                grown.add((merged, row[following]))
                before[following] = place
            row[place], row[second], after[place] = merged, NONE, following
        del counts[pair]
        for pair in grown:
            if counts[pair] > 0:  # else this very merge has taken it apart again
                heapq.heappush(heap, entry(pair))
    return merges


def ranks(merges: Iterable[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """The vocabulary as tiktoken wants it: the 256 bytes, then what each merge makes, numbered."""
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    return {token: rank for rank, token in enumerate(tokens)}


def save_tokenizer(merges: Iterable[tuple[bytes, bytes]], path: Path) -> None:
    """Write a tokenizer.model like Meta's: on each line a token's bytes in base64 and its rank."""
    with path.open("w") as file:
        for token, rank in ranks(merges).items():
            file.write(f"{base64.b64encode(token).decode()} {rank}\n")
