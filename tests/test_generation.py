"""Sampling and the generation loop."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import apart, config_of, random_tokens, random_weights

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
    drawn = llama3.sample(logits.expand(n, 5), temperature, top_p, generator)
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
    drawn = llama3.sample(logits, temperature, generator=generator)
    shares = (torch.bincount(drawn, minlength=3) / n).tolist()
    powers = [math.exp((score - 1e4) / max(temperature, 1e-9)) for score in scores]
    for share, power in zip(shares, powers, strict=True):
        p = power / sum(powers)
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n)


# --- generation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("model"))
    return random_weights(config), config


PROMPT = [256, 7, 8, 9]


@pytest.fixture
def watched(monkeypatch):
    """The tokens and options of each forward pass, and its logits."""
    calls, forward = [], llama3.forward

    def watching(tokens, weights, config, **options):
        logits = forward(tokens, weights, config, **options)
        calls.append((tokens, weights, options, logits))
        return logits

    monkeypatch.setattr(llama3, "forward", watching)
    return calls


def chosen_tokens(prompts, model, **options):
    """The tokens of each step, as lists."""
    steps = llama3.generate_batch(prompts, *model, **options)
    return [tokens.tolist() for tokens, _ in steps]


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
        options = {"max_new_tokens": 40, "temperature": 1.5, "top_p": 0.95, "seed": seed}
        return list(llama3.generate(PROMPT, *model, **options))

    assert drawn(7) == drawn(7)
    assert len({tuple(drawn(seed)) for seed in (7, 8, None, None)}) == 4


def test_the_global_random_state_is_neither_read_nor_changed(model):
    torch.manual_seed(1)
    state = torch.get_rng_state()

    def drawn(seed):
        options = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed}
        return list(llama3.generate(PROMPT, *model, **options))

    first = drawn(3)
    assert drawn(None) != first
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert drawn(3) == first


def test_a_small_top_p_draws_the_likeliest_token_at_any_temperature(model):
    options = {"max_new_tokens": 20, "temperature": 3.0, "top_p": 0.0}
    greedy = list(llama3.generate(PROMPT, *model, max_new_tokens=20))
    assert list(llama3.generate(PROMPT, *model, **options)) == greedy


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
    weights, config = model[0], model[1]._replace(max_seq_len=max_seq_len)
    tokens = llama3.generate(PROMPT, weights, config, max_new_tokens=max_new_tokens)
    assert len(list(tokens)) == length


def test_tokens_are_computed_only_when_they_are_asked_for(model, watched):
    tokens = llama3.generate(PROMPT, *model, max_new_tokens=10)
    assert watched == []
    next(tokens)
    next(tokens)
    next(tokens)
    lengths = [tokens.shape[-1] for tokens, *_ in watched]
    assert lengths == [4, 1, 1]  # the whole prompt at once, then one token a step


def test_a_prompt_goes_through_in_blocks_each_against_the_keys_up_to_its_end(
    model, watched, monkeypatch
):
    prompt = random_tokens(model[1], 100).tolist()
    expected = list(llama3.generate(prompt, *model, max_new_tokens=20))
    watched.clear()
    seen = []

    def progress(blocks):
        for block in blocks:
            seen.append(block.shape[-1])
            yield block

    monkeypatch.setattr(llama3, "PREFILL_TOKENS", 30)
    tokens = llama3.generate(prompt, *model, max_new_tokens=20, progress=progress)
    assert list(tokens) == expected
    calls = [(t.shape[-1], options["cache"].shape[-2]) for t, _, options, _ in watched]
    assert calls[:5] == [(30, 30), (30, 60), (30, 90), (10, 100), (1, 101)]
    assert len(calls) == 4 + 19  # nothing is computed that no one asks for
    assert seen == [30, 30, 30, 10]


def test_a_step_records_no_gradients_and_sees_only_the_cache_up_to_itself(model, watched):
    weights = {name: weight.clone().requires_grad_() for name, weight in model[0].items()}
    assert len(list(llama3.generate(PROMPT, weights, model[1], max_new_tokens=4))) == 4
    seen = [(o["cache"].shape[-2], y.is_inference(), y.requires_grad) for _, _, o, y in watched]
    assert seen == [(length, True, False) for length in (4, 5, 6, 7)]


def test_inference_mode_does_not_leak_into_the_code_that_takes_the_tokens(model):
    for _ in llama3.generate(PROMPT, *model, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_four_threads_at_once_have_the_tokens_of_each_alone(model):
    """And PyTorch's switch for oneDNN, one for the whole process, stays as it was."""
    prompts = [random_tokens(model[1], 5 + n, seed=n).tolist() for n in range(4)]
    options = {"max_new_tokens": 40, "temperature": 0.7, "seed": 1}

    def tokens_of(prompt):
        return list(llama3.generate(prompt, *model, **options))

    alone = [tokens_of(prompt) for prompt in prompts]
    before = torch._C._get_mkldnn_enabled()
    try:
        for state in (True, False):
            torch._C._set_mkldnn_enabled(state)
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(tokens_of, prompts)) == alone
            assert torch._C._get_mkldnn_enabled() == state
    finally:
        torch._C._set_mkldnn_enabled(before)


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


# --- what it takes --------------------------------------------------------------------------------


def test_a_prompt_is_a_sequence_of_whole_numbers_in_any_form(model):
    expected = list(llama3.generate(PROMPT, *model, max_new_tokens=5))
    forms = [tuple(PROMPT), torch.tensor(PROMPT), np.array(PROMPT), iter(PROMPT)]
    forms.append([np.int32(token) for token in PROMPT])
    for form in forms:
        assert list(llama3.generate(form, *model, max_new_tokens=np.int64(5))) == expected
    for stop in ([expected[2]], {expected[2]}, np.array(expected[2:]), range(expected[2], 1280)):
        options = {"max_new_tokens": 5, "stop_tokens": stop}
        tokens = list(llama3.generate(PROMPT, *model, **options))
        assert tokens == expected[: len(tokens)]
        assert len(tokens) <= 2


def test_a_seed_is_a_whole_number_in_any_form(model):
    options = {"max_new_tokens": 10, "temperature": 1.0}
    expected = list(llama3.generate(PROMPT, *model, seed=7, **options))
    assert list(llama3.generate(PROMPT, *model, seed=np.int64(7), **options)) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": []}, "the prompt's length: found 0, expected a whole number from 1 to 8192"),
        ({"prompt": [0] * 9000}, "the prompt's length: found 9000"),
        ({"prompt": [1280]}, "a token: found 1280, expected a whole number from 0 to 1279"),
        ({"prompt": [-1]}, "a token: found -1"),
        ({"prompt": [[1, 2]]}, "a token: found [1, 2]"),
        ({"prompt": torch.ones(1, 2, dtype=torch.int64)}, "a token: found [1, 1]"),
        ({"prompt": "Hello"}, "a token: found 'H'"),
        ({"prompt": [1.0]}, "a token: found 1.0"),
        ({"prompt": [True]}, "a token: found True"),
        ({"prompt": [None]}, "a token: found None"),
        ({"stop_tokens": "<|eot_id|>"}, "a token: found '<'"),
        ({"stop_tokens": [None]}, "a token: found None"),
        ({"stop_tokens": [1280]}, "a token: found 1280"),
        ({"max_new_tokens": -1}, "max_new_tokens: found -1, expected a whole number from 0 to"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: found 1.5"),
        ({"max_new_tokens": None}, "max_new_tokens: found None"),
        ({"temperature": -0.1}, "temperature: found -0.1, expected a number from 0 to 1000000"),
        ({"temperature": math.nan}, "temperature: found nan"),
        ({"temperature": math.inf}, "temperature: found inf"),
        ({"temperature": 10**400}, "temperature: found 1000"),
        ({"temperature": None}, "temperature: found None"),
        ({"temperature": True}, "temperature: found True"),
        ({"top_p": 1.1}, "top_p: found 1.1, expected a number from 0 to 1"),
        ({"top_p": math.nan}, "top_p: found nan"),
        ({"top_p": "x"}, "top_p: found 'x'"),
        ({"seed": -1}, "seed: found -1, expected a whole number from 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed: found 9223372036854775808"),
        ({"seed": 1.0}, "seed: found 1.0"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_refused_at_once(model, changes, says):
    arguments = {"prompt": PROMPT, "max_new_tokens": 3} | changes
    with pytest.raises(ValueError, match="found") as error:  # before a token is asked for
        llama3.generate(arguments.pop("prompt"), *model, **arguments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_that_fills_the_context_is_too_long_by_one_token_more(model):
    weights, config = model[0], model[1]._replace(max_seq_len=3)
    with pytest.raises(ValueError, match="length: found 4, expected a whole number from 1 to 3"):
        llama3.generate(PROMPT, weights, config, max_new_tokens=1)
    assert list(llama3.generate(PROMPT[:3], weights, config, max_new_tokens=1)) == []
    with pytest.raises(ValueError, match="length: found 0"):
        llama3.generate_batch([], *model, max_new_tokens=1)


def test_what_was_generated_stays_when_a_later_step_is_not_finite(demo_weights, demo_config):
    """The token 46 alone has no finite embedding."""
    changed = dict(demo_weights)
    changed["tok_embeddings.weight"] = demo_weights["tok_embeddings.weight"].clone()
    changed["tok_embeddings.weight"][46] = float("nan")
    prompt = [1024, 355, 261, 32, 56, 258, 32]
    tokens = llama3.generate(prompt, changed, demo_config, max_new_tokens=9)
    assert [next(tokens), next(tokens)] == [338, 46]
    with pytest.raises(FloatingPointError, match="the logits of new token 3 are not finite"):
        next(tokens)


# --- batches and log-probabilities ----------------------------------------------------------------


def test_a_batch_of_unequal_prompts_has_the_tokens_of_each_alone(model):
    prompts = [random_tokens(model[1], n, seed=n).tolist() for n in (1, 9, 40, 23)]
    alone = [[*llama3.generate(p, *model, max_new_tokens=30)] for p in prompts]
    steps = chosen_tokens(prompts, model, max_new_tokens=30)
    assert [[*row] for row in zip(*steps, strict=True)] == alone
    assert len({len(set(row)) for row in alone}) > 1


def test_a_batch_in_blocks_is_the_same(model, monkeypatch):
    prompts = [random_tokens(model[1], n, seed=n).tolist() for n in (3, 70)]
    expected = chosen_tokens(prompts, model, max_new_tokens=9)
    monkeypatch.setattr(llama3, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(llama3, "SCORES_AT_ONCE", 500)
    assert chosen_tokens(prompts, model, max_new_tokens=9) == expected


@pytest.mark.parametrize("lengths", [(70,), (70, 31, 5)], ids=len)
def test_blocks_of_a_prompt_leave_out_the_keys_that_none_of_their_queries_sees(
    model, monkeypatch, lengths
):
    """And the padding beside them, if a whole block is padding, sees itself alone."""
    weights, config = model
    rows = [random_tokens(config, n, seed=n) for n in lengths]
    starts = torch.tensor([70 - n for n in lengths])
    padded = torch.stack([torch.nn.functional.pad(row, (70 - len(row), 0)) for row in rows])
    monkeypatch.setattr(llama3, "SCORES_AT_ONCE", 2000)
    keys, pattern = [], llama3.attention_pattern
    monkeypatch.setattr(
        llama3, "attention_pattern", lambda q, k, m: keys.append(k.shape[-2]) or pattern(q, k, m)
    )
    session = llama3.Session(weights, config, batch=len(rows))
    options = {"starts": starts} if len(rows) > 1 else {}
    logits = torch.cat([session.read(part, **options) for part in padded.split([36, 34], 1)], 1)
    assert keys == [18, 36] * config.n_layers + [53, 70] * config.n_layers
    for row, found in zip(rows, logits, strict=True):
        assert apart(found[70 - len(row) :], llama3.forward(row, weights, config)) < 3e-5


def test_a_row_that_has_ended_gives_minus_one_until_all_have(model):
    prompts = [random_tokens(model[1], n, seed=n).tolist() for n in (5, 8)]
    alone = [[*llama3.generate(p, *model, max_new_tokens=12)] for p in prompts]
    stop = [alone[0][2], alone[1][9]]
    rows = [row[: next((i for i, t in enumerate(row) if t in stop), 12)] for row in alone]
    assert len(rows[0]) == 2 < len(rows[1])
    steps = chosen_tokens(prompts, model, max_new_tokens=12, stop_tokens=stop)
    first, second = zip(*steps, strict=True)
    assert [*first] == rows[0] + [-1] * (len(rows[1]) - 2)
    assert [*second] == rows[1]


@pytest.mark.parametrize("n_vocab", [None, 1280, 700])
def test_a_step_gives_the_models_own_distribution_over_its_whole_vocabulary(model, n_vocab):
    """Whatever is chosen, and however many of the tokens the tokenizer has."""
    prompt = random_tokens(model[1], 12).tolist()
    generator, given = torch.Generator().manual_seed(1), []

    def choose(logits):
        given.append(logits)
        return llama3.sample(logits, 2.0, 0.5, generator)

    tokens = list(prompt)
    options = {"max_new_tokens": 5, "choose": choose, "n_vocab": n_vocab}
    for chosen, logprobs in llama3.generate_batch([prompt], *model, **options):
        logits = llama3.forward(torch.tensor(tokens), *model)[-1]
        assert logprobs.shape == (1, model[1].vocab_size)
        assert logprobs.dtype == torch.float32
        assert apart(logprobs[0], torch.log_softmax(logits, -1)) < 1e-5
        assert given[-1].shape == (1, n_vocab or model[1].vocab_size)
        assert chosen.item() < (n_vocab or model[1].vocab_size)
        tokens.append(chosen.item())
    assert len(tokens) == 17


def test_a_token_that_the_tokenizer_does_not_have_is_never_chosen(model):
    first = next(llama3.generate(PROMPT, *model, max_new_tokens=1))
    options = {"max_new_tokens": 30, "temperature": 2.0, "seed": 0, "n_vocab": first}
    assert max(llama3.generate(PROMPT, *model, **options)) < first
    logits = llama3.forward(torch.tensor(PROMPT), *model)[-1]
    options = {"max_new_tokens": 1, "n_vocab": first}
    assert [*llama3.generate(PROMPT, *model, **options)] == [logits[:first].argmax().item()]


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_session_gives_the_logits_of_the_whole_sequence_however_it_reads_it(
    model, dtype, tolerance
):
    """In one go, in blocks, token by token, and after it was led back."""
    weights = {name: weight.to(dtype) for name, weight in model[0].items()}
    config, tokens = model[1], random_tokens(model[1], 24)
    whole = llama3.forward(tokens, weights, config)
    for blocks in ([24], [10, 1, 1, 5, 7], [1] * 24):
        session = llama3.Session(weights, config)
        read = [session.read(block[None]) for block in tokens.split(blocks)]
        assert apart(torch.cat(read, dim=1)[0], whole) < tolerance
        assert torch.equal(session.tokens, tokens[None])
    other = random_tokens(config, 30, seed=1)
    other[:9] = tokens[:9]
    session = llama3.Session(weights, config)
    session.read(other[None])
    assert session.rewind(tokens.tolist()) == 9
    assert apart(session.read(tokens[None, 9:])[0], whole[9:]) < tolerance
    assert session.tokens.tolist() == [tokens.tolist()]


def test_a_session_of_a_batch_gives_each_rows_logits(model):
    tokens = random_tokens(model[1], 3, 12)
    session = llama3.Session(*model, batch=3)
    read = torch.cat([session.read(block) for block in tokens.split([7, 1, 4], dim=1)], dim=1)
    assert apart(read, llama3.forward(tokens, *model)) < 3e-5
    assert torch.equal(session.tokens, tokens)


def test_rewind_keeps_what_the_prompt_begins_with_but_never_the_whole_prompt(model):
    for prompt, kept in [
        ([5, 6, 7, 8], 3),  # its last token is read again, for its logits
        ([5, 6, 7, 8, 9], 4),
        ([5, 6, 1, 8], 2),
        ([5, 6], 1),
        ([5], 0),
        ([1, 6, 7], 0),
    ]:
        session = llama3.Session(*model)
        session.read(torch.tensor([[5, 6, 7, 8]]))
        assert session.rewind(prompt) == kept
        assert session.tokens.tolist() == [[5, 6, 7, 8][:kept]]


def test_reserve_keeps_what_was_read_and_never_makes_less_room(model):
    tokens = random_tokens(model[1], 1, 12)
    session = llama3.Session(*model)
    session.read(tokens[:, :8])
    before = session.cache[..., :8, :].clone()
    session.reserve(500)
    assert session.cache.shape[-2] == 500
    assert torch.equal(session.cache[..., :8, :], before)
    session.reserve(3)
    assert session.cache.shape[-2] == 500
    assert session.tokens.tolist() == tokens[:, :8].tolist()
    assert apart(session.read(tokens[:, 8:]), llama3.forward(tokens, *model)[:, 8:]) < 3e-5


def test_a_session_that_read_another_prompt_gives_the_tokens_of_a_fresh_one(model, watched):
    """And what two prompts begin with is read once."""
    first = random_tokens(model[1], 50).tolist()
    session = llama3.Session(*model)
    answer = [*llama3.generate(first, *model, max_new_tokens=10, session=session)]
    assert session.tokens.tolist() == [first + answer[:-1]]
    for prompt, new in (
        (first + answer + [7, 8, 9], 4),  # the last token of the answer was not read yet
        (first + answer + [7, 8, 9], 1),  # for the logits of the last token
        ([*first[:20], 5, *first[:7]], 8),
        (first[:3], 1),
        ([9, 9], 2),
    ):
        expected = [*llama3.generate(prompt, *model, max_new_tokens=40)]
        watched.clear()
        options = {"max_new_tokens": 40, "session": session}
        assert [*llama3.generate(prompt, *model, **options)] == expected
        assert sum(tokens.shape[-1] for tokens, *_ in watched) == new + 39
        session.rewind([*prompt, 0])


def test_a_session_is_refused_for_several_prompts(model):
    session = llama3.Session(*model)
    with pytest.raises(ValueError, match="the session has other weights or rows"):
        llama3.generate_batch([[1], [2]], *model, max_new_tokens=2, session=session)
    both = llama3.Session(*model, batch=2)
    expected = chosen_tokens([[1, 3], [2]], model, max_new_tokens=2)
    assert chosen_tokens([[1, 3], [2]], model, max_new_tokens=2, session=both) == expected
    with pytest.raises(
        ValueError, match="the session has other weights or rows"
    ):  # it has read something by now
        llama3.generate_batch([[1, 3], [2]], *model, max_new_tokens=2, session=both)
    with pytest.raises(ValueError, match="the session has other weights or rows"):
        llama3.generate_batch([[1, 3]], *model, max_new_tokens=2, session=both)


def test_a_session_can_be_read_on_after_a_generation(model):
    """Which computes in inference mode, as the code around it does not."""
    session = llama3.Session(*model)
    steps = llama3.generate(PROMPT, *model, max_new_tokens=100, session=session)
    new = [next(steps) for _ in range(3)]
    logits = session.read(torch.tensor([[new[-1], 5]]))[0]
    expected = llama3.forward(torch.tensor([*PROMPT, *new, 5]), *model)[-2:]
    assert apart(logits, expected) < 3e-5


def test_the_cache_grows_as_it_is_used(model, monkeypatch):
    """By half, so that a position is copied few times; never at once to all that may be asked."""
    lengths, reserve = [], llama3.Session.reserve

    def watching(session, length):
        if length > session.cache.shape[-2]:
            lengths.append((session.cache.shape[-2], length))
        reserve(session, length)

    monkeypatch.setattr(llama3.Session, "reserve", watching)
    config = model[1]._replace(n_layers=1, max_seq_len=10**6 + 1)
    tokens = llama3.generate([1024], model[0], config, max_new_tokens=10**6)
    for _ in range(700):
        next(tokens)
    assert lengths == [(0, 257), (257, 387), (387, 582), (582, 874)]


def test_a_cache_that_grows_changes_no_token(model):
    session = llama3.Session(*model)
    session.reserve(500)
    options = {"max_new_tokens": 300}
    expected = list(llama3.generate([7, 8], *model, session=session, **options))
    assert session.cache.shape[-2] == 500
    assert list(llama3.generate([7, 8], *model, **options)) == expected
