"""How the command chooses tokens: each filter's closed form, and all together as transformers."""

import argparse

import pytest
import torch
import transformers

import llama3
from cli.options import parse_arguments
from cli.sampling import Sampler, min_p, penalize, top_k

PROBABILITIES = torch.tensor([0.1, 0.5, 0.05, 0.25, 0.1])


def sampler(prompts=(), **settings):
    """A Sampler with the options' defaults but for `settings`."""
    args = vars(parse_arguments(["--prompt", "a"])) | settings
    return Sampler(argparse.Namespace(**args), prompts, torch.device("cpu"))


def test_top_k_min_p_and_the_penalty_are_their_closed_forms():
    p = PROBABILITIES
    assert top_k(p, 1).tolist() == [0, 1, 0, 0, 0]
    assert top_k(p, 2).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])
    equals = [0.1 / 0.95, 0.5 / 0.95, 0, 0.25 / 0.95, 0.1 / 0.95]
    assert top_k(p, 3).tolist() == pytest.approx(equals)  # both that are third
    assert top_k(p, 9).tolist() == pytest.approx(p.tolist())
    assert min_p(p, 0.5).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])
    assert min_p(p, 0.15).tolist() == pytest.approx(equals)
    assert min_p(p, 1).tolist() == [0, 1, 0, 0, 0]
    assert min_p(p, 0).tolist() == pytest.approx(p.tolist())
    for keep in (lambda p: top_k(p, 2), lambda p: min_p(p, 0.5)):
        batch = keep(torch.stack([p, p.flip(0)]))
        assert batch[0].tolist() == pytest.approx(keep(p).tolist())
        assert batch[1].tolist() == pytest.approx(keep(p.flip(0)).tolist())
    seen = torch.tensor([True, True, False, False, True])
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0])
    assert penalize(logits, seen, 4).tolist() == [0.5, -8, 2, -2, 0]


def test_all_of_them_together_are_those_of_transformers(monkeypatch):
    """In the order that is documented: penalty, temperature, top_k, top_p, min_p."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40, 300, generator=generator)
    prompts = torch.randint(0, 300, (40, 20), generator=generator)
    seen = torch.zeros(40, 300, dtype=torch.bool).scatter(1, prompts, True)
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.7)(prompts, logits)
    assert torch.allclose(penalize(logits, seen, 1.7), penalty)
    p = torch.softmax(logits, -1)
    expected = torch.softmax(transformers.TopKLogitsWarper(7)(None, logits), -1)
    assert torch.allclose(top_k(p, 7), expected)
    expected = torch.softmax(transformers.MinPLogitsWarper(0.05)(None, logits), -1)
    assert torch.allclose(min_p(p, 0.05), expected)
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(1.6),
        transformers.TopKLogitsWarper(12),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.1),
    ]
    warped = logits
    for step in steps:
        warped = step(prompts, warped)
    drawn_from = []

    def multinomial(probabilities, *_, **__):
        drawn_from.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    filters = {"temperature": 1.6, "top_k": 12, "top_p": 0.9, "min_p": 0.1}
    sampler(prompts.tolist(), **filters, repetition_penalty=1.3)(logits)
    assert torch.allclose(drawn_from[0], torch.softmax(warped, -1), atol=1e-6)
    assert (drawn_from[0] > 0).sum(-1).float().mean() < 11  # each takes some away
    likeliest = sampler(prompts.tolist(), repetition_penalty=1.3)(logits)
    assert torch.equal(likeliest, steps[0](prompts, logits).argmax(-1))


def test_the_options_that_llama3_has_too_draw_the_same_tokens():
    """And the filters that do nothing change nothing, not even in the last bit."""
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in [(0, 1), (0.3, 1), (1.7, 0.8), (1e-40, 1), (1e6, 0.5)]:
        ours = sampler(temperature=temperature, top_p=top_p, seed=5)
        generator = torch.Generator().manual_seed(5)
        for _ in range(20):
            expected = llama3.sample(logits, temperature, top_p, generator)
            assert torch.equal(ours(logits), expected)


def test_a_seed_repeats_the_choices_and_without_one_they_differ():
    logits = torch.zeros(1, 100)

    def drawn(seed):
        choose = sampler(temperature=1.0, seed=seed)
        return tuple(choose(logits).item() for _ in range(20))

    state = torch.get_rng_state()
    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in (3, 4, None, None)}) == 4
    assert torch.equal(torch.get_rng_state(), state)  # everyone else's random numbers stay


def test_the_penalty_looks_at_prompt_and_completion():
    """Of logits that are always the same, the next best that neither has is taken each time."""
    logits = 100 - torch.arange(50).float().expand(2, -1)
    prompts = [[0, 2, 9], [1, 77]]  # of a model with more tokens than its tokenizer has
    choose = sampler(prompts, repetition_penalty=100.0)
    rows = [choose(logits).tolist() for _ in range(5)]
    assert rows == [[1, 0], [3, 2], [4, 3], [5, 4], [6, 5]]
    choose = sampler(prompts)
    assert [choose(logits).tolist() for _ in range(2)] == [[0, 0]] * 2
