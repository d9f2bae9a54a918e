"""Llama 3, from Meta's own files to the next token, with nothing but tensors and functions.

    prompt = [1024, 355, 261, 32, 56, 258, 32]  # "17 plus 8 is ", as tokenizer_setup encodes it
    config = llama3.load_config("demo")  # the constants in params.json
    weights = llama3.load_weights("demo", config)  # the tensors in consolidated.00.pth
    logits = llama3.forward(torch.tensor(prompt), weights, config)  # [7, vocab_size]: what is next?
    new_tokens = [*llama3.generate(prompt, weights, config, max_new_tokens=1)]  # [338], or "25"

Tokens go in and tokens come out; `python llama3.py --prompt TEXT` is in the folder cli. A function
stands below those that it calls, so this file is read from top to bottom:

    1. Config        the constants of a model, from params.json
    2. Weights       their names and shapes, which are Meta's own
    3. The model     embedding, RMSNorm, RoPE, attention, SwiGLU, logits
    4. Generation    one token after another, with a cache of keys and values
    5. Loading       params.json and consolidated.00.pth, checked

Letters in shapes: B batch, T tokens, L positions whose keys and values are attended to, K key and
value heads, G query heads that share one of them, d the width of a head, V the vocabulary; "..."
stands for any leading batch dimensions, or none.
"""

if __name__ == "__main__":  # the command, which imports this file as the module llama3
    from cli.main import main

    raise SystemExit(main())

import functools
import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import silu


def checked(name: str, value: Any, low: float, high: float, kind: type = Integral) -> Any:
    """Return value as an int or a float if it is from low to high; else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        noun = "a whole number" if kind is Integral else "a number"
        raise ValueError(f"{name}: found {repr(value)[:40]}, expected {noun} from {low} to {high}")
    return int(value) if kind is Integral else float(value)


# --- 1. Config ------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The constants of a model."""

    dim: int  # width of the residual stream, the vector that represents a token
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key and value heads, each shared by n_heads / n_kv_heads query heads
    head_dim: int
    ffn_dim: int  # width inside the feed-forward network
    vocab_size: int
    norm_eps: float  # added to the mean square in RMSNorm, so that it never divides by zero
    rope_theta: float  # the base of RoPE's frequencies
    max_seq_len: int  # the context length that it was trained for, in tokens
    rope_scaling_factor: float | None = None  # 8 for Llama 3.1 and 3.3, 32 for 3.2
    rope_divisors: tuple[float, ...] | None = None  # of RoPE's frequencies, for other families
    rope_attention_factor: float = 1.0  # by which RoPE lengthens queries and keys, in YaRN


# By dim, for Llama 3.2 1B and 3B, whose params.json leaves the factor out: Meta's code takes 8, but
# they were trained with 32 (their config.json; issues 166 and 241 of llama-models).
ROPE_SCALING_FACTORS = {2048: 32, 3072: 32}
# Keys of params.json that are not fields of Config: three that fields follow from, one not used.
PARAMS = ("multiple_of", "ffn_dim_multiplier", "use_scaled_rope", "max_batch_size")


def config_from_params(params: Mapping[str, Any]) -> Config:
    """The Config that a params.json stands for. ValueError names a key that is wrong or unknown."""
    given = {key: value for key, value in params.items() if value is not None}
    for key in sorted(given.keys() - {*Config._fields[:-2], *PARAMS}):
        if given[key] not in (False, 0, -1, "", [], {}):
            found = f"{json.dumps(key)[:40]} is {json.dumps(given[key])[:40]}, which is unknown"
            raise ValueError(f"{found} and may change the results; remove it if it does not")

    def number(key: str, default: Any = None, low: float = 1, high: float = 2**24, kind=Integral):
        return checked(f'"{key}"', given.get(key, default), low, high, kind)

    dim, n_heads, scaled = number("dim"), number("n_heads"), given.get("use_scaled_rope", False)
    head_dim, n_kv_heads = number("head_dim", dim // n_heads), number("n_kv_heads", n_heads)
    if head_dim % 2 or ("head_dim" not in given and dim % n_heads):
        found = f'"n_heads", "head_dim": found {n_heads}, {head_dim}'
        raise ValueError(f"{found}, expected heads of an even width that fill dim {dim}")
    if n_heads % n_kv_heads:
        raise ValueError(f'"n_kv_heads": found {n_kv_heads}, expected a divisor of {n_heads}')
    if not isinstance(scaled, bool) or ("rope_scaling_factor" in given and not scaled):
        expected = "expected a boolean, true with factor"
        raise ValueError(f'"use_scaled_rope": found {scaled!r}, {expected}')
    # SwiGLU's width, roughly 8/3 dim (llama3/model.py in llama-models).
    width = int(number("ffn_dim_multiplier", 1, 0.01, 100, Real) * int(2 * 4 * dim / 3))
    width = math.ceil(width / number("multiple_of", 256)) * number("multiple_of", 256)
    factor = number("rope_scaling_factor", ROPE_SCALING_FACTORS.get(dim, 8), 1, 1e6, Real)
    n_layers, ffn_dim = number("n_layers", high=4096), number("ffn_dim", width)
    return Config(
        *(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim),
        vocab_size=number("vocab_size"),
        max_seq_len=number("max_seq_len", 131072 if scaled else 8192),
        norm_eps=number("norm_eps", None, 1e-12, 1, Real),
        rope_theta=number("rope_theta", None, 1, 1e12, Real),
        rope_scaling_factor=factor if scaled else None,
    )


# --- 2. Weights -----------------------------------------------------------------------------------

# Under Meta's names. A matrix is a tensor [outputs, inputs], of any dtype, or a function that does
# [..., inputs] -> [..., outputs]; a function under "layers.0" computes all of that layer.
Weights = Mapping[str, Tensor | Callable[[Tensor], Tensor]]


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape, [outputs, inputs], of all weights but biases and norms of heads."""
    dim, ffn_dim, vocab_size = config.dim, config.ffn_dim, config.vocab_size
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {"tok_embeddings.weight": (vocab_size, dim)}
    for layer in range(config.n_layers):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (q_dim, dim),
            f"layers.{layer}.attention.wk.weight": (kv_dim, dim),
            f"layers.{layer}.attention.wv.weight": (kv_dim, dim),
            f"layers.{layer}.attention.wo.weight": (dim, q_dim),
            f"layers.{layer}.feed_forward.w1.weight": (ffn_dim, dim),
            f"layers.{layer}.feed_forward.w3.weight": (ffn_dim, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, ffn_dim),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    return shapes | {"norm.weight": (dim,), "output.weight": (vocab_size, dim)}


# --- 3. The model ---------------------------------------------------------------------------------

# Every cast and the order of the operations are those of Meta's reference (llama3/model.py in
# llama-models), so that the logits of a whole sequence equal the reference's to the last bit. A
# test guards that: a local name may be changed freely, the order of two operations never.


def product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T, [..., inputs] -> [..., outputs]; w of another dtype is converted in blocks."""
    if w.dtype == x.dtype:
        return x @ w.T
    rows = max(2**20 // w.shape[1] // 64, 1) * 64  # a block fits in the processor's cache
    keep = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    buffer = x.new_empty(rows, w.shape[1])  # one for all blocks, unless autograd must keep them
    parts = (p.to(x.dtype) if keep else buffer[: len(p)].copy_(p) for p in w.split(rows))
    return torch.cat([x @ part.T for part in parts], dim=-1)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Each vector in x times the matrix `name`: the one product of activations and weights.

    [..., inputs] -> [..., outputs]. A row of the matrix holds what one output takes of each input.
    """
    w, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    y = product(x, w) if isinstance(w, Tensor) else w(x)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale vectors [..., dim] to a mean square of 1, then by weight (Zhang & Sennrich 2019)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope_frequencies(config: Config, device: str | torch.device = "cpu") -> Tensor:
    """The angles, in radians per position, by which RoPE turns a head's pairs (Su et al. 2021).

    -> float32 [d / 2]; pair i has 1 / theta^(2i / d). From Llama 3.1 on, waves longer than the 8192
    tokens of Llama 3 are stretched, those shorter than 2048 kept, and those in between blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_divisors is not None:
        return frequencies / torch.tensor(config.rope_divisors, device=device)
    if config.rope_scaling_factor is None:
        return frequencies
    old_context, low, high = 8192, 1, 4
    wavelengths = 2 * math.pi / frequencies  # in positions
    kept = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)  # the share left as it is
    return (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies


def rope_rotations(positions: Tensor, config: Config) -> Tensor:
    """RoPE's rotations as complex numbers, of length 1: positions [T] -> complex64 [T, d / 2]."""
    angles = positions.float()[:, None] * rope_frequencies(config, positions.device)
    return torch.polar(torch.full_like(angles, config.rope_attention_factor), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn every pair of neighbours (2i, 2i + 1) in x, read as a complex number, by its rotation.

    x [..., heads, T, d], rotations [T, d / 2] -> [..., heads, T, d].
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., heads, T, d / 2]
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def queries_keys_values(
    x: Tensor, weights: Weights, layer: int, config: Config, rotations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: what a token looks for, is found by, and hands over.

    x [..., T, dim] -> [..., n_heads, T, d], and twice [..., n_kv_heads, T, d]; RoPE turns q and k.
    """

    def heads(name: str) -> Tensor:
        y = linear(x, weights, f"layers.{layer}.attention.{name}")  # [..., T, heads * d]
        y = y.unflatten(-1, (-1, config.head_dim)).transpose(-3, -2)  # [..., heads, T, d]
        norm = weights.get(f"layers.{layer}.attention.{name[1]}_norm.weight")  # q and k of Qwen3
        return y if norm is None else rms_norm(y, norm, config.norm_eps)

    return rotate(heads("wq"), rotations), rotate(heads("wk"), rotations), heads("wv")


def causal_mask(positions: Tensor, keys: Tensor, starts: Tensor | None = None) -> Tensor:
    """True where a query may attend to a key: at its own position and before.

    positions [T], those of the keys [L] -> bool [T, L]; with `starts` [B], see `forward`,
    [B, 1, T, L]: padding is hidden, except from itself, because a softmax over nothing is NaN.
    """
    mask = keys <= positions[:, None]
    if starts is None:
        return mask
    return (mask & (keys >= starts[:, None, None, None])) | (keys == positions[:, None])


def attention_pattern(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Attention weights: how much each query attends to each position (Vaswani et al. 2017).

    softmax(q k^T / sqrt(d)) where the mask is true: q [..., T, d], k [..., L, d], mask [..., T, L]
    -> [..., T, L]; each row sums to 1. The softmax is computed in float32.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    minus_inf = scores.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    return torch.softmax(scores + minus_inf, dim=-1, dtype=torch.float32).to(q.dtype)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Give every query head a copy of its keys or values: [..., K, L, d] -> [..., K * G, L, d]."""
    # A token's heads lie side by side, as in Meta's reference: the last bit of a sum depends on it.
    return x.transpose(-3, -2).repeat_interleave(times, dim=-2).transpose(-3, -2)


SCORES_AT_ONCE = 2**21  # attention scores computed at a time, and 32 times as many on a GPU
PREFILL_TOKENS = 1024  # of a prompt at a time: enough to keep the processor busy


def grouped_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, exact: bool = True
) -> Tensor:
    """Each query head gathers values; G neighbours share one head of them (Ainslie et al. 2023).

    q [..., K * G, T, d], k and v [..., K, L, d], mask [T, L] or [B, 1, T, L] -> [..., K * G, T, d].
    Queries go through in blocks, so that there are about SCORES_AT_ONCE scores at a time. Without
    `exact`, blocks leave out the keys after their own, which may change the last bit.
    """
    T, L = q.shape[-2], k.shape[-2]
    group = q.shape[-3] // k.shape[-3]
    blocks = max(min(q[..., 0].numel() * L // (SCORES_AT_ONCE << 5 * q.is_cuda) + 1, T // 16), 1)
    exact = exact or blocks == 1
    if T == L and exact:  # a whole sequence: the reference's operations, to the last bit
        k, v, group = repeat_heads(k, group), repeat_heads(v, group), 1
    out = torch.empty_like(q)  # to write to: a list of blocks would scatter the memory
    for i in range(blocks):
        part = slice(T * i // blocks, T * (i + 1) // blocks)
        end = L if exact else int(mask[..., part, :].flatten(0, -2).any(0).nonzero()[-1]) + 1
        # Unless they were repeated, a head of keys gets the queries of its group as rows.
        rows = q[..., part, :].unflatten(-3, (-1, group)).flatten(-3, -2)  # [..., K, G * T, d]
        row_mask = torch.cat([mask[..., part, :end]] * group, dim=-2)  # row g * T + t: head g
        pattern = attention_pattern(rows, k[..., :end, :], row_mask)
        out[..., part, :] = (pattern @ v[..., :end, :]).unflatten(-2, (group, -1)).flatten(-4, -3)
    return out


def attention(
    x: Tensor,
    weights: Weights,
    layer: int,
    config: Config,
    rotations: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    cache: Tensor | None = None,
) -> Tensor:
    """Each token gathers what it needs from the tokens up to itself: x [..., T, dim] -> the same.

    rotations [T, d / 2], mask [T, L]. With a cache [2, ..., n_kv_heads, L or more, d], the tokens'
    keys and values are written into it at `positions` [T], and L of it attended to; else L = T.
    """
    q, k, v = queries_keys_values(x, weights, layer, config, rotations)
    if cache is not None:
        k = cache[0].index_copy_(-2, positions, k)[..., : mask.shape[-1], :]
        v = cache[1].index_copy_(-2, positions, v)[..., : mask.shape[-1], :]
    out = grouped_query_attention(q, k, v, mask, exact=cache is None)  # [..., n_heads, T, d]
    return linear(out.transpose(-3, -2).flatten(-2), weights, f"layers.{layer}.attention.wo")


def feed_forward(x: Tensor, weights: Weights, layer: int) -> Tensor:
    """SwiGLU (Shazeer 2020), each token by itself: x [..., T, dim] -> [..., T, dim]."""
    name = f"layers.{layer}.feed_forward"
    gate = silu(linear(x, weights, f"{name}.w1"))  # [..., T, ffn_dim]
    return linear(gate * linear(x, weights, f"{name}.w3"), weights, f"{name}.w2")


def block(x: Tensor, weights: Weights, layer: int, config: Config, *where: Tensor | None) -> Tensor:
    """One layer: attention and SwiGLU, each added to x [..., T, dim]. where: see `attention`."""
    normed = rms_norm(x, weights[f"layers.{layer}.attention_norm.weight"], config.norm_eps)
    x = x + attention(normed, weights, layer, config, *where)
    normed = rms_norm(x, weights[f"layers.{layer}.ffn_norm.weight"], config.norm_eps)
    return x + feed_forward(normed, weights, layer)


def forward(
    tokens: Tensor,
    weights: Weights,
    config: Config,
    *,
    positions: Tensor | None = None,
    cache: Tensor | None = None,
    starts: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    """The whole model: tokens [..., T] -> logits of what comes after each, float32 [..., T, V].

    positions: where the tokens stand in their sequence, int64 [T]; by default 0 to T - 1.
    cache: see `new_cache`. Keys and values are written into it at the positions, and a token
        attends to those up to its own. Pass cache[..., :L, :] to leave positions from L on out.
    starts: for a batch padded on the left, where each row begins, int64 [B]; RoPE needs no change.
    last_only: compute the logits of the last token only, [..., 1, vocab_size].
    """
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    keys = positions if cache is None else torch.arange(cache.shape[-2], device=tokens.device)
    mask = causal_mask(positions, keys, starts)  # [T, L]
    rotations = rope_rotations(positions, config)  # [T, d / 2]
    x = weights["tok_embeddings.weight"][tokens].to(weights["norm.weight"].dtype)  # [..., T, dim]
    for layer in range(config.n_layers):
        where = rotations, mask, positions, None if cache is None else cache[layer]
        whole = weights.get(f"layers.{layer}")  # a function in the place of this layer, or none
        x = whole(x, *where) if whole else block(x, weights, layer, config, *where)
    x = x[..., -1:, :] if last_only else x
    return linear(rms_norm(x, weights["norm.weight"], config.norm_eps), weights, "output").float()


# --- 4. Generation --------------------------------------------------------------------------------


def new_cache(weights: Weights, config: Config, length: int, batch: Sequence[int] = ()) -> Tensor:
    """An empty cache, [n_layers, 2, *batch, K, length, d], of keys (index 0) and values (1)."""
    shape = config.n_layers, 2, *batch, config.n_kv_heads, length, config.head_dim
    return weights["norm.weight"].new_zeros(shape)


class Session:
    """The tokens processed so far, int64 [B, n], and their KV cache. One generation at a time."""

    def __init__(self, weights: Weights, config: Config, batch: int = 1) -> None:
        self.weights, self.config = weights, config
        self.tokens = torch.empty(batch, 0, dtype=torch.int64, device=weights["norm.weight"].device)
        self.cache = new_cache(weights, config, 0, [batch])

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all, if there is less."""
        old = self.cache
        if length > old.shape[-2]:
            self.cache = new_cache(self.weights, self.config, length, [len(self.tokens)])
            self.cache[..., : old.shape[-2], :] = old

    def rewind(self, prompt: Sequence[int]) -> int:
        """Keep the prefix shared with a prompt, but for its last token; return its length."""
        n = max(min(self.tokens.shape[1], len(prompt) - 1), 0)
        same = self.tokens[0, :n] == torch.tensor(prompt[:n], device=self.tokens.device)
        self.tokens = self.tokens[:, : int(same.cumprod(0).sum())]
        return self.tokens.shape[1]

    @torch.inference_mode()
    def read(self, tokens: Tensor, **options: Any) -> Tensor:
        """Read the next tokens of each row, [B, T]: -> logits. Options: see `forward`."""
        begin, end = self.tokens.shape[1], self.tokens.shape[1] + tokens.shape[1]
        if end > self.cache.shape[-2]:  # half as long again, so that no position is copied often
            self.reserve(min(end + end // 2, max(end, self.config.max_seq_len)))
        positions = torch.arange(begin, end, device=tokens.device)
        where = {"positions": positions, "cache": self.cache[..., :end, :]}
        logits = forward(tokens, self.weights, self.config, **where, **options)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        return logits


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens until their sum exceeds top_p: [..., V] (Holtzman et al. 2019)."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the sum of all likelier tokens
    kept = ordered.masked_fill(before > top_p, 0.0)
    return torch.zeros_like(ordered).scatter(-1, tokens, kept / kept.sum(-1, keepdim=True))


def sample(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Choose a token, at temperature 0 the likeliest: logits [..., V] -> int64 [...]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes inf - inf
    probabilities = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
    probabilities = nucleus(probabilities, top_p) if top_p < 1 else probabilities
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate_batch(
    prompts: Sequence[Sequence[int]],
    weights: Weights,
    config: Config,
    *,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] = sample,
    stop_tokens: Collection[int] = (),
    n_vocab: int | None = None,
    session: Session | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue a batch of B prompts of any lengths: an iterator that computes a step when asked.

    A step gives the chosen tokens, int64 [B], and the log-probabilities of all tokens before
    sampling, float32 [B, vocab_size]. A row yields -1 once it has reached a stop token; iteration
    ends when all rows have, after max_new_tokens, or with config.max_seq_len tokens. Raises
    ValueError when called, and FloatingPointError at a step whose logits are not finite.

    choose: takes logits [B, n_vocab] and gives tokens [B]; by default the likeliest.
    n_vocab: how many tokens the tokenizer has, if fewer than the model.
    session: what it has read already of a single prompt is not read again.
    progress: wraps the iterator over blocks of the prompts, for example in tqdm.
    """
    checked("max_new_tokens", max_new_tokens, 0, 2**63 - 1)
    checked("n_vocab", config.vocab_size if n_vocab is None else n_vocab, 1, config.vocab_size)
    rows = [row.tolist() if isinstance(row, Tensor) else [*row] for row in (stop_tokens, *prompts)]
    for token in (token for row in rows for token in row):
        checked("a token", token, 0, config.vocab_size - 1)
    stop_tokens, *prompts = rows
    for prompt in prompts or [()]:
        checked("the prompt's length", len(prompt), 1, config.max_seq_len)
    session = session or Session(weights, config, batch=len(prompts))
    fits = len(session.tokens) == len(prompts) and (len(prompts) == 1 or not session.tokens.numel())
    if not fits or session.weights is not weights:
        raise ValueError("the session has other weights or rows, or read a batch; start a new one")
    device, n_prompt = weights["norm.weight"].device, max(map(len, prompts))
    stop = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
    padding = [n_prompt - len(prompt) for prompt in prompts]  # on the left
    padded = [[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    starts = torch.tensor(padding, device=device) if any(padding) else None

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        n_new = min(max_new_tokens, config.max_seq_len - n_prompt)
        session.reserve(n_prompt + min(n_new, 256))
        unread = torch.tensor(padded, device=device)[:, session.rewind(padded[0]) :]
        blocks = progress(unread.split(PREFILL_TOKENS, dim=1))
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for step in range(1, n_new + 1):
            for part in blocks:
                logits = session.read(part, starts=starts, last_only=True)[:, -1]
            if not torch.stack(logits.aminmax()).isfinite().all():
                raise FloatingPointError(f"the logits of new token {step} are not finite")
            tokens = choose(logits[:, :n_vocab].clone())  # [B]
            ended |= torch.isin(tokens, stop)
            if ended.all():
                return
            blocks = [tokens[:, None]]
            yield tokens.masked_fill(ended, -1), torch.log_softmax(logits, dim=-1)

    return steps()


def generate(
    prompt: Sequence[int],
    weights: Weights,
    config: Config,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    **options: Any,
) -> Iterator[int]:
    """Continue one prompt up to a stop token: an iterator over new tokens.

    temperature: 0 takes the likeliest token, more is more random. top_p: see `nucleus`. seed: the
    same one draws the same tokens. options, and what is raised: see `generate_batch`.
    """
    checked("temperature", temperature, 0, 10**6, Real)
    checked("top_p", top_p, 0, 1, Real)
    generator = torch.Generator(weights["norm.weight"].device)
    generator.manual_seed(generator.seed() if seed is None else checked("seed", seed, 0, 2**63 - 1))
    choose = functools.partial(sample, temperature=temperature, top_p=top_p, generator=generator)
    limits = {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens, "choose": choose}
    steps = generate_batch([prompt], weights, config, **limits, **options)
    return (tokens.item() for tokens, _ in steps)


# --- 5. Loading -----------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointError(ValueError):
    """A problem with the file or folder of a checkpoint, `path`, in one line."""

    def __init__(self, path: str | Path, problem: object) -> None:
        self.path, self.problem = path, " ".join(str(problem).split())[:600]
        super().__init__(path, self.problem)

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def map_file(path: Path) -> dict[str, Tensor]:
    """Map what torch.save wrote; no code in the file runs. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would map compressed bytes as well
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("a compressed archive; load and torch.save it again")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        reason = f"{type(error).__name__}: {error}".partition(". ")[0]
        found = getattr(error, "strerror", None) or reason[:120]
        raise CheckpointError(path, f"{found}; expected tensors by torch.save") from error


def map_files(ckpt_dir: str | Path) -> list[dict[str, Tensor]]:
    """Map consolidated.00.pth, consolidated.01.pth, ... in a folder. Raises CheckpointError."""
    n = max(len([*Path(ckpt_dir).glob("consolidated.[0-9][0-9].pth")]), 1)
    return [map_file(Path(ckpt_dir) / f"consolidated.{i:02}.pth") for i in range(n)]


def load_config(ckpt_dir: str | Path) -> Config:
    """The Config in a folder's params.json: see `config_from_params`. Raises CheckpointError."""
    path = Path(ckpt_dir) / "params.json"
    try:
        return config_from_params(dict(json.loads(path.read_bytes())))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(path, error) from error


def split_axis(name: str) -> int | None:
    """The dimension in which Meta splits a weight over files, as fairscale's layers do.

    wo and w2 by columns, whose results are summed; other matrices by rows, with their biases; norms
    and output.bias not at all (Shoeybi et al. 2019, Megatron-LM; llama3/model.py in llama-models).
    """
    whole = "norm" in name or name.endswith(("wo.bias", "w2.bias", "output.bias"))
    return 1 if name.endswith(("wo.weight", "w2.weight")) else None if whole else 0


def shards_of(files: Sequence[dict[str, Tensor]], config: Config) -> dict[str, list[Tensor]]:
    """Each weight's parts in the files, side by side along split_axis; ValueError if one is off."""
    shapes, shards = weight_shapes(config), {}
    for file in files:  # some have RoPE's frequencies; an output that is tied may be left out
        file.pop("rope.freqs", None)
        file.setdefault("output.weight", file.get("tok_embeddings.weight"))
    matrices = [n[:-6] for n, shape in shapes.items() if len(shape) == 2 and "embed" not in n]
    shapes |= {f"{n}bias": shapes[f"{n}weight"][:1] for n in matrices if f"{n}bias" in files[0]}
    norms = [f"{n[:-3]}{n[-2]}_norm.weight" for n in matrices if n.endswith(("wq.", "wk."))]
    shapes |= dict.fromkeys(norms if norms[0] in files[0] else (), (config.head_dim,))
    for name in sorted({*shapes}.union(*files), key=str):
        if name not in shapes or not all(isinstance(file.get(name), Tensor) for file in files):
            raise ValueError(f"{name} is {'missing' if name in shapes else 'unknown'}")
    for name, shape in shapes.items():
        axis, parts = split_axis(name), [file[name].detach() for file in files]
        w, kind = parts[0], (parts[0].shape, parts[0].dtype, torch.strided, "cpu")
        same = all((p.shape, p.dtype, p.layout, p.device.type) == kind for p in parts)
        if same and axis is None:
            same = all(p.equal(w) for p in parts[1:])
        elif same and name == "layers.0.attention.wq.weight":  # no file is there twice
            same = len({str(p[0].tolist()) for p in parts}) == len(parts)
        if not same:
            raise ValueError(f"{name} is not dense, or the {len(files)} files are not of one model")
        if ".wk." in name or ".wv." in name:  # with more files than key heads, several hold one
            parts = parts[:: max(sum(map(len, parts)) // shape[0], 1)]
        size = tuple(n * len(parts) if i == axis else n for i, n in enumerate(w.shape))
        if size != shape or w.dtype not in DTYPES.values():
            found = f"{name} has shape {[*size]} and type {w.dtype} in {len(files)} file(s)"
            raise ValueError(f"{found}, expected {[*shape]} and {' or '.join(DTYPES)}")
        shards[name] = parts if axis is not None else [w]
    return shards


def default_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that weights are stored in, or float32 on a CPU without native products in it."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(stored)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # oneDNN supports more, by conversions
    units = f"avx512_{name}", f"amx_{name}", name, f"{name}_arith"
    native = device.type != "cpu" or not name or any(able.get(unit) for unit in units)
    return stored if native else torch.float32


def load_weights(
    ckpt_dir: str | Path, config: Config, device: str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Load a folder's weights; on the CPU those of a single file stay mapped. CheckpointError."""
    files, device, weights = map_files(ckpt_dir), torch.device(device), {}
    try:
        shards = shards_of(files, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(ckpt_dir, error) from error
    for name, parts in shards.items():
        w = parts[0] if len(parts) == 1 else torch.cat(parts, dim=split_axis(name))
        dtype = dtype or default_dtype(w.dtype, device)
        weights[name] = w if device.type == "cpu" and w.dim() == 2 else w.to(device, dtype)
    if shards["output.weight"][0].data_ptr() == shards["tok_embeddings.weight"][0].data_ptr():
        weights["output.weight"] = weights["tok_embeddings.weight"]  # tied: one copy serves
    return weights
