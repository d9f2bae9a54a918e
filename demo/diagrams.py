"""The diagrams of the notebooks, drawn from a model's Config: boxes, arrows and shapes."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from demo.pictures import BLUE, GRAY, LIGHT, ORANGE, figure_of
from llama3 import Config


def _box(
    axes: Axes, x: float, y: float, text: str, below: str = "", above: str = "", color: str = BLUE
) -> None:
    """A box around x, y with a text in it, and smaller ones under or over it."""
    shape = FancyBboxPatch(
        (x - 0.62, y - 0.3), 1.24, 0.6, boxstyle="round,pad=0,rounding_size=0.1", fc="w", ec=color
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=8)
    small = {"ha": "center", "fontsize": 7, "color": "#555", "linespacing": 1.3}
    axes.text(x, y - 0.38, below, va="top", **small)
    axes.text(x, y + 0.4, above, va="bottom", **small)


def _arrow(axes: Axes, start: tuple, end: tuple, color: str = GRAY, style: str = "-|>") -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=8, color=color, shrinkA=0, shrinkB=0
        )
    )


def _canvas(width: float, height: float, size: tuple, title: str) -> tuple[Figure, Axes]:
    figure, axes = figure_of(size=size)
    axes.set(xlim=(0, width), ylim=(0, height), title=title)
    axes.axis("off")
    return figure, axes


def model(config: Config, n_tokens: int) -> Figure:
    """The whole model, with its shapes, and the sections of notebook.ipynb that open each box."""
    c, T = config, n_tokens
    figure, axes = _canvas(15.6, 4.7, (8, 2.8), "Llama 3, from token ids to the next token")
    y, up = 1.0, 2.75  # of the residual stream, and of what is added to it
    _arrow(axes, (1.3, y), (14.9, y), color=BLUE)
    axes.add_patch(Rectangle((3.55, 0.3), 7.5, 4.3, fc=LIGHT, ec=GRAY, lw=0.8, zorder=0))
    axes.text(3.7, 4.3, f"layer, {c.n_layers} times", fontsize=8, va="center", weight="bold")
    _box(axes, 0.75, y, "token ids", f"[{T}]\nsection 1", color=ORANGE)
    _box(axes, 2.45, y, "lookup", f"[{T}, {c.dim}]\nsection 3")
    for x, name, inside in [
        (4.4, "attention", f"sections 4, 5\n{c.n_heads} heads of {c.head_dim}"),
        (8.1, "SwiGLU", f"section 5\n{c.dim} to {c.ffn_dim:,} to {c.dim}"),
    ]:
        _arrow(axes, (x, y), (x, up - 0.3))
        _box(axes, x, up, "RMSNorm", above=f"section 3\n[{T}, {c.dim}]")
        _arrow(axes, (x + 0.62, up), (x + 1.18, up))
        _box(axes, x + 1.8, up, name, above=inside)
        _arrow(axes, (x + 2.42, up), (x + 2.6, up), style="-")
        _arrow(axes, (x + 2.6, up), (x + 2.6, y + 0.2))
        axes.plot(x + 2.6, y, "o", ms=13, mfc="w", mec=BLUE)
        axes.text(x + 2.6, y, "+", ha="center", va="center", fontsize=11, color=BLUE)
    axes.text(6.3, 0.62, "residual stream", fontsize=7, ha="center", va="center", color=BLUE)
    _box(axes, 11.9, y, "RMSNorm", f"[{T}, {c.dim}]\nsection 3")
    _box(axes, 13.5, y, "output", f"[{T}, {c.vocab_size:,}]\nsection 6")
    axes.text(15.0, y, "logits", fontsize=8, va="center", ha="left")
    return figure


def groups(config: Config, head: int) -> Figure:
    """The query heads that share each key and value head; `head` stands out."""
    n, shared = config.n_heads, config.n_kv_heads
    title = f"{n} query heads, {shared} key and value heads"
    figure, axes = _canvas(n, 3, (8, 2), title)
    group = n // shared
    size = max(9 if n <= 16 else 8 * 30 / n, 4)
    for h in range(n):
        mine = h == head
        x, below = h + 0.5, (h // group + 0.5) * group
        _arrow(axes, (below, 0.95), (x, 1.95), color=ORANGE if mine else GRAY)
        color = ORANGE if mine else BLUE
        axes.add_patch(Rectangle((h + 0.08, 1.95), 0.84, 0.7, fc="w", ec=color))
        axes.text(x, 2.3, f"q{h}", ha="center", va="center", fontsize=size)
    for s in range(shared):
        color = ORANGE if s == head // group else BLUE
        left = s * group + 0.08
        axes.add_patch(Rectangle((left, 0.25), group - 0.16, 0.7, fc=LIGHT, ec=color))
        axes.text((s + 0.5) * group, 0.6, f"k{s}, v{s}", ha="center", va="center", fontsize=size)
    return figure


def cache(labels: Sequence[str], new: str, config: Config) -> Figure:
    """What the cache holds of the tokens `labels` when the row of `new` goes through."""
    labels = [*labels[-24:], new]
    T, c = len(labels), config
    title = "With a cache, one row goes through the layers"
    figure, axes = _canvas(T + 3, 5.2, (8, 2.6), title)
    for i, token in enumerate(labels):
        is_new = i == T - 1
        x = 3 + i
        for y in (2.1, 1.2):
            axes.add_patch(
                Rectangle((x + 0.06, y), 0.88, 0.8, fc=ORANGE if is_new else LIGHT, ec=BLUE)
            )
        axes.text(x + 0.5, 1.05, token, rotation=90, ha="center", va="top", fontsize=7)
        _arrow(axes, (3 + T - 0.5, 4.0), (x + 0.5, 2.95), color=ORANGE if is_new else GRAY)
    axes.text(2.85, 2.5, "keys", ha="right", va="center", fontsize=8)
    axes.text(2.85, 1.6, "values", ha="right", va="center", fontsize=8)
    axes.text(2.85, 0.6, "token", ha="right", va="center", fontsize=8)
    axes.add_patch(Rectangle((2 + T + 0.06, 4.0), 0.88, 0.8, fc="w", ec=ORANGE))
    axes.text(
        2 + T - 0.1,
        4.4,
        "the new token's query meets all keys, and its weights add up the values;\n"
        "its own key and value (orange) are put in",
        ha="right",
        va="center",
        fontsize=8,
    )
    axes.text(
        0.05,
        4.4,
        f"one of {c.n_layers} layers,\none of {c.n_kv_heads} heads",
        va="center",
        fontsize=8,
    )
    return figure


def one_head(config: Config, n_tokens: int) -> Figure:
    """One head of attention, from the normed vectors of all tokens to what it brings to them."""
    c, T = config, n_tokens
    d = c.head_dim
    figure, axes = _canvas(15.4, 5.6, (8, 3.2), "One head of attention")
    _box(axes, 0.8, 2.8, "normed", f"[{T}, {c.dim}]", color=ORANGE)
    for y, weight, name in [(4.5, "wq", "queries"), (2.8, "wk", "keys"), (1.1, "wv", "values")]:
        _arrow(axes, (1.42, 2.8), (2.3, y))
        _box(axes, 2.92, y, f"@ {weight}ᵀ", f"{name}\n[{T}, {d}]")
    for y in (4.5, 2.8):
        _arrow(axes, (3.54, y), (4.5, y))
        _box(axes, 5.12, y, "RoPE", f"[{T}, {d}]")
    _arrow(axes, (5.74, 4.5), (6.7, 3.9))
    _arrow(axes, (5.74, 2.8), (6.7, 3.5))
    steps = [
        (7.32, "q kᵀ / √d", "scores"),
        (9.2, "mask", "hidden: -∞"),
        (11.08, "softmax", "pattern"),
    ]
    for x, text, name in steps:
        _box(axes, x, 3.7, text, f"[{T}, {T}]", name)
        _arrow(axes, (x + 0.62, 3.7), (x + 1.26, 3.7))
    axes.plot([3.54, 12.96], [1.1, 1.1], color=GRAY, linewidth=1)
    _arrow(axes, (12.96, 1.1), (12.96, 3.4))
    _box(axes, 12.96, 3.7, "@ values", above=f"sums of values\n[{T}, {d}]")
    _arrow(axes, (13.58, 3.7), (14.1, 3.7))
    axes.text(14.15, 3.7, "to wo", fontsize=8, va="center")
    note = "tokens meet only where shapes are [T, T]".replace("T", str(T))
    axes.text(9.2, 1.9, note, fontsize=8, ha="center", color="#555")
    return figure


def swiglu(config: Config, n_tokens: int) -> Figure:
    """The two ways through the feed-forward network."""
    c, T = config, n_tokens
    figure, axes = _canvas(13.4, 4.2, (8, 2.5), "SwiGLU: a gate, and what goes through it")
    _box(axes, 0.8, 2.1, "normed", f"[{T}, {c.dim}]", color=ORANGE)
    for y, weight in [(3.2, "w1"), (1.0, "w3")]:
        _arrow(axes, (1.42, 2.1), (2.5, y))
        _box(axes, 3.12, y, f"@ {weight}ᵀ", f"[{T}, {c.ffn_dim:,}]")
    _arrow(axes, (3.74, 3.2), (4.8, 3.2))
    _box(axes, 5.42, 3.2, "SiLU", f"[{T}, {c.ffn_dim:,}]", "the gate")
    _arrow(axes, (6.04, 3.2), (7.53, 2.35))
    _arrow(axes, (3.74, 1.0), (7.53, 1.95))
    axes.plot(7.8, 2.15, "o", ms=19, mfc="w", mec=BLUE)
    axes.text(7.8, 2.15, "\u00d7", ha="center", va="center", fontsize=13, color=BLUE)
    axes.text(7.8, 1.55, f"[{T}, {c.ffn_dim:,}]", ha="center", va="top", fontsize=7, color="#555")
    _arrow(axes, (8.1, 2.15), (9.3, 2.15))
    _box(axes, 9.92, 2.15, "@ w2ᵀ", f"[{T}, {c.dim}]")
    _arrow(axes, (10.54, 2.15), (11.4, 2.15))
    axes.text(11.5, 2.15, "to the\nresidual stream", fontsize=8, va="center")
    return figure
