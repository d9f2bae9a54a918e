"""A notebook run in this process: quicker than in a kernel, and each cell can be looked into."""

import contextlib
import functools
import gc
import io
from collections import defaultdict

import IPython.display
import nbformat
import pytest
from conftest import DEMO, ROOT
from matplotlib.figure import Figure

import formats
import llama3
import tokenizer_setup
from demo import diagrams, notebooks, pictures

PART_1, PART_2, PART_3 = notebooks.NOTEBOOKS

# What a run does less of that need not find what the committed outputs show.
LESS = {
    "circle": {"range(200)": "range(2)", "range(10, 80)": "range(38, 44)"},
    "streams": {"for a in range(31)": "for a in range(0, 31, 3)"},
    "leave-out-plot": {"left_out.items()": "[*left_out.items()][:2]"},
    "leave-out-check": {"most = 1000": "most = 3", "else 12": "else 1"},
    "shapes": {'"n_layers": 32': '"n_layers": 2'},
    "steps": {"range(41 ": "range(2 "},
    "symptoms": {'symptoms(root / "demo")': "()"},
}


@functools.cache
def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@contextlib.contextmanager
def without_garbage_collection():
    """Figures are many small objects, and each time the collector would go through all others."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Run:
    """A notebook with a model. Its cells' texts: `printed`; its figures: `shown`; its `names`.

    changes: by the name of a cell, what stands in it and what is put in its place. before: called
    with each cell and the names that those before it have made. last: the last cell that is run.
    whole: whether nothing is done less of. draw: "pictures", "figures" without making pictures of
    them, or "nothing". pngs: the pictures, by cell.
    """

    def __init__(
        self,
        name,
        ckpt_dir=DEMO,
        changes=None,
        *,
        before=None,
        last=None,
        whole=False,
        draw="figures",
    ):
        self.printed, self.shown, self.names = {}, [], {"__name__": "notebook"}
        self.pngs = defaultdict(list)
        changes = {**({} if whole else LESS), **(changes or {})}
        show = pictures.show
        with pytest.MonkeyPatch.context() as patch, without_garbage_collection():
            patch.setattr(IPython.display, "display", lambda data, raw: self.display(data))
            patch.setattr(pictures, "show", show if draw == "pictures" else self.show)
            if draw == "nothing":
                for module in (pictures, diagrams):
                    for function, f in [*vars(module).items()]:
                        if getattr(f, "__annotations__", {}).get("return") is Figure:
                            patch.setattr(module, function, lambda *_, **__: None)
            patch.setenv("LLAMA3_CKPT_DIR", str(ckpt_dir))
            patch.chdir((ROOT / name).parent)
            for cell in code_cells(read(name)):
                source = cell.source
                for right, wrong in changes.get(cell.id, {}).items():
                    assert right in source, f"{cell.id} has no {right!r} any more"
                    source = source.replace(right, wrong)
                if before is not None:
                    before(cell, self.names)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    self.here = cell.id
                    exec(compile(source, f"cell {cell.id}", "exec"), self.names)
                self.printed[cell.id] = out.getvalue()
                if cell.id == last:
                    break

    def show(self, figure, text):
        self.shown.append((figure, text))
        print(text)

    def display(self, data):
        self.pngs[self.here].append(notebooks.png_of({"data": data}))


PROMPT = "the answer to the ultimate question of life, the universe, and everything is "


def first_token(model_path):
    """The token that llama3.py generates after the notebooks' prompt, in the weights' own type."""
    source = formats.open(model_path)
    dtype = source.stored["tok_embeddings.weight"].dtype
    weights = {name: w.to(dtype) for name, w in source.load_weights().items()}
    prompt = tokenizer_setup.encode(source.tokenizer(), PROMPT)
    return next(llama3.generate(prompt, weights, source.config, max_new_tokens=1))
