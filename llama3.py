"""Llama 3, from Meta's own files to the next token, with nothing but tensors and functions.

To be read from top to bottom:

    1. Config        the constants in params.json
    2. Weights       the tensors in consolidated.00.pth, under Meta's own names
    3. The model     embedding, RMSNorm, RoPE, attention, SwiGLU, logits
    4. Generation    one token after another, with a cache of keys and values
    5. Command line  python llama3.py --prompt "..."

Letters in shapes: T tokens, L positions whose keys and values are attended to, dim the width of
the model; "..." stands for any leading batch dimensions, or none.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import silu
from tqdm import tqdm

import tokenizer_setup
from tokenizer_setup import CheckpointError, describe_file, one_line

# --- 1. Config ------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The constants of a model, under the names that they have in params.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    rope_scaling_factor: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width inside the feed-forward network (llama3/model.py in Meta's llama-models)."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return math.ceil(width / self.multiple_of) * self.multiple_of

    @property
    def max_seq_len(self) -> int:
        """Tokens in the context that the model was made for: Llama 3.1 and later, or 3."""
        return 131072 if self.use_scaled_rope else 8192


# The values in params.json: their type, their limits, and whether they must be there.
_PARAMS = {
    "dim": (int, 1, 2**24, True),
    "n_layers": (int, 1, 4096, True),
    "n_heads": (int, 1, 2**24, True),
    "n_kv_heads": (int, 1, 2**24, False),
    "vocab_size": (int, 1, 2**24, True),
    "multiple_of": (int, 1, 2**24, True),
    "ffn_dim_multiplier": (float, 0.01, 100, False),
    "norm_eps": (float, 1e-12, 1, True),
    "rope_theta": (float, 1, 1e12, True),
    "use_scaled_rope": (bool, False, True, False),
    "rope_scaling_factor": (float, 1, 1e6, False),
}


def load_config(ckpt_dir: str | os.PathLike) -> Config:
    """Read and check params.json in the folder `ckpt_dir`.

    n_kv_heads, ffn_dim_multiplier, use_scaled_rope and rope_scaling_factor may be missing or null.
    Keys that Config does not have are ignored.

    Raises CheckpointError; it names the key whose value is missing or impossible.
    """
    path = _checkpoint_file(ckpt_dir, "params.json")
    content = _read(path)
    try:
        params = json.loads(content)
    except (ValueError, RecursionError) as error:
        found = describe_file(content) or f"no JSON: {one_line(error)}"
        raise CheckpointError(f"{path}: found {found}; expected a JSON object") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path}: found a JSON {type(params).__name__}, expected an object")

    def bad(key: str, expected: str) -> CheckpointError:
        found = one_line(json.dumps(params[key]), limit=40) if key in params else "missing"
        return CheckpointError(f'{path}: "{key}" is {found}, expected {expected}')

    values = {}
    for key, (kind, low, high, required) in _PARAMS.items():
        value = params.get(key)
        if value is not None or required:
            whole_float = kind is float and type(value) is int  # 500000 for 500000.0
            if not (type(value) is kind or whole_float) or not low <= value <= high:
                noun = {int: "a whole number", float: "a number", bool: "a boolean"}[kind]
                raise bad(key, f"{noun} from {json.dumps(low)} to {json.dumps(high)}")
        values[key] = value if value is None else kind(value)
    if values["n_kv_heads"] is None:
        values["n_kv_heads"] = values["n_heads"]
    values["use_scaled_rope"] = bool(values["use_scaled_rope"])
    if values["rope_scaling_factor"] is None:
        # Meta's code has 8 for all models; the published 3.2 ones of 1B and 3B were made with 32.
        values["rope_scaling_factor"] = 32.0 if values["dim"] in (2048, 3072) else 8.0
    config = Config(**values)
    if config.dim % config.n_heads or config.head_dim % 2:
        raise bad("n_heads", f'a number that cuts "dim" ({config.dim}) into heads of even width')
    if config.n_heads % config.n_kv_heads:
        raise bad("n_kv_heads", f'a number that divides "n_heads" ({config.n_heads})')
    return config


def _checkpoint_file(ckpt_dir: str | os.PathLike, name: str) -> Path:
    """The path of `name` in `ckpt_dir`, or a CheckpointError that says what is there instead."""
    folder = Path(ckpt_dir)
    if os.path.isfile(folder / name):
        return folder / name
    found = f"has no {name}" if os.path.isdir(folder) else "no such folder"
    if os.path.isfile(folder / "original" / name):
        found += " (but its folder 'original' has: use that one)"
    elif os.path.isfile(folder / "config.json"):
        found += " (it is a Hugging Face checkpoint)"
    raise CheckpointError(
        f"{folder}: {found}; needed is a folder with Meta's params.json, consolidated.00.pth and "
        "tokenizer.model"
    )


def _read(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, by default all of them."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


# --- 2. Weights -----------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight. A matrix is [outputs, inputs], to be used as x @ w.T."""
    dim, ffn_dim, vocab_size = config.dim, config.ffn_dim, config.vocab_size
    kv_dim = config.n_kv_heads * config.head_dim
    shapes = {"tok_embeddings.weight": (vocab_size, dim)}
    for layer in range(config.n_layers):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (dim, dim),
            f"layers.{layer}.attention.wk.weight": (kv_dim, dim),
            f"layers.{layer}.attention.wv.weight": (kv_dim, dim),
            f"layers.{layer}.attention.wo.weight": (dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": (ffn_dim, dim),
            f"layers.{layer}.feed_forward.w3.weight": (ffn_dim, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, ffn_dim),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    return shapes | {"norm.weight": (dim,), "output.weight": (vocab_size, dim)}


def load_weights(
    ckpt_dir: str | os.PathLike,
    config: Config,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Load consolidated.00.pth from the folder `ckpt_dir`, under the names that it has there.

    The file is mapped into memory, not read: on the CPU and in the checkpoint's own dtype
    (dtype=None) nothing is copied, and pages come from disk when they are first used.

    Raises CheckpointError unless the file holds just the weights that `config` calls for.
    """
    path = _checkpoint_file(ckpt_dir, "consolidated.00.pth")
    n_files = len(list(path.parent.glob("consolidated.*.pth")))
    if n_files > 1:
        sharded = f"the checkpoint is split over {n_files} files, which cannot be loaded yet"
        raise CheckpointError(f"{path.parent}: {sharded}; use a model of one consolidated.00.pth")
    try:
        with warnings.catch_warnings(action="ignore"):
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        found = describe_file(_read(path, 4096)) or one_line(error)
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint of plain tensors, or not all of it: found {found}; "
            "download it again"
        ) from None
    if problem := _problem(weights, config):
        raise CheckpointError(f"{path}: {problem}")
    weights = {name: tensor.detach() for name, tensor in weights.items() if name != "rope.freqs"}

    device = torch.device(device)
    stored_dtype = weights["output.weight"].dtype
    if device.type == "cpu" and dtype in (None, stored_dtype):
        return weights
    total = sum(tensor.nbytes for tensor in weights.values())
    moved = {}  # by place in the file: tied weights stand in it once and are moved once
    with tqdm(
        desc="loading", total=total, unit="B", unit_scale=True, delay=0.5, leave=False, disable=None
    ) as progress:
        for name, tensor in weights.items():
            place = tensor.data_ptr(), tensor.shape
            if place not in moved:
                moved[place] = tensor.to(device=device, dtype=dtype or stored_dtype)
            weights[name] = moved[place]
            progress.update(tensor.nbytes)
    return weights


def _problem(weights: object, config: Config) -> str | None:
    """What keeps `weights` from being just the tensors that `config` calls for, or None."""
    if not isinstance(weights, dict):
        return f"found a {type(weights).__name__}, expected a dictionary of tensors"
    shapes = weight_shapes(config)
    dtypes = set()
    for name, shape in shapes.items():
        tensor = weights.get(name)
        if tensor is None:
            return f"{name} is missing, expected a tensor of shape {[*shape]}"
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return f"{name} is no dense tensor, expected one of shape {[*shape]}"
        if tensor.shape != shape:
            return f"{name} has shape {[*tensor.shape]}, expected {[*shape]} from params.json"
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        found = " and ".join(sorted(dtypes))
        return f"the weights are of type {found}, expected one of {', '.join(DTYPES)}"
    for name in weights.keys() - shapes.keys() - {"rope.freqs"}:
        return f"found {one_line(repr(name), 80)}, which is no weight of a Llama 3 text model"
    return None


# --- 3. The model ---------------------------------------------------------------------------------
#
# Every cast and the order of the operations are those of Meta's reference (llama3/model.py in
# llama-models), so that the logits of a whole sequence equal the reference's to the last bit.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to a root mean square of 1, then by `weight` (Zhang & Sennrich 2019).

    x [..., dim], weight [dim] -> [..., dim]. The norm is computed in float32.
    """
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope_frequencies(config: Config, device: str | torch.device = "cpu") -> Tensor:
    """The angles, in radians per position, by which RoPE turns a head's pairs (Su et al. 2021).

    -> float32 [head_dim / 2]. Pair i has 1 / theta^(2i / head_dim). With use_scaled_rope (Llama
    3.1 and later), waves longer than the 8192 tokens of Llama 3's context are stretched by
    rope_scaling_factor, those shorter than 2048 are kept, and between the two goes a blend.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if not config.use_scaled_rope:
        return frequencies
    old_context, low, high = 8192, 1, 4
    stretched = frequencies / config.rope_scaling_factor
    wavelengths = 2 * math.pi / frequencies  # in positions
    kept = (old_context / wavelengths - low) / (high - low)
    blend = (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies
    longer_or_blend = torch.where(wavelengths > old_context / low, stretched, blend)
    return torch.where(wavelengths < old_context / high, frequencies, longer_or_blend)


def rope_rotations(positions: Tensor, config: Config) -> Tensor:
    """RoPE's rotations as complex numbers of length 1: positions [T] -> [T, head_dim / 2]."""
    angles = positions.float()[:, None] * rope_frequencies(config, positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn every pair of neighbours (2i, 2i + 1) in x, read as a complex number, by its rotation.

    x [..., heads, T, head_dim], rotations [T, head_dim / 2] -> [..., heads, T, head_dim].
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., heads, T, head_dim / 2]
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def queries_keys_values(
    x: Tensor, weights: dict[str, Tensor], layer: int, config: Config, rotations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token looks for, what it offers to be found by, and what it hands over.

    x [..., T, dim], rotations [T, head_dim / 2] -> queries [..., n_heads, T, head_dim], keys and
    values [..., n_kv_heads, T, head_dim]. Queries and keys are rotated by their positions.
    """
    wq, wk, wv = (weights[f"layers.{layer}.attention.w{name}.weight"] for name in "qkv")

    def split_heads(y: Tensor) -> Tensor:  # [..., T, heads * head_dim] -> [..., heads, T, head_dim]
        return y.unflatten(-1, (-1, config.head_dim)).transpose(-3, -2)

    q = rotate(split_heads(x @ wq.T), rotations)
    k = rotate(split_heads(x @ wk.T), rotations)
    return q, k, split_heads(x @ wv.T)


def attention_shares(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """How much of each position a query takes: softmax(q k^T / sqrt(d)) (Vaswani et al. 2017).

    q [..., T, d], k [..., L, d], visible [T, L] -> [..., T, L]; each row sums to 1, and is 0 where
    the query may not look. The softmax is computed in float32.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~visible, -math.inf)
    return torch.softmax(scores.float(), dim=-1).to(q.dtype)


def attention(
    x: Tensor,
    weights: dict[str, Tensor],
    layer: int,
    config: Config,
    rotations: Tensor,
    visible: Tensor,
    positions: Tensor | None = None,
    cache: Tensor | None = None,
) -> Tensor:
    """Each token gathers what it needs from the tokens up to itself: x [..., T, dim] -> the same.

    rotations [T, head_dim / 2]; visible [T, L] says which positions each token may look at.
    With a cache [2, ..., n_kv_heads, L, head_dim], the tokens' keys and values are written into it
    at `positions` [T], and all of it is attended to; without one, L = T.

    Grouped-query attention (Ainslie et al. 2023): n_heads / n_kv_heads neighbouring query heads
    share one head of keys and values.
    """
    q, k, v = queries_keys_values(x, weights, layer, config, rotations)
    if cache is not None:
        k = cache[0].index_copy_(-2, positions, k)  # [..., n_kv_heads, L, head_dim]
        v = cache[1].index_copy_(-2, positions, v)

    batch, T = x.shape[:-2], x.shape[-2]
    group = q.shape[-3] // k.shape[-3]
    if T == 1:
        # The queries of a group become the rows of one product, and nothing is copied: with the
        # heads of the 8B model and L = 4096, in bfloat16 on a CPU, 20 times as fast as the copies.
        q = q.reshape(*batch, -1, group, config.head_dim)  # [..., n_kv_heads, group, head_dim]
    else:
        k, v = repeat_heads(k, group), repeat_heads(v, group)  # [..., n_heads, L, head_dim]
    heads = attention_shares(q, k, visible) @ v
    heads = heads.reshape(*batch, -1, T, config.head_dim)  # [..., n_heads, T, head_dim]
    return heads.transpose(-3, -2).flatten(-2) @ weights[f"layers.{layer}.attention.wo.weight"].T


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Give every query head a copy of its keys or values: [..., K, L, d] -> [..., K * times, L, d].

    In memory a token's heads lie side by side, as in Meta's reference: the order in which a
    product sums, and so the last bit of a float32 score, depends on how its operands lie.
    """
    return x.transpose(-3, -2).repeat_interleave(times, dim=-2).transpose(-3, -2)


def feed_forward(x: Tensor, weights: dict[str, Tensor], layer: int) -> Tensor:
    """SwiGLU (Shazeer 2020), each token by itself: x [..., T, dim] -> [..., T, dim]."""
    w1, w2, w3 = (weights[f"layers.{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T  # inside: [..., T, ffn_dim]


def forward(
    tokens: Tensor,
    weights: dict[str, Tensor],
    config: Config,
    *,
    positions: Tensor | None = None,
    cache: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    """The whole model: tokens [..., T] -> logits, float32 [..., T, vocab_size].

    Row t holds a score for every token of the vocabulary to come after tokens[..., t].

    positions: where the tokens stand in their sequence, int64 [T]; by default 0 to T - 1.
    cache: see `new_cache`. The keys and values of the tokens are written into it at `positions`,
        and each token attends to what it holds up to the token's own position. Give a part of
        the cache, cache[..., :L, :], to leave the positions from L on untouched and unread.
    last_only: compute the logits of the last token only, [..., 1, vocab_size].
    """
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    key_positions = positions
    if cache is not None:
        key_positions = torch.arange(cache.shape[-2], device=tokens.device)
    visible = key_positions <= positions[:, None]  # [T, L]: none may look ahead
    rotations = rope_rotations(positions, config)  # [T, head_dim / 2]

    x = weights["tok_embeddings.weight"][tokens]  # [..., T, dim]
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
    return (x @ weights["output.weight"].T).float()


# --- 4. Generation --------------------------------------------------------------------------------


def new_cache(
    weights: dict[str, Tensor], config: Config, length: int, batch: Sequence[int] = ()
) -> Tensor:
    """An empty cache of keys and values for `length` positions.

    -> zeros [n_layers, 2, *batch, n_kv_heads, length, head_dim], in the weights' dtype and on
    their device; index 0 of the second dimension holds the keys, 1 the values.
    """
    wk = weights["layers.0.attention.wk.weight"]
    n_kv_heads = wk.shape[0] // config.head_dim
    return wk.new_zeros(config.n_layers, 2, *batch, n_kv_heads, length, config.head_dim)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens until their sum exceeds top_p, and scale them to sum to 1 again.

    Top-p sampling (Holtzman et al. 2019). [..., vocab_size] -> [..., vocab_size]
    """
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the sum of all likelier tokens
    kept = ordered.masked_fill(before > top_p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, tokens, kept)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token: logits [vocab_size] or [B, vocab_size] -> int64 [] or [B].

    The likeliest at temperature 0; else drawn from softmax(logits / temperature), cut to its
    nucleus if top_p is less than 1.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes inf - inf
    probabilities = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate(
    prompt_tokens: Sequence[int],
    weights: dict[str, Tensor],
    config: Config,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    max_seq_len: int | None = None,
) -> Iterator[int]:
    """Continue `prompt_tokens`: an iterator over the new tokens, each computed when asked for.

    It ends after max_new_tokens, before the first of `stop_tokens`, or when prompt and
    completion together fill the context of max_seq_len tokens (by default config.max_seq_len).
    For temperature and top_p see `sample`. The random numbers come from a generator of this
    call's own: the same seed gives the same tokens; without one, every call differs.

    Raises ValueError for arguments out of range.
    """
    if max_seq_len is None:
        max_seq_len = config.max_seq_len
    if not 1 <= len(prompt_tokens) <= max_seq_len:
        raise ValueError(f"the prompt has {len(prompt_tokens)} tokens, expected 1 to {max_seq_len}")
    if not 0 <= min(prompt_tokens) <= max(prompt_tokens) < config.vocab_size:
        raise ValueError(f"the prompt has a token that is not in 0 to {config.vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected 0 to 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected 0 to 2**63 - 1")

    n_new = min(max_new_tokens, max_seq_len - len(prompt_tokens))
    device = weights["output.weight"].device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    tokens = torch.tensor(prompt_tokens, device=device)

    @torch.inference_mode()
    def new_tokens(tokens: Tensor) -> Iterator[int]:
        cache = new_cache(weights, config, len(tokens) + n_new)
        start = 0
        for _ in range(n_new):  # first the whole prompt (prefill), then one token a step (decode)
            end = start + len(tokens)
            positions = torch.arange(start, end, device=device)
            seen = cache[..., :end, :]
            logits = forward(
                tokens, weights, config, positions=positions, cache=seen, last_only=True
            )
            tokens = sample(logits, temperature, top_p, generator)  # [1]
            token = tokens.item()
            if token in stop_tokens:
                return
            yield token
            start = end

    return new_tokens(tokens)


# --- 5. Command line ------------------------------------------------------------------------------

DEMO_DIR = Path(__file__).resolve().parent / "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input ends the program with status 2."""
    try:
        return run(parse_arguments(argv))
    except CheckpointError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        return 130


def refuse(message: str) -> NoReturn:
    """End the program because of bad input: one line on standard error, status 2."""
    note(f"error: {one_line(message, limit=1000)}")
    sys.exit(2)


def note(message: str) -> None:
    """Tell the user something on standard error."""
    print(f"llama3.py: {message}", file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and check each by itself."""

    def number(kind: type, low: float, high: float) -> Callable[[str], float]:
        def parse(text: str) -> float:
            try:
                if low <= (value := kind(text)) <= high:
                    return value
            except ValueError:
                pass
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"found {one_line(text, 40)!r}, expected {noun} from {low} to {high}"
            )

        return parse

    parser = argparse.ArgumentParser(
        prog="llama3.py",
        description="Continue a text with a Llama 3 model, read from its files as Meta ships them. "
        "The completion goes to standard output, everything else to standard error.",
        epilog="Without --ckpt-dir: the folder that the environment variable LLAMA3_CKPT_DIR "
        "names, else Meta-Llama-3-8B in the current folder, else the small bundled demo.",
        allow_abbrev=False,
    )
    parser.error = refuse

    def add(option: str, text: str, **settings: object) -> None:
        parser.add_argument(option, help=text, **settings)

    positive = number(int, 1, 2**24)
    add("--prompt", "the text to continue", metavar="TEXT", required=True)
    add(
        "--ckpt-dir", "folder with the model's files (default: see below)", metavar="DIR", type=Path
    )
    add("--tokenizer", "tokenizer.model to use (default: the one in that folder)", metavar="FILE")
    tokens = "tokens to make at most (default: 128)"
    add("--max-new-tokens", tokens, metavar="N", type=positive, default=128)
    temperature = "0 always takes the likeliest token, more is more random (default: 0)"
    add("--temperature", temperature, metavar="X", type=number(float, 0, 10**6), default=0.0)
    likeliest = "draw among the likeliest tokens that have probability P together (default: 1)"
    add("--top-p", likeliest, metavar="P", type=number(float, 0, 1), default=1.0)
    seed = "make the random choices repeatable (default: new ones every time)"
    add("--seed", seed, metavar="N", type=number(int, 0, 2**63 - 1))
    device = "auto, the default, takes the first of the others that this machine has"
    add("--device", device, default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", "type to compute in (default: the checkpoint's)", choices=DTYPES)
    context = "tokens in the context (default: 8192, with use_scaled_rope 131072)"
    add("--max-seq-len", context, metavar="N", type=positive)
    add("--stats", "end with a line of JSON on standard error", action="store_true")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Load the model and stream its completion of the prompt; returns the exit status."""
    start = time.perf_counter()
    ckpt_dir = args.ckpt_dir or default_checkpoint()
    device = choose_device(args.device)
    config = load_config(ckpt_dir)
    tokenizer = tokenizer_setup.load_tokenizer(args.tokenizer or ckpt_dir / "tokenizer.model")
    if tokenizer.n_vocab != config.vocab_size:
        refuse(
            f'the tokenizer has {tokenizer.n_vocab} tokens, but "vocab_size" in params.json is '
            f"{config.vocab_size}; use the tokenizer.model that came with the weights"
        )
    prompt_tokens = tokenizer_setup.encode(tokenizer, args.prompt)
    max_seq_len = args.max_seq_len or config.max_seq_len
    room = max_seq_len - len(prompt_tokens)
    if room < 0:
        refuse(
            f"the prompt has {len(prompt_tokens)} tokens, but the context only {max_seq_len}; "
            "shorten the prompt or raise --max-seq-len"
        )
    if args.max_new_tokens > room:
        note(f"the context of {max_seq_len} tokens has room for {room} new ones")
    weights = load_weights(ckpt_dir, config, device, DTYPES.get(args.dtype))
    load_s = time.perf_counter() - start

    tokens = generate(
        prompt_tokens,
        weights,
        config,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop_tokens=tokenizer_setup.stop_tokens(tokenizer),
        max_seq_len=max_seq_len,
    )
    times = [time.perf_counter()]  # of the start, then of every token
    status = stream(tokenizer_setup.decode_stream(tokenizer, _timed(tokens, times)))
    if args.stats:
        if len(times) == 1:  # not one token came
            times.append(time.perf_counter())
        stats = {
            "load_s": round(load_s, 4),
            "prompt_tokens": len(prompt_tokens),
            "prefill_s": round(times[1] - times[0], 4),
            "decode_tokens": len(times) - 2,
            "decode_s": round(times[-1] - times[1], 4),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if device.type == "cuda":
            stats["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
        print(json.dumps(stats), file=sys.stderr)
    return status


def stream(texts: Iterable[str]) -> int:
    """Write `texts` to standard output as they come, and nothing else; returns the exit status."""
    if sys.stdout is None:
        refuse("standard output is closed, so there is nowhere to write to")
    sys.stdout.reconfigure(encoding="utf-8")
    status = 0
    try:
        for text in texts:
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        if not isinstance(error, BrokenPipeError):  # with which a reader says that it has enough
            refuse(f"standard output cannot be written: {error.strerror}")
    if sys.stdout.isatty():
        print(flush=True)
    return status


def _timed(items: Iterable[int], times: list[float]) -> Iterator[int]:
    """`items`, with the time at which each came added to `times`."""
    for item in items:
        times.append(time.perf_counter())
        yield item


def default_checkpoint() -> Path:
    """The folder to use without --ckpt-dir; says on standard error which it is."""
    if os.environ.get("LLAMA3_CKPT_DIR"):
        ckpt_dir, origin = Path(os.environ["LLAMA3_CKPT_DIR"]), "from LLAMA3_CKPT_DIR"
    elif Path("Meta-Llama-3-8B").is_dir():
        ckpt_dir, origin = Path("Meta-Llama-3-8B"), "found in the current folder"
    else:
        ckpt_dir, origin = DEMO_DIR, "the small bundled demo"
    note(f"using the model in {ckpt_dir} ({origin})")
    return ckpt_dir


def choose_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" the best one that this machine has."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    present = {"cuda": cuda, "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in present if present[kind])
    if not present[name]:
        refuse(f"argument --device: PyTorch finds no {name} device here; use --device cpu")
    return torch.device(name)


def peak_rss_bytes() -> int | None:
    """The most memory that this process has had resident so far; None where it cannot be told."""
    try:  # Linux: getrusage would also count what the parent had resident when it forked
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


if __name__ == "__main__":
    sys.exit(main())
