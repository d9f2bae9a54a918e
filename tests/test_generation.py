"""Sampling and the generation loop."""

import math
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import apart, config_of, random_tokens, random_weights

import command_line
import llama3

PROBABILITIES = torch.tensor([0.1, 0.5, 0.05, 0.25, 0.1])


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [  # the likeliest until their sum exceeds top_p; of equals, the first
        (0.0, {1}),
        (0.4999, {1}),
        (0.6, {1, 3}),
        (0.76, {0, 1, 3}),
        (0.86, {0, 1, 3, 4}),
        (0.96, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_the_nucleus_is_its_closed_form(top_p, kept):
    total = sum(PROBABILITIES[i].item() for i in kept)
    expected = [PROBABILITIES[i].item() / total if i in kept else 0.0 for i in range(5)]
    assert llama3.nucleus(PROBABILITIES, top_p).tolist() == pytest.approx(expected)
    batch = llama3.nucleus(torch.stack([PROBABILITIES, PROBABILITIES.flip(0)]), top_p)
    assert batch[0].tolist() == pytest.approx(expected)
    assert batch.sum(-1).tolist() == pytest.approx([1, 1])


def test_the_nucleus_takes_the_first_of_equals_and_the_token_that_its_sum_just_reaches():
    equal = torch.full((1000,), 2.0**-10)
    kept = llama3.nucleus(equal, 0.25).nonzero().flatten()
    assert kept.tolist() == list(range(257))  # 256 sum up to 1/4, and one more exceeds it
    quarters = torch.tensor([0.25, 0.5, 0.25])
    assert llama3.nucleus(quarters, 0.5).tolist() == pytest.approx([1 / 3, 2 / 3, 0])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_samples_have_the_frequencies_of_the_closed_form(temperature, top_p):
    logits = PROBABILITIES.log() + 3.0
    powers = [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    expected = [p / sum(powers) for p in powers]
    if top_p == 0.8:
        expected = [0.1 / 0.85, 0.5 / 0.85, 0, 0.25 / 0.85, 0]
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    drawn = llama3.sample(logits.expand(n, 5), llama3.Sampling(temperature, top_p), generator)
    assert drawn.shape == (n,)
    shares = (torch.bincount(drawn, minlength=5) / n).tolist()
    for share, p in zip(shares, expected, strict=True):
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n)


def test_temperature_zero_takes_the_likeliest_token_without_any_randomness():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert llama3.sample(logits).tolist() == [1, 0]
    assert llama3.sample(logits[0]).item() == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9, 1e4, 1e6])
def test_extreme_temperatures_still_give_a_distribution(temperature):
    scores = [1e4, -1e4, 9.9e3]
    n, generator = 20_000, torch.Generator().manual_seed(0)
    logits = torch.tensor(scores).expand(n, 3)
    drawn = llama3.sample(logits, llama3.Sampling(temperature), generator)
    shares = (torch.bincount(drawn, minlength=3) / n).tolist()
    powers = [math.exp((score - 1e4) / max(temperature, 1e-9)) for score in scores]
    for share, power in zip(shares, powers, strict=True):
        p = power / sum(powers)
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n)


def test_top_k_min_p_and_the_penalty_are_their_closed_forms():
    p = PROBABILITIES  # 0.1, 0.5, 0.05, 0.25, 0.1
    assert llama3.top_k(p, 1).tolist() == [0, 1, 0, 0, 0]
    assert llama3.top_k(p, 2).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])
    equals = [0.1 / 0.95, 0.5 / 0.95, 0, 0.25 / 0.95, 0.1 / 0.95]
    assert llama3.top_k(p, 3).tolist() == pytest.approx(equals)  # both that are third
    assert llama3.top_k(p, 9).tolist() == pytest.approx(p.tolist())
    assert llama3.min_p(p, 0.5).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])
    assert llama3.min_p(p, 0.15).tolist() == pytest.approx(equals)
    assert llama3.min_p(p, 1).tolist() == [0, 1, 0, 0, 0]
    assert llama3.min_p(p, 0).tolist() == pytest.approx(p.tolist())
    for keep in (lambda p: llama3.top_k(p, 2), lambda p: llama3.min_p(p, 0.5)):
        batch = keep(torch.stack([p, p.flip(0)]))
        assert batch[0].tolist() == pytest.approx(keep(p).tolist())
        assert batch[1].tolist() == pytest.approx(keep(p.flip(0)).tolist())
    seen = torch.tensor([True, True, False, False, True])
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0])
    assert llama3.penalized(logits, seen, 4).tolist() == [0.5, -8, 2, -2, 0]


def test_all_of_them_together_are_those_of_transformers():
    """In the order that is documented: penalty, temperature, top_k, top_p, min_p."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40, 300, generator=generator)
    prompts = torch.randint(0, 300, (40, 20), generator=generator)
    seen = torch.zeros(40, 300, dtype=torch.bool).scatter(1, prompts, True)
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.7)(prompts, logits)
    assert torch.allclose(llama3.penalized(logits, seen, 1.7), penalty)
    p = torch.softmax(logits, -1)
    expected = torch.softmax(transformers.TopKLogitsWarper(7)(None, logits), -1)
    assert torch.allclose(llama3.top_k(p, 7), expected)
    expected = torch.softmax(transformers.MinPLogitsWarper(0.05)(None, logits), -1)
    assert torch.allclose(llama3.min_p(p, 0.05), expected)
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

    sampling = llama3.Sampling(1.6, 0.9, top_k=12, min_p=0.1, repetition_penalty=1.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        llama3.sample(logits, sampling, None, seen)
    assert torch.allclose(drawn_from[0], torch.softmax(warped, -1), atol=1e-6)
    assert (drawn_from[0] > 0).sum(-1).float().mean() < 11  # each takes some away
    greedy = llama3.Sampling(repetition_penalty=1.3)
    assert torch.equal(
        llama3.sample(logits, greedy, None, seen), steps[0](prompts, logits).argmax(-1)
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 1e7, 10**400, "hot", None, True, [1.0]]),
        ("top_p", [-0.1, 1.1, math.nan, "x", None, False]),
        ("seed", [-1, 2**63, 1.0, math.nan, "x", True]),
        ("top_k", [-1, 1.5, math.nan, None]),
        ("min_p", [-0.1, 1.1, math.nan, None]),
        ("repetition_penalty", [0, -1, math.inf, math.nan, None]),
    ],
)
def test_a_sampling_with_an_impossible_value_cannot_be_made(name, values):
    for value in values:
        for make in (llama3.Sampling, llama3.GREEDY._replace):
            with pytest.raises(
                ValueError, match=f"^{name}: found .*, expected a .*number from 0.* to"
            ):
                make(**{name: value})


def test_a_sampling_is_a_plain_record_with_defaults_that_take_the_likeliest_token():
    assert llama3.GREEDY == llama3.Sampling() == (0.0, 1.0, None, 0, 0.0, 1.0)
    sampling = llama3.Sampling(0.7, seed=np.int64(3), top_p=np.float32(0.5))
    assert sampling[:3] == (0.7, 0.5, 3)
    assert sampling._replace(temperature=1) == llama3.Sampling(1, 0.5, 3)
    assert [type(value) for value in sampling] == [float, float, int, int, float, float]
    assert pickle.loads(pickle.dumps(sampling)) == sampling


# --- generation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("model"))
    return random_weights(config), config


PROMPT = [256, 7, 8, 9]


def test_greedy_tokens_are_those_of_the_whole_sequence_computed_anew_each_time(model):
    weights, config = model
    tokens = list(PROMPT)
    for _ in range(30):
        tokens.append(llama3.forward(torch.tensor(tokens), weights, config)[-1].argmax().item())
    assert list(llama3.generate(PROMPT, *model, max_new_tokens=30)) == tokens[len(PROMPT) :]


def test_the_demos_greedy_tokens_are_the_same_with_and_without_a_cache(demo_weights, demo_config):
    tokens = [1024, 84, 104, 101]
    for _ in range(60):
        logits = llama3.forward(torch.tensor(tokens), demo_weights, demo_config)
        tokens.append(logits[-1].argmax().item())
    generated = llama3.generate(tokens[:4], demo_weights, demo_config, max_new_tokens=60)
    assert list(generated) == tokens[4:]


def test_the_same_seed_gives_the_same_tokens_and_no_seed_different_ones(model):
    def drawn(seed):
        sampling = llama3.Sampling(temperature=1.5, top_p=0.95, seed=seed)
        return list(llama3.generate(PROMPT, *model, max_new_tokens=40, sampling=sampling))

    assert drawn(7) == drawn(7)
    assert len({tuple(drawn(seed)) for seed in (7, 8, None, None)}) == 4


def test_the_global_random_state_is_neither_read_nor_changed(model):
    torch.manual_seed(1)
    state = torch.get_rng_state()

    def drawn(seed):
        sampling = llama3.Sampling(temperature=1.0, seed=seed)
        return list(llama3.generate(PROMPT, *model, max_new_tokens=20, sampling=sampling))

    first = drawn(3)
    assert drawn(None) != first
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert drawn(3) == first


def test_generation_ends_before_a_stop_token(model):
    tokens = list(llama3.generate(PROMPT, *model, max_new_tokens=30))
    stop = tokens[12]
    stopped = list(llama3.generate(PROMPT, *model, max_new_tokens=30, stop_tokens={stop}))
    assert stopped == tokens[: tokens.index(stop)]


@pytest.mark.parametrize(
    ("max_new_tokens", "max_seq_len", "length"), [(5, 100, 5), (5, 6, 2), (5, 4, 0), (0, 100, 0)]
)
def test_generation_ends_after_max_new_tokens_or_at_the_end_of_the_context(
    model, max_new_tokens, max_seq_len, length
):
    settings = {"max_new_tokens": max_new_tokens, "max_seq_len": max_seq_len}
    assert len(list(llama3.generate(PROMPT, *model, **settings))) == length


def test_tokens_are_computed_only_when_they_are_asked_for(model, monkeypatch):
    calls = []
    forward = llama3.forward

    def counting(tokens, *args, **kwargs):
        calls.append(tokens.shape[-1])
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(llama3, "forward", counting)
    tokens = llama3.generate(PROMPT, *model, max_new_tokens=10)
    assert calls == []
    next(tokens)
    assert calls == [4]  # prefill: the whole prompt at once
    next(tokens)
    next(tokens)
    assert calls == [4, 1, 1]  # decode: one token a step


def test_steps_use_the_product_of_one_vector_and_the_prompt_does_not(model, monkeypatch):
    weights, config = model
    used, one = [], llama3.product_of_one
    torch._C._set_mkldnn_enabled(True)  # as it is when nothing has changed it
    monkeypatch.setattr(llama3, "product_of_one", lambda x, w: used.append(x.shape) or one(x, w))
    tokens = llama3.generate([7], weights, config, max_new_tokens=3)
    next(tokens)
    assert used == []  # a prompt of one token has the bits of the whole sequence
    next(tokens)
    assert len(used) == 7 * config.n_layers + 1
    assert set(used) == {(1, 1, config.dim), (1, 1, config.ffn_dim)}
    assert torch._C._get_mkldnn_enabled()
    with pytest.raises(RuntimeError):
        one(torch.ones(1, 3), torch.ones(2, 4))
    assert torch._C._get_mkldnn_enabled()


def test_a_prompt_goes_through_in_blocks_each_against_the_keys_up_to_its_end(model, monkeypatch):
    prompt = random_tokens(model[1], 100).tolist()
    expected = list(llama3.generate(prompt, *model, max_new_tokens=20))
    calls, seen = [], []
    forward = llama3.forward

    def watched(tokens, *args, cache, **kwargs):
        calls.append((tokens.shape[-1], cache.shape[-2]))
        return forward(tokens, *args, cache=cache, **kwargs)

    def progress(blocks):
        for block in blocks:
            seen.append(block.shape[-1])
            yield block

    monkeypatch.setattr(llama3, "forward", watched)
    monkeypatch.setattr(llama3, "PREFILL_TOKENS", 30)
    tokens = llama3.generate(prompt, *model, max_new_tokens=20, progress=progress)
    assert list(tokens) == expected
    assert calls[:5] == [(30, 30), (30, 60), (30, 90), (10, 100), (1, 101)]
    assert len(calls) == 4 + 19  # nothing is computed that no one asks for
    assert seen == [30, 30, 30, 10]


def test_a_step_records_no_gradients_and_sees_only_the_cache_up_to_itself(model, monkeypatch):
    weights = {name: weight.clone().requires_grad_() for name, weight in model[0].items()}
    seen = []
    forward = llama3.forward

    def watched(tokens, *args, cache, **kwargs):
        logits = forward(tokens, *args, cache=cache, **kwargs)
        seen.append((cache.shape[-2], logits.is_inference(), logits.requires_grad))
        return logits

    monkeypatch.setattr(llama3, "forward", watched)
    assert len(list(llama3.generate(PROMPT, weights, model[1], max_new_tokens=4))) == 4
    assert seen == [(length, True, False) for length in (4, 5, 6, 7)]


def test_inference_mode_does_not_leak_into_the_code_that_takes_the_tokens(model):
    for _ in llama3.generate(PROMPT, *model, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt_tokens": []}, "0 tokens"),
        ({"prompt_tokens": [0] * 9000}, "9000 tokens"),
        ({"prompt_tokens": [1280]}, "0 to 1279"),
        ({"prompt_tokens": [-1]}, "0 to 1279"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_seq_len": 0}, "4 tokens"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_at_once(model, changes, says):
    arguments = {"prompt_tokens": PROMPT, "max_new_tokens": 3} | changes
    with pytest.raises(ValueError, match=says):
        llama3.generate(arguments.pop("prompt_tokens"), *model, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_of_any_type_are_the_likeliest_of_the_whole_sequence_in_it(model, dtype):
    weights, config = model
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    tokens = random_tokens(config, 6).tolist()
    new = list(llama3.generate(tokens, cast, config, max_new_tokens=12))
    logits = llama3.forward(torch.tensor(tokens + new), cast, config)[5:-1]
    chosen = logits.gather(-1, torch.tensor(new)[:, None])[:, 0]
    allowed = 0.05 if dtype == torch.bfloat16 else 0.005  # its steps round otherwise
    assert (logits.amax(-1) - chosen).max() <= allowed * logits.abs().max()


# --- batches, log-probabilities, contexts, scores -------------------------------------------------


def test_a_batch_of_unequal_prompts_has_the_tokens_of_each_alone(model):
    prompts = [random_tokens(model[1], n, seed=n).tolist() for n in (1, 9, 40, 23)]
    alone = [[*llama3.generate(p, *model, max_new_tokens=30)] for p in prompts]
    steps = [tokens.tolist() for tokens, _ in llama3.steps(prompts, *model, max_new_tokens=30)]
    assert [[*row] for row in zip(*steps, strict=True)] == alone
    assert len({len(set(row)) for row in alone}) > 1


def test_a_batch_in_blocks_is_the_same(model, monkeypatch):
    prompts = [random_tokens(model[1], n, seed=n).tolist() for n in (3, 70)]
    expected = [t.tolist() for t, _ in llama3.steps(prompts, *model, max_new_tokens=9)]
    monkeypatch.setattr(llama3, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(llama3, "MOST_SCORES", 500)
    assert [t.tolist() for t, _ in llama3.steps(prompts, *model, max_new_tokens=9)] == expected


def test_a_row_that_has_ended_gives_minus_one_until_all_have(model):
    prompts = [random_tokens(model[1], n, seed=n).tolist() for n in (5, 8)]
    alone = [[*llama3.generate(p, *model, max_new_tokens=12)] for p in prompts]
    stop = [alone[0][2], alone[1][9]]
    rows = [row[: next((i for i, t in enumerate(row) if t in stop), 12)] for row in alone]
    assert len(rows[0]) == 2 < len(rows[1])
    options = {"max_new_tokens": 12, "stop_tokens": stop}
    steps = [tokens.tolist() for tokens, _ in llama3.steps(prompts, *model, **options)]
    first, second = zip(*steps, strict=True)
    assert [*first] == rows[0] + [-1] * (len(rows[1]) - 2)
    assert [*second] == rows[1]


def test_a_step_gives_the_models_own_distribution(model):
    prompt = random_tokens(model[1], 12).tolist()
    sampling = llama3.Sampling(2.0, 0.5, 1, top_k=3, min_p=0.1, repetition_penalty=2.0)
    tokens = list(prompt)
    for chosen, logprobs in llama3.steps([prompt], *model, max_new_tokens=5, sampling=sampling):
        logits = llama3.forward(torch.tensor(tokens), *model)[-1]
        assert logprobs.shape == (1, model[1].vocab_size)
        assert apart(logprobs[0], torch.log_softmax(logits, -1)) < 1e-5
        tokens.append(chosen.item())


def test_the_penalty_looks_at_prompt_and_completion(model, monkeypatch):
    """Of logits that are always the same, the next best that neither has is taken each time."""
    logits = 100 - torch.arange(model[1].vocab_size).float()
    monkeypatch.setattr(
        llama3, "forward", lambda tokens, *_, **__: logits.expand(len(tokens), 1, -1)
    )
    sampling = llama3.Sampling(repetition_penalty=100)
    prompts = [[0, 2, 9], [1]]
    steps = llama3.steps(prompts, *model, max_new_tokens=5, sampling=sampling)
    rows = zip(*(tokens.tolist() for tokens, _ in steps), strict=True)
    assert [*rows] == [(1, 3, 4, 5, 6), (0, 2, 3, 4, 5)]
    steps = llama3.steps(prompts, *model, max_new_tokens=2)
    assert [tokens.tolist() for tokens, _ in steps] == [[0, 0]] * 2


def test_a_context_is_gone_on_from(model, monkeypatch):
    """What two prompts begin with is read once, and the tokens are the same."""
    read, forward = [], llama3.forward

    def counting(tokens, *args, **kwargs):
        read.append(tokens.shape[-1])
        return forward(tokens, *args, **kwargs)

    first = random_tokens(model[1], 50).tolist()
    context = llama3.Context()
    monkeypatch.setattr(llama3, "forward", counting)
    answer = [*llama3.generate(first, *model, max_new_tokens=10, context=context)]
    assert (sum(read), context.tokens) == (59, first + answer[:-1])
    for prompt, new in (
        (first + answer + [7, 8, 9], 4),  # the last token of the answer was not read yet
        (first + answer + [7, 8, 9], 1),  # for the logits of the last token
        ([*first[:20], 5, *first[:7]], 8),
        (first[:3], 1),
        ([9, 9], 2),
    ):
        monkeypatch.setattr(llama3, "forward", forward)
        expected = [*llama3.generate(prompt, *model, max_new_tokens=300)]
        monkeypatch.setattr(llama3, "forward", counting)
        read.clear()
        ours = [*llama3.generate(prompt, *model, max_new_tokens=300, context=context)]
        assert ours == expected
        assert sum(read) == new + 299
        context.tokens = context.tokens[: len(prompt)]


def test_a_context_of_a_batch_is_not_gone_on_from(model):
    context = llama3.Context()
    prompts = [[1, 2, 3, 4], [2, 3]]
    [*llama3.steps(prompts, *model, max_new_tokens=2, context=context)]
    expected = [*llama3.generate([1, 2, 3, 4, 7], *model, max_new_tokens=5)]
    assert [
        *llama3.generate([1, 2, 3, 4, 7], *model, max_new_tokens=5, context=context)
    ] == expected


def test_a_score_is_the_log_probability_of_each_token_after_those_before(model, monkeypatch):
    tokens = random_tokens(model[1], 70)
    logprobs = torch.log_softmax(llama3.forward(tokens, *model), -1)
    expected = logprobs[:-1].gather(1, tokens[1:, None])[:, 0]
    score = command_line.scored_tokens
    assert apart(score(tokens.tolist(), *model), expected) < 1e-5
    assert apart(score(tokens.tolist(), *model, first=30), expected[29:]) < 1e-5
    monkeypatch.setattr(command_line, "SCORED_LOGITS", 9 * model[1].vocab_size)
    seen = []

    def progress(blocks):
        seen.extend(blocks)
        return blocks

    assert apart(score(tokens.tolist(), *model, progress=progress), expected) < 1e-5
    assert seen == [*range(0, 69, 9)]  # some rows of logits at a time
    for bad in ([99999], [-1], "ab", [1.5]):
        with pytest.raises(ValueError, match="the text: found"):
            score(bad, *model)
    with pytest.raises(ValueError, match="first: found 0, expected a whole number from 1"):
        score([5, 6], *model, first=0)
    assert score([5], *model).shape == (0,)
    assert score([5, 6], *model).shape == (1,)
