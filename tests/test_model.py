"""The model's functions: shapes, and numbers against other implementations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DEMO,
    PARAMS_8B,
    SMALL,
    apart,
    config_of,
    peak_of,
    random_tokens,
    random_weights,
)
from references import meta_order, numpy_float64, scaled_frequency

import llama3

SIZES = [
    {},
    {"n_kv_heads": None},
    {"n_kv_heads": 1},
    {"dim": 96, "n_heads": 6, "n_kv_heads": 2},
    {"dim": 256, "n_heads": 8, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3},
    {"use_scaled_rope": True},
]


# --- shapes ---------------------------------------------------------------------------------------


def test_the_shapes_of_the_8b_model_are_those_of_the_study_notes(tmp_path):
    config = config_of(tmp_path, **PARAMS_8B)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in llama3.weight_shapes(config).items()
    }
    tokens = torch.zeros(17, dtype=torch.int64, device="meta")
    x = weights["tok_embeddings.weight"][tokens]
    assert x.shape == (17, 4096)
    assert llama3.rms_norm(x, weights["norm.weight"], config.norm_eps).shape == (17, 4096)

    wq, wk = (weights[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk"))
    assert wq.unflatten(0, (config.n_heads, -1)).shape == (32, 128, 4096)
    assert wk.unflatten(0, (config.n_kv_heads, -1)).shape == (8, 128, 4096)
    q = (x @ wq.T).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
    assert q.shape == (32, 17, 128)
    assert q[0].unflatten(-1, (-1, 2)).shape == (17, 64, 2)
    rotations = llama3.rope_rotations(torch.arange(17, device="meta"), config)
    assert rotations.shape == (17, 64)
    assert rotations.dtype == torch.complex64
    assert llama3.rotate(q, rotations).shape == (32, 17, 128)

    mask = torch.ones(17, 17, dtype=torch.bool, device="meta")
    attended = llama3.attention(x, weights, 0, config, rotations, mask)
    assert attended.shape == (17, 4096)
    assert weights["layers.0.feed_forward.w1.weight"].shape == (14336, 4096)
    assert llama3.feed_forward(x, weights, 0).shape == (17, 4096)
    logits = llama3.forward(tokens, weights, config)
    assert logits.shape == (17, 128256)
    assert logits[-1].shape == (128256,)
    assert logits.dtype == torch.float32


def test_the_shapes_of_the_demo_follow_its_params(demo_config, demo_weights):
    config, dim, T = demo_config, demo_config.dim, 9
    tokens = random_tokens(config, T)
    x = demo_weights["tok_embeddings.weight"][tokens]
    assert x.shape == (T, dim)
    assert x.dtype == torch.bfloat16
    positions = torch.arange(T)
    rotations = llama3.rope_rotations(positions, config)
    assert rotations.shape == (T, config.head_dim // 2)
    mask = llama3.causal_mask(positions, positions)
    assert mask.shape == (T, T)
    assert llama3.attention(x, demo_weights, 0, config, rotations, mask).shape == (T, dim)
    assert llama3.feed_forward(x, demo_weights, 0).shape == (T, dim)
    assert llama3.block(x, demo_weights, 0, config, rotations, mask).shape == (T, dim)
    cache = llama3.new_cache(demo_weights, config, 12, batch=(3,))
    assert cache.shape == (config.n_layers, 2, 3, config.n_kv_heads, 12, config.head_dim)
    assert llama3.forward(tokens, demo_weights, config).shape == (T, config.vocab_size)
    batch = tokens.expand(3, T)
    assert llama3.forward(batch, demo_weights, config).shape == (3, T, config.vocab_size)
    last = llama3.forward(batch, demo_weights, config, last_only=True)
    assert last.shape == (3, 1, config.vocab_size)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_equal_metas_order_of_operations_to_the_last_bit(tmp_path, size, dtype):
    config = config_of(tmp_path, **size)
    weights = random_weights(config, dtype)
    for batch, length in [(1, 1), (1, 2), (1, 5), (1, 17), (1, 100), (2, 3), (3, 7), (2, 65)]:
        tokens = random_tokens(config, batch, length)
        expected = meta_order(tokens, weights, SMALL | size)
        assert torch.equal(llama3.forward(tokens, weights, config), expected)
        if batch == 1:
            assert torch.equal(llama3.forward(tokens[0], weights, config), expected[0])
        cache = llama3.new_cache(weights, config, length, batch=(batch,))
        assert torch.equal(llama3.forward(tokens, weights, config, cache=cache), expected)


def test_the_demos_logits_equal_metas_order_of_operations(demo_config, demo_weights):
    params = json.loads((DEMO / "params.json").read_text())
    tokens = random_tokens(demo_config, 2, 200)
    expected = meta_order(tokens, demo_weights, params)
    assert torch.equal(llama3.forward(tokens, demo_weights, demo_config), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_agree_with_numpy_in_double_precision(tmp_path, size):
    config = config_of(tmp_path, **size)
    weights = random_weights(config)
    tokens = random_tokens(config, 12)
    expected = numpy_float64(tokens.tolist(), weights, SMALL | size)
    assert apart(llama3.forward(tokens, weights, config), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_agree_with_transformers(tmp_path, size):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of(tmp_path, **size)
    weights = random_weights(config)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            intermediate_size=config.ffn_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
    ).eval()
    model.load_state_dict(hugging_face_names(weights, config))
    for length in (1, 12, 300):
        tokens = random_tokens(config, 2, length)
        with torch.no_grad():
            expected = model(tokens).logits
        assert apart(llama3.forward(tokens, weights, config), expected) < 1e-4


def hugging_face_names(weights, config):
    """The weights as transformers has them: other names, and RoPE's pairs (i, i + head_dim / 2)
    in place of (2i, 2i + 1), so that the rows of wq and wk stand in another order."""
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    renamed = {}
    for name, weight in weights.items():
        kind = name.removesuffix(".weight")
        prefix = ""
        if kind.startswith("layers."):
            _, layer, kind = kind.split(".", 2)
            prefix = f"model.layers.{layer}."
        if kind in ("attention.wq", "attention.wk"):
            halves = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2)
            weight = halves.flatten(0, 2)
        renamed[f"{prefix}{names[kind]}.weight"] = weight
    return renamed


def test_rope_frequencies_are_the_published_ones(tmp_path):
    frequencies = llama3.rope_frequencies(config_of(tmp_path, **PARAMS_8B))
    # llama3-from-scratch prints this row for theta 500000 and 64 pairs
    published = [1.0, 8.1462e-01, 6.6360e-01, 5.4058e-01, 4.4037e-01, 3.5873e-01, 2.9223e-01]
    assert frequencies[:7].tolist() == pytest.approx(published, rel=1e-4)
    assert frequencies[-1].item() == pytest.approx(2.4551e-06, rel=1e-4)
    assert frequencies.shape == (64,)


@pytest.mark.parametrize(("dim", "factor"), [(4096, 8), (2048, 32), (3072, 32), (8192, 8)])
def test_scaled_rope_follows_the_rule_of_llama_3_1_with_each_models_factor(tmp_path, dim, factor):
    sizes = {"dim": dim, "n_heads": dim // 128, "n_kv_heads": None}
    plain = llama3.rope_frequencies(config_of(tmp_path, **sizes))
    scaled = llama3.rope_frequencies(config_of(tmp_path, **sizes, use_scaled_rope=True))
    expected = torch.stack([scaled_frequency(f, factor=factor) for f in plain])
    assert torch.equal(scaled, expected)
    assert (scaled == plain).any()
    assert (scaled == plain / factor).any()
    assert ((scaled < plain) & (scaled > plain / factor)).any()


def test_scaled_rope_follows_the_rule_at_its_borders_and_for_any_base(tmp_path):
    """Where one case of the rule ends, the next begins, to the last bit."""
    config = config_of(tmp_path, dim=1024, use_scaled_rope=True)  # 128 pairs
    for theta in (1.0, 10.0, 1e3, 1e4, 5e5, 1e6, 1e9):
        for factor in (1.0, 8.0, 32.0, 7.3):
            plain = llama3.rope_frequencies(
                config._replace(rope_scaling_factor=None, rope_theta=theta)
            )
            scaled = llama3.rope_frequencies(
                config._replace(rope_theta=theta, rope_scaling_factor=factor)
            )
            assert torch.equal(
                scaled, torch.stack([scaled_frequency(f, factor=factor) for f in plain])
            )


def test_rotated_scores_depend_only_on_how_far_apart_two_positions_are(demo_config):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, demo_config.head_dim, generator=generator)

    def score(i, j):
        positions = llama3.rope_rotations(torch.tensor([i, j]), demo_config)
        return (llama3.rotate(q, positions[:1]) @ llama3.rotate(k, positions[1:]).T).item()

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rms_norm_is_its_closed_form():
    x = torch.tensor([[3.0, -4.0]])
    weight = torch.tensor([2.0, 10.0])
    mean_square = (9 + 16) / 2
    expected = [3 / np.sqrt(mean_square) * 2, -4 / np.sqrt(mean_square) * 10]
    assert llama3.rms_norm(x, weight, 0.0)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 5, 9])
def test_grouped_query_attention_is_each_head_by_itself(T, batch):
    K, G, L, d = 2, 3, 9, 4
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(*batch, K * G, T, d, generator=generator)
    k, v = torch.randn(2, *batch, K, L, d, generator=generator)
    mask = torch.arange(L) <= torch.arange(L - T, L)[:, None]
    heads = llama3.grouped_query_attention(q, k, v, mask)
    assert heads.shape == q.shape
    for h in range(K * G):
        scores = q[..., h, :, :].double() @ k[..., h // G, :, :].double().mT / d**0.5
        shares = torch.where(mask, scores.exp(), 0)
        expected = shares / shares.sum(-1, keepdim=True) @ v[..., h // G, :, :].double()
        assert apart(heads[..., h, :, :], expected) < 1e-5


@pytest.mark.parametrize("T", [1, 7])
def test_a_continuation_in_float32_copies_no_keys_or_values(demo_config, demo_weights, T):
    """No step of its attention takes as much memory as the keys have."""
    config, L = demo_config, 4000
    weights = {name: weight.float() for name, weight in demo_weights.items()}
    cache = llama3.new_cache(weights, config, L + 100)[0, ..., :L, :]
    positions = torch.arange(L - T, L)
    mask = torch.arange(L) <= positions[:, None]
    rotations = llama3.rope_rotations(positions, config)
    x = torch.ones(T, config.dim)
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        llama3.attention(x, weights, 0, config, rotations, mask, positions, cache)
    taken = {event.name: event.cpu_memory_usage for event in profile.events()}
    scores = config.n_heads * T * L * x.itemsize
    assert taken["aten::softmax"] == scores < cache[0].nbytes  # so that a copy would be the most
    assert max(event.cpu_memory_usage for event in profile.events()) == scores


@pytest.mark.parametrize("cached", [False, True])
def test_matrices_meet_activations_in_linear_and_nowhere_else(
    demo_config, demo_weights, monkeypatch, cached
):
    """The model is given no matrices: linear alone has them, and each is used once."""
    tokens = random_tokens(demo_config, 2, 9)
    expected = llama3.forward(tokens, demo_weights, demo_config)
    matrices = [name for name, weight in demo_weights.items() if weight.dim() == 2]
    matrices.remove("tok_embeddings.weight")  # of which rows are looked up
    rest = {name: weight for name, weight in demo_weights.items() if name not in matrices}
    linear, used = llama3.linear, []

    def linear_with_matrices(x, weights, name):
        used.append(f"{name}.weight")
        return linear(x, demo_weights, name)

    cache = llama3.new_cache(demo_weights, demo_config, 9, batch=(2,)) if cached else None
    monkeypatch.setattr(llama3, "linear", linear_with_matrices)
    assert torch.equal(llama3.forward(tokens, rest, demo_config, cache=cache), expected)
    assert sorted(used) == sorted(matrices)


def test_the_cache_has_the_type_of_the_norms_whatever_the_matrices_are(demo_config):
    for dtype in (torch.float32, torch.bfloat16):
        weights = {"norm.weight": torch.ones(demo_config.dim, dtype=dtype)}
        cache = llama3.new_cache(weights, demo_config, 5)
        assert cache.dtype == dtype
        assert cache.shape[1:3] == (2, demo_config.n_kv_heads)


@pytest.mark.parametrize("cached", [False, True])
def test_a_matrix_may_be_a_function_with_a_bias_beside_it(tmp_path, cached):
    config = config_of(tmp_path)
    weights = random_weights(config)
    generator = torch.Generator().manual_seed(1)
    for kind in ("attention.wq", "attention.wo", "feed_forward.w1"):
        rows = len(weights[f"layers.1.{kind}.weight"])
        weights[f"layers.1.{kind}.bias"] = torch.randn(rows, generator=generator)
    functions = {
        name: lambda x, w=w: x @ w.T
        for name, w in weights.items()
        if name.startswith(("layers.1.attention", "layers.0.feed_forward.w2", "layers.1.feed"))
        and w.dim() == 2
    }
    functions["output.weight"] = lambda x: x @ weights["output.weight"].T
    assert len(functions) == 9
    tokens = random_tokens(config, 2, 9)
    cache = llama3.new_cache(weights, config, 9, batch=(2,)) if cached else None
    expected = llama3.forward(tokens, weights, config)
    assert torch.equal(llama3.forward(tokens, weights | functions, config, cache=cache), expected)
    no_bias = {name: w for name, w in weights.items() if not name.endswith("bias")}
    assert apart(llama3.forward(tokens, no_bias, config), expected) > 1e-2  # so it was added


def test_a_bias_is_added_to_what_its_matrix_gives(demo_weights):
    """Written down as in the definition: y = x W^T + b."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, 7, generator=generator), torch.randn(3, 7, generator=generator)
    bias = torch.randn(3, generator=generator)
    expected = x.double() @ w.double().T + bias.double()
    for matrix in (w, lambda x: x @ w.T):
        y = llama3.linear(x, {"a.weight": matrix, "a.bias": bias}, "a")
        assert apart(y, expected) < 1e-6


def test_the_model_is_its_embeddings_its_blocks_and_its_output(tmp_path):
    """Block by block, as a study of what each layer does has it; with a cache, too."""
    config = config_of(tmp_path, n_layers=3)
    weights = random_weights(config)
    tokens, positions = random_tokens(config, 2, 9), torch.arange(9)
    rotations = llama3.rope_rotations(positions, config)
    mask = llama3.causal_mask(positions, positions)
    cache = llama3.new_cache(weights, config, 9, batch=(2,))
    x = cached = weights["tok_embeddings.weight"][tokens]
    for layer in range(3):
        x = llama3.block(x, weights, layer, config, rotations, mask)
        where = rotations, mask, positions, cache[layer]
        cached = llama3.block(cached, weights, layer, config, *where)
    expected = llama3.forward(tokens, weights, config)
    for out in (x, cached):
        normed = llama3.rms_norm(out, weights["norm.weight"], config.norm_eps)
        assert torch.equal(llama3.linear(normed, weights, "output"), expected)


def test_the_mask_lets_a_query_see_the_keys_from_the_start_of_its_row_to_itself():
    positions, keys, starts = torch.tensor([3, 4]), torch.arange(6), torch.tensor([0, 2, 4])
    plain, padded = (llama3.causal_mask(positions, keys, s) for s in (None, starts))
    assert (plain.dtype, plain.shape) == (torch.bool, (2, 6))
    assert (padded.dtype, padded.shape) == (torch.bool, (3, 1, 2, 6))
    for t, p in enumerate(positions.tolist()):
        for k in range(6):
            assert plain[t, k] == (k <= p)
            for b, start in enumerate(starts.tolist()):  # padding sees itself, or nothing at all
                assert padded[b, 0, t, k] == (start <= k <= p or k == p)


def test_no_token_sees_the_ones_after_it(tmp_path):
    config = config_of(tmp_path)
    weights = random_weights(config)
    tokens = random_tokens(config, 20)
    changed = tokens.clone()
    changed[11:] = random_tokens(config, 9, seed=1)
    before, after = (llama3.forward(t, weights, config) for t in (tokens, changed))
    assert torch.equal(before[:11], after[:11])
    assert not torch.equal(before[11:], after[11:])


# --- stored in one type, computed in another ------------------------------------------------------

OTHER_TYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


@pytest.mark.parametrize(("stored", "computed"), OTHER_TYPES, ids=str)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[4]], ids=str)
def test_a_matrix_of_another_type_gives_the_bits_of_a_converted_one(
    tmp_path, stored, computed, size
):
    """As load_weights gives them: the norms are converted, the matrices as they are stored."""
    config = config_of(tmp_path, **size)
    weights = random_weights(config, stored)
    mixed = {name: w.to(computed) if w.dim() == 1 else w for name, w in weights.items()}
    converted = {name: w.to(computed) for name, w in weights.items()}
    for shape in [(1,), (2,), (50,), (3, 7)]:
        tokens = random_tokens(config, *shape)
        expected = llama3.forward(tokens, converted, config)
        assert torch.equal(llama3.forward(tokens, mixed, config), expected)
    assert llama3.new_cache(mixed, config, 3).dtype == computed


@pytest.mark.parametrize(("stored", "computed"), OTHER_TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 2500])
def test_a_matrix_converted_in_blocks_gives_what_the_converted_one_gives(stored, computed, rows):
    """Of 1,024 inputs, 1,024 rows are converted at a time. Their last bits may differ."""
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(rows, 1024, generator=generator).to(stored)
    tolerance = 1e-6 if computed == torch.float32 else 1e-2
    for shape in [(1024,), (1, 1, 1024), (2, 5, 1024), (0, 1024)]:
        x = torch.randn(shape, generator=generator).to(computed)
        y, expected = llama3.product(x, w), x @ w.to(computed).T
        assert y.shape == expected.shape
        assert y.dtype == computed
        assert not x.numel() or apart(y.float(), expected.float()) < tolerance
        with torch.inference_mode():
            assert torch.equal(llama3.product(x, w), y)


def test_float32_over_bfloat16_weights_is_nearer_to_float64_than_bfloat16(tmp_path):
    config = config_of(tmp_path, dim=256, n_heads=8, n_kv_heads=2, n_layers=4)
    params = SMALL | {"dim": 256, "n_heads": 8, "n_kv_heads": 2, "n_layers": 4}
    weights = random_weights(config, torch.bfloat16)
    mixed = {name: w.float() if w.dim() == 1 else w for name, w in weights.items()}
    tokens = random_tokens(config, 16)
    exact = numpy_float64(tokens.tolist(), weights, params)
    reference = meta_order(tokens[None], weights, params)[0]
    assert apart(llama3.forward(tokens, mixed, config), exact) < 1e-5
    assert apart(reference, exact) > 1e-3


@pytest.mark.parametrize("learned", ["both", "x", "w"])
def test_gradients_go_through_a_matrix_of_another_type(learned):
    """Several blocks of it: none may be converted into the memory of the one before."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2500, 1024, generator=generator).bfloat16()
    x = torch.randn(3, 1024, generator=generator)
    x.requires_grad_(learned != "w")
    w.requires_grad_(learned != "x")
    llama3.linear(x, {"a.weight": w}, "a").square().sum().backward()
    got = x.grad, w.grad
    x.grad = w.grad = None
    (x @ w.float().T).square().sum().backward()
    for found, expected, tolerance in zip(got, (x.grad, w.grad), (1e-5, 1e-2), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or apart(found.float(), expected.float()) < tolerance


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_matrix_of_another_type_is_never_converted_as_a_whole():
    w = torch.ones(20_000, 1000, dtype=torch.bfloat16)  # 80 MB in float32
    weights = {"a.weight": w}
    for x in (torch.ones(1, 1000), torch.ones(20, 1000)):
        with torch.inference_mode():
            llama3.linear(x, weights, "a")
            assert peak_of(lambda x=x: llama3.linear(x, weights, "a")) < 20e6


# --- in blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 1000, 20_000])
def test_blocks_of_queries_give_the_bits_of_all_at_once(tmp_path, monkeypatch, dtype, most):
    config = config_of(tmp_path)
    weights = random_weights(config, dtype)
    params = SMALL
    for shape in [(1, 90), (2, 65), (1, 17), (1, 33)]:
        tokens = random_tokens(config, *shape)
        expected = meta_order(tokens, weights, params)
        monkeypatch.setattr(llama3, "SCORES_AT_ONCE", 2**40)
        assert torch.equal(llama3.forward(tokens, weights, config), expected)
        monkeypatch.setattr(llama3, "SCORES_AT_ONCE", most)
        assert torch.equal(llama3.forward(tokens, weights, config), expected)


def test_a_long_whole_sequence_equals_metas_order_of_operations(tmp_path):
    """Long enough to go through in blocks without being told to."""
    config = config_of(tmp_path, n_layers=1)
    tokens = random_tokens(config, 1, 1500)
    assert 2 * llama3.SCORES_AT_ONCE < 4 * 1500**2
    for dtype in (torch.float32, torch.bfloat16):
        weights = random_weights(config, dtype)
        expected = meta_order(tokens, weights, SMALL | {"n_layers": 1})
        assert torch.equal(llama3.forward(tokens, weights, config), expected)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_scores_of_a_whole_sequence_are_never_in_memory_at_once(tmp_path):
    """They alone would take 16 heads x 2,000^2 x 4 bytes, and their softmax as much again."""
    config = config_of(tmp_path, n_layers=1, n_heads=16)
    weights, tokens = random_weights(config), random_tokens(config, 2000)
    with torch.inference_mode():
        llama3.forward(tokens[:100], weights, config)
        peak = peak_of(lambda: llama3.forward(tokens, weights, config, last_only=True))
    assert peak < 16 * 2000**2 * 4


# --- one function for every use -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_cached_decode_agrees_with_the_whole_sequence(tmp_path, size, dtype, tolerance):
    config = config_of(tmp_path, **size)
    weights = random_weights(config, dtype)
    tokens = random_tokens(config, 2, 24)
    whole = llama3.forward(tokens, weights, config)
    cache = llama3.new_cache(weights, config, 40, batch=(2,))
    steps = [10, 1, 1, 5, 1, 6]  # prefill, decode, and a prefill that goes on where those ended
    start = 0
    for length in steps:
        positions = torch.arange(start, start + length)
        part = tokens[:, start : start + length]
        logits = llama3.forward(part, weights, config, positions=positions, cache=cache)
        assert apart(logits, whole[:, start : start + length]) < tolerance
        start += length
    assert start == 24


def test_part_of_a_cache_serves_like_a_cache_of_that_length(tmp_path):
    config = config_of(tmp_path)
    weights = random_weights(config)
    tokens = random_tokens(config, 8)
    exact = llama3.new_cache(weights, config, 8)
    longer = llama3.new_cache(weights, config, 50)
    expected = llama3.forward(tokens, weights, config, cache=exact)
    logits = llama3.forward(tokens, weights, config, cache=longer[..., :8, :])
    assert torch.equal(logits, expected)
    assert torch.equal(longer[..., :8, :], exact)
    assert not longer[..., 8:, :].any()


def test_a_batch_gives_what_each_sequence_gives_alone(tmp_path):
    config = config_of(tmp_path)
    weights = random_weights(config)
    tokens = random_tokens(config, 3, 17)
    batch = llama3.forward(tokens, weights, config)
    for row, logits in zip(tokens, batch, strict=True):
        assert apart(logits, llama3.forward(row, weights, config)) < 1e-5


@pytest.mark.parametrize("lengths", [(9, 4, 1), (1100, 1040)], ids=str)
def test_padding_on_the_left_is_hidden_in_one_forward_pass(tmp_path, lengths):
    """Of more tokens than generation reads at a time, too; whatever token the padding is."""
    config = config_of(tmp_path, n_layers=2, vocab_size=50)
    weights = random_weights(config)
    longest = lengths[0]
    rows = [random_tokens(config, n, seed=n) for n in lengths]
    starts = torch.tensor([longest - n for n in lengths])
    for padding in (0, 7):
        padded = torch.stack(
            [torch.cat([torch.full((longest - len(row),), padding), row]) for row in rows]
        )
        batch = llama3.forward(padded, weights, config, starts=starts)
        assert batch.isfinite().all()
        for row, logits in zip(rows, batch, strict=True):
            alone = llama3.forward(row, weights, config)
            assert apart(logits[longest - len(row) :], alone) < 1e-4
    shown = llama3.forward(padded, weights, config)[-1, longest - len(row) :]
    assert apart(shown, alone) > 1e-2  # so the padding would have been seen


def test_more_than_one_batch_dimension_is_allowed(tmp_path):
    config = config_of(tmp_path)
    weights = random_weights(config)
    tokens = random_tokens(config, 6, 5)
    flat = llama3.forward(tokens, weights, config)
    nested = llama3.forward(tokens.view(2, 3, 5), weights, config)
    assert apart(nested.flatten(0, 1), flat) < 1e-5


def test_positions_may_start_anywhere_without_a_cache(tmp_path):
    config = config_of(tmp_path)
    weights = random_weights(config)
    tokens = random_tokens(config, 9)
    there = llama3.forward(tokens, weights, config, positions=torch.arange(500, 509))
    assert apart(there, llama3.forward(tokens, weights, config)) < 1e-4  # scores are relative


def test_every_weight_gets_the_gradient_that_finite_differences_give(tmp_path):
    config = config_of(tmp_path, dim=8, n_heads=2, n_kv_heads=1, vocab_size=11, multiple_of=4)
    weights = random_weights(config)
    tokens = random_tokens(config, 2, 6)

    def loss():
        logits = llama3.forward(tokens[:, :-1], weights, config)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    for weight in weights.values():
        weight.requires_grad_()
    loss().backward()
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight += 1e-3 * direction
            above = loss()
            weight -= 2e-3 * direction
            below = loss()
            weight += 1e-3 * direction
        slope = ((above - below) / 2e-3).item()
        assert (weight.grad * direction).sum().item() == pytest.approx(slope, abs=2e-3), name
