"""A model as it lies in files of any kind: its config, its weights, its tokenizer.

RoPE turns pairs of a head's numbers: those of Meta are neighbours, (2i, 2i + 1), those of Hugging
Face lie half a head apart, (i, i + d / 2). So the rows of wq and wk, and their biases, lie in
another order there. llama.cpp has Meta's order for Llama and Hugging Face's for Qwen2.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import llama3
from formats.blocks import BYTES, SIZES, Blocks
from formats.errors import CheckpointError, one_line, refuse
from formats.placing import to_device
from formats.text import FileTokenizer
from formats.vocabulary import model_tokenizer
from tokenizer_setup import Tokenizer

Span = Callable[[str, int], tuple[int, int]]  # a weight's name and size -> a part along split_axis


def join(parts: Sequence[Tensor], axis: int | None, begin: int = 0, end: int = 2**62) -> Tensor:
    """Cut from `begin` to `end` out of tensors that are side by side along an axis."""
    if axis is None:
        return parts[0]
    found = []
    for part in parts:
        size = part.shape[axis]
        low, high = max(begin, 0), min(end, size)
        if low < high:
            found.append(part.narrow(axis, low, high - low))
        begin, end = begin - size, end - size
    return found[0] if len(found) == 1 else torch.cat(found, dim=axis)


class Stored(NamedTuple):
    """A weight in files: what it is loaded as, in Meta's order of rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # of blocks, what they are converted to
    parts: Callable[[], Sequence[Tensor]]  # side by side along split_axis, one in most files
    is_copy: bool = False  # else it is mapped, and takes no memory of its own
    stored_as: str = ""  # the file's name of its dtype
    blocks: bool = False  # whether the parts are the bytes of blocks, of the type stored_as

    def weight(
        self, axis: int | None, dtype: torch.dtype, begin: int = 0, end: int = 2**62
    ) -> Tensor | Blocks:
        """What is stored, from `begin` to `end` along an axis.

        dtype: what becomes of blocks where their rows are cut within a block.
        """
        if not self.blocks:
            return join(self.parts(), axis, begin, end)
        blocks, numbers = Blocks(join(self.parts(), 0), self.stored_as), SIZES[self.stored_as]
        begin, end = max(begin, 0), min(end, self.shape[axis])
        if axis == 0:
            return Blocks(blocks.raw[begin:end], self.stored_as)
        if begin % numbers or end % numbers:
            return blocks.to(dtype)[:, begin:end]
        begin, end = (i // numbers * BYTES[self.stored_as] for i in (begin, end))
        return Blocks(blocks.raw[:, begin:end], self.stored_as)

    def tensors(self) -> Iterator[Tensor]:
        """All of its numbers, of blocks some rows at a time."""
        if not self.blocks:
            return iter(self.parts())
        return (piece for raw in self.parts() for piece in Blocks(raw, self.stored_as).pieces())

    def tensor(self, axis: int | None) -> Tensor:
        """All of it, of its dtype."""
        w = self.weight(axis, self.dtype)
        return w.to(self.dtype) if isinstance(w, Blocks) else w


def summary(kind: str, config: llama3.Config, stored: dict[str, Stored]) -> str:
    """Describe a model in a few words."""
    count = sum(math.prod(tensor.shape) for tensor in stored.values())
    matrices = [tensor for tensor in stored.values() if len(tensor.shape) > 1]
    types = {str(matrix.stored_as or matrix.dtype).split(".")[-1] for matrix in matrices}
    copies = (s.stored_as and s.is_copy and not s.blocks for s in stored.values())
    made = ", partly made bfloat16" * any(copies)
    weights = f"{count / 1e6:.1f} million weights in {'/'.join(sorted(types))}{made}"
    return f"{kind}, {config.n_layers} layers, {weights}"


class Source(NamedTuple):
    """A model in files."""

    path: Path
    found: str  # what it is, in a few words
    config: llama3.Config
    stored: dict[str, Stored]  # by Meta's names; without output.weight, it is the embeddings
    text: Callable[[], Tokenizer | FileTokenizer]  # makes its tokenizer
    sampling: Mapping[str, object] = {}  # what its files suggest, under transformers' names
    exact: bool = False  # whether Llama 3's tokenizer has a token for each row of its embeddings

    def load_weights(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        progress: Callable[[Iterable[str]], Iterable[str]] = iter,
        span: Span = lambda name, size: (0, size),
    ) -> dict[str, Tensor | Blocks]:
        """As llama3.load_weights, of each weight what `span` says, along its split_axis."""
        device, placed = torch.device(device), {}
        dtype = dtype or self.default_dtype(device)
        for name in progress(self.stored):
            axis, stored = llama3.split_axis(name), self.stored[name]
            begin, end = span(name, stored.shape[axis or 0])
            w = stored.weight(axis, dtype, begin, end)
            cut = end - begin < stored.shape[axis or 0]
            if isinstance(w, Blocks):
                raw = w.raw.clone() if cut and stored.is_copy else w.raw  # so that the rest goes
                w = Blocks(to_device(raw, device), w.kind)
            elif device.type != "cpu" or w.dim() == 1:
                w = to_device(w, device).to(dtype)
            elif cut and (stored.is_copy or axis == 1):
                w = w.clone(memory_format=torch.contiguous_format)  # so that the rest goes
            placed[name] = w
        if "output.weight" not in placed:
            begin, end = span("output.weight", self.config.vocab_size)
            table, stored = placed["tok_embeddings.weight"], self.stored["tok_embeddings.weight"]
            if isinstance(table, Blocks) and device.type == "cpu":  # mapped by itself: see gguf.py
                table = stored.weight(0, dtype, begin, end)
            else:
                cut = getattr(table, "raw", table)[begin:end]
                table = Blocks(cut, table.kind) if isinstance(table, Blocks) else cut
            placed["output.weight"] = table
        return placed

    def default_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype to compute in unless another is asked for."""
        return llama3.default_dtype(self.stored["tok_embeddings.weight"].dtype, device)

    def bytes_needed(self, device: torch.device, dtype: torch.dtype, n_ranks: int = 1) -> float:
        """The memory that the weights take on a device, about; what is mapped takes none."""
        size, table = 0, self.stored["tok_embeddings.weight"]
        tied = {"output.weight": table} if table.blocks else {}  # which is repacked, too
        for name, stored in (tied | self.stored).items():
            n = math.prod(stored.shape) / (1 if name == "tok_embeddings.weight" else n_ranks)
            if stored.blocks:  # repacked; embeddings stay mapped
                on_cpu = device.type == "cpu" and name == "tok_embeddings.weight"
                size += 0 if on_cpu else n / SIZES[stored.stored_as] * BYTES[stored.stored_as]
            elif device.type != "cpu":
                size += n * dtype.itemsize
            elif stored.is_copy or (n_ranks > 1 and llama3.split_axis(name) == 1):
                size += n * stored.dtype.itemsize
        return size

    def tokenizer(self, path: str | Path | None = None) -> Tokenizer | FileTokenizer:
        """Its tokenizer, or that in a tokenizer.model. Raises CheckpointError."""
        where, rows = Path(path or self.path), self.config.vocab_size
        try:
            found = model_tokenizer(path, rows) if path else self.text()
        except CheckpointError:
            raise
        except ImportError as error:
            problem = f"its tokenizer needs a package: pip install {error.name}"
            raise CheckpointError(where, problem) from None
        except Exception as error:  # what is in files may have any form
            problem = f"its tokenizer cannot be used: {one_line(error)}"
            raise CheckpointError(where, problem) from None
        n, metas = found.n_vocab, isinstance(found, Tokenizer)
        if n > rows or (self.exact and metas and n < rows):
            problem = f'the tokenizer has {n} tokens, but the "vocab_size" of the model is {rows}'
            raise CheckpointError(where, f"{problem}; use the tokenizer that came with the weights")
        return found


# Of weights, without the layer, and of constants: Meta's names, Hugging Face's and llama.cpp's.
NAMES = {
    "tok_embeddings": ("embed_tokens", "token_embd"),
    "norm": ("norm", "output_norm"),
    "output": ("lm_head", "output"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "attention.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}
KEYS = {
    "dim": ("hidden_size", "embedding_length"),
    "n_layers": ("num_hidden_layers", "block_count"),
    "n_heads": ("num_attention_heads", "attention.head_count"),
    "n_kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "ffn_dim": ("intermediate_size", "feed_forward_length"),
    "norm_eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    "head_dim": ("head_dim", "attention.key_length"),
    "max_seq_len": ("max_position_embeddings", "context_length"),
}


def pairs_side_by_side(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, or their bias, from Hugging Face's order to Meta's: a copy.

    [heads * d, ...]: within a head, i and i + d / 2 become 2i and 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_half_a_head_apart(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of pairs_side_by_side."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def renamed(name: str, names: Mapping[str, str], layers: str) -> str | None:
    """A weight's name elsewhere, or None: blk.3.attn_q.bias -> layers.3.attention.wq.bias.

    names: the new name for each old one, without the layer and "weight" or "bias".
    """
    match = re.fullmatch(r"(?:\w+\.(0|[1-9]\d{0,5})\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return None
    layer = "" if match[1] is None else f"{layers}.{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"


def config_of(path: Path, params: dict[str, object], keys: dict[str, str]) -> llama3.Config:
    """The Config of constants under Meta's names; `keys` are those that an error names them by."""
    if params["ffn_dim"] is None:  # which Meta's formula would give another model
        raise CheckpointError(path, f'"{keys["ffn_dim"]}" is missing')
    own = {key: params.pop(key) for key in llama3.Config._fields[-2:] if key in params}
    try:
        return llama3.config_from_params(params)._replace(**own)
    except ValueError as error:
        problem = re.sub(r'"(\w+)"', lambda key: f'"{keys.get(key[1], key[1])}"', str(error))
        raise CheckpointError(path, problem) from None


def in_metas_order(
    path: Path,
    family: str,
    config: llama3.Config,
    tensors: Mapping[str, Stored],
    rename: Callable[[str], str | None],
    there: Callable[[str], str | None],
    tied: object,
    reorder: bool,
    biased: set[str] | None = None,
) -> dict[str, Stored]:
    """The weights under Meta's names and in Meta's order of rows, if they are what `config` needs.

    rename: a name there to Meta's; there: one of Meta's to that; reorder: whether wq and wk are in
    Hugging Face's order; biased: the matrices of a layer that have a bias, by default those that
    have one anywhere. Raises CheckpointError.
    """
    stored: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        metas = rename(name)
        if metas is None or metas in stored:
            problem = "which is no weight of a model known here" if metas is None else "twice"
            raise CheckpointError(path, f"found {one_line(name, 80)}, {problem}")
        stored[metas] = tensor
    if type(tied) is not bool:
        refuse(path, "tie_word_embeddings", tied, "true or false")
    output = stored.pop("output.weight", None) if tied else None
    if not tied and "output.weight" not in stored:
        raise CheckpointError(path, "lm_head.weight is missing, but tie_word_embeddings is false")
    norm = "layers.0.attention.q_norm.weight"
    if (family == "qwen3") != (norm in stored):
        state = "is there" if norm in stored else "is missing"
        raise CheckpointError(path, f"{there(norm)} {state}, which contradicts {family}")
    described = {n: torch.empty((), dtype=t.dtype).expand(t.shape) for n, t in stored.items()}
    try:
        shards = llama3.shards_of([described], config)
    except (ValueError, RuntimeError) as error:  # it knows Meta's names
        problem = re.sub(r"[\w.]+\.(weight|bias)", lambda n: there(n[0]) or n[0], one_line(error))
        raise CheckpointError(path, problem) from None
    with_bias = {re.sub(r"^layers\.\d+\.|\.bias$", "", n) for n in stored if n.endswith(".bias")}
    for matrix in (name for name, (tensor,) in shards.items() if tensor.dim() == 2):
        kind, bias = re.sub(r"^layers\.\d+\.|\.weight$", "", matrix), f"{matrix[:-6]}bias"
        if (kind in (with_bias if biased is None else biased)) != (bias in stored):
            state = "is there" if bias in stored else "is missing"
            raise CheckpointError(path, f"{there(bias)} {state}, which contradicts the config")
    if output is not None:
        a, b = (join(tensor.parts(), 0) for tensor in (output, stored["tok_embeddings.weight"]))
        if a.dtype != b.dtype or not a.view(torch.uint8).equal(b.view(torch.uint8)):
            problem = "lm_head.weight is not the embeddings, but tie_word_embeddings is true"
            raise CheckpointError(path, f"{problem}; set it to false to use lm_head.weight")
    for name, tensor in stored.items():
        if reorder and re.search(r"attention\.(w[qk]|[qk]_norm)\.", name):
            stored[name] = tensor._replace(
                parts=lambda old=tensor.parts: [pairs_side_by_side(old()[0], config.head_dim)],
                is_copy=True,
            )
    return stored
