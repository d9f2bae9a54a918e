"""The notebooks' text and outputs: that they are what the cells print, and say what is so.

    python demo/notebooks.py

runs the notebooks on the demo and writes their outputs into them, and the two pictures that the
README shows: to be done after every change of a cell, or of what the cells print.

What "the same output" means, since processors round differently and clocks never agree:

- text and numbers are the same, up to white space;
- but in cells tagged "rounded", which print what came out of products that are rounded, a number
  with a decimal point may differ by 3 % and by 1 in its last place;
- the difference that a check reports may be any that the check allows, or none;
- a picture, cut into 64 x 64 blocks of color from 0 to 1, differs by 0.001 on average at most, or
  by 0.015 if another version of matplotlib drew it.

What happens with mistakes and with other models is in test_notebook_runs.py.
"""

import ast
import copy
import functools
import html
import io
import json
import math
import re
from decimal import Decimal

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from matplotlib.figure import Figure
from matplotlib.text import Text
from notebook_run import PART_1, PART_2, PART_3, PROMPT, Run, code_cells, first_token, read, text_of

from demo import diagrams, notebooks, pictures, trace

every_notebook = pytest.mark.parametrize("name", notebooks.NOTEBOOKS)

# Run after the first notebook's cells, in its kernel: llama3.py as a command, and its function.
COMMANDS = [
    "%run llama3.py --prompt '17 plus 8 is ' --ckpt-dir demo",
    "import cli.main\ncli.main.main(['--prompt', '17 plus 8 is ', '--ckpt-dir', 'no'])",
]


def pngs_of(cell):
    return [png for png in map(notebooks.png_of, cell.outputs) if png]


def texts(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.fixture(scope="module")
def kernel():
    """The first notebook and COMMANDS after a run of all cells in a kernel."""
    notebook = copy.deepcopy(read(PART_1))
    for command in COMMANDS:
        cell = nbformat.v4.new_code_cell(command, metadata={"tags": ["raises-exception"]})
        notebook.cells.append(cell)
    return notebooks.executed(notebook, ROOT, timeout=200)


@functools.cache
def run(name):
    """A whole run of a notebook in this process, with its pictures."""
    return Run(name, whole=True, draw="pictures")


# --- the committed notebooks ----------------------------------------------------------------------


@every_notebook
def test_it_was_run_from_top_to_bottom_without_a_warning(name):
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"
        assert "execution" not in cell.metadata  # the times of the last run


@every_notebook
def test_it_is_short_and_small_and_names_no_place_on_a_machine(name):
    notebook = read(name)
    assert len(notebook.cells) < 70
    assert (ROOT / name).stat().st_size < 1.2e6
    words = "".join(cell.source for cell in notebook.cells)
    words += "".join(map(text_of, code_cells(notebook)))
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users|mnt|opt)\b|[A-Z]:\\\\", words)


@every_notebook
def test_it_uses_no_ready_made_layers(name):
    code = "\n".join(cell.source for cell in code_cells(read(name)))
    ready_made = set(re.findall(r"\bnn\.[\w.]+|scaled_dot_product\w*", code))
    assert ready_made <= {"nn.functional.cross_entropy"}  # which is compared with, and trained on


@every_notebook
def test_its_text_leaves_the_sizes_to_the_checkpoint(name, demo_config):
    numbers = {
        int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d", " ".join(texts(read(name))))
    }
    assert not numbers & {demo_config.dim, demo_config.vocab_size, demo_config.ffn_dim}


def test_every_step_is_compared_with_the_function_that_does_it():
    checks = "\n".join(
        text_of(cell) for name in notebooks.NOTEBOOKS for cell in code_cells(read(name))
    )
    functions = re.findall(r"^✓ .* as in (?:llama3|cli)\.([\w.]+)", checks, flags=re.MULTILINE)
    assert {*functions} == {
        *("rms_norm", "rope_frequencies", "rope_rotations", "rotate", "queries_keys_values"),
        *("causal_mask", "attention_pattern", "grouped_query_attention", "attention"),
        *("feed_forward", "block", "forward", "Session", "nucleus", "sample", "generate"),
        "sampling.top_k",
    }


@every_notebook
def test_its_contents_lead_to_its_sections_and_end_with_exercises(name):
    text = "\n".join(texts(read(name)))
    linked = re.findall(r"^\d+\. \[(.+)\]\(#(.+)\)$", text, flags=re.MULTILINE)
    numbered = re.findall(r"^## (\d+)\. (.+)$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in numbered] == [*range(1, 1 + len(linked))]
    for (title, target), (number, heading) in zip(linked, numbered, strict=True):
        assert title == heading
        assert target == f"{number}. {heading}".replace(" ", "-")  # as Jupyter makes anchors
    assert numbered[-1][1] == "Your turn"
    exercises = re.findall(r"^\*\*(\d)\.\*\* (★{1,3}) \(\d+ minutes\)", text, flags=re.MULTILINE)
    assert len(exercises) in (3, 4)


@every_notebook
def test_its_links_within_the_project_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#\s]+)\)", "\n".join(texts(read(name)))):
        assert "://" in link or ((ROOT / name).parent / link).exists(), link


@every_notebook
def test_a_cell_can_be_taken_in_at_a_glance(name):
    lines = {cell.id: len(cell.source.splitlines()) for cell in code_cells(read(name))}
    assert {cell: n for cell, n in lines.items() if n > 30 and cell != "from-part-1"} == {}


def statements(cell):
    """The top-level statements of a cell, as they stand there."""
    lines = cell.source.splitlines()
    return ["\n".join(lines[s.lineno - 1 : s.end_lineno]) for s in ast.parse(cell.source).body]


@pytest.mark.parametrize("name", [PART_2, PART_3])
def test_what_is_needed_of_the_first_notebook_is_what_stands_there(name):
    (copied,) = (cell for cell in code_cells(read(name)) if cell.id == "from-part-1")
    there = [s for cell in code_cells(read(PART_1)) for s in statements(cell)]
    others = [s for s in statements(copied) if s not in there]
    of_its_own = ["from demo import pictures", 'model_path = root / "demo"  # until section 6']
    assert others == (of_its_own if name == PART_2 else [])


@every_notebook
def test_every_picture_is_read_out_under_it_and_for_those_who_do_not_see_it(name):
    for cell in code_cells(read(name)):
        for place, output in enumerate(cell.outputs):
            if "text/html" in output.get("data", {}):
                title, text = output.data["text/plain"][1:-1], cell.outputs[place + 1].text
                alternative = re.search(r'alt="(.*?)"', output.data["text/html"])[1]
                shown = re.sub(r"[\s;]+", " ", f"{title}. {text}")  # in lines there
                assert re.sub(r"[\s;]+", " ", html.unescape(alternative)) in shown
                assert len(title) > 10
                assert len(text) > 30


@every_notebook
def test_no_printed_line_is_so_long_that_it_breaks_within_a_word(name):
    for cell in code_cells(read(name)):
        for line in text_of(cell).splitlines():
            assert len(line) <= 105, (cell.id, line)


def test_the_pictures_of_the_readme_are_those_of_the_notebooks():
    found = {}
    for name in notebooks.NOTEBOOKS:
        found |= notebooks.of_the_readme(read(name))
    shown = re.findall(r"!\[(.+?)\]\(demo/(\w+)\.png\)", (ROOT / "README.md").read_text())
    assert {name for _, name in shown} == found.keys()
    assert all(len(alternative) > 30 for alternative, _ in shown)
    for name, picture in found.items():
        assert (DEMO / f"{name}.png").read_bytes() == picture, "run python demo/notebooks.py"


def test_what_the_text_says_of_the_demo_is_what_its_cells_print():
    printed = {cell.id: text_of(cell) for cell in code_cells(read(PART_2))}
    assert "head 6: '·' gives 1.00 to '8', 2 back" in printed["sum"]
    assert "head 7: '·' gives 0.99 to '17', 5 back" in printed["sum"]
    assert "75 sums 74 are right; without head 6: 3, without head 7: 4, only" in printed["sums"]
    assert "of all 961 sums, 960 are right\n    1 plus 1 is 1  (held out)" in printed["one-wrong"]
    assert "42 comes first in 200 of 200 random orders" in printed["by-heart"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "it has 74 right; without head 6, 3, and without head 7, 4" in readme
    ends = [text for text in printed["circle"].splitlines() if re.match("head [67]", text)]
    assert all(float(re.search(r"helix ([\d.]+)", line)[1]) >= 0.98 for line in ends)


# --- outputs --------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
CHECK = re.compile(r"^(✓ .* as in .*?)(?: \(off by (\S+), allowed (\S+)\))?$", re.MULTILINE)


def same_text(old, new, tags=()):
    """Whether two outputs say the same, by the rule at the top of this file."""
    for (_, *before), (_, *now) in zip(CHECK.findall(old), CHECK.findall(new), strict=False):
        if not all(float(found) <= float(allowed) for found, allowed in (before, now) if allowed):
            return False
        if before[1] and now[1] and before[1] != now[1]:
            return False
    old, new = (CHECK.sub(r"\1", text) for text in (old, new))
    if [part.split() for part in NUMBER.split(old)] != [part.split() for part in NUMBER.split(new)]:
        return False
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    if "rounded" in tags:
        return all(a == b or nearly_the_same(a, b) for a, b in pairs)
    return all(a == b for a, b in pairs)


def nearly_the_same(old, new):
    if not ("." in old and "." in new):
        return False
    a, b = (Decimal(number.replace(",", "")) for number in (old, new))
    last_place = 10.0 ** max(a.as_tuple().exponent, b.as_tuple().exponent)
    return math.isclose(a, b, rel_tol=0.03, abs_tol=1.01 * last_place)


@functools.cache
def blocks(picture, n=64):
    """The mean colors of n x n blocks of a PNG picture."""
    colors = matplotlib.image.imread(io.BytesIO(picture))[..., :3]
    rows, columns = (np.linspace(0, size, n + 1).astype(int) for size in colors.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(colors, rows[:-1], axis=0), columns[:-1], axis=1)
    return sums / np.outer(np.diff(rows), np.diff(columns))[..., None]


def same_picture(old, new):
    """Whether two pictures show the same, by the rule at the top of this file."""
    versions = {re.search(rb"Matplotlib version([\w.]+)", png).group(1) for png in (old, new)}
    limit = 0.001 if len(versions) == 1 else 0.015
    return np.abs(blocks(old) - blocks(new)).mean() <= limit


@every_notebook
def test_the_committed_outputs_are_what_the_cells_print(name):
    found, stale = run(name), []
    for cell in code_cells(read(name)):
        same = same_text(text_of(cell), found.printed[cell.id], cell.metadata.get("tags", ()))
        pngs = [*zip(pngs_of(cell), found.pngs[cell.id], strict=True)]
        if not (same and all(same_picture(old, new) for old, new in pngs)):
            stale.append(cell.id)
    assert not stale, f"the outputs of {stale} have changed: python demo/notebooks.py"


def test_a_kernel_shows_what_a_run_in_this_process_does(kernel):
    for cell in code_cells(kernel)[: -len(COMMANDS)]:
        assert same_text(text_of(cell), run(PART_1).printed[cell.id], cell.metadata.get("tags", ()))
        assert len(pngs_of(cell)) == len(run(PART_1).pngs[cell.id])


CHECKED = "✓ x [2] as in f"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("scores [17, 16]", "scores  [17, 16]\n", True),
        ("scores [17, 16]", "scores [17, 17]", False),
        ("ids [1024, 690]", "ids [1024, 691]", False),
        ("rope_theta: 500000.0", "rope_theta: 510000.0", False),
        ("its text '42'", "its text '43'", False),
        (CHECKED, CHECKED + " (off by 1e-03, allowed 0.02)", True),
        (CHECKED + " (off by 2e-03, allowed 0.02)", CHECKED, True),
        (CHECKED, CHECKED + " (off by 0.3, allowed 0.02)", False),
        (
            CHECKED + " (off by 1e-03, allowed 0.02)",
            CHECKED + " (off by 1e-03, allowed 0.5)",
            False,
        ),
        (CHECKED, "✓ x [2] as in g", False),
        (CHECKED, "✓ x [3] as in f", False),
        ("✗ x: difference 0.659", "✗ x: difference 0.658", False),
    ],
)
def test_which_outputs_count_as_the_same(old, new, same):
    assert same_text(old, new) is same


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("perplexity 40.0", "perplexity 41.0", True),
        ("perplexity 40.0", "perplexity 42.0", False),
        ("differ by 0.000", "differ by 0.001", True),
        ("differ by 0.000", "differ by 0.002", False),
        ("score -0.686", "score 0.686", False),
        ("after 4 tokens", "after 5 tokens", False),
        ("a step of 8.4e-06", "a step of 8.5e-06", True),
        ("a step of 8.4e-06", "a step of 0.1e-06", False),
        ("a step of 8.4e-06", "a step of 8.4e-05", False),
    ],
)
def test_which_rounded_numbers_count_as_the_same(old, new, same):
    assert same_text(old, new, ["rounded"]) is same
    assert not same_text(old, new)


def drawn(scores, color="#2f6db3"):
    """A picture of some data: a heat map beside a curve."""
    figure = Figure(dpi=50)
    left, right = figure.subplots(1, 2)
    left.imshow(scores, cmap="RdBu_r", vmin=-1, vmax=1)
    right.plot(scores[0], color=color)
    right.set_ylim(-1, 1)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_a_picture_of_other_data_is_noticed_and_rounding_is_not():
    scores = np.random.default_rng(0).uniform(-1, 1, (17, 17))
    picture = drawn(scores)
    assert same_picture(picture, drawn(scores))
    assert same_picture(picture, drawn(scores * 1.002))
    for other in (-scores, scores.T, scores * 1.1, np.roll(scores, 1)):
        assert not same_picture(picture, drawn(other))
    assert not same_picture(picture, drawn(scores, color="#d9772b"))


@every_notebook
def test_every_picture_differs_from_the_others(name):
    found = [png for cell in code_cells(read(name)) for png in pngs_of(cell)]
    assert len(found) >= 7
    for a in range(len(found)):
        for b in range(a):
            assert not same_picture(found[a], found[b])


# --- what it comes to -----------------------------------------------------------------------------


def test_by_hand_it_comes_to_the_token_that_llama3_generates(demo_tokenizer):
    (cell,) = (c for c in code_cells(read(PART_1)) if "next-token" in c.metadata.get("tags", ()))
    token = int(re.search(r"^next_token (\d+)$", text_of(cell), re.M)[1])
    assert token == first_token(DEMO)
    assert demo_tokenizer.decode([token]) == "42"
    assert PROMPT + "42\n" in run(PART_3).printed["generate"]


def test_it_leaves_no_gradients_in_the_weights():
    assert not any(w.requires_grad for w in run(PART_3).names["weights"].values())


def test_the_golden_numbers_are_those_of_arithmetic_in_double_precision(demo_weights, demo_config):
    golden = json.loads((DEMO / "trace.json").read_text())
    assert golden == trace.of_the_demo()  # as written by python demo/trace.py
    w = {name: weight.double().numpy() for name, weight in demo_weights.items()}
    c, tokens = demo_config, golden["tokens"]
    T, d, group = len(tokens), c.head_dim, c.n_heads // c.n_kv_heads
    found = {"embeddings": w["tok_embeddings.weight"][tokens]}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"]

    def rotated(x):  # [T, heads * d]
        pairs = x.reshape(T, -1, d // 2, 2)
        angle = np.arange(T)[:, None] * c.rope_theta ** (-2 * np.arange(d // 2) / d)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(T, -1)

    def keep(layer, **tensors):
        if layer == 0:
            found.update({f"layers.0 {key.replace('_', ' ')}": x for key, x in tensors.items()})

    x = found["embeddings"]
    for i in range(c.n_layers):
        name = f"layers.{i}"
        normed = norm(x, f"{name}.attention_norm")
        q, k, v = (normed @ w[f"{name}.attention.{n}.weight"].T for n in ("wq", "wk", "wv"))
        keep(i, queries=q, keys=k, values=v)
        q, k, heads = rotated(q), rotated(k), []
        for h in range(c.n_heads):
            s = h // group
            scores = q[:, h * d : (h + 1) * d] @ k[:, s * d : (s + 1) * d].T / math.sqrt(d)
            powers = np.exp(scores) * np.tril(np.ones((T, T)))
            pattern = powers / powers.sum(-1, keepdims=True)
            heads.append(pattern @ v[:, s * d : (s + 1) * d])
        heads = np.concatenate(heads, axis=1)
        change = heads @ w[f"{name}.attention.wo.weight"].T
        keep(i, heads=heads, after_attention=x + change)
        if i == 0:
            found |= {"layers.0 attention_norm": normed, "layers.0 attention, after wo": change}
            found |= {"layers.0 queries, rotated": q, "layers.0 keys, rotated": k}
            found |= {"layers.0 scores, last head": scores, "layers.0 pattern, last head": pattern}
        x = x + change
        normed = norm(x, f"{name}.ffn_norm")
        gate = normed @ w[f"{name}.feed_forward.w1.weight"].T
        gated = gate / (1 + np.exp(-gate)) * (normed @ w[f"{name}.feed_forward.w3.weight"].T)
        change = gated @ w[f"{name}.feed_forward.w2.weight"].T
        keep(i, gated=gated)
        if i == 0:
            found |= {"layers.0 ffn_norm": normed, "layers.0 gate, before SiLU": gate}
            found["layers.0 feed_forward"] = change
        x = x + change
        found[f"after layers.{i}"] = x
    found["norm"] = norm(x, "norm")
    found["logits"] = found["norm"] @ w["output.weight"].T
    assert found.keys() == golden["tensors"].keys()
    for name, right in golden["tensors"].items():
        row = found[name][-1]
        assert [*found[name].shape] == right["shape"], name
        assert np.allclose(row[:3], right["first"], atol=2e-6 + 1e-5 * right["length"]), name
        assert math.isclose(np.linalg.norm(row), right["length"], rel_tol=1e-4), name


# --- pictures -------------------------------------------------------------------------------------


def texts_of(figure):
    """The texts of a picture, without its title."""
    found = [text.get_text() for text in figure.findobj(Text) if text.get_text()]
    return [text for text in found if text != pictures.title_of(figure)]


def test_the_diagrams_say_what_the_model_is(demo_config):
    sizes = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10}
    config = demo_config._replace(**sizes, ffn_dim=70, vocab_size=999)
    assert texts_of(diagrams.model(config, 7)) == [
        *("layer, 3 times", "token ids", "[7]\nsection 1", "lookup", "[7, 48]\nsection 3"),
        *("RMSNorm", "section 3\n[7, 48]", "attention", "sections 4, 5\n6 heads of 10", "+"),
        *("RMSNorm", "section 3\n[7, 48]", "SwiGLU", "section 5\n48 to 70 to 48", "+"),
        *("residual stream", "RMSNorm", "[7, 48]\nsection 3", "output", "[7, 999]\nsection 6"),
        "logits",
    ]
    figure = diagrams.groups(config, 4)
    assert pictures.title_of(figure) == "6 query heads, 2 key and value heads"
    assert texts_of(figure) == [*(f"q{i}" for i in range(6)), "k0, v0", "k1, v1"]
    found = texts_of(diagrams.cache(["a", "b"], "c", config))
    assert {"a", "b", "c", "keys", "values", "one of 3 layers,\none of 2 heads"} <= {*found}
    found = texts_of(diagrams.one_head(config, 7))
    assert {"[7, 48]", "queries\n[7, 10]", "keys\n[7, 10]", "values\n[7, 10]", "[7, 7]"} <= {*found}
    assert texts_of(diagrams.swiglu(config, 7)).count("[7, 70]") == 4


def test_pictures_of_attention_name_their_tokens_and_heads():
    patterns, labels = torch.rand(4, 3, 3), ["a", "b", ","]
    figure = pictures.heads(patterns, labels, "title", group=2)
    heads = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in heads] == [
        f"head {h}, keys {k}" for h, k in enumerate([0, 0, 1, 1])
    ]
    figure = pictures.last_row(patterns[:, -1], ["w", "x", "y", "z"], labels, "title", "what")
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["w", "x", "y", "z"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "“,”"]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    figure = pictures.attention(patterns[0], mask, patterns[0], labels, "title")
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == (
        "key of token",
        "query of token",
    )
    drawn = figure.axes[2].images[0].get_array()
    assert drawn.mask.tolist() == (~mask).tolist()
    assert np.allclose(drawn.filled(0), patterns[0] * mask)


def luminance(color):
    """Relative luminance of a color, by WCAG 2.1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_table_of_what_breaks_can_be_read():
    answers = {
        "this": [("yes", 0.9, True, 9, 9), ("no", math.nan, False, 0, 9)],
        "that": [("a", 0.5, True, 1, 1), ("b", None, False, 4, 9)],
    }
    figure = pictures.left_out(answers, ["first", "second"])
    axes = figure.axes[0]
    texts = {text.get_text(): text for text in axes.texts}
    assert {"yes  0.900", "9 of 9", "✗ no  not a number", "✗ b  not a number"} <= {*texts}
    assert "1 of 1" not in texts
    image = axes.images[0]
    for text in texts.values():  # black on any of the colors
        assert text.get_color() == "k"
        assert text.get_fontsize() >= 9
        assert (text.get_weight() == "bold") == text.get_text().startswith("✗")
    for share in (0.0, 0.5, 1.0):
        background = luminance(image.cmap(image.norm(share)))
        assert (background + 0.05) / 0.05 >= 4.5


# --- llama3.py in a notebook ----------------------------------------------------------------------


def test_in_a_notebook_llama3_runs_as_a_command_and_as_a_function_that_gives_its_status(kernel):
    streams = [
        {
            name: "".join(output.text for output in cell.outputs if output.get("name") == name)
            for name in ("stdout", "stderr")
        }
        for cell in kernel.cells[-len(COMMANDS) :]
    ]
    assert streams[0]["stdout"] == "25."
    assert re.fullmatch(r"llama3\.py: found in demo: .*\n", streams[0]["stderr"])
    assert streams[1]["stdout"] == ""
    assert streams[1]["stderr"].startswith("llama3.py: error: no: no such folder")
    assert kernel.cells[-1].outputs[-1].data["text/plain"] == "2"
