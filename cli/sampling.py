"""The choice of the next token, beyond llama3.py's temperature and top-p."""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor
from torch import device as Device

import llama3
from cli import ranks


def suggestion(args: Namespace, suggested: Mapping[str, object]) -> str:
    """What a model's files suggest for sampling, as options, if the command says nothing; or ""."""
    usual = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    if any(getattr(args, name) != value for name, value in usual.items()):
        return ""
    found = {name: suggested.get(name) for name in usual if suggested.get("do_sample", True)}
    return " ".join(
        f"--{name.replace('_', '-')} {value:g}"
        for name, value in found.items()
        if type(value) in (int, float) and value != usual[name]
    )


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower the logits [..., V] of seen tokens, bool [..., V], as in CTRL (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _renormalized(probabilities: Tensor, keep: Tensor) -> Tensor:
    kept = probabilities.masked_fill(~keep, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def top_k(probabilities: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, and any as likely as the last of them (Fan et al. 2018)."""
    least = probabilities.topk(min(k, probabilities.shape[-1])).values[..., -1:]
    return _renormalized(probabilities, probabilities >= least)


def min_p(probabilities: Tensor, share: float) -> Tensor:
    """Keep tokens at least `share` times as likely as the likeliest one (Nguyen et al. 2024)."""
    keep = probabilities >= share * probabilities.amax(-1, keepdim=True)
    return _renormalized(probabilities, keep)


class Sampler:
    """Chooses tokens as the options say: logits [B, V] -> int64 [B], the same on all ranks.

    First the repetition penalty goes to the tokens of prompts and completions. Then at temperature
    0 the likeliest is taken; else one is drawn from softmax(logits / temperature), of which first
    top_k, then top_p and then min_p keep a part.
    """

    def __init__(self, args: Namespace, prompts: Sequence[Sequence[int]], device: Device) -> None:
        self.args, self.prompts, self.seen = args, prompts, None
        seed = ranks.agreed(lambda: int.from_bytes(os.urandom(7), "little"))
        self.generator = Generator(device).manual_seed(seed if args.seed is None else args.seed)

    def draw(self, logits: Tensor) -> Tensor:
        logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes inf - inf
        probabilities = torch.softmax(logits / max(self.args.temperature, 1e-30), dim=-1)
        if self.args.top_k:
            probabilities = top_k(probabilities, self.args.top_k)
        if self.args.top_p < 1:
            probabilities = llama3.nucleus(probabilities, self.args.top_p)
        if self.args.min_p:
            probabilities = min_p(probabilities, self.args.min_p)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)

    def __call__(self, logits: Tensor) -> Tensor:
        args = self.args
        if args.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, prompt in zip(self.seen, self.prompts, strict=True):
                    row[[token for token in prompt if token < len(row)]] = True
            logits = penalize(logits, self.seen, args.repetition_penalty)
        tokens = logits.argmax(-1) if args.temperature == 0 else self.draw(logits)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return ranks.agreed_tokens(tokens)
