"""Pictures: the likeliest next tokens, and what the heads of a layer attend to."""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import llama3
from cli import ranks
from cli.messages import UsageError, note
from cli.model import Model
from formats.errors import one_line

PLOTTED_TOKENS = 60  # at most, of the end of a prompt
PLOTTED_CHARACTERS = 14  # of a token
MOST_PIXELS = 4e7


@torch.inference_mode()
def attention_of(
    tokens: Sequence[int], weights: llama3.Weights, config: llama3.Config, layer: int, last: int
) -> Tensor:
    """The attention pattern of a layer's heads, [n_heads, last, T], for the last queries."""
    tokens = torch.tensor(tokens, device=weights["norm.weight"].device)
    positions = torch.arange(len(tokens), device=tokens.device)
    mask = llama3.causal_mask(positions, positions)
    rotations = llama3.rope_rotations(positions, config)
    x = weights["tok_embeddings.weight"][tokens].to(weights["norm.weight"].dtype)  # [T, dim]
    for i in range(layer):
        x = llama3.block(x, weights, i, config, rotations, mask)
    normed = llama3.rms_norm(x, weights[f"layers.{layer}.attention_norm.weight"], config.norm_eps)
    q, k, _ = llama3.queries_keys_values(normed, weights, layer, config, rotations)
    k = llama3.repeat_heads(k, len(q) // len(k))
    return llama3.attention_pattern(q[:, -last:], k, mask[-last:])


def label_of(token: bytes, has_glyph: Callable[[str], bool]) -> str:
    """A token as it can be drawn: spaces are dots; what the font lacks, or half a letter, hex."""
    shown = token.decode(errors="backslashreplace").replace(" ", "\u00b7")
    drawn = (c if c.isprintable() and has_glyph(c) else ascii(c)[1:-1] for c in shown)
    shown = "".join(drawn)
    cut = PLOTTED_CHARACTERS - 1
    return shown if len(shown) <= PLOTTED_CHARACTERS else shown[:cut] + "\u2026"


def draw(
    path: str, model: Model, tokens: Sequence[int], logprobs: Tensor, pattern: Tensor, layer: int
) -> None:
    """Draw the likeliest next tokens, logprobs [V], and attention, pattern [n_heads, last, T]."""
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))

    def label(token: int) -> str:
        token = model.tokenizer.decode_single_token_bytes(token)
        return label_of(token, lambda character: font.get_char_index(ord(character)) != 0)

    n_heads, last = pattern.shape[:2]
    names = [label(token) for token in tokens[-last:]]
    side = max(0.17 * last, 1.2) + 0.075 * max(map(len, names)) + 0.35  # of a head, in inches
    columns = min(math.ceil(math.sqrt(1.5 * n_heads)), n_heads)
    rows = math.ceil(n_heads / columns)
    size = columns * side + 4.2, max(rows * side, 4.6)
    dpi = min(100, math.sqrt(MOST_PIXELS / math.prod(size)))
    figure = Figure(size, dpi, layout="constrained")
    FigureCanvasAgg(figure)
    bars, heads = figure.subfigures(1, 2, width_ratios=[4.2, columns * side])

    axes, scale = bars.subplots(2, 1, height_ratios=[12, 0.4])
    n_vocab = model.tokenizer.n_vocab
    top = logprobs[:n_vocab].float().exp().topk(min(15, n_vocab))
    drawn = axes.barh(range(len(top.values)), top.values.tolist())
    axes.set_yticks(range(len(top.values)), [label(token) for token in top.indices.tolist()])
    shown = [f" {p:.3f}" if p >= 0.001 else f" {p:.0e}" for p in top.values.tolist()]
    axes.bar_label(drawn, shown, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.3 * top.values.max().item()), xlabel="probability", title="the next token")
    for head, axes in enumerate(heads.subplots(rows, columns, squeeze=False).flat):
        if head >= n_heads:
            axes.axis("off")
            continue
        weights = pattern[head, :, -last:].float().cpu().numpy()
        image = axes.imshow(weights, norm=PowerNorm(0.5, 0, 1), cmap="Blues")  # small ones show
        axes.set_xticks(range(last), names, rotation=90, fontsize=7)
        axes.set_yticks(range(last), names, fontsize=7)
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
    bars.colorbar(image, cax=scale, orientation="horizontal", ticks=[0, 0.1, 0.5, 1])
    scale.set_title("attention weight", fontsize=8)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign is a character
    try:
        figure.savefig(path, format="png")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"argument --plot: {path}: cannot be written: {problem}") from None
    note(f"wrote {path}" + f" (the last {last} tokens)" * (last < len(tokens)))


def check(args: argparse.Namespace, config: llama3.Config) -> None:
    """Raise UsageError if --plot cannot be drawn, as far as that can be told before."""
    os.environ["MPLBACKEND"] = "agg"  # whatever the user has for windows
    try:
        import matplotlib
    except ImportError:
        raise UsageError("argument --plot: needs matplotlib: pip install matplotlib") from None
    matplotlib.rcdefaults()  # its fonts are those that labels are made for
    if (args.plot_layer or 0) >= config.n_layers:
        layers = f"found {args.plot_layer}, expected a layer from 0 to {config.n_layers - 1}"
        raise UsageError(f"argument --plot-layer: {layers}")
    if not os.path.isdir(os.path.dirname(args.plot) or "."):
        raise UsageError(f"argument --plot: {args.plot}: there is no such folder")


def plot(model: Model, weights: llama3.Weights, tokens: Sequence[int]) -> None:
    """Draw what --plot asks for, after a prompt of these tokens."""
    args, heads = model.args, model.source.config.n_heads
    layer, last = args.plot_layer or 0, min(len(tokens), PLOTTED_TOKENS)
    room = model.config._replace(max_seq_len=len(tokens) + 1)  # also where the prompt fills it
    steps = model._replace(config=room).steps([tokens], weights, max_new_tokens=1, stop_tokens=())
    with contextlib.closing(steps):
        _, logprobs = next(steps)
    pattern = attention_of(tokens, weights, model.config, layer, last)
    if ranks.n_ranks() > 1:
        pattern = ranks.all_gather(pattern, len(pattern) * ranks.this_rank(), heads, dim=0)
    if ranks.this_rank() == 0:
        draw(args.plot, model, tokens, logprobs[0], pattern, layer)
