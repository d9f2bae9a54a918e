"""Llama 3, from Meta's own files to the next token, with nothing but tensors and functions.

    prompt = [1024, 355, 261, 32, 56, 258, 32]  # "17 plus 8 is ", as tokenizer_setup encodes it
    config = llama3.load_config("demo")  # the constants in params.json
    weights = llama3.load_weights("demo", config)  # the tensors in consolidated.00.pth
    logits = llama3.forward(torch.tensor(prompt), weights, config)  # [7, vocab_size]: what is next?
    new_tokens = [*llama3.generate(prompt, weights, config, max_new_tokens=1)]  # [338], or "25"

Tokens go in and tokens come out; `python llama3.py --prompt TEXT` is in command_line.py. A function
stands below those that it calls, so this file is read from top to bottom:

    1. Config        the constants of a model
    2. Weights       their names and shapes, which are Meta's own
    3. The model     embedding, RMSNorm, RoPE, attention, SwiGLU, logits
    4. Generation    one token after another, with a cache of keys and values
    5. Loading       params.json and consolidated.00.pth, checked

Letters in shapes: B batch, T tokens, L positions whose keys and values are attended to, K key and
value heads, G query heads that share one of them, d the width of a head; "..." stands for any
leading batch dimensions, or none. Of a whole model K is n_kv_heads, K * G is n_heads, and d is
head_dim.
"""

if __name__ == "__main__":  # the command, which imports this file as the module llama3
    try:
        import command_line
    except KeyboardInterrupt:  # while it still imports PyTorch
        raise SystemExit(130) from None
    raise SystemExit(command_line.main())

import itertools
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

import checkpoint_files as files
from checkpoint_files import SAMPLING_LIMITS, Limits, one_line

# --- 1. Config ------------------------------------------------------------------------------------


class _ConfigFields(NamedTuple):
    dim: int  # width of the vector that stands for a token
    n_layers: int
    n_heads: int  # heads of queries
    vocab_size: int
    multiple_of: int  # of which ffn_dim is one, unless it is given
    norm_eps: float  # is added to the mean square in RMSNorm
    rope_theta: float  # the base of RoPE's frequencies
    n_kv_heads: int | None = None  # heads of keys and values: n_heads
    head_dim: int | None = None  # width of one head: dim / n_heads
    ffn_dim: int | None = None  # width inside the feed-forward network: swiglu_width
    ffn_dim_multiplier: float | None = None
    use_scaled_rope: bool = False  # true for Llama 3.1 and later
    rope_scaling_factor: float = 8.0
    rope_divisors: tuple[float, ...] | None = None  # of each frequency, if scaled in another way
    max_seq_len: int | None = None  # tokens in the context: 8192, with use_scaled_rope 131072


class Config(_ConfigFields):
    """The constants of a model, under their names in params.json; None becomes what follows."""

    def __new__(cls, *values: float | None, **named: float | None) -> "Config":
        given = _ConfigFields(*values, **named)
        return super().__new__(cls, **files.completed_params(given._asdict()))


# --- 2. Weights -----------------------------------------------------------------------------------


class Weights(dict[str, Tensor | list[Tensor]]):
    """Tensors under Meta's names: see weight_shapes. A plain dict serves as well.

    Norms and biases have the type that is computed in; the matrices may be stored in any other, and
    may be lists of pieces, cut along split_axis, from several files. A rank has a part of each.
    """

    one_token: Callable[[Tensor, Tensor], Tensor] | None = None  # `linear` of a single vector
    rank: int = 0  # of this process among n_ranks
    n_ranks: int = 1

    def __init__(self, weights: object = (), **attributes: object) -> None:
        super().__init__(weights)
        self.__dict__ |= getattr(weights, "__dict__", {}) | attributes  # a copy has the same

    def tensors(self) -> list[Tensor]:
        """All of them, also those of matrices in pieces."""
        return [tensor for weight in self.values() for tensor in files.pieces_of(weight)]


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight. A matrix is [outputs, inputs]; biases are optional."""
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
#
# Every cast and the order of the operations are those of Meta's reference (llama3/model.py in
# llama-models), so that the logits of a whole sequence equal the reference's to the last bit.
# test_logits_equal_metas_order_of_operations_to_the_last_bit in tests/test_model.py guards that: a
# local name may be changed freely, the order of two operations never.

CONVERTED_NUMBERS = 2**20  # of a matrix at a time: few enough to stay in a processor's caches


def _product_with_another_type(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T in the type of x, to the same bits, without a second copy of w: a piece at a time."""
    rows = max(CONVERTED_NUMBERS // w.shape[1] // 64, 1) * 64
    room = x.new_empty(rows, w.shape[1])  # for every piece, unless autograd needs them all later
    keep = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    pieces = (part.to(x.dtype) if keep else room[: len(part)].copy_(part) for part in w.split(rows))
    return torch.cat([x @ piece.T for piece in pieces], dim=-1)


def product_of_one(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T for one vector x [..., inputs], without oneDNN, which takes twice as long for it."""
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return x @ w.T if w.dtype == x.dtype else _product_with_another_type(x, w)
    finally:
        torch._C._set_mkldnn_enabled(onednn)


def sum_over_ranks(x: Tensor, weights: Weights) -> Tensor:
    """The sum of the ranks' x, all of one shape, on each of them; of a single process x itself."""
    if getattr(weights, "n_ranks", 1) > 1:
        torch.distributed.all_reduce(x)
    return x


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Each vector in x times the matrix `name`: the one product of activations and weights.

    x [..., inputs], the weight [outputs, inputs] -> [..., outputs]. A row of the weight holds what
    one output takes of each input, hence the transpose. A bias is added if there is one. A rank has
    some rows, for some outputs; of wo and w2 some columns, for some inputs, and all are summed.
    """
    one_token = getattr(weights, "one_token", None)

    def product(x: Tensor, w: Tensor) -> Tensor:
        if one_token is not None and x.numel() == w.shape[1]:
            return one_token(x, w)
        return x @ w.T if w.dtype == x.dtype else _product_with_another_type(x, w)

    bias = weights.get(f"{name}.bias")
    w, by_columns = weights[f"{name}.weight"], files.split_axis(f"{name}.weight") == 1
    if isinstance(w, Tensor):
        y = product(x, w)
    elif by_columns:
        y = sum(map(product, x.split([piece.shape[1] for piece in w], dim=-1), w))
    else:
        y = torch.cat([product(x, piece) for piece in w], dim=-1)
    y = sum_over_ranks(y, weights) if by_columns else y
    return y if bias is None else y + bias


def whole(x: Tensor, weights: Weights, size: int, dim: int = -1) -> Tensor:
    """The ranks' parts of a dimension side by side: [..., part] -> [..., size]; x if it is all."""
    if getattr(weights, "n_ranks", 1) == 1:
        return x
    parts = x.new_zeros([size if i == dim % x.dim() else n for i, n in enumerate(x.shape)])
    parts.narrow(dim, size * weights.rank // weights.n_ranks, x.shape[dim]).copy_(x)
    return sum_over_ranks(parts, weights)


def embed(tokens: Tensor, weights: Weights, vocab_size: int) -> Tensor:
    """Look each token's row up in the embeddings: tokens [..., T] -> [..., T, dim]."""
    table, dtype = weights["tok_embeddings.weight"], weights["norm.weight"].dtype
    if isinstance(table, Tensor) and len(table) == vocab_size:
        return table[tokens].to(dtype)
    x, first = 0, vocab_size * weights.rank // weights.n_ranks  # row of this rank, and of a piece
    for piece in files.pieces_of(table):
        here = (tokens >= first) & (tokens < first + len(piece))
        rows = piece[(tokens - first).where(here, 0)].to(dtype)
        x, first = x + rows.masked_fill(~here[..., None], 0), first + len(piece)
    return sum_over_ranks(x, weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to a root mean square of 1, then by `weight` (Zhang & Sennrich 2019).

    x [..., dim], weight [dim] -> [..., dim]. The norm is computed in float32.
    """
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope_frequencies(config: Config, device: str | torch.device = "cpu") -> Tensor:
    """The angles, in radians per position, by which RoPE turns a head's pairs (Su et al. 2021).

    -> float32 [d / 2]. Pair i has 1 / theta^(2i / d). With use_scaled_rope (Llama 3.1 and later),
    waves longer than the 8192 tokens of Llama 3's context are stretched by rope_scaling_factor,
    those shorter than 2048 are kept, and between the two goes a blend.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_divisors is not None:
        return frequencies / torch.tensor(config.rope_divisors, device=device)
    if not config.use_scaled_rope:
        return frequencies
    old_context, low, high = 8192, 1, 4
    wavelengths = 2 * math.pi / frequencies  # in positions
    kept = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)  # the share left as it is
    return (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies


def rope_rotations(positions: Tensor, config: Config) -> Tensor:
    """RoPE's rotations as complex numbers of length 1: positions [T] -> complex64 [T, d / 2]."""
    angles = positions.float()[:, None] * rope_frequencies(config, positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn every pair of neighbours (2i, 2i + 1) in x, read as a complex number, by its rotation.

    x [..., heads, T, d], rotations [T, d / 2] -> [..., heads, T, d].
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., heads, T, d / 2]
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def queries_keys_values(
    x: Tensor, weights: Weights, layer: int, config: Config, rotations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token looks for, what it offers to be found by, and what it hands over.

    x [..., T, dim], rotations [T, d / 2] -> queries [..., n_heads, T, d], keys and values
    [..., n_kv_heads, T, d]. Queries and keys are rotated by their positions.
    """

    def heads(name: str) -> Tensor:  # as many as the weight has rows for: it may be a part of it
        y = linear(x, weights, f"layers.{layer}.attention.{name}")  # [..., T, heads * d]
        return y.unflatten(-1, (-1, config.head_dim)).transpose(-3, -2)  # [..., heads, T, d]

    return rotate(heads("wq"), rotations), rotate(heads("wk"), rotations), heads("wv")


def attention_shares(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Attention weights, the share that a query takes of each position (Vaswani et al. 2017).

    softmax(q k^T / sqrt(d)) under the mask `visible`, which is true where a query may look:
    q [..., T, d], k [..., L, d], visible [T, L] -> [..., T, L]; each row sums to 1, and is 0 where
    the mask is false. The softmax is computed in float32.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = scores.new_zeros(visible.shape).masked_fill(~visible, -math.inf)  # [T, L]
    return torch.softmax((scores + hidden).float(), dim=-1).to(q.dtype)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Give every query head a copy of its keys or values: [..., K, L, d] -> [..., K * G, L, d].

    times: G. In memory a token's heads lie side by side, as in Meta's reference: the order in which
    a product sums, and so the last bit of a float32 score, depends on how its operands lie.
    """
    return x.transpose(-3, -2).repeat_interleave(times, dim=-2).transpose(-3, -2)


MOST_SCORES = 2**22  # of attention, at a time
PREFILL_TOKENS = 1024  # of a prompt at a time: enough to keep the processor busy


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Each query head gathers values; G neighbours share one head of them (Ainslie et al. 2023).

    q [..., K * G, T, d], k and v [..., K, L, d] -> [..., K * G, T, d]. visible: as in `attention`.
    Queries go through in blocks, so that there are about MOST_SCORES scores at a time.
    """
    T, L = q.shape[-2], k.shape[-2]
    group = q.shape[-3] // k.shape[-3]  # not from the config: these may be some of its heads
    if T == L:  # a whole sequence: the reference's operations, to the last bit
        k, v, group = repeat_heads(k, group), repeat_heads(v, group), 1
    # Else the queries of a group are rows of one product, and k and v are not repeated.
    blocks = max(min(q[..., 0].numel() * L // MOST_SCORES + 1, T // 16), 1)
    heads = torch.empty_like(q)  # to write to: a list of blocks would scatter the memory
    for i in range(blocks):
        block = slice(T * i // blocks, T * (i + 1) // blocks)
        rows = q[..., block, :].unflatten(-3, (-1, group)).flatten(-3, -2)  # [..., K, G * T, d]
        if visible.dim() == 1:
            seen = torch.arange(L, device=q.device) <= visible[block, None]  # [T, L]
        else:
            seen = visible[..., block, :]
        seen = torch.cat([seen] * group, dim=-2)  # row g * T + t: head g
        shares = attention_shares(rows, k, seen)
        heads[..., block, :] = (shares @ v).unflatten(-2, (group, -1)).flatten(-4, -3)
    return heads


def attention(
    x: Tensor,
    weights: Weights,
    layer: int,
    config: Config,
    rotations: Tensor,
    visible: Tensor,
    positions: Tensor | None = None,
    cache: Tensor | None = None,
) -> Tensor:
    """Each token gathers what it needs from the tokens up to itself: x [..., T, dim] -> the same.

    rotations [T, d / 2]; visible [T, L] is true where a token may look, or visible [T] holds the
    last of the L positions that it may look at.
    With a cache [2, ..., n_kv_heads, L, d], the tokens' keys and values are written into it at
    `positions` [T], and all of it is attended to; without one, L = T.
    """
    q, k, v = queries_keys_values(x, weights, layer, config, rotations)
    if cache is not None:
        k = cache[0].index_copy_(-2, positions, k)  # [..., n_kv_heads, L, d]
        v = cache[1].index_copy_(-2, positions, v)
    heads = grouped_query_attention(q, k, v, visible)  # [..., n_heads, T, d]
    return linear(heads.transpose(-3, -2).flatten(-2), weights, f"layers.{layer}.attention.wo")


def feed_forward(x: Tensor, weights: Weights, layer: int) -> Tensor:
    """SwiGLU (Shazeer 2020), each token by itself: x [..., T, dim] -> [..., T, dim]."""
    name = f"layers.{layer}.feed_forward"
    gate = silu(linear(x, weights, f"{name}.w1"))  # [..., T, ffn_dim]
    return linear(gate * linear(x, weights, f"{name}.w3"), weights, f"{name}.w2")


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
    """The whole model: tokens [..., T] -> logits, float32 [..., T, vocab_size].

    Row t holds a score for every token of the vocabulary to come after tokens[..., t].

    positions: where the tokens stand in their sequence, int64 [T]; by default 0 to T - 1.
    cache: see `new_cache`. The keys and values of the tokens are written into it at `positions`,
        and each token attends to what it holds up to the token's own position. Give a part of
        the cache, cache[..., :L, :], to leave the positions from L on untouched and unread.
    starts: the first position of each row of a batch that is padded on the left, int64 [B]; those
        before are hidden. (RoPE needs to know nothing of it: only differences of positions count.)
    last_only: compute the logits of the last token only, [..., 1, vocab_size].
    """
    in_order = positions is None or cache is not None  # the key of position i is the one at i
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    visible = positions  # for a long sequence: attention makes the parts of the mask that it needs
    if not in_order or starts is not None or len(positions) <= PREFILL_TOKENS:
        keys = positions if cache is None else torch.arange(cache.shape[-2], device=tokens.device)
        visible = keys <= positions[:, None]  # [T, L]: none may look ahead
        if starts is not None:  # [B, 1, T, L]; padding sees itself, for a softmax of nothing is NaN
            visible = visible & (keys >= starts[:, None, None, None]) | (keys == positions[:, None])
    rotations = rope_rotations(positions, config)  # [T, d / 2]

    x = embed(tokens, weights, config.vocab_size)  # [..., T, dim]
    for layer in range(config.n_layers):
        normed = rms_norm(x, weights[f"layers.{layer}.attention_norm.weight"], config.norm_eps)
        layer_cache = None if cache is None else cache[layer]
        x = x + attention(
            normed, weights, layer, config, rotations, visible, positions, layer_cache
        )
        normed = rms_norm(x, weights[f"layers.{layer}.ffn_norm.weight"], config.norm_eps)
        x = x + feed_forward(normed, weights, layer)
    if last_only:
        x = x[..., -1:, :]
    x = rms_norm(x, weights["norm.weight"], config.norm_eps)
    return whole(linear(x, weights, "output").float(), weights, config.vocab_size)


# --- 4. Generation --------------------------------------------------------------------------------


def new_cache(weights: Weights, config: Config, length: int, batch: Sequence[int] = ()) -> Tensor:
    """An empty cache of keys and values for `length` positions.

    -> zeros [n_layers, 2, *batch, n_kv_heads, length, d], in the dtype and on the device of the
    norms; index 0 of the second dimension holds the keys, 1 the values.
    """
    # Not config.n_kv_heads: the weights may be a part of the model, with some of its heads.
    wk = files.pieces_of(weights["layers.0.attention.wk.weight"])
    n_kv_heads = sum(map(len, wk)) // config.head_dim
    shape = config.n_layers, 2, *batch, n_kv_heads, length, config.head_dim
    return weights["norm.weight"].new_zeros(shape)  # norms have the type that is computed in


def longer_cache(cache: Tensor, length: int) -> Tensor:
    """A cache for `length` positions that begins with what `cache` holds."""
    longer = cache.new_zeros((*cache.shape[:-2], length, cache.shape[-1]))
    longer[..., : cache.shape[-2], :] = cache
    return longer


class _SamplingFields(NamedTuple):
    temperature: float = 0.0  # 0 takes the likeliest token, more is more random
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    seed: int | None = None  # the same seed draws the same tokens; None: new ones every time
    top_k: int = 0  # draw among the k likeliest tokens; 0: among all
    min_p: float = 0.0  # draw among tokens with this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # more makes tokens that were there already less likely


class Sampling(_SamplingFields):
    """How the next token is chosen: Sampling(temperature=0.8, seed=1). ValueError if impossible."""

    def __new__(cls, *values: float | None, **named: float | None) -> "Sampling":
        fields = _SamplingFields(*values, **named)._asdict()
        for name, limits in SAMPLING_LIMITS.items():
            if not (name == "seed" and fields["seed"] is None):
                fields[name] = limits.check(name, fields[name])
        return super().__new__(cls, **fields)

    @classmethod
    def _make(cls, values: Iterable[float | None]) -> "Sampling":
        return cls(*values)  # so that _replace checks as well


GREEDY = Sampling()  # the likeliest token, always


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits, of which those of `seen` tokens go down: divided by `penalty`, or times it below 0.

    The repetition penalty of CTRL (Keskar et al. 2019). logits [..., V], seen bool [..., V].
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _kept(probabilities: Tensor, keep: Tensor) -> Tensor:  # scaled to sum to 1 again
    kept = probabilities.masked_fill(~keep, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def top_k(probabilities: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, and any as likely as the last of them (Fan et al. 2018)."""
    least = probabilities.topk(min(k, probabilities.shape[-1])).values[..., -1:]
    return _kept(probabilities, probabilities >= least)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens until their sum exceeds top_p (top-p, Holtzman et al. 2019)."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the sum of all likelier tokens
    kept = _kept(ordered, before <= top_p)
    return torch.zeros_like(probabilities).scatter(-1, tokens, kept)


def min_p(probabilities: Tensor, share: float) -> Tensor:
    """Keep tokens at least `share` times as likely as the likeliest one (Nguyen et al. 2024)."""
    return _kept(probabilities, probabilities >= share * probabilities.amax(-1, keepdim=True))


def sample(
    logits: Tensor,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Choose a token: logits [V] or [B, V] -> int64 [] or [B]. The seed is the generator's matter.

    First the repetition penalty goes to `seen` tokens, bool like the logits. Then at temperature 0
    the likeliest is taken; else one is drawn from softmax(logits / temperature), of which first
    top_k, then top_p and then min_p keep a part.
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes inf - inf
    probabilities = torch.softmax(logits / max(sampling.temperature, 1e-30), dim=-1)
    if sampling.top_k:
        probabilities = top_k(probabilities, sampling.top_k)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    if sampling.min_p:
        probabilities = min_p(probabilities, sampling.min_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


class Context:
    """The tokens that a model has read, and the cache of their keys and values, to go on from."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # of the first row of a batch
        self.cache: Tensor | None = None
        self.batch = 0

    def begin(self, prompts: list[list[int]], weights: Weights, config: Config, length: int) -> int:
        """Keep what the only prompt begins with, but its last token; how many tokens that are."""
        same = (a == b for a, b in zip(self.tokens, prompts[0][:-1], strict=False))
        n = sum(itertools.takewhile(bool, same)) if len(prompts) == self.batch == 1 else 0
        del self.tokens[n:]
        self.batch = len(prompts)
        if n == 0:
            self.cache = new_cache(weights, config, length, batch=[self.batch])
        elif self.cache.shape[-2] < length:
            self.cache = longer_cache(self.cache, length)
        return n


def steps(
    prompts: Sequence[Sequence[int]],
    weights: Weights,
    config: Config,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Collection[int] | int = (),
    max_seq_len: int | None = None,
    n_vocab: int | None = None,
    context: Context | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue a batch of B prompts of any lengths: an iterator that computes a step when asked.

    A step gives the chosen tokens, int64 [B], and the logarithms of the probabilities that the
    model gives to every token, before sampling, float32 [B, vocab_size]. A row that came to one of
    `stop_tokens` has -1 from there on; the end is where all have, after max_new_tokens, or where
    the longest row fills the context of max_seq_len tokens (by default config.max_seq_len).

    n_vocab: tokens from there on are never chosen; a tokenizer may have less than the model.
    context: what it has read already of a single prompt is not read again.
    progress: what the blocks of the prompts go through.

    Raises ValueError when called, and FloatingPointError at a step whose logits are not finite.
    """
    max_seq_len = config.max_seq_len if max_seq_len is None else max_seq_len
    n_vocab = config.vocab_size if n_vocab is None else n_vocab
    for name, length in (("max_new_tokens", max_new_tokens), ("max_seq_len", max_seq_len)):
        Limits(int, 0, 2**63 - 1).check(name, length)
    Limits(int, 1, config.vocab_size).check("n_vocab", n_vocab)
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling: found {one_line(repr(sampling), 40)}, expected a Sampling")
    token_ids = Limits(int, 0, config.vocab_size - 1)
    prompts = [token_ids.check_each("the prompt", prompt) for prompt in prompts]
    for prompt in prompts or [()]:
        if not 1 <= len(prompt) <= max_seq_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens, expected 1 to {max_seq_len}")
    if isinstance(stop_tokens, numbers.Integral):
        stop_tokens = [stop_tokens]
    device = weights["norm.weight"].device
    stop = torch.tensor(token_ids.check_each("stop_tokens", stop_tokens), device=device)
    n_prompt = max(map(len, prompts))
    n_new = min(max_new_tokens, max_seq_len - n_prompt)
    padded = [[0] * (n_prompt - len(prompt)) + prompt for prompt in prompts]  # on the left
    starts = torch.tensor([n_prompt - len(prompt) for prompt in prompts], device=device)
    starts = starts if starts.any() else None
    context = context or Context()
    decoding = Weights(weights)
    decoding.one_token = decoding.one_token or product_of_one

    def read(tokens: Tensor, weights: Weights) -> Tensor:  # the next ones, [B, T] -> [B, V]
        begin, end = len(context.tokens), len(context.tokens) + tokens.shape[1]
        positions, seen = torch.arange(begin, end, device=device), context.cache[..., :end, :]
        logits = forward(
            tokens, weights, config, positions=positions, cache=seen, starts=starts, last_only=True
        )
        context.tokens += tokens[0].tolist()
        return logits[:, -1]

    @torch.inference_mode()
    def loop() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(device)
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        n_read = context.begin(prompts, weights, config, min(n_prompt + 256, n_prompt + n_new))
        unread = torch.tensor(padded, device=device)[:, n_read:]
        for tokens in progress(unread.split(PREFILL_TOKENS, dim=1)) if n_new else ():
            logits = read(tokens, weights)
        seen = torch.zeros(len(prompts), config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for step in range(1, n_new + 1):
            if step > 1:
                length = len(context.tokens) + 1
                if length > context.cache.shape[-2]:  # by half: each position is copied twice
                    length = min(length + length // 2, n_prompt + n_new)
                    context.cache = longer_cache(context.cache, length)
                logits = read(tokens.clamp(min=0)[:, None], decoding)
            files.check_finite(logits, weights, step)
            tokens = sample(logits[:, :n_vocab], sampling, generator, seen[:, :n_vocab])  # [B]
            tokens = sum_over_ranks(tokens * (decoding.rank == 0), weights)  # those of rank 0
            ended |= torch.isin(tokens, stop)
            if ended.all():
                return
            seen.scatter_(1, tokens[:, None], True)
            tokens = tokens.masked_fill(ended, -1)
            yield tokens, torch.log_softmax(logits, dim=-1)

    return loop()


def generate(
    prompt_tokens: Sequence[int], weights: Weights, config: Config, **options: object
) -> Iterator[int]:
    """Continue one prompt up to a stop token: an iterator over new tokens. Options: see `steps`."""
    return (tokens.item() for tokens, _ in steps([prompt_tokens], weights, config, **options))


# --- 5. Loading -----------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(ckpt_dir: str | os.PathLike) -> Config:
    """Read and check params.json in the folder `ckpt_dir`: see checkpoint_files.check_params.

    A vocab_size of -1 is that of the weights. Raises CheckpointError, which names the key.
    """
    return Config(**files.params_in(ckpt_dir, torch.load, optional=Config._field_defaults))


def map_weights(
    ckpt_dir: str | os.PathLike, config: Config, rank: int = 0, n_ranks: int = 1
) -> Weights:
    """The weights in the folder `ckpt_dir`, or a rank's part, in the type that they are stored in.

    The files are mapped, not read: nothing is copied, and pages come from disk when they are first
    used. Raises CheckpointError unless the files hold just the weights that `config` calls for.
    """
    shapes, d = weight_shapes(config), config.head_dim
    parts, unit = files.weights_in(ckpt_dir, torch.load, shapes, DTYPES, d)
    part = files.part_of_weights(parts, shapes, d, rank, n_ranks, unit)
    return Weights(part, rank=rank, n_ranks=n_ranks)


def default_dtype(weights: Weights, device: torch.device) -> torch.dtype:
    """The type most numbers are stored in, or float32 where a processor has no products of it."""
    tensors = Weights(weights).tensors()
    types = {tensor.dtype for tensor in tensors}
    dtype = max(types, key=lambda t: sum(w.numel() for w in tensors if w.dtype == t))
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if device.type != "cpu" or name is None:
        return dtype
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", bool)
    return dtype if supported() else torch.float32


def place_weights(
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    join: bool = True,
) -> Weights:
    """The weights as `forward` computes with them on `device` in `dtype`.

    On the CPU matrices stay as they are, mapped: `linear` converts what it takes of them. Those in
    pieces are joined, unless `join` is false. Other devices get copies, one after the other.
    progress: what the names go through meanwhile.
    """
    placed, copies = Weights(weights), {}  # tied weights are stored once, and are copied once
    for name in progress(weights):
        pieces = files.pieces_of(weights[name])
        place = tuple((p.data_ptr(), p.shape, p.stride(), p.dtype) for p in pieces)
        if place not in copies:
            mapped = device.type == "cpu" and pieces[0].dim() == 2
            stored = pieces if mapped else [p.to(device).to(dtype) for p in pieces]
            columns = placed.n_ranks > 1 and not pieces[0].is_contiguous()  # of a matrix
            if (mapped and not join) or (len(pieces) == 1 and not columns):
                copies[place] = stored if len(stored) > 1 else stored[0]
            else:
                copies[place] = torch.cat(stored, dim=files.split_axis(name) or 0)
                files.forget(pieces)
        placed[name] = copies[place]
    return placed


def load_weights(
    ckpt_dir: str | os.PathLike,
    config: Config,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Weights:
    """Load the weights in the folder `ckpt_dir`, to compute on `device`. Raises CheckpointError."""
    device, weights = torch.device(device), map_weights(ckpt_dir, config)
    return place_weights(weights, device, dtype or default_dtype(weights, device))
