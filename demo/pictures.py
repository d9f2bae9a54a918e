"""The pictures of the notebook: this file only draws, and nothing in it is needed to understand it.

    figure, axes = figure_of(1, 2)   # what is drawn on
    show(figure, "what is to be seen in it, in one line")

A picture is shown with that line under it. The output has its title and the line as alternative
text too, for viewers that know of it.

    python demo/pictures.py

runs the notebook, stores its outputs in it, and writes the pictures of the README, which are those
of the cells tagged "readme".
"""

import base64
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.append(str(HERE.parent))

from cli.plot import label_of  # noqa: E402
from llama3 import Config  # noqa: E402
from tokenizer_setup import Tokenizer  # noqa: E402

BLUE, ORANGE, GRAY, LIGHT = "#2f6db3", "#d9772b", "#9aa5b1", "#eef2f6"
HIDDEN = "#d5dade"  # what a mask hides
PATTERN = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, 1)}  # the root, to tell small weights apart
PATTERN_TICKS = [0, 0.1, 0.3, 0.6, 1]

STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GRAY]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "text.parse_math": False,  # a token may hold a dollar sign
}

# --- on every picture -----------------------------------------------------------------------------

_font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token's text as it can be drawn: spaces are dots; what the font lacks, or bytes, hex.

    A token that only the model has, and not its tokenizer, is its id.
    """
    if token >= tokenizer.n_vocab:
        return f"<{token}>"
    text = tokenizer.decode_single_token_bytes(int(token))
    return label_of(text, lambda character: _font.get_char_index(ord(character)) != 0)


def figure_of(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 3.2), **options: object
) -> tuple[Figure, Axes]:
    """A figure and its axes, as pyplot.subplots gives them. size: in inches, at 100 dots each.

    From here on, matplotlib draws in the STYLE of this file.
    """
    matplotlib.rcParams.update(STYLE)
    figure = Figure(size, dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def title_of(figure: Figure) -> str:
    """The title of a figure, or of its only panel."""
    return (figure.get_suptitle() or figure.axes[0].get_title()).strip()


def show(figure: Figure, text: str) -> None:
    """Show a figure in the notebook, and under it one line that says what is to be seen."""
    from IPython.display import display

    file = io.BytesIO()
    figure.savefig(file, format="png")
    title = title_of(figure).replace("\n", " ")
    content = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": f"[{title}]"}
    display(content, raw=True, metadata={"image/png": {"alt": f"{title}. {text}"}})
    print(text)


def logarithmic(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers at powers of ten."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    axis.set_minor_locator(NullLocator())


def whole_numbers(*axes: Axis) -> None:
    """Write only whole numbers on axes."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(6, integer=True))


def name_tokens(axis: Axis, labels: Sequence[str], inches: float = 6) -> None:
    """Write tokens on an axis of this length; only positions where there are too many."""
    size = min(9, 60 * inches / len(labels))
    if size < 4:  # points: nobody could read them
        return whole_numbers(axis)
    upright = axis.axis_name == "x" and sum(map(len, labels)) * size > 80 * inches
    axis.set_ticks(range(len(labels)), labels, rotation=90 * upright, fontsize=size)


def bars(
    names: Sequence[str], values: Sequence[float], texts: Sequence[str], **words: str
) -> Figure:
    """Bars from the top down, each with a text at its end. words: title, xlabel, ylabel."""
    figure, axes = figure_of(size=(8, 0.9 + 0.26 * len(names)))
    axes.bar_label(axes.barh(range(len(names)), values), texts, padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.15 * max(values) or 1), **words)
    return figure


# --- attention ------------------------------------------------------------------------------------


def rotations(found: Tensor, positions: Sequence[int]) -> Figure:
    """RoPE's rotations, complex [T, d / 2], of the tokens at some positions, on a circle."""
    n_pairs = found.shape[1]
    figure, panels = figure_of(1, len(positions), size=(8, 3.2), sharey=True)
    pairs = ScalarMappable(Normalize(0, max(n_pairs - 1, 1)), "viridis")
    for axes, position in zip(panels, positions, strict=True):
        axes.add_patch(Circle((0, 0), 1, fill=False, color=GRAY, linestyle=":"))
        for pair, rotation in enumerate(found[position].tolist()):
            color = pairs.to_rgba(pair)
            axes.plot([0, rotation.real], [0, rotation.imag], color=color, linewidth=1)
            axes.plot(rotation.real, rotation.imag, "o", color=color)
        axes.set(title=f"position {position}", xlabel="real part", aspect="equal")
        axes.set(ylabel="imaginary part")
        axes.label_outer()
    figure.suptitle("The rotations of three tokens")
    ticks = MaxNLocator(integer=True)
    figure.colorbar(pairs, ax=panels, label="pair, fast to slow", ticks=ticks)
    return figure


def attention(
    scores: Tensor, mask: Tensor, pattern: Tensor, labels: Sequence[str], title: str
) -> Figure:
    """Scores [T, T] before the mask and after it, and the pattern: a row for each query."""
    most = max(scores.float().abs().max().item(), 1e-3)
    both_ways = {"cmap": "RdBu_r", "norm": SymLogNorm(most / 20, vmin=-most, vmax=most)}
    masked, pattern = (x.float().masked_fill(~mask, math.nan) for x in (scores, pattern))
    figure, panels = figure_of(1, 3, size=(8, 4.1), sharey=True)
    for axes, matrix, name, colors in [
        (panels[0], scores, "scores", both_ways),
        (panels[1], masked, "masked", both_ways),
        (panels[2], pattern, "pattern", PATTERN),
    ]:
        image = axes.imshow(matrix.float().cpu().numpy(), **colors)
        axes.set_facecolor(HIDDEN)
        axes.set(title=name, xlabel="key of token", ylabel="query of token")
        axes.label_outer()
        name_tokens(axes.xaxis, labels, 1.9)
        ticks = [-most, -most / 10, 0, most / 10, most]
        weights = "attention weight", PATTERN_TICKS
        what, ticks = weights if name == "pattern" else ("score", ticks)
        place = {"location": "bottom", "aspect": 30, "format": "%.2g"}
        figure.colorbar(image, ax=axes, label=what, ticks=ticks, **place).minorticks_off()
    name_tokens(panels[0].yaxis, labels, 1.9)
    figure.suptitle(title + "\n")
    return figure


def heads(patterns: Tensor, labels: Sequence[str], title: str, group: int) -> Figure:
    """What the heads look at: patterns [n_heads, T, T], the first 32 of them."""
    shown = min(len(patterns), 32)
    columns = min(shown, 4 if shown <= 8 else 8)
    rows = math.ceil(shown / columns)
    side = 7 / columns
    size = (8, (side + 0.3) * rows + 1.7)
    figure, grid = figure_of(rows, columns, size=size, squeeze=False, sharex=True, sharey=True)
    for head, axes in enumerate(grid.flat):
        if head >= shown:
            axes.axis("off")
            continue
        image = axes.imshow(patterns[head].float().cpu().numpy(), **PATTERN)
        axes.set(xlabel="key of token", ylabel="query of token")
        axes.set_title(f"head {head}, keys {head // group}", fontsize="small")
        if columns <= 4:
            if head + columns >= shown:  # only the outer ones are labelled
                name_tokens(axes.xaxis, labels, side)
            if head % columns == 0:
                name_tokens(axes.yaxis, labels, side)
            axes.tick_params(length=2, pad=2)
        else:
            whole_numbers(axes.xaxis, axes.yaxis)
        axes.label_outer(remove_inner_ticks=True)
    figure.suptitle(title)
    place = {"location": "bottom", "aspect": 60, "pad": 0.01}
    figure.colorbar(image, ax=grid, label="attention weight", ticks=PATTERN_TICKS, **place)
    return figure


def last_row(
    rows: Tensor, names: Sequence[str], labels: Sequence[str], title: str, what: str
) -> Figure:
    """What the last token looks at: attention weights [rows, T], a row for each of `names`."""
    figure, axes = figure_of(size=(8, 1.6 + 0.24 * len(names)))
    image = axes.imshow(rows.float().cpu().numpy(), aspect="auto", **PATTERN)
    step = 1 + len(names) // 16
    axes.set_yticks(range(0, len(names), step), names[::step])
    name_tokens(axes.xaxis, labels)
    axes.set(title=title, xlabel="key of token", ylabel=what)
    figure.colorbar(image, ax=axes, label="attention weight", ticks=PATTERN_TICKS)
    return figure


# --- tables ---------------------------------------------------------------------------------------


def table(
    shares: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    right: Sequence[Sequence[bool]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> tuple[Figure, Axes]:
    """A table of texts [rows, columns]: the greater a share the darker, orange where not right."""
    figure, axes = figure_of(size=(8, 1 + 0.27 * len(rows)))
    axes.imshow(shares, aspect="auto", cmap="Blues", norm=Normalize(0, 1.6))
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            dark = shares[y][x] > 0.5
            color = ("w" if dark else "k") if right[y][x] else ("#ffd9b3" if dark else ORANGE)
            weight = "normal" if right[y][x] else "bold"
            place = {"ha": "center", "va": "center", "fontsize": 7.5}
            axes.text(x, y, text, color=color, weight=weight, **place)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


# --- diagrams -------------------------------------------------------------------------------------


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
    """The whole model, with its shapes, and the sections of the notebook that open each box."""
    c, T = config, n_tokens
    figure, axes = _canvas(15.6, 4.7, (8, 2.8), "Llama 3, from token ids to the next token")
    y, up = 1.0, 2.75  # of the residual stream, and of what is added to it
    _arrow(axes, (1.3, y), (14.9, y), color=BLUE)
    axes.add_patch(Rectangle((3.55, 0.3), 7.5, 4.3, fc=LIGHT, ec=GRAY, lw=0.8, zorder=0))
    axes.text(3.7, 4.3, f"layer, {c.n_layers} times", fontsize=8, va="center", weight="bold")
    _box(axes, 0.75, y, "token ids", f"[{T}]\nsection 1", color=ORANGE)
    _box(axes, 2.45, y, "lookup", f"[{T}, {c.dim}]\nsection 3")
    for x, name, inside in [
        (4.4, "attention", f"sections 4 to 6\n{c.n_heads} heads of {c.head_dim}"),
        (8.1, "SwiGLU", f"section 6\n{c.dim} to {c.ffn_dim:,} to {c.dim}"),
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
    _box(axes, 13.5, y, "output", f"[{T}, {c.vocab_size:,}]\nsection 7")
    axes.text(15.0, y, "logits", fontsize=8, va="center", ha="left")
    return figure


def groups(config: Config, head: int) -> Figure:
    """The query heads that share each key and value head; `head` stands out."""
    n, shared = config.n_heads, config.n_kv_heads
    title = f"Heads of queries: {n}, heads of keys and values: {shared}"
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
    """What the cache holds when one row goes through: the last of the tokens, `labels`."""
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
        "the query of the new token, whose key and value (orange) are put in",
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


# --- the pictures of the README -------------------------------------------------------------------


def of_the_readme(notebook: dict) -> dict[str, bytes]:
    """The pictures of cells tagged "readme", as PNG files, by the cells' names."""
    found = {}
    for cell in notebook["cells"]:
        if "readme" in cell["metadata"].get("tags", ()):
            (png,) = (o["data"]["image/png"] for o in cell["outputs"] if "data" in o)
            found[cell["id"]] = base64.b64decode(png)
    return found


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    path = HERE.parent / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    options = {"record_timing": False, "coalesce_streams": True}  # so that little differs each time
    NotebookClient(
        notebook, resources={"metadata": {"path": str(path.parent)}}, **options
    ).execute()
    nbformat.write(notebook, path)
    for name, png in of_the_readme(notebook).items():
        (HERE / f"{name}.png").write_bytes(png)


if __name__ == "__main__":
    main()
