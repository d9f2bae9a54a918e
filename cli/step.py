"""One token through the model: a layer as one function, built from llama3.block itself."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import llama3
from cli.build import BUILT_FROM_BYTES, Part, Run, key_of, runs_of
from cli.words import Product, Words, dequantized, make_words, multiply_words, size_of, some_rows

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


def multiply(x: Tensor, w: Tensor | Words) -> Tensor:
    """The product of one vector x and a matrix, in quarters or in words, as it is built."""
    return multiply_words(x, w) if isinstance(w, Words) else multiply_and_sum(x, w)


def multiply_plainly(x: Tensor, w: Tensor | Words) -> Tensor:
    """The same, by what `multiply` is compared with."""
    if isinstance(w, Words):
        return (x @ dequantized(w, x.dtype))[..., : w.outputs]
    return llama3.product(x, w.flatten(0, 1))


Form = tuple[str, int | None] | None  # the type and the outputs of words, or none for a tensor


def taken_apart(w: Tensor | Words) -> tuple[Form, tuple[Tensor, ...]]:
    """What a function that is built takes as inputs, and what it must know of them."""
    return (w[:2], w[2:]) if isinstance(w, Words) else (None, (w,))


def one_matrix(
    x: Tensor, *tensors: Tensor, form: Form, times: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """A product, with tensors of a matrix as inputs."""
    return times(x, Words(*form, *tensors) if form else tensors[0])


def one_layer(
    x: Tensor,
    rotations: Tensor,
    mask: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *tensors: Tensor,
    forms: dict[str, Form],
    config: llama3.Config,
) -> Tensor:
    """llama3.block of one token, with tensors of the weights of layer 0 as inputs.

    keys, values [1, K, room, d]: a layer's cache; as much of it is attended to as the mask is long.
    forms: by the weights' names, what is known of them.
    """
    weights, remaining = {}, iter(tensors)
    for name, form in forms.items():
        w = next(remaining)
        if form or w.dim() == 2:
            w = Words(*form, w, next(remaining)) if form else in_quarters(w)
            w = functools.partial(multiply, w=w)
        weights[name] = w
    return llama3.block(x, weights, 0, config, rotations, mask, positions, (keys, values))


def plain_layer(
    x: Tensor, *inputs: Tensor, weights: llama3.Weights, config: llama3.Config
) -> Tensor:
    """The same with weights that are not taken apart, which a built layer is compared with."""
    rotations, mask, positions, *cache = inputs[:5]
    return llama3.block(x, weights, 0, config, rotations, mask, positions, cache)


# --- in place of layers and matrices --------------------------------------------------------------


def buildable(w: Any) -> bool:
    """Whether a weight is a tensor that can be read row after row."""
    return isinstance(w, Tensor) and w.is_contiguous()


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
        names = sorted(name for name in weights if name.startswith(start))
        own = {name.replace(start, "layers.0."): weights[name] for name in names}
        held = {n: w.words if isinstance(w, Product) else w for n, w in own.items()}
        if all(isinstance(w, Words) or buildable(w) for w in held.values()):
            apart = {name: taken_apart(w) for name, w in held.items()}
            forms = {name: form for name, (form, _) in apart.items()}
            built = functools.partial(one_layer, forms=forms, config=constants)
            plain = functools.partial(plain_layer, weights=own, config=constants)
            tensors = tuple(tensor for _, tensors in apart.values() for tensor in tensors)
            about, open_sizes = repr((constants, forms)), (*sizes, *[{}] * len(tensors))
            parts[start[:-1]] = Part(built, plain, inputs, tensors, open_sizes, about)
    return parts


def matrix_part(w: Tensor | Words, dtype: torch.dtype) -> Part:
    """The product of one vector with matrices such as w, of any number of rows, as a part."""
    x = torch.randn(1, 1, w.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    if isinstance(w, Words):
        few, rows = some_rows(w, 0, 64), 0
    else:
        quarters, rows = len(in_quarters(w)), 1
        few = w[-259 * quarters :].unflatten(0, (quarters, -1))
    form, tensors = taken_apart(few)
    functions = (
        functools.partial(one_matrix, form=form, times=times)
        for times in (multiply, multiply_plainly)
    )
    open_sizes = {}, *[{rows: "rows"} if t.shape[rows] > 1 else {} for t in tensors]
    return Part(*functions, (x,), tensors, open_sizes, f"matrix {form}")


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


def matrix_function(run: Run, w: Tensor | Product) -> Callable[[Tensor], Tensor]:
    """The product with a matrix: of a single vector by what was built, else as before."""
    if isinstance(w, Product):
        outputs, (_, tensors), several = w.words.outputs, taken_apart(w.words), w
    else:
        outputs, tensors = len(w), (in_quarters(w),)
        several = functools.partial(llama3.product, w=w)

    def times(x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1] or outputs < 8 or torch.is_grad_enabled():
            return several(x)
        return run([x.reshape(1, 1, -1), *tensors])[0][..., :outputs].view(*x.shape[:-1], -1)

    return times


@torch.inference_mode()
def with_built_steps(
    weights: dict[str, Any],
    config: llama3.Config,
    build: bool | None = None,
    layers: bool = True,
    steps: bool = True,
) -> llama3.Weights:
    """The weights with what is built of them, or as they are where that fails.

    build: whether to build what is not there yet; None: if there are enough weights. What is there
    is always used. layers: whole layers, else every matrix by itself. steps: for single tokens,
    else only what dequantizes. Blocks in `weights` itself are replaced by words.
    """
    dtype, size = weights["norm.weight"].dtype, sum(map(size_of, weights.values()))
    wanted = size > BUILT_FROM_BYTES if build is None else build
    make_words(weights, wanted, bool(build))
    parts = layer_parts(weights, config) if layers else {}
    for name, w in weights.items():
        w = w.words if isinstance(w, Product) else w
        matrix = isinstance(w, Words) or (buildable(w) and w.dim() == 2)
        if matrix and ".".join(name.split(".")[:2]) not in parts and "embed" not in name:
            parts[name] = matrix_part(w, dtype)
    runs, functions = runs_of(parts.values(), wanted and (steps or bool(build)), bool(build)), {}
    for name, part in parts.items():
        run = runs.get(key_of(part))
        if run and name in weights:
            functions[name] = matrix_function(run, weights[name])
        elif run:
            layer = int(name.removeprefix("layers."))
            functions[name] = layer_function(run, part, weights, layer, config)
    return {**weights, **functions}
