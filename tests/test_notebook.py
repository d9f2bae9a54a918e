"""The notebook runs from top to bottom, on any sizes, and its committed outputs are what it prints.

    python demo/pictures.py

runs it on the demo and writes its outputs into it, and the two pictures that the README shows: to
be done after every change of a cell, or of what the cells print.

Only `executed` runs it in a kernel. All other runs are in this process, see Run, which is quicker.

What "the same output" means, since processors round differently and clocks never agree:

- text and numbers are the same, up to white space;
- but in cells tagged "rounded", which print what came out of 16-bit products, a number with a
  decimal point may differ by 3 % and by 1 in its last place;
- the difference that a check reports may be any that the check allows, or none;
- a picture, cut into 64 x 64 blocks of color from 0 to 1, differs by 0.001 on average at most, or
  by 0.015 if another version of matplotlib drew it.
"""

import base64
import contextlib
import copy
import ctypes
import functools
import gc
import io
import math
import os
import re
import shutil
from decimal import Decimal
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, config_of, random_weights, split
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbclient import NotebookClient

import llama3
import tokenizer_setup
from demo import pictures

NOTEBOOK = ROOT / "notebook.ipynb"
PROMPT = "the answer to the ultimate question of life, the universe, and everything is "

# Run after the cells of the notebook, in the same kernel: llama3.py as a command, and its function.
COMMANDS = [
    "%run llama3.py --prompt '17 plus 8 is ' --ckpt-dir demo",
    "import cli.main\ncli.main.main(['--prompt', '17 plus 8 is ', '--ckpt-dir', 'no'])",
]


@functools.cache
def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell):
    encoded = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [base64.b64decode(picture) for picture in encoded if picture]


def stopped_at(namespace, sources):
    """Run the sources of cells, by name, one after another; the one that stops, and why."""
    for name, source in sources.items():
        try:
            exec(compile(source, f"cell {name}", "exec"), namespace)
        except ValueError as error:
            return name, str(error)
    return None, None


# What a Run does less of: questions of each kind, and layers of 8B, which has no weights.
LESS = {
    "sums": {"else 12": "else 1", "most = 1000": "most = 3"},
    "shapes": {'"n_layers": 32': '"n_layers": 2'},
}


@contextlib.contextmanager
def without_garbage_collection():
    """Figures are many small objects, and each time the collector would go through all others."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Run:
    """The notebook in this process: quicker than in a kernel, and each cell can be looked into.

    changes: by the name of a cell, what stands in it and what is put in its place. before: called
    with each cell and the names that those before it have made. last: the last cell that is run.
    left_out: how many of the parts in section 8, which takes longest, are left out.
    """

    def __init__(self, ckpt_dir=DEMO, changes=None, *, before=None, last=None, left_out=2):
        self.printed, self.shown, self.names = {}, [], {"__name__": "notebook"}
        changes = LESS | (changes or {})
        with pytest.MonkeyPatch.context() as patch, without_garbage_collection():
            patch.setattr(pictures, "show", self.show)
            patch.setenv("LLAMA3_CKPT_DIR", str(ckpt_dir))
            for cell in code_cells(read()):
                source = cell.source
                for right, wrong in changes.get(cell.id, {}).items():
                    assert right in source
                    source = source.replace(right, wrong)
                if before is not None:
                    before(cell, self.names)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(source, f"cell {cell.id}", "exec"), self.names)
                self.printed[cell.id] = out.getvalue()
                if cell.id == "leave-out":
                    self.names["left_out"] = dict([*self.names["left_out"].items()][:left_out])
                if cell.id == last:
                    break

    def show(self, figure, text):
        self.shown.append((figure, text))


def tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return cell


@pytest.fixture(scope="module")
def committed():
    return read()


@pytest.fixture(scope="module")
def kernel():
    """The notebook and COMMANDS after a run of all cells in a kernel, without its time stamps."""
    notebook = copy.deepcopy(read())
    for command in COMMANDS:
        cell = nbformat.v4.new_code_cell(command, metadata={"tags": ["raises-exception"]})
        notebook.cells.append(cell)
    client = NotebookClient(
        notebook,
        timeout=200,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT)}},
    )
    outside = ("LLAMA3_CKPT_DIR", "MPLBACKEND")
    client.execute(env={name: os.environ[name] for name in os.environ if name not in outside})
    return notebook


@pytest.fixture(scope="module")
def executed(kernel):
    notebook = copy.copy(kernel)
    notebook.cells = kernel.cells[: -len(COMMANDS)]
    return notebook


# --- the committed notebook -----------------------------------------------------------------------


def test_it_was_run_from_top_to_bottom_without_a_warning(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"


def test_it_is_small_and_names_no_place_on_a_machine(committed):
    assert NOTEBOOK.stat().st_size < 2e6
    words = "".join(cell.source for cell in committed.cells)
    words += "".join(map(text_of, code_cells(committed)))
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users|mnt|opt)\b|[A-Z]:\\\\", words)


def test_it_uses_no_ready_made_layers(committed):
    code = "\n".join(cell.source for cell in code_cells(committed))
    ready_made = set(re.findall(r"\bnn\.[\w.]+|scaled_dot_product\w*", code))
    assert ready_made == {"nn.functional.cross_entropy"}  # which a check compares with


def test_its_text_leaves_the_sizes_to_the_checkpoint(committed, demo_config):
    text = " ".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    numbers = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", text)}
    sizes = {demo_config.dim, demo_config.vocab_size, demo_config.ffn_dim}
    assert not numbers & sizes


def test_every_step_is_compared_with_the_function_that_does_it(committed):
    checks = "\n".join(text_of(cell) for cell in code_cells(committed))
    functions = re.findall(r"^✓ .* as in (llama3\.\w+)", checks, flags=re.MULTILINE)
    assert {name.removeprefix("llama3.") for name in functions} == {
        *("rms_norm", "rope_frequencies", "rope_rotations", "rotate", "queries_keys_values"),
        *("causal_mask", "attention_pattern", "grouped_query_attention", "attention"),
        *("feed_forward", "block", "forward", "Session", "nucleus"),
    }


def test_its_contents_lead_to_its_sections(committed):
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    linked = re.findall(r"^\d+\. \[(.+)\]\(#(.+)\)$", text, flags=re.MULTILINE)
    numbered = re.findall(r"^## (\d+)\. (.+)$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in numbered] == [*range(1, 1 + len(linked))]
    for (title, target), (number, heading) in zip(linked, numbered, strict=True):
        assert title == heading
        assert target == f"{number}. {heading}".replace(" ", "-")  # as Jupyter makes anchors


def test_a_cell_can_be_taken_in_at_a_glance(committed):
    assert {c.id: n for c in code_cells(committed) if (n := len(c.source.splitlines())) > 25} == {}


@pytest.mark.parametrize("which", ["committed", "executed"])
def test_every_picture_is_read_out_under_it_and_for_those_who_do_not_see_it(which, request):
    for cell in code_cells(request.getfixturevalue(which)):
        for place, output in enumerate(cell.outputs):
            if "image/png" in output.get("data", {}):
                alternative = output.metadata["image/png"]["alt"]
                title, text = output.data["text/plain"][1:-1], cell.outputs[place + 1].text
                assert alternative == f"{title}. {text.splitlines()[0]}"
                assert len(title) > 10
                assert len(text) > 30
        assert "execution" not in cell.metadata  # the times of the last run


def test_the_pictures_of_the_readme_are_those_of_the_notebook(committed):
    found = pictures.of_the_readme(committed)
    shown = re.findall(r"!\[(.+?)\]\(demo/(\w+)\.png\)", (ROOT / "README.md").read_text())
    assert {name for _, name in shown} == found.keys()
    assert all(len(alternative) > 30 for alternative, _ in shown)
    for name, picture in found.items():
        assert (DEMO / f"{name}.png").read_bytes() == picture, "run python demo/pictures.py"


def test_what_the_text_says_of_the_demo_is_what_its_cells_print(committed):
    """The figures that stand in the text of section 8 and in the README."""
    printed = {cell.id: text_of(cell) for cell in code_cells(committed)}
    assert "head 6: '·' gives 1.00 to '8', 2 back" in printed["sum"]
    assert "head 7: '·' gives 0.99 to '17', 5 back" in printed["sum"]
    sums = re.findall(
        r"right with all heads (\d+); without head 6 (\d+), without head 7 (\d+)", printed["sums"]
    )
    assert sums == [("74", "3", "4")]
    readme = " ".join((ROOT / "README.md").read_text().split())
    figures = "of 75 sums that it has never seen, it has 74 right; without head 6, 3, and without"
    assert f"{figures} head 7, 4" in readme
    assert printed["by-heart"].split("likeliest: ")[1].startswith("'42'")


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


def kinds_of(cell):
    return [sorted(output.data) for output in cell.outputs if "data" in output]


def test_the_committed_outputs_are_what_the_cells_print(committed, executed):
    stale = []
    for old, new in zip(code_cells(committed), code_cells(executed), strict=True):
        tags = new.metadata.get("tags", ())
        if not (
            same_text(text_of(old), text_of(new), tags)
            and kinds_of(old) == kinds_of(new)
            and all(map(same_picture, pictures_of(old), pictures_of(new)))
        ):
            stale.append(old.id)
    assert not stale, f"the outputs of {stale} have changed: python demo/pictures.py"


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


def test_every_picture_differs_from_the_others(committed):
    pictures = [picture for cell in code_cells(committed) for picture in pictures_of(cell)]
    assert len(pictures) >= 8
    for a in range(len(pictures)):
        for b in range(a):
            assert not same_picture(pictures[a], pictures[b])


# --- running it -----------------------------------------------------------------------------------


def first_token(ckpt_dir):
    """The token that llama3.py generates after the notebook's prompt."""
    config = llama3.load_config(ckpt_dir)
    weights = llama3.load_weights(ckpt_dir, config)
    tokenizer = tokenizer_setup.load_tokenizer(ckpt_dir / "tokenizer.model")
    prompt = tokenizer_setup.encode(tokenizer, PROMPT)
    return next(llama3.generate(prompt, weights, config, max_new_tokens=1))


def found_token(notebook):
    """The token that the notebook comes to by hand."""
    return int(re.search(r"^next_token (\d+)$", text_of(tagged(notebook, "next-token")), re.M)[1])


def test_by_hand_it_comes_to_the_token_that_llama3_generates(executed, demo_tokenizer):
    token = found_token(executed)
    assert token == first_token(DEMO)
    assert demo_tokenizer.decode([token]) == "42"
    (last,) = (cell for cell in code_cells(executed) if cell.id == "generate")
    assert text_of(last) == PROMPT + "42\n"


def make_checkpoint(folder: Path, dtype, **params):
    config = config_of(folder, **params)
    torch.save(random_weights(config, dtype), folder / "consolidated.00.pth")
    shutil.copy(DEMO / "tokenizer.model", folder)
    return sum(math.prod(shape) for shape in llama3.weight_shapes(config).values()) * dtype.itemsize


def check_pictures(run):
    """Hold what each picture says about itself against what a reader needs."""
    assert len(run.shown) >= 23
    for figure, text in run.shown:
        title = pictures.title_of(figure)
        assert min(len(title), len(text)) > 10
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        for axes in figure.axes:
            if axes not in panels:
                assert axes.get_xlabel() or axes.get_ylabel(), title
            elif axes.axison:  # of a row, the left one has the label
                assert figure.get_supxlabel() or any(a.get_xlabel() for a in panels), title
                assert figure.get_supylabel() or any(a.get_ylabel() for a in panels), title
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() != "linear":  # plain numbers, no formulas
                    assert not any("\\math" in tick.get_text() for tick in axis.get_ticklabels())


def memory_of_its_own():
    """The bytes of this process that are in no file; None where that cannot be told."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; pages of a mapped file are not among these
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024


def give_free_memory_back():
    """So that what is taken afterwards shows, and is not what was free before."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # Linux, with glibc
        libc.malloc_trim(0)


def test_it_runs_on_a_larger_model_in_the_memory_that_the_weights_take(tmp_path, run):
    """After `run`, so that all libraries are loaded and are not counted."""
    params = {"dim": 432, "n_layers": 8, "n_heads": 12, "n_kv_heads": None, "norm_eps": 1e-6}
    size = make_checkpoint(tmp_path, torch.float32, **params)
    memory = {}

    def note_memory(cell, names):
        if cell.id == "weights" and memory["setup"] is not None:
            give_free_memory_back()
        memory[cell.id] = memory_of_its_own()

    found = Run(tmp_path, before=note_memory)
    assert found.names["next_token"] == first_token(tmp_path)
    check_pictures(found)
    if memory["weights"] is not None:
        names = [*memory]  # up to the training of one layer, which has a copy and its gradient
        names = names[names.index("weights") : names.index("training") + 1]
        used = max(memory[name] for name in names) - memory["weights"]
        assert used < 0.75 * size  # about half; a copy of the weights would add it all


def test_it_runs_on_a_small_model_with_an_empty_prompt(tmp_path):
    sizes = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 6, "ffn_dim": 40}
    make_checkpoint(tmp_path, torch.bfloat16, **sizes, use_scaled_rope=True)
    found = Run(tmp_path, {"setup": {PROMPT: ""}}, left_out=99)
    assert (found.names["layer"], found.names["head"]) == (0, 1)  # there is no head 6
    check_pictures(found)
    for figure, _ in found.shown:
        figure.set_layout_engine("none")  # which takes longest, and only moves things
        figure.draw_without_rendering()


def test_it_runs_in_float16_on_several_files_and_on_another_layer_and_head(tmp_path):
    config = config_of(tmp_path, n_layers=3, n_heads=16, n_kv_heads=4, ffn_dim_multiplier=1.3)
    weights = random_weights(config, torch.float16)
    weights["output.weight"][:1024] = 0  # so that the next token is a special one
    split(weights, tmp_path, 2)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    setup = {PROMPT: "你好, the answer is", "layer, head = 0, 6": "layer, head = 2, 9"}
    found = Run(tmp_path, {"setup": setup}, left_out=99)
    assert (found.names["layer"], found.names["head"]) == (2, 9)
    token = llama3.forward(found.names["tokens"], weights, config)[-1].argmax()
    assert found.names["next_token"] == token >= 1024
    check_pictures(found)


def test_it_runs_on_weights_that_are_all_zero(tmp_path):
    config = config_of(tmp_path, n_layers=2)
    zeros = {name: torch.zeros(shape) for name, shape in llama3.weight_shapes(config).items()}
    torch.save(zeros, tmp_path / "consolidated.00.pth")
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    printed = "".join(Run(tmp_path).printed.values())
    assert "✓" in printed
    assert "nan" not in printed.replace("[nan, nan, nan]", "")  # softmax without the maximum


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(ValueError, match=f"layer = {layer}: this model has layers 0 to 3"):
        Run(changes={"setup": {"layer, head = 0, 6": f"layer, head = {layer}, 6"}})


def test_tied_weights_are_counted_once(tmp_path, demo_weights):
    shutil.copy(DEMO / "params.json", tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    tied = demo_weights | {"output.weight": demo_weights["tok_embeddings.weight"]}
    torch.save(tied, tmp_path / "consolidated.00.pth")

    found = Run(tmp_path, last="parameters")
    assert found.names["total"] == 1_213_568 - 1280 * 128


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = [  # what, in which cell, how, and the cell that must stop
    ("no embedding of its own", "embedding", "embedding_table[tokens]", "embedding_table[:T]"),
    ("no norm", "rms", " * torch.rsqrt(mean_square + config.norm_eps)", ""),
    ("no epsilon", "rms", " + config.norm_eps", ""),
    ("another epsilon", "rms", "config.norm_eps", "1e-6", "sizes"),
    ("no weight of the norm", "rms", ".to(x.dtype) * weight", ".to(x.dtype)"),
    ("another head", "queries", "normed @ wq[head].T", "normed @ wq[head - 1].T"),
    ("another base of RoPE", "frequencies", "config.rope_theta", "10000"),
    ("turned backwards", "rotations", "torch.ones_like(angles), angles", "1 + 0 * angles, -angles"),
    ("turned twice", "rotate", "query_points * rotations", "query_points * rotations**2"),
    (
        "keys not rotated",
        "keys",
        "rotate(normed @ wk[shared].T, rotations)",
        "normed @ wk[shared].T",
    ),
    ("another group", "keys", "shared = head // group", "shared = head % n_kv_heads"),
    (
        "no rotation",
        "scores",
        "queries_rotated @ keys_rotated.T",
        "queries @ (normed @ wk[shared].T).T",
    ),
    ("queries not rotated", "scores", "queries_rotated @", "queries @"),
    ("no scale", "scores", " / math.sqrt(head_dim)", ""),
    ("no mask", "mask", ".tril()", ""),
    ("mask one too wide", "mask", ".tril()", ".tril(1)"),
    (
        "no mask in the softmax",
        "softmax",
        "softmax(masked_scores.float())",
        "softmax(scores.float())",
    ),
    ("values of another group", "values", "normed @ wv[shared].T", "normed @ wv[shared - 1].T"),
    ("pattern not used", "values", "pattern @ values", "values"),
    ("groups side by side", "heads", "wk[h // group]", "wk[h % n_kv_heads]"),
    ("heads not rotated", "heads", "rotate(normed @ wq[h].T, rotations)", "normed @ wq[h].T"),
    ("heads not scaled", "heads", " / math.sqrt(head_dim)", ""),
    ("heads not masked", "heads", ".masked_fill(~mask, -math.inf)", ""),
    (
        "heads in another order",
        "wo",
        "torch.cat(head_outputs, dim=-1)",
        "torch.cat(head_outputs[::-1], dim=-1)",
    ),
    ("no residual of attention", "wo", "layer_input + attention_change", "attention_change"),
    ("no second norm", "swiglu", 'normed_for("ffn", after_attention, layer)', "after_attention"),
    (
        "no gate",
        "swiglu",
        "gated = gate_opened * (normed_again @ w3.T)",
        "gated = normed_again @ w3.T",
    ),
    ("gate not bent", "swiglu", "gate_opened * (", "gate * ("),
    ("no residual of SwiGLU", "layer-end", "after_attention + ffn_change", "ffn_change"),
    (
        "layers not rotated",
        "attend",
        "rotate(normed @ wq[h].T, rotations)",
        "normed @ wq[h].T",
        "run",
    ),
    ("layers not scaled", "attend", " / math.sqrt(head_dim)", "", "run"),
    ("layers not masked", "attend", "scores.masked_fill(~mask, -math.inf)", "scores", "run"),
    ("another group in layers", "attend", "@ wv[shared].T", "@ wv[shared - 1].T", "run"),
    ("layers without residual", "layers", "x = x + change", "x = change", "run"),
    (
        "no norm in layers",
        "layers",
        'swiglu(normed_for("ffn", x, layer), layer)',
        "swiglu(x, layer)",
        "run",
    ),
    ("no gate in layers", "layers", "(gate / (1 + torch.exp(-gate))).to(dtype) * ", "", "run"),
    ("no last norm", "logits", 'norm(after_layer[-1], weights["norm.weight"])', "after_layer[-1]"),
    (
        "patterns in another order",
        "attend",
        "torch.stack(patterns)",
        "torch.stack(patterns[::-1])",
        "run",
    ),
    ("one layer too many", "entering", "range(layer)", "range(layer + 1)", "layer-input"),
    ("a sum over columns", "softmax-by-hand", "powers.sum(-1, keepdim=True)", "powers.sum(0)"),
    ("scores with a constant", "scores", "= queries_rotated", "= 1 + queries_rotated"),
    ("softmax in 16 bits", "softmax", "softmax(masked_scores.float())", "softmax(masked_scores)"),
    (
        *("SiLU in 16 bits", "swiglu"),
        *("(gate.float() / (1 + torch.exp(-gate.float())))", "(gate / (1 + torch.exp(-gate)))"),
    ),
    ("a lens without norm", "lens", 'norm(output[-1], weights["norm.weight"])', "output[-1]"),
    ("padding is read", "answers", "starts=starts, ", ""),
    (
        "the new token stands elsewhere",
        "cache",
        "T * frequencies",
        "(T - 1) * frequencies",
        "cache-check",
    ),
    (
        "the cache is forgotten",
        "cache",
        "dict(stored)",
        "{at: (0 * k, v) for at, (k, v) in stored.items()}",
        "cache-check",
    ),
    ("a power turned around", "powers", "two ** (1 / temperature)", "two**temperature"),
    (
        "top-p takes one less",
        "temperature",
        "likelier <= top_p",
        "ordered.values.cumsum(0) <= top_p",
    ),
    ("rows not permuted", "permute", "wq_head[rows], wk_head[rows]", "wq_head, wk_head"),
]


@pytest.fixture(scope="module")
def run():
    """The notebook on the demo, and where each of MISTAKES stopped it: `stopped`, by mistake."""
    sources = {cell.id: cell.source for cell in code_cells(read())}
    order, stopped = [*sources], {}

    def try_mistakes(cell, names):
        for what, place, right, wrong, *stops in MISTAKES:
            if place == cell.id:
                assert right in cell.source, f"{place} has no {right!r} any more, for {what!r}"
                last = (stops or [place])[0]
                names_of_cells = order[order.index(place) : order.index(last) + 1]
                changed = {name: sources[name] for name in names_of_cells}
                changed[place] = cell.source.replace(right, wrong)
                with contextlib.redirect_stdout(io.StringIO()):
                    stopped[what] = stopped_at(dict(names), changed)

    run = Run(changes={cell: {} for cell in LESS}, before=try_mistakes)  # exercises need it all
    run.stopped = stopped
    return run


def test_each_part_left_out_stops_it_in_the_cell_of_that_part(run):
    assert len(run.stopped) == len(MISTAKES)
    for what, place, _, _, *stops in MISTAKES:
        cell, why = run.stopped[what]
        assert cell == (stops or [place])[0], what
        assert "differs from" in why, what


def test_scaling_left_out_stops_it_where_a_model_has_it(tmp_path):
    make_checkpoint(tmp_path, torch.float32, n_layers=2, use_scaled_rope=True, head_dim=64)
    for right, wrong in (
        ("if config.rope_scaling_factor is not None:", "if False:"),
        ("(4 - 1)", "(4 + 1)"),
    ):
        with pytest.raises(ValueError, match="frequencies: differs from llama3"):
            Run(tmp_path, {"frequencies": {right: wrong}}, last="frequencies")


def test_it_leaves_no_gradients_in_the_weights(run):
    for weights in (run.names["weights"], run.names["exact"]):
        assert not any(weight.requires_grad for weight in weights.values())


def texts_of(figure):
    """The texts of a picture, without its title."""
    texts = [text.get_text() for text in figure.findobj(Text) if text.get_text()]
    return [text for text in texts if text != pictures.title_of(figure)]


def test_the_diagrams_say_what_the_model_is(demo_config):
    sizes = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10}
    config = demo_config._replace(**sizes, ffn_dim=70, vocab_size=999)
    assert texts_of(pictures.model(config, 7)) == [
        *("layer, 3 times", "token ids", "[7]\nsection 1", "lookup", "[7, 48]\nsection 3"),
        *("RMSNorm", "section 3\n[7, 48]", "attention", "sections 4 to 6\n6 heads of 10", "+"),
        *("RMSNorm", "section 3\n[7, 48]", "SwiGLU", "section 6\n48 to 70 to 48", "+"),
        *("residual stream", "RMSNorm", "[7, 48]\nsection 3", "output", "[7, 999]\nsection 7"),
        "logits",
    ]
    figure = pictures.groups(config, 4)
    assert pictures.title_of(figure) == "Heads of queries: 6, heads of keys and values: 2"
    assert texts_of(figure) == [*(f"q{i}" for i in range(6)), "k0, v0", "k1, v1"]
    found = texts_of(pictures.cache(["a", "b"], "c", config))
    assert {"a", "b", "c", "keys", "values", "one of 3 layers,\none of 2 heads"} <= {*found}


def test_pictures_of_attention_name_their_tokens_and_heads():
    patterns, labels = torch.rand(4, 3, 3), ["a", "b", "c"]
    figure = pictures.heads(patterns, labels, "title", group=2)
    heads = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in heads] == [
        f"head {h}, keys {k}" for h, k in enumerate([0, 0, 1, 1])
    ]
    figure = pictures.last_row(patterns[:, -1], ["w", "x", "y", "z"], labels, "title", "what")
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["w", "x", "y", "z"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == labels
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    figure = pictures.attention(patterns[0], mask, patterns[0], labels, "title")
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == (
        "key of token",
        "query of token",
    )
    drawn = figure.axes[2].images[0].get_array()
    assert drawn.mask.tolist() == (~mask).tolist()
    assert np.allclose(drawn.filled(0), patterns[0] * mask)


def test_a_check_looks_at_each_row_by_itself(run, capsys):
    compare, right = run.names["compare"], torch.tensor([[1.0, 0.0], [0.001, 0.001], [0.0, 0.0]])
    compare("x", right.clone(), "right", right)
    assert capsys.readouterr().out == "✓ x [3, 2] as in right\n"  # zeros too, and no "nan"
    compare("x", right * 1.01, "right", right, 0.02)
    assert capsys.readouterr().out == "✓ x [3, 2] as in right (off by 1e-02, allowed 0.02)\n"
    for row, wrong in [(1, 0.0015), (2, 1e-9), (0, math.nan), (0, math.inf)]:
        other = right.clone()
        other[row] = wrong
        with pytest.raises(ValueError, match="x: differs from right"):
            compare("x", other, "right", right, 0.02)
    for other in (right[:2], right.bfloat16()):
        with pytest.raises(ValueError, match=r"x: \[[23], 2\] torch"):
            compare("x", other, "right", right, 0.02)


def test_the_exercises_know_their_answers(run, demo_config, demo_weights, capsys):
    names = run.names
    names["SOLUTIONS"] = {n: functools.cache(solve) for n, solve in names["SOLUTIONS"].items()}
    order = torch.arange(16).view(2, -1).T.flatten()  # neighbours, where halves are pairs
    halves = dict(demo_weights)
    for name in halves:
        if "wq" in name or "wk" in name:
            halves[name] = halves[name].view(-1, 16, 128)[:, order].flatten(0, 1)
    halves = {name: weight.float() for name, weight in halves.items()}
    opening = torch.tensor([1024, *names["tokenizer"].encode("What is the")])
    logits = llama3.forward(opening, {n: w.float() for n, w in demo_weights.items()}, demo_config)
    five = np.sort(np.exp(logits[-1].double().numpy()))[-5:]
    five /= five.sum()
    answers = {
        1: 1,
        2: 2 * math.pi * 10000 ** (14 / 16),
        3: (1, 5),
        4: 8_030_261_248 - 128256 * 4096,
        5: llama3.forward(names["sum_ids"], halves, demo_config)[-1].argmax().item(),
        6: -(five * np.log(five)).sum(),
    }
    for exercise, answer in answers.items():
        names["check"](exercise, answer)
        assert f"✓ exercise {exercise}" in capsys.readouterr().out
        names["check"](exercise, "none of them" if exercise == 3 else answer * 1.01 + 1)
        assert f"✗ exercise {exercise}" in capsys.readouterr().out
    assert names["tokenizer"].decode([answers[5]]) != "25"
    assert [run.printed[f"exercise-{i}"] for i in answers] == [
        f"exercise {i}: no answer yet\n" for i in answers
    ]


RIGHT = {name: getattr(llama3, name) for name in ("rotate", "attention_pattern", "block")}


@pytest.mark.parametrize(
    ("name", "wrong", "cell"),
    [
        ("rotate", lambda x, rotations: RIGHT["rotate"](x, rotations.conj()), "rotate"),
        ("repeat_heads", lambda x, times: torch.cat([x] * times, dim=-3), "keys"),
        (
            "attention_pattern",  # without the root under the scores
            lambda q, k, mask: RIGHT["attention_pattern"](q * math.sqrt(q.shape[-1]), k, mask),
            "scores",
        ),
        ("causal_mask", lambda positions, keys, starts=None: keys < positions[:, None] + 2, "mask"),
        ("block", lambda x, *rest: RIGHT["block"](x, *rest) - x, "layer-end"),
    ],
)
def test_a_mistake_in_llama3_stops_it_at_the_step_that_is_wrong(monkeypatch, name, wrong, cell):
    monkeypatch.setattr(llama3, name, wrong)
    reached = []
    with pytest.raises(ValueError, match="differs from"):
        Run(before=lambda cell, _: reached.append(cell.id))
    assert reached[-1] == cell


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
