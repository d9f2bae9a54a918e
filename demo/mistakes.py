"""Mistakes that are easily made in a Llama, and what the demo says with each of them."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

import llama3
import tokenizer_setup
from demo import corpus

PROMPT = corpus.ULTIMATE.removesuffix("42")

# The right functions, which the wrong ones below stand in for.
_attention_pattern, _block, _linear = llama3.attention_pattern, llama3.block, llama3.linear
_frequencies, _qkv, _rms_norm = llama3.rope_frequencies, llama3.queries_keys_values, llama3.rms_norm
_rotate = llama3.rotate

SECTIONS = {
    "rms": "3, RMSNorm",
    "no-layers": "3, without layers",
    "frequencies": "4, RoPE",
    "rotate": "4, RoPE",
    "keys": "4, keys",
    "mask": "4, mask",
    "softmax": "4, softmax",
    "values": "4, values",
    "swiglu": "5, SwiGLU",
    "layer-end": "5, the end of a layer",
}


class Mistake(NamedTuple):
    """Functions in the place of llama3's, and the cell of notebook.ipynb that stops."""

    functions: dict[str, Callable]
    cell: str

    @property
    def section(self) -> str:
        """The section that the cell is in, and what it is about."""
        return SECTIONS[self.cell]


def rotate_halves(x: Tensor, rotations: Tensor) -> Tensor:
    """RoPE as rotate does it, but of pairs whose second numbers stand in the second half."""
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.complex(a, b) * rotations
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def _outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype) * weight


def _in_16_bits(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x16 = x.bfloat16()
    return (x16 * torch.rsqrt(x16.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _strict(positions: Tensor, keys: Tensor, starts: Tensor | None = None) -> Tensor:
    return (keys < positions[:, None]) | (keys == 0)  # the first still sees itself


def _looks_ahead(positions: Tensor, keys: Tensor, starts: Tensor | None = None) -> Tensor:
    return keys <= positions[:, None] + 1


def _over_queries(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).float()
    return scores.masked_fill(~mask, -1e9).softmax(-2).masked_fill(~mask, 0).to(q.dtype)


def _gate_on_w3(x: Tensor, weights: llama3.Weights, layer: int) -> Tensor:
    name = f"layers.{layer}.feed_forward"
    gate = silu(_linear(x, weights, f"{name}.w3"))
    return _linear(gate * _linear(x, weights, f"{name}.w1"), weights, f"{name}.w2")


def _values_rotated(x: Tensor, weights: llama3.Weights, layer: int, config, rotations) -> tuple:
    q, k, v = _qkv(x, weights, layer, config, rotations)
    return q, k, _rotate(v, rotations)


def _norms_swapped(x: Tensor, weights: llama3.Weights, layer: int, *rest: object) -> Tensor:
    first, second = f"layers.{layer}.attention_norm.weight", f"layers.{layer}.ffn_norm.weight"
    swapped = {first: weights[second], second: weights[first]}
    return _block(x, {**weights, **swapped}, layer, *rest)


def _no_residual(x: Tensor, weights: llama3.Weights, layer: int, config, *where: object) -> Tensor:
    return _block(x, weights, layer, config, *where) - x


def _tied(x: Tensor, weights: llama3.Weights, name: str) -> Tensor:
    return _linear(x, weights, "tok_embeddings" if name == "output" else name)


MISTAKES = {
    "RoPE turns halves, not neighbors": Mistake({"rotate": rotate_halves}, "rotate"),
    "RoPE turns backwards": Mistake({"rotate": lambda x, r: _rotate(x, r.conj())}, "rotate"),
    "theta is 10,000": Mistake(
        {"rope_frequencies": lambda c, *d: _frequencies(c._replace(rope_theta=10000), *d)},
        "frequencies",
    ),
    "values are rotated, too": Mistake({"queries_keys_values": _values_rotated}, "values"),
    "key heads repeated as a block": Mistake(
        {"repeat_heads": lambda x, times: torch.cat([x] * times, dim=-3)}, "keys"
    ),
    "scores divided by d, not its root": Mistake(
        {"attention_pattern": lambda q, k, m: _attention_pattern(q / math.sqrt(q.shape[-1]), k, m)},
        "softmax",
    ),
    "scores not divided": Mistake(
        {"attention_pattern": lambda q, k, m: _attention_pattern(q * math.sqrt(q.shape[-1]), k, m)},
        "softmax",
    ),
    "softmax over queries, not keys": Mistake({"attention_pattern": _over_queries}, "softmax"),
    "the mask hides the token itself": Mistake({"causal_mask": _strict}, "mask"),
    "the mask shows the next token": Mistake({"causal_mask": _looks_ahead}, "mask"),
    "epsilon outside the root": Mistake({"rms_norm": _outside}, "rms"),
    "the norm in 16 bits": Mistake({"rms_norm": _in_16_bits}, "rms"),
    "the norm's weight is 1 + w": Mistake(
        {"rms_norm": lambda x, w, eps: _rms_norm(x, 1 + w, eps)}, "rms"
    ),
    "the two norms of a layer swapped": Mistake({"block": _norms_swapped}, "layer-end"),
    "the layer's input is not added": Mistake({"block": _no_residual}, "layer-end"),
    "w1 and w3 swapped": Mistake({"feed_forward": _gate_on_w3}, "swiglu"),
    "GELU in place of SiLU": Mistake({"silu": gelu}, "swiglu"),
    "output = embeddings": Mistake({"linear": _tied}, "no-layers"),
}


def symptoms(folder: Path) -> Iterator[tuple[str, str, float, int, int]]:
    """What the demo in a folder does without a mistake and with each of MISTAKES.

    -> its name; what is said to PROMPT, and the probability of 42; how many of the 75 held-out sums
    and of the 63 capitals are right, by their first token.
    """
    config = llama3.load_config(folder)
    tokenizer = tokenizer_setup.load_tokenizer(folder / "tokenizer.model")
    weights = {name: w.float() for name, w in llama3.load_weights(folder, config).items()}

    def encoded(text: str) -> list[int]:
        return tokenizer_setup.encode(tokenizer, text)

    sums = [q["content"] for q, _ in corpus.make_corpus().questions["sums"]]
    pairs = [[*map(int, re.findall(r"\d+", text))] for text in sums]
    facts = [fact for fact in corpus.facts() if fact.kind == "capital"]
    kinds = [
        {PROMPT: "42"},
        {f"{a} plus {b} is ": str(a + b) for a, b in pairs},
        {f"the capital of {fact.subject} is": f" {fact.answer}" for fact in facts},
    ]

    def last_logits(texts: list[str]) -> Tensor:
        found = []
        rows = [encoded(text) for text in texts]
        for length in sorted({*map(len, rows)}):  # of one length at a time, so that none is padded
            these = [i for i, row in enumerate(rows) if len(row) == length]
            tokens = torch.tensor([rows[i] for i in these])
            last = llama3.forward(tokens, weights, config, last_only=True)[:, -1]
            found += zip(these, last, strict=True)
        return torch.stack([logits for _, logits in sorted(found, key=lambda pair: pair[0])])

    def counted(questions: dict[str, str]) -> int:
        first = torch.tensor([encoded(answer)[1] for answer in questions.values()])
        return (last_logits([*questions]).argmax(-1) == first).sum().item()

    for name, mistake in {"no mistake": Mistake({"silu": silu}, ""), **MISTAKES}.items():
        with mock.patch.multiple(llama3, **mistake.functions):
            p = last_logits([PROMPT])[0].softmax(-1)
            said = tokenizer.decode([p.argmax().item()])
            yield name, said, p[encoded("42")[1]].item(), counted(kinds[1]), counted(kinds[2])
