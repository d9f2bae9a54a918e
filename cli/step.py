"""One token through the model: a layer as one function, built from llama3.block itself."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import llama3
from cli.build import Part, Run, key_of, runs_of

BUILT_FROM_BYTES = 5e8  # of weights: below, building takes longer than it saves
ROOM = 8  # positions in the cache that a layer is tried with


def multiply_and_sum(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T for one vector x [..., inputs], as it compiles to a loop that reads w once.

    w [quarters, rows, inputs]. It converts, multiplies and sums in float32 on the way. Of sums of
    more than 4096 numbers PyTorch's compiler makes a slower loop: they are taken in equal parts.
    """
    inputs = w.shape[-1]
    parts = next(n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= 4096)
    inputs_in_parts = x.float().reshape(parts, -1)
    rows = w.unflatten(-1, (parts, -1))  # of each quarter
    sums = [(w.float() * inputs_in_parts).sum(-1).sum(-1) for w in rows]
    return torch.cat(sums).to(x.dtype).view(*x.shape[:-1], -1)


def in_quarters(w: Tensor) -> Tensor:
    """The rows of a large matrix in four parts, read side by side: -> [4 or 1, rows, inputs]."""
    return w.unflatten(0, (4 if w.numel() >= 2**20 and len(w) % 4 == 0 else 1, -1))


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """llama3.product with a matrix in quarters, which `multiply_and_sum` is compared with."""
    return llama3.product(x, w.flatten(0, 1))


def one_layer(
    x: Tensor,
    rotations: Tensor,
    mask: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *tensors: Tensor,
    names: Sequence[str],
    config: llama3.Config,
    times: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """llama3.block of one token, with the weights called `names` of layer 0 as inputs.

    keys, values [1, K, room, d]: a layer's cache; as much of it is attended to as the mask is long.
    """
    weights: dict[str, Tensor | Callable] = dict(zip(names, tensors, strict=True))
    for name, w in weights.items():
        weights[name] = functools.partial(times, w=in_quarters(w)) if w.dim() == 2 else w
    return llama3.block(x, weights, 0, config, rotations, mask, positions, (keys, values))


# --- in place of layers and matrices --------------------------------------------------------------


def layer_parts(weights: llama3.Weights, config: llama3.Config) -> dict[str, Part]:
    """The layers of a model, "layers.0" and so on, as parts to build."""
    generator, dtype = torch.Generator().manual_seed(0), weights["norm.weight"].dtype
    x = torch.randn(1, 1, config.dim, generator=generator).to(dtype)
    cache = torch.randn(2, 1, config.n_kv_heads, ROOM, config.head_dim, generator=generator)
    positions = torch.tensor([ROOM - 4])
    mask = llama3.causal_mask(positions, torch.arange(ROOM - 2))  # which hides one
    inputs = x, llama3.rope_rotations(positions, config), mask, positions, *cache.to(dtype)
    sizes = {}, {}, {1: "length"}, {}, {2: "room"}, {2: "room"}
    parts, constants = {}, config._replace(n_layers=1, vocab_size=1, max_seq_len=1)
    for layer in range(config.n_layers):
        start = f"layers.{layer}."
        own = {n.replace(start, "layers.0."): w for n, w in weights.items() if n.startswith(start)}
        if all(isinstance(w, Tensor) and w.is_contiguous() for w in own.values()):
            forms = (
                functools.partial(one_layer, names=[*own], config=constants, times=times)
                for times in (multiply_and_sum, multiply)
            )
            about, open_sizes = repr((constants, [*own])), (*sizes, *[{}] * len(own))
            parts[start[:-1]] = Part(*forms, inputs, (*own.values(),), open_sizes, about)
    return parts


def matrix_part(w: Tensor, dtype: torch.dtype) -> Part:
    """The product of one vector with matrices such as w as a part to build."""
    x = torch.randn(1, 1, w.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    quarters = len(in_quarters(w))
    w = w[-259 * quarters :].unflatten(0, (quarters, -1))  # some of the rows
    return Part(multiply_and_sum, multiply, (x,), (w,), ({}, {1: "rows"}), "matrix")


def layer_function(
    run: Run, part: Part, weights: llama3.Weights, layer: int, config: llama3.Config
) -> Callable[..., Tensor]:
    """A layer as forward takes it: a single token by what was built, all else by llama3.block."""
    _, heads, _, d = part.inputs[4].shape

    def step(x: Tensor, *where: Any) -> Tensor:
        rotations, mask, positions, cache = where
        single = x.shape[:-1] == (1, 1) and mask.dim() == 2 and mask.shape[1] > 1
        whole = cache is not None and cache.storage_offset() % cache.stride(-3) == 0
        if not single or not whole or torch.is_grad_enabled():
            return llama3.block(x, weights, layer, config, *where)
        room = cache.stride(-3) // d  # of all of the cache, which this is the beginning of
        strides = heads * room * d, room * d, d, 1
        keys, values = (half.as_strided((1, heads, room, d), strides) for half in cache)
        return run([x, rotations, mask, positions, keys, values, *part.weights])[0]

    return step


def matrix_function(run: Run, w: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a matrix: of a single vector by what was built, else by llama3.product."""
    quarters = in_quarters(w)

    def times(x: Tensor) -> Tensor:
        if x.numel() != w.shape[1] or len(w) < 8 or torch.is_grad_enabled():
            return llama3.product(x, w)
        return run([x.reshape(1, 1, -1), quarters])[0].view(*x.shape[:-1], -1)

    return times


@torch.inference_mode()
def with_built_steps(
    weights: llama3.Weights, config: llama3.Config, build: bool | None = None, layers: bool = True
) -> llama3.Weights:
    """The weights with what is built of them, or as they are where that fails.

    build: whether to build what is not there yet; None: if there are enough weights. What is there
    is always used. layers: whole layers, else every matrix by itself.
    """
    large = sum(w.nbytes for w in weights.values() if isinstance(w, Tensor)) > BUILT_FROM_BYTES
    parts = layer_parts(weights, config) if layers else {}
    for name, w in weights.items():
        layer, matrix = ".".join(name.split(".")[:2]), isinstance(w, Tensor) and w.dim() == 2
        if matrix and w.is_contiguous() and layer not in parts and "embed" not in name:
            parts[name] = matrix_part(w, weights["norm.weight"].dtype)
    runs, functions = runs_of(parts.values(), large if build is None else build, bool(build)), {}
    for name, part in parts.items():
        run = runs.get(key_of(part))
        if run and name in weights:
            functions[name] = matrix_function(run, weights[name])
        elif run:
            layer = int(name.removeprefix("layers."))
            functions[name] = layer_function(run, part, weights, layer, config)
    return {**weights, **functions}
