"""Whether answers to the notebooks' exercises are right: they are computed from the model at hand.

Spoilers below.
"""

import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import llama3
import tokenizer_setup
from demo import corpus
from demo.mistakes import rotate_halves


def _pattern(ids: Tensor, weights: llama3.Weights, config: llama3.Config, layer: int) -> Tensor:
    """A layer's patterns, [n_heads, T, T]."""
    found = []

    def kept(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        found.append(pattern_now(q, k, mask))
        return found[-1]

    pattern_now = llama3.attention_pattern
    with mock.patch.object(llama3, "attention_pattern", kept):
        llama3.forward(ids, weights, config._replace(n_layers=layer + 1))
    return found[-1]


def checker(
    config: llama3.Config,
    weights: llama3.Weights,
    tokenizer: Any,
    prompt: str,
    head: int = 0,
) -> Callable[[str, Any], None]:
    """A function check(exercise, answer) that says whether an answer is right.

    Whole numbers and pairs must be equal, other numbers to three digits.
    """
    exact = {name: w.float() if w.dim() == 1 else w for name, w in weights.items()}
    device = weights["norm.weight"].device

    def encoded(text: str) -> Tensor:
        return torch.tensor(tokenizer_setup.encode(tokenizer, text), device=device)

    def logits(text: str) -> Tensor:
        return llama3.forward(encoded(text), exact, config, last_only=True)[-1]

    def root() -> float:
        q_scale = math.sqrt(config.head_dim)
        pattern_now = llama3.attention_pattern
        without = lambda q, k, mask: pattern_now(q * q_scale, k, mask)  # noqa: E731
        with mock.patch.object(llama3, "attention_pattern", without):
            return _pattern(encoded(prompt), weights, config, 0)[head, -2:][0].max().item()

    def one_layer_less() -> int:
        fewer = config._replace(n_layers=config.n_layers - 1)
        return llama3.forward(encoded(prompt), weights, fewer)[-1].argmax().item()

    def hot() -> int:
        ids = encoded("the opposite of hot is")
        text = [tokenizer.decode_single_token_bytes(token) for token in ids.tolist()]
        place = text.index(b" hot")
        layers = range(config.n_layers)
        return max(layers, key=lambda i: _pattern(ids, exact, config, i)[:, -1, place].max())

    def capitals() -> tuple[int, int]:
        facts = [fact for fact in corpus.facts() if fact.kind == "capital"]
        facts = facts[: 1000 if config.dim < 300 else 12]
        questions = [f"the capital of {fact.subject} is" for fact in facts]
        rows = [encoded(question) for question in questions]
        first = [tokenizer_setup.encode(tokenizer, f" {f.answer}", bos=False)[0] for f in facts]
        longest = max(map(len, rows))
        padded = torch.stack([torch.cat([r.new_zeros(longest - len(r)), r]) for r in rows])
        starts = torch.tensor([longest - len(row) for row in rows], device=device)

        def right(layer: int, head: int) -> int:
            name = f"layers.{layer}.attention.wo.weight"
            wo = exact[name].clone().view(config.dim, config.n_heads, config.head_dim)
            wo[:, head] = 0
            changed = exact | {name: wo.flatten(1)}
            found = llama3.forward(padded, changed, config, starts=starts, last_only=True)[:, -1]
            return (found.argmax(-1) == torch.tensor(first, device=device)).sum().item()

        heads = [(i, h) for i in range(config.n_layers) for h in range(config.n_heads)]
        return min(heads, key=lambda at: right(*at))

    def last_turn() -> float:
        return 2 * math.pi * 10000 ** (1 - 2 / config.head_dim)

    def tied() -> int:
        return 8_030_261_248 - 128_256 * 4096

    def halves() -> int:
        with mock.patch.object(llama3, "rotate", rotate_halves):
            return logits("17 plus 8 is ").argmax().item()

    def five() -> float:
        p = logits("What is the").softmax(-1).topk(5).values
        p = p / p.sum()
        return -(p * p.log()).sum().item()

    solutions = {
        "root": root,
        "one layer less": one_layer_less,
        "broken": lambda: 6,
        "hot": hot,
        "capitals": capitals,
        "between": lambda: "14",
        "last turn": last_turn,
        "tied": tied,
        "halves": halves,
        "five": five,
    }
    solutions = {name: functools.cache(solve) for name, solve in solutions.items()}

    def check(exercise: str, answer: Any) -> None:
        if answer is None:
            print(f"{exercise}: no answer yet")
            return
        answer = answer.item() if isinstance(answer, Tensor) and answer.numel() == 1 else answer
        right = solutions[exercise]()
        same = (tuple(answer) if isinstance(answer, list) else answer) == right
        if isinstance(right, float) and isinstance(answer, int | float):
            same = math.isclose(answer, right, rel_tol=5e-3)
        print(f"{'✓' if same else '✗'} {exercise}: {answer} is {'right' if same else 'not it'}")

    return check
