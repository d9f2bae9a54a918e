"""A model as every use needs it: its device, its tokenizer, its weights."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import formats
import llama3
from cli import ranks
from cli.capture import CapturedSession
from cli.memory import check_memory
from cli.messages import UsageError, bar, note
from cli.sampling import Sampler, suggestion
from cli.step import with_built_steps
from cli.words import expanded
from formats.errors import one_line
from formats.source import Source
from tokenizer_setup import Tokenizer, encode, stop_tokens

DEMO_DIR = Path(__file__).resolve().parent.parent / "demo"


def default_checkpoint() -> Path:
    """The folder to use without --ckpt-dir; says on standard error which it is."""
    ckpt_dir, origin = DEMO_DIR, "the small bundled demo"
    if os.environ.get("LLAMA3_CKPT_DIR"):
        ckpt_dir, origin = Path(os.environ["LLAMA3_CKPT_DIR"]), "from LLAMA3_CKPT_DIR"
    elif Path("Meta-Llama-3-8B").is_dir():
        ckpt_dir, origin = Path("Meta-Llama-3-8B"), "found in the current folder"
    note(f"using the model in {ckpt_dir} ({origin})")
    return ckpt_dir


def choose_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" the best one that this machine has.

    Of several ranks on a machine each has a GPU of its own, or they share the processor. Raises
    UsageError for a device that is not there.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = [f"cuda:{i}" for i in range(cuda)] + ["mps"] * torch.backends.mps.is_available()
    if ranks.n_ranks() > 1 and name in ("auto", "cuda") and (cuda or name == "cuda"):
        if cuda < ranks.ranks_here():
            raise UsageError(
                f"{ranks.ranks_here()} processes here, but {cuda} CUDA devices; start no more "
                "processes than devices (--nproc-per-node), or use --device cpu"
            )
        name = f"cuda:{ranks.in_environment('LOCAL_RANK', 0)}"
        torch.cuda.set_device(torch.device(name))
    elif ranks.n_ranks() > 1 and name not in ("auto", "cpu"):
        expected = "expected cuda or cpu with several processes"
        raise UsageError(f"argument --device: found {name}, {expected}")
    name = {"auto": [*present, "cpu"][0], "cuda": "cuda:0"}.get(name, name)
    if name not in (*present, "cpu"):
        wanted = "cuda" if name == "cuda:0" else name
        others = ", ".join(f"--device {other}" for other in (*present, "cpu"))
        found = f"argument --device: PyTorch finds no device {one_line(wanted, 40)} here"
        raise UsageError(f"{found}; use {others}")
    return torch.device(name)


def set_threads(wanted: int | None) -> None:
    """Compute with so many threads, or one a core; ranks on a machine share its cores."""
    if not wanted and ranks.n_ranks() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        wanted = max((os.cpu_count() or 1) // ranks.ranks_here(), 1)  # torchrun has set it to 1
    if wanted:
        torch.set_num_threads(wanted)


class Model(NamedTuple):
    """A model, opened as the options say."""

    args: argparse.Namespace
    source: Source
    config: llama3.Config  # of what this rank computes, with the context that was asked for
    tokenizer: Tokenizer
    device: torch.device

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text, after the one that begins a text. Raises UsageError.

        special: whether it may spell special tokens, also that one.
        """
        begin = self.tokenizer.begin
        bos = not (special and begin and text.startswith(begin))
        try:
            return encode(self.tokenizer, text, bos, special)
        except ValueError as error:  # a vocabulary that has no token for some characters
            raise UsageError(f"the model's tokenizer cannot encode a text: {error}") from None

    def load(self, prompt: int, new: int, batch: int = 1) -> llama3.Weights:
        """The weights, to compute with; UsageError if there is no memory for so many tokens."""
        args, source, n, rank = self.args, self.source, ranks.n_ranks(), ranks.this_rank()
        with ranks.together():
            dtype = llama3.DTYPES.get(args.dtype) or source.default_dtype(self.device)
            size = source.bytes_needed(self.device, dtype, n)
            check_memory(self.config, size, self.device, dtype, prompt, new, batch)
            span = ranks.span_of(source.config, rank, n)
            loading = bar("loading", " tensors", delay=0.5)
            weights = source.load_weights(self.device, dtype, loading, span)
            if self.device.type == "cpu" and args.compile is not False:
                options = {"steps": new > 1 and batch == 1, "layers": n == 1}
                weights = with_built_steps(weights, self.config, args.compile, **options)
            return ranks.connected(expanded(weights), source.config, rank, n)

    def session(self, weights: llama3.Weights) -> llama3.Session:
        """A new session of one text; on a GPU it reads single tokens by recorded steps."""
        captures = self.device.type == "cuda" and ranks.n_ranks() == 1
        if captures and self.args.compile is not False:
            return CapturedSession(weights, self.config)
        return llama3.Session(weights, self.config)

    def steps(
        self, prompts: Sequence[Sequence[int]], weights: llama3.Weights, **options: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """llama3.generate_batch, as the options say. FloatingPointError says what is wrong."""
        options = {
            "max_new_tokens": self.args.max_new_tokens,
            "choose": Sampler(self.args, prompts, self.device),
            "stop_tokens": stop_tokens(self.tokenizer),
            "n_vocab": self.tokenizer.n_vocab,
            "progress": bar("reading the prompt", " blocks", delay=2),
            "session": self.session(weights) if len(prompts) == 1 else None,
        } | options
        try:
            yield from llama3.generate_batch(prompts, weights, self.config, **options)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}: {self.why_not_finite(weights)}") from None

    def why_not_finite(self, weights: llama3.Weights) -> str:
        """The reason for logits that are not finite: a weight, or activations that overflow."""
        dtype = str(weights["norm.weight"].dtype).removeprefix("torch.")
        for name, stored in self.source.stored.items():
            if not all(part.isfinite().all() for part in stored.tensors()):
                return f"{name} contains NaN or infinity"
        hint = ", which ends at 65504; use --dtype bfloat16 or float32" * (dtype == "float16")
        return f"all weights are finite, but activations overflowed in {dtype}{hint}"


def open_model(args: argparse.Namespace) -> Model:
    """The model that the options name, but for its weights. CheckpointError and UsageError."""
    with ranks.together():
        ckpt_dir = args.ckpt_dir or default_checkpoint()
        device = choose_device(args.device)
        set_threads(args.threads)
        source = formats.open(ckpt_dir)
        if args.quantize:
            try:
                source = formats.quantized(source, args.quantize)
            except ValueError as error:
                raise UsageError(f"argument --quantize: {one_line(error)}") from None
        note(f"found in {ckpt_dir}: {source.found}")
        tokenizer, config = source.tokenizer(args.tokenizer), source.config
        suggested = suggestion(args, source.sampling) if args.score is None else ""
        if suggested:
            note(f"its generation_config.json suggests {suggested}, which is not done by itself")
    ranks.check_number(config)
    if args.max_seq_len and args.max_seq_len > config.max_seq_len:
        note(f"the model was trained for {config.max_seq_len} tokens; quality drops beyond")
    part = ranks.part_of(config, ranks.n_ranks())
    part = part._replace(max_seq_len=args.max_seq_len or config.max_seq_len)
    return Model(args, source, part, tokenizer, device)
