"""The notebook runs from top to bottom, on any sizes, and its committed outputs are what it prints.

    jupyter execute --inplace notebook.ipynb

runs it on the demo and writes its outputs into it: to be done after every change of a cell, or of
what the cells print.

What "the same output" means, since processors round differently and clocks never agree:

- text and numbers are the same, up to white space;
- but in cells tagged "rounded", which print what came out of 16-bit products, a number with a
  decimal point may differ by 3 % and by 1 in its last place;
- in cells tagged "measured", which print times, any number may stand for another;
- the difference that a check reports may be any that the check allows;
- a picture, cut into 64 x 64 blocks of color from 0 to 1, differs by 0.001 on average at most, or
  by 0.015 if another version of matplotlib drew it; in a "measured" cell it need only be there.
"""

import base64
import functools
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, config_of, random_weights
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import llama3
import tokenizer_setup

NOTEBOOK = ROOT / "notebook.ipynb"
PROMPT = "the answer to the ultimate question of life, the universe, and everything is "


def execute(notebook, folder=ROOT, ckpt_dir=None, after_cell=None):
    """Run all cells in a clean kernel, without Jupyter's time stamps; their outputs are kept."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LLAMA3_CKPT_DIR", "MPLBACKEND")
    }
    if ckpt_dir is not None:
        environment["LLAMA3_CKPT_DIR"] = str(ckpt_dir)
    client = NotebookClient(
        notebook,
        timeout=200,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    if after_cell is not None:
        client.on_cell_executed = lambda cell, cell_index, execute_reply: after_cell(client, cell)
    client.execute(env=environment)
    return notebook


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell):
    encoded = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [base64.b64decode(picture) for picture in encoded if picture]


def tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return cell


@pytest.fixture(scope="module")
def committed():
    return read()


@pytest.fixture(scope="module")
def executed():
    return execute(read())


# --- the committed notebook -----------------------------------------------------------------------


def test_it_was_run_from_top_to_bottom_without_a_warning(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"


def test_it_is_small_and_names_no_place_on_a_machine(committed):
    assert NOTEBOOK.stat().st_size < 1.5e6
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
        *("attention_shares", "attention", "feed_forward", "forward", "nucleus"),
    }


# --- outputs --------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
CHECK = re.compile(r"^(✓ .*: difference )(\S+), allowed (\S+)$", flags=re.MULTILINE)


def same_text(old, new, tags=()):
    """Whether two outputs say the same, by the rule at the top of this file."""
    for text in (old, new):
        for _, difference, allowed in CHECK.findall(text):
            if not float(difference) <= float(allowed):
                return False
    old, new = (CHECK.sub(r"\1…, allowed \3", text) for text in (old, new))
    if [part.split() for part in NUMBER.split(old)] != [part.split() for part in NUMBER.split(new)]:
        return False
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    if "measured" in tags:
        return True
    if "rounded" in tags:
        return all(a == b or nearly_the_same(a, b) for a, b in pairs)
    return all(a == b for a, b in pairs)


def nearly_the_same(old, new):
    if not ("." in old and "." in new):
        return False
    last_place = 10.0 ** -len(old.split(".")[1])
    a, b = (float(number.replace(",", "")) for number in (old, new))
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
            and ("measured" in tags or all(map(same_picture, pictures_of(old), pictures_of(new))))
        ):
            stale.append(old.id)
    assert not stale, (
        f"the outputs of {stale} have changed: jupyter execute --inplace notebook.ipynb"
    )


CHECKED = "✓ x [2] as in f: difference {}, allowed 0.02"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("scores [17, 16]", "scores  [17, 16]\n", True),
        ("scores [17, 16]", "scores [17, 17]", False),
        ("ids [1024, 690]", "ids [1024, 691]", False),
        ("rope_theta: 500000.0", "rope_theta: 510000.0", False),
        ("its text '42'", "its text '43'", False),
        (CHECKED.format("0"), CHECKED.format("1e-03"), True),
        (CHECKED.format("0"), CHECKED.format("0.3"), False),
        (CHECKED.format("0"), CHECKED.format("0").replace("0.02", "0.1"), False),
        (CHECKED.format("0"), CHECKED.format("0").replace("f:", "g:"), False),
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
    ],
)
def test_which_rounded_numbers_count_as_the_same(old, new, same):
    assert same_text(old, new, ["rounded"]) is same
    assert not same_text(old, new)


def test_in_a_measured_cell_only_the_words_count():
    assert same_text("with 1024 tokens: 1.5", "with 512 tokens: 9.5", ["measured"])
    assert not same_text("with 1024 tokens: 1.5", "after 1024 tokens: 1.5", ["measured"])


def drawn(scores, color="#2f6db3"):
    """A picture of some data: a heat map beside a curve."""
    figure = Figure()
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
    assert text_of(code_cells(executed)[-1]) == PROMPT + "42\n"


def make_checkpoint(folder: Path, dtype, **params):
    config = config_of(folder, **params)
    torch.save(random_weights(config, dtype), folder / "consolidated.00.pth")
    shutil.copy(DEMO / "tokenizer.model", folder)
    return sum(math.prod(shape) for shape in llama3.weight_shapes(config).values()) * dtype.itemsize


# Runs before the first cell: notes what each picture says about itself, and prints it at the end.
WATCH_PICTURES = """
from matplotlib.backend_bases import FigureCanvasBase

pictures, print_figure = [], FigureCanvasBase.print_figure

def watch(canvas, *args, **kwargs):
    figure, labels, ticks = canvas.figure, [], []
    title = figure.get_suptitle() or figure.axes[0].get_title()
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            labels.append(axes.get_ylabel())
        elif axes.axison:
            labels.append(axes.get_xlabel() or figure.get_supxlabel())
            labels.append(axes.get_ylabel() or figure.get_supylabel())
        ticks += [text.get_text() for text in axes.get_xticklabels() + axes.get_yticklabels()]
    pictures.append([title, labels, ticks])
    return print_figure(canvas, *args, **kwargs)

FigureCanvasBase.print_figure = watch
"""


def test_it_runs_on_a_model_of_other_sizes_in_the_memory_that_the_weights_take(tmp_path):
    size = make_checkpoint(
        tmp_path, torch.float32, dim=768, n_layers=8, n_heads=12, n_kv_heads=None, norm_eps=1e-6
    )
    memory = {}

    def note_memory(client, cell):
        status = Path(f"/proc/{client.km.provisioner.pid}/status")
        if status.exists():  # Linux; pages of a mapped file are not among these
            memory[cell.id] = int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024

    notebook = read()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WATCH_PICTURES))
    notebook.cells.append(nbformat.v4.new_code_cell("import json; print(json.dumps(pictures))"))
    execute(notebook, ckpt_dir=tmp_path, after_cell=note_memory)

    assert found_token(notebook) == first_token(tmp_path)
    pictures = json.loads(text_of(notebook.cells[-1]))
    assert len(pictures) >= 8
    for title, labels, ticks in pictures:
        assert title
        assert all(labels)
        assert not any("\\math" in tick for tick in ticks)
    if memory:
        names = [*memory]
        before_timing = names[: names.index(tagged(notebook, "measured").id)]
        used = max(memory[name] for name in before_timing) - memory["pictures"]
        assert used < 0.75 * size  # about 110 of 224 MB, by libraries; a copy would add 224


@pytest.mark.parametrize(
    ("dtype", "params"),
    [
        (torch.bfloat16, {"n_layers": 1, "n_heads": 8, "n_kv_heads": 1, "use_scaled_rope": True}),
        (torch.float16, {"n_layers": 3, "n_heads": 16, "n_kv_heads": 4, "ffn_dim_multiplier": 1.3}),
    ],
    ids=["one layer, one head of keys, scaled RoPE, bfloat16", "three layers, float16"],
)
def test_it_runs_on_small_models_of_every_kind(tmp_path, dtype, params):
    make_checkpoint(tmp_path, dtype, **params)
    notebook = execute(read(), ckpt_dir=tmp_path)
    assert all(
        output.get("name") != "stderr" for cell in code_cells(notebook) for output in cell.outputs
    )


@pytest.mark.parametrize(
    ("right", "wrong", "cell"),
    [
        ("/ math.sqrt(q.shape[-1])", "", "softmax"),
        ("pairs * rotations", "pairs * rotations.conj()", "rotate"),
    ],
)
def test_a_mistake_in_llama3_stops_it_at_the_step_that_is_wrong(tmp_path, right, wrong, cell):
    code = (ROOT / "llama3.py").read_text()
    assert right in code, (
        f"llama3.py has no {right!r} any more, which this test replaces by {wrong!r} to make a "
        "mistake that the notebook must notice; if the line was only rewritten, rewrite it here too"
    )
    (tmp_path / "llama3.py").write_text(code.replace(right, wrong))
    for name in ("checkpoint_files.py", "tokenizer_setup.py", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = read()
    with pytest.raises(CellExecutionError, match="differs from llama3"):
        execute(notebook, folder=tmp_path)
    failed = [c.id for c in code_cells(notebook) for o in c.outputs if o.output_type == "error"]
    assert failed == [cell]
