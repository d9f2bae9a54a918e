"""Several processes, as torchrun starts them, that compute one model, each with a part of it.

Every rank runs the same program. Of each matrix it has some rows, or of wo and w2 some columns,
whose results are summed (Shoeybi et al. 2019, Megatron-LM). What only rank 0 can know, such as
typed text, goes to all by one broadcast; only rank 0 has a voice.
"""

import datetime
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import llama3
from cli.messages import UsageError
from formats.errors import CheckpointError, one_line

MEETING = datetime.timedelta(minutes=2)  # for all ranks to start


def in_environment(name: str, default: int) -> int:
    """A number that torchrun, or another launcher, has put into the environment of a rank."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and "MASTER_ADDR" in os.environ else default


def n_ranks() -> int:
    """Return the number of processes that compute together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """Return the number of this process among them."""
    return dist.get_rank() if n_ranks() > 1 else 0


def ranks_here() -> int:
    """Return the number of them on this machine."""
    return in_environment("LOCAL_WORLD_SIZE", 1) if n_ranks() > 1 else 1


def meet() -> None:
    """Meet the other ranks, if there are any. Raises UsageError if they cannot be reached."""
    rank, n = in_environment("RANK", 0), in_environment("WORLD_SIZE", 1)
    if n == 1:
        return
    forever = datetime.timedelta(days=365)  # users may think for long; who ends is noticed at once
    try:
        if not dist.is_available() or rank >= n:
            raise ValueError(f"this is rank {rank} of {n}, and torch.distributed is needed")
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=MEETING)
        dist.distributed_c10d._set_pg_timeout(forever)
    except (ValueError, RuntimeError) as error:
        reason = one_line(error, limit=300)
        raise UsageError(f"the {n} processes cannot reach each other: {reason}") from None


def agreed(read: Callable[[], Any]) -> Any:
    """Return on every rank what `read` returns on rank 0, or raise its UsageError."""
    if n_ranks() == 1:
        return read()
    box: list[Any] = [None]
    if this_rank() == 0:
        try:
            box = [read()]
        except UsageError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if isinstance(box[0], UsageError):
        raise box[0]
    return box[0]


def agreed_tokens(tokens: Tensor) -> Tensor:
    """Return the tokens that rank 0 has chosen."""
    if n_ranks() > 1:
        dist.broadcast(tokens, src=0)
    return tokens


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    values = [value] * n_ranks()
    if n_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Raise UsageError on all ranks if one of them cannot do what is in this context."""
    problem = None
    try:
        yield
    except (CheckpointError, UsageError, MemoryError, OSError, RuntimeError) as error:
        if n_ranks() == 1:
            raise
        problem = one_line(error, limit=1000)
    for rank, found in enumerate(gathered(problem)):
        if found is not None:
            raise UsageError(found if rank == 0 else f"rank {rank}: {found}")


def lost_connection(error: BaseException) -> bool:
    """Return whether an error means that another rank died, which says why itself."""
    closed = "peer|closed|reset by|recv|NCCL|timed out"
    return n_ranks() > 1 and isinstance(error, RuntimeError) and bool(re.search(closed, str(error)))


def check_number(config: llama3.Config) -> None:
    """Raise UsageError unless as many ranks as there are can share a model."""
    heads, kv_heads = config.n_heads, config.n_kv_heads
    most = min(heads, config.ffn_dim, config.vocab_size)
    numbers = (n for n in range(1, most + 1) if heads % n == 0)
    possible = [n for n in numbers if kv_heads % n == 0 or n % kv_heads == 0]
    if n_ranks() not in possible:
        shared = f"{heads} query heads and {kv_heads} key and value heads"
        start = ", ".join(map(str, possible))
        raise UsageError(f"{n_ranks()} processes cannot share {shared}; start {start}")


def part_of(config: llama3.Config, n: int) -> llama3.Config:
    """The sizes of what one of n ranks computes."""
    heads = {"n_heads": config.n_heads // n, "n_kv_heads": max(config.n_kv_heads // n, 1)}
    return config._replace(ffn_dim=-(-config.ffn_dim // n), **heads)


def span_of(config: llama3.Config, rank: int, n: int) -> Callable[[str, int], tuple[int, int]]:
    """Return the function that gives the part of a weight, by its name and size, that a rank has.

    Heads stay whole. Where there are fewer key heads than ranks, several ranks have the same one.
    The table of embeddings is whole on every rank.
    """

    def span(name: str, size: int) -> tuple[int, int]:
        if n == 1 or llama3.split_axis(name) is None or name == "tok_embeddings.weight":
            return 0, size
        unit = config.head_dim if ".attention." in name else 1
        begin, end = size // unit * rank // n, size // unit * (rank + 1) // n
        return begin * unit, (max(end, begin + 1) if unit > 1 else end) * unit

    return span


def all_gather(x: Tensor, begin: int, size: int, dim: int = -1) -> Tensor:
    """The ranks' slices of a dimension side by side; x is the one that begins at `begin`."""
    whole = x.new_zeros([size if i == dim % x.dim() else n for i, n in enumerate(x.shape)])
    whole.narrow(dim, begin, x.shape[dim]).copy_(x)
    dist.all_reduce(whole)
    return whole


def connected(weights: llama3.Weights, config: llama3.Config, rank: int, n: int) -> llama3.Weights:
    """A rank's weights; products with wo and w2 are summed, those with output put side by side."""
    if n == 1:
        return weights

    def times(w: Any) -> Callable[[Tensor], Tensor]:
        return w if callable(w) else functools.partial(llama3.product, w=w)

    def summed(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def sum_over_ranks(x: Tensor) -> Tensor:
            y = product(x)
            dist.all_reduce(y)
            return y

        return sum_over_ranks

    begin, _ = span_of(config, rank, n)("output.weight", config.vocab_size)
    output = times(weights["output.weight"])
    columns = {name: w for name, w in weights.items() if llama3.split_axis(name) == 1}
    functions = {name: summed(times(w)) for name, w in columns.items()}
    functions["output.weight"] = lambda x: all_gather(output(x), begin, config.vocab_size)
    return {**weights, **functions}
