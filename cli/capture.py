"""One token on a GPU: llama3.forward recorded as a CUDA graph, so that a step is a single launch.

A layer is some forty small kernels, which the processor would start one by one, and a GPU is done
with them sooner than that. A graph starts them all, with the same addresses each time: so the token
and its position are written into tensors that stay, the cache is read in lengths of 256, and the
weights stay where they are. What a graph is: https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import llama3
from cli.messages import note
from formats.errors import one_line

LENGTHS = 256  # of the cache, in which there are graphs
CLOSE = 0.02  # how far logits may be from those of forward, of the largest: a few roundings


def record(function: Callable[[], Tensor], stream: Any, pool: Any) -> Callable[[], Tensor]:
    """A function's work on the current CUDA device, recorded; what it returns is the same tensor.

    It runs once before on the same stream, so that what is set up at first, such as the workspace
    of products, is not in the pool of memory that graphs share, which run one after the other.
    """
    now = torch.cuda.current_stream()
    stream.wait_stream(now)
    with torch.cuda.stream(stream):  # which is left again also if recording fails
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = function()
    now.wait_stream(stream)

    def again() -> Tensor:
        graph.replay()
        return result

    return again


class CapturedSession(llama3.Session):
    """A session of one text that reads single tokens by graphs; it goes on without if that fails.

    A graph is recorded for each length of the cache when it is first needed, and compared with
    forward before it is used.
    """

    def __init__(self, weights: llama3.Weights, config: llama3.Config) -> None:
        super().__init__(weights, config)
        self.token = self.tokens.new_zeros(1, 1)
        self.position = self.tokens.new_zeros(1)
        self.graphs: dict[int, Callable[[], Tensor]] = {}
        self.stream = torch.cuda.Stream(self.token.device) if self.token.is_cuda else None
        self.pool: Any = None
        # Other families' divisors of frequencies are copied from the processor at each step.
        self.captures = config.rope_divisors is None

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens, and up to a whole number of LENGTHS."""
        cache = self.cache
        super().reserve(-(-length // LENGTHS) * LENGTHS)
        if self.cache is not cache:  # at other addresses. Not one of them goes without the others
            self.graphs.clear()

    def graph(self, length: int) -> Callable[[], Tensor]:
        """A step of the token and the position that are set, recorded; RuntimeError if it fails."""

        def step() -> Tensor:
            where = {"positions": self.position, "cache": self.cache[..., :length, :]}
            return llama3.forward(self.token, self.weights, self.config, **where)

        token, position = self.token.clone(), self.position.clone()
        with torch.cuda.device_of(self.token):
            if not self.graphs and self.token.is_cuda:  # a pool ends with the last graph in it
                self.pool = torch.cuda.graph_pool_handle()
            self.token.zero_()  # what is recorded must read these, and not know what they were
            self.position.fill_(length - 1)  # of the cache, what is written later than read
            found = record(step, self.stream, self.pool)
            self.token.copy_(token)
            self.position.copy_(position)
            expected = step()
            difference = (found() - expected).abs().max()
        if not difference <= CLOSE * expected.abs().max():
            raise RuntimeError(f"its logits differ by {difference:.2g}")
        return found

    @torch.inference_mode()
    def read(self, tokens: Tensor, **options: Any) -> Tensor:
        """Read the next tokens, [1, T]: -> logits."""
        end = self.tokens.shape[1] + tokens.shape[1]
        alone = tokens.shape[1] == 1 and options.get("starts") is None
        if not self.captures or not alone or end > self.cache.shape[-2]:
            return super().read(tokens, **options)
        self.token.copy_(tokens)
        self.position.fill_(end - 1)
        length = -(-end // LENGTHS) * LENGTHS
        try:
            if length not in self.graphs:
                self.graphs[length] = self.graph(length)
            logits = self.graphs[length]().clone()
        except RuntimeError as error:
            self.captures = False
            note(f"a step cannot be captured, which is slower: {one_line(error, 200)}")
            return super().read(tokens, **options)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        return logits
