"""The pictures of the notebooks: this file only draws, and is not needed to understand them.

    figure, axes = figure_of(1, 2)   # what is drawn on
    show(figure, "what is to be seen in it, in one line")

A picture is shown with that line under it, and has its title and the line as alternative text.
What is drawn from a Config alone is in diagrams.py.
"""

import base64
import html
import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cli.plot import label_of
from tokenizer_setup import Tokenizer

BLUE, ORANGE, GRAY, LIGHT = "#2f6db3", "#d9772b", "#9aa5b1", "#eef2f6"
HIDDEN = "#d5dade"  # what a mask hides
PATTERN = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, 1)}  # the root, to tell small weights apart
PATTERN_TICKS, ROOTED = [0, 0.1, 0.3, 0.6, 1], " (colored by its square root)"

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
    """Show a figure in the notebook, and under it one line that says what is to be seen.

    It is an HTML image, the only kind to which viewers give alternative text, of 200 dots an inch
    and at most 128 colors, which takes a third of the bytes.
    """
    from IPython.display import display

    figure.set_dpi(200)
    canvas, file, made_by = FigureCanvasAgg(figure), io.BytesIO(), PngInfo()
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    few_colors = image.convert("RGB").quantize(128, Image.Quantize.FASTOCTREE, dither=0)
    made_by.add_text("Software", f"Matplotlib version{matplotlib.__version__}")
    few_colors.save(file, format="png", compress_level=7, pnginfo=made_by)
    title = title_of(figure).replace("\n", " ")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    size = f'width="{image.width // 2}" style="max-width: 100%"'
    alternative = html.escape(f"{title}. {text}".replace("\n", "; "))
    tag = f'<img alt="{alternative}" {size} src="{source}">'
    display({"text/html": tag, "text/plain": f"[{title}]"}, raw=True)
    for line in text.splitlines():
        print(textwrap.fill(line, 100))


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
    labels = [text if text.isalnum() or len(text) > 1 else f"“{text}”" for text in labels]
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
    figure.suptitle("The later a token stands, the further its pairs are turned")
    ticks = MaxNLocator(integer=True)
    figure.colorbar(pairs, ax=panels, label="pair, fast to slow", ticks=ticks)
    return figure


def attention(
    scores: Tensor, mask: Tensor, pattern: Tensor, labels: Sequence[str], title: str
) -> Figure:
    """Scores [T, T] before the mask and after it, and the pattern: a row for each query."""
    most = max(scores.float().abs().max().item(), 1e-3)
    both_ways = {"cmap": "RdBu_r", "norm": SymLogNorm(most / 20, vmin=-most, vmax=most)}
    ticks_of_scores = [-most, -most / 10, 0, most / 10, most]
    if scores.min() > 0 or scores.max() < 0:  # of one sign: from the least to the greatest
        ends = scores.min().item(), scores.max().item()
        both_ways, ticks_of_scores = {"cmap": "Reds", "norm": Normalize(*ends)}, ends
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
        weights = "attention weight", PATTERN_TICKS
        what, ticks = weights if name == "pattern" else ("score", ticks_of_scores)
        place = {"location": "bottom", "aspect": 30, "format": "%.2g"}
        figure.colorbar(image, ax=axes, label=what, ticks=ticks, **place).minorticks_off()
    name_tokens(panels[0].yaxis, labels, 1.9)
    scales = "colors: scores by sign, finer near 0; weights by their square root"
    figure.suptitle(f"{title}\n")
    figure.supxlabel(scales, fontsize=8, color="#555")
    return figure


def heads(patterns: Tensor, labels: Sequence[str], title: str, group: int) -> Figure:
    """What the heads look at: patterns [n_heads, T, T], the first 32 of them."""
    shown = min(len(patterns), 32)
    columns = min(shown, 4 if shown <= 8 else 3 if shown == 9 else 8)
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
    figure.colorbar(image, ax=grid, label=f"attention weight{ROOTED}", ticks=PATTERN_TICKS, **place)
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
    axes.set(
        title=title,
        xlabel="key of token (colors: square root of the attention weight)",
        ylabel=what,
    )
    for y, x in (rows > 0.5).nonzero().tolist() if rows.numel() < 1000 else ():
        weight = f"{rows[y, x]:.2f}"
        axes.text(x, y, weight, ha="center", va="center", color="w", fontsize=7)
    figure.colorbar(image, ax=axes, label="attention weight", ticks=PATTERN_TICKS)
    return figure


def arrows(
    before: Tensor, after: Tensor, places: Sequence[int], labels: Sequence[str], pairs: int = 4
) -> Figure:
    """The first pairs of two tokens' queries, complex [T, d / 2], before RoPE and after it."""
    pairs = min(pairs, before.shape[1])
    was, *now = ({"color": c, "ls": s} for c, s in ((GRAY, "--"), (BLUE, "-"), (ORANGE, "-")))
    figure, panels = figure_of(1, pairs, size=(8, 3), squeeze=False)
    for pair, axes in enumerate(panels[0]):
        size = 1.15 * max(before[place, pair].abs().item() for place in places) or 1.0
        axes.add_patch(Circle((0, 0), size / 1.15, fill=False, color=HIDDEN, linestyle=":"))
        for place, look in zip(places, now, strict=True):
            for point, style in ((before[place, pair], was), (after[place, pair], look)):
                end = point.real.item(), point.imag.item()
                arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "lw": 1.6} | style
                axes.annotate("", end, (0, 0), arrowprops=arrow)
        axes.set(xlim=(-size, size), ylim=(-size, size), aspect="equal", xlabel="real part")
        axes.set(title=f"pair {pair}", ylabel="imaginary part" if pair == 0 else "")
        axes.locator_params(nbins=3)
    handles = [Line2D([], [], **style) for style in (was, *now)]
    names = ["before RoPE", f"after it, at {places[0]}", f"after it, at {places[1]}"]
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    whose = " and ".join(f"“{labels[place]}” at {place}" for place in places)
    figure.suptitle(f"RoPE turns each query by its own angles: {whose}")
    return figure


# --- numbers on a circle --------------------------------------------------------------------------


def clock(points: Mapping[str, Tensor], numbers: Sequence[int], hours: int = 20) -> Figure:
    """Numbers at points [N, 2], a panel each, in the colors of their hours."""
    figure, panels = figure_of(1, len(points), size=(8, 4.4), squeeze=False)
    for axes, (name, found) in zip(panels[0], points.items(), strict=True):
        x, y = found[:, 0].tolist(), found[:, 1].tolist()
        axes.plot(x, y, color=HIDDEN, linewidth=1, zorder=0)
        for number, left, up in zip(numbers, x, y, strict=True):
            red, green, blue, _ = matplotlib.colormaps["twilight"](number % hours / hours)
            color = 0.75 * red, 0.75 * green, 0.75 * blue  # so that the light ones show, too
            look = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
            axes.text(left, up, number, weight="bold" if number < hours else "normal", **look)
        axes.set(title=name, xlabel="first direction", ylabel="second direction")
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.label_outer()
    figure.suptitle(f"The clock: what a head hands over for the numbers 0 to {numbers[-1]}")
    return figure


def sums(points: Mapping[str, Tensor], totals: Sequence[int], hours: int = 20) -> Figure:
    """What stands for a sum at points [N, 2], a panel each, colored by the total's hour."""
    figure, panels = figure_of(1, len(points), size=(8, 4), squeeze=False)
    for axes, (name, found) in zip(panels[0], points.items(), strict=True):
        colors = {"c": [total % hours for total in totals], "cmap": "twilight", "vmax": hours}
        image = axes.scatter(found[:, 0].tolist(), found[:, 1].tolist(), s=9, vmin=0, **colors)
        axes.set(title=name, xlabel="first direction", ylabel="second direction")
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.label_outer()
    figure.colorbar(image, ax=panels, label=f"a + b modulo {hours}", ticks=range(0, hours + 1, 5))
    figure.suptitle("The feed-forward network of layer 0 puts the sum on a circle")
    return figure


# --- parts ----------------------------------------------------------------------------------------


def left_out(
    answers: Mapping[str, Sequence[Sequence]],
    asked: Sequence[str],
    title: str = "What breaks without each part",
) -> Figure:
    """A table of what is said, by the part that is left out, to one question of each kind.

    answers: by part, for each kind, the token that is said, the probability of the right one,
    whether that is the one said, and how many of how many of the kind are right.
    """
    rows = [*answers]
    two_lines = len(asked) > 2
    figure, axes = figure_of(size=(8, 1.5 + (0.44 if two_lines else 0.33) * len(rows)))
    shares = [[row[3] / row[4] for row in answers[name]] for name in rows]
    axes.imshow(shares, aspect="auto", cmap="Blues", norm=Normalize(0, 2.4))
    for y, name in enumerate(rows):
        for x, (said, chance, is_right, right, count) in enumerate(answers[name]):
            place = {"va": "center", "fontsize": 9, "color": "k"}
            mark = "" if is_right else "✗ "
            undefined = chance is None or math.isnan(chance)
            probability = "not a number" if undefined else f"{chance:.3f}"
            weight = "normal" if is_right else "bold"
            said = said if len(said) < 10 else f"{said[:8]}…"
            text = f"{mark}{said}  {probability}"
            many = f"{right} of {count}" if count > 1 else ""
            up = 0.22 * (two_lines and count > 1)
            axes.text(x - 0.46, y - up, text, ha="left", weight=weight, **place)
            axes.text(x + 0.46, y + up, many, ha="right", **place)
    axes.set_xticks(range(len(asked)), asked, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.set_ylabel("left out")
    legend = "what is said, the probability of the right token, how many of the kind are right"
    axes.set_xlabel(f"{legend}\ndarker: more of the kind are right; ✗: the one shown is wrong")
    figure.suptitle(title)
    return figure


def lens(readable: Sequence[float], sayings: Sequence[str], answer: str) -> Figure:
    """How likely an answer can be read after each layer, and what would be said there."""
    figure, axes = figure_of(size=(8, 3))
    axes.plot(readable, "o-")
    step = 1 + len(readable) // 12
    ticks = [f"{n} layers\nsay '{saying}'" for n, saying in enumerate(sayings)]
    axes.set_xticks(range(0, len(readable), step), ticks[::step], fontsize=8)
    title = f"The probability of '{answer}', read after each layer"
    axes.set(title=title, xlabel="layers that the last token went through", ylabel="probability")
    axes.set_ylim(-0.05, 1.05)
    return figure


def norm_sizes(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], eps: float
) -> Figure:
    """The sizes (roots of mean squares) of vectors before RMSNorm and after it."""
    figure, axes = figure_of(size=(8, 3))
    every = [eps**0.5, *(size for sizes in before.values() for size in sizes)]
    m = np.geomspace(max(min(every), 1e-9) / 3, 3 * max(every), 100)
    axes.plot(m, m / np.sqrt(m**2 + eps), color="k", linewidth=1)
    axes.axvline(eps**0.5, color=GRAY, linestyle=":", label="root of epsilon")
    for name, color in zip(before, ("k", "w"), strict=True):
        axes.plot(before[name], after[name], "o", mfc=color, mec="k", label=name)
    axes.set(xlabel="size before", ylabel="size after")
    axes.set_title("RMSNorm makes all sizes 1, but those near epsilon's root and below stay small")
    logarithmic(axes.xaxis)
    axes.legend()
    return figure


def silu(given: Mapping[int, Tensor]) -> Figure:
    """SiLU, and under it how often each input occurs in a layer: given [..., ffn_dim] by layer."""
    inputs = {i: np.array(z.flatten().tolist()) for i, z in given.items()}
    most = max(np.quantile(abs(z), 0.995) for z in inputs.values()) or 1.0
    z = np.linspace(-most, most, 200)
    figure, panels = figure_of(1, len(given), size=(8, 3.2), squeeze=False, sharey=True)
    for axes, (i, found) in zip(panels[0], inputs.items(), strict=True):
        counts, edges = np.histogram(found, bins=60, range=(-most, most))
        heights = counts / max(counts.max(), 1) * most
        axes.stairs(heights, edges, fill=True, color="#b9d0ea", label="how often")
        axes.plot(z, z * (1 + np.tanh(z / 2)) / 2, label="SiLU")
        axes.plot(z, z / 2, ":", color=GRAY, label="z / 2")
        axes.set(title=f"layer {i}", xlabel="z", ylabel="silu(z)")
        axes.label_outer()
    panels[0][0].legend()
    figure.suptitle("The inputs of SiLU, and how far it is from a straight line")
    return figure


# --- generation, scores, training, sizes ----------------------------------------------------------


def choices(
    chances: Mapping[float, Sequence[float]],
    kept: Mapping[float, Sequence[bool]],
    names: Sequence[str],
    title: str,
) -> Figure:
    """The chances of the same tokens at several temperatures, those that are kept in blue."""
    figure, panels = figure_of(1, len(chances), size=(8, 3.2), sharey=True)
    for axes, (temperature, p) in zip(panels, chances.items(), strict=True):
        colors = [BLUE if keep else GRAY for keep in kept[temperature]]
        axes.barh(range(len(p)), p, color=colors)
        axes.set_title(f"temperature {temperature}", fontsize="small")
        axes.locator_params(axis="x", nbins=3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel("probability (each panel has a scale of its own)")
    figure.supylabel("next token")
    figure.suptitle(title)
    return figure


def surprise(found: Mapping[str, tuple[Tensor, Tensor]], labels: Sequence[Sequence[str]]) -> Figure:
    """The surprise at each token of some sentences, and what was expected."""
    figure, panels = figure_of(1, len(found), size=(8, 3.4), sharey=True)
    for axes, names, (sentence, (at, expected)) in zip(panels, labels, found.items(), strict=True):
        axes.bar(range(len(at)), at.tolist(), label="surprise at the token")
        axes.plot(expected.tolist(), "o", color=ORANGE, label="entropy of the prediction")
        name_tokens(axes.xaxis, names, 3)
        axes.set(title=sentence, xlabel="token", ylabel="nats")
        axes.label_outer()
    panels[0].legend()
    figure.suptitle("A wrong word surprises far more than the model expects")
    return figure


def falling(losses: Sequence[float], title: str) -> Figure:
    """A loss, step by step."""
    figure, axes = figure_of(size=(8, 2.6))
    axes.plot(losses, "o-")
    axes.set(title=title, xlabel="steps taken", ylabel="nats per token")
    axes.set_ylim(bottom=0)
    whole_numbers(axes.xaxis)
    return figure


def turns(tokens_per_turn: Mapping[str, Sequence[float]], n_tokens: int) -> Figure:
    """How many tokens RoPE's pairs need for a turn, of one model and of others."""
    figure, (left, right) = figure_of(1, 2, size=(8, 3.2))
    (this, found), *others = tokens_per_turn.items()
    left.plot(found, "o-", label=this)
    left.axhline(n_tokens, color=ORANGE, label="tokens in our prompt")
    for name, found in others:
        right.plot(found, label=name)
    for limit in (2048, 8192):
        right.axhline(limit, color=GRAY, linestyle=":", label=f"{limit:,} tokens")
    for axes in (left, right):
        logarithmic(axes.yaxis)
        whole_numbers(axes.xaxis)
        axes.set(xlabel="pair", ylabel="tokens for one turn")
        axes.legend()
    left.set_title("From fast pairs to slow ones")
    right.set_title("Llama 3 8B and 3.1 8B")
    figure.suptitle("Llama 3.1 slows down only the slow pairs")
    return figure


def matrices(found: Mapping[str, Sequence[Sequence[float]]], title: str) -> Figure:
    """Matrices of factors from -1 to 1, side by side."""
    figure, panels = figure_of(1, len(found), size=(8, 3.2), sharey=True)
    for axes, (name, matrix) in zip(panels, found.items(), strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set(title=name, xlabel="number before", ylabel="number after")
        whole_numbers(axes.xaxis, axes.yaxis)
        axes.label_outer()
    figure.suptitle(title)
    figure.colorbar(image, ax=panels, label="factor", shrink=0.8)
    return figure


def work(shares: Mapping[tuple[str, int], Mapping[str, float]]) -> Figure:
    """The share of operations by module, in percent, by model and number of tokens."""
    models = list(dict.fromkeys(name for name, _ in shares))
    figure, panels = figure_of(1, len(models), size=(8, 3.6), sharey=True)
    for axes, model in zip(panels, models, strict=True):
        of_model = [(length, parts) for (name, length), parts in shares.items() if name == model]
        for i, (length, parts) in enumerate(of_model):
            height = np.arange(len(parts)) + 0.4 * i - 0.2
            axes.barh(height, [*parts.values()], 0.4, label=f"{length:,} tokens")
            axes.set_yticks(range(len(parts)), parts)
        axes.set(title=model, xlabel="% of the operations", ylabel="module")
        axes.label_outer()
    panels[0].invert_yaxis()
    panels[-1].legend()
    figure.suptitle("The longer the text, the larger the part of attention in the work")
    return figure
