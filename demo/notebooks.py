"""Run the notebooks and store what their cells print, and the pictures of the README.

    python demo/notebooks.py

after every change of a cell, or of what the cells import: the tests compare. The pictures are those
of the cells tagged "readme".

    LLAMA3_CKPT_DIR=... python demo/notebooks.py --real

writes demo/smollm2.json instead: what the cells of the second notebook find on a real model, which
is too large to be bundled.
"""

import base64
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.append(str(HERE.parent))

from demo import pictures  # noqa: E402

NOTEBOOKS = ("notebook.ipynb", "notebooks/how_it_adds.ipynb", "notebooks/your_own.ipynb")
REAL = HERE / "smollm2.json"


def png_of(output: dict[str, Any]) -> bytes | None:
    """The picture that an output of a cell shows."""
    found = re.search(r"base64,([^\"]*)", "".join(output.get("data", {}).get("text/html", ())))
    return base64.b64decode(found[1]) if found else None


def of_the_readme(notebook: dict[str, Any]) -> dict[str, bytes]:
    """The pictures of cells tagged "readme", as PNG files, by the cells' names."""
    found = {}
    for cell in notebook["cells"]:
        if "readme" in cell["metadata"].get("tags", ()):
            (found[cell["id"]],) = filter(None, map(png_of, cell["outputs"]))
    return found


def executed(notebook: Any, folder: Path, **options: Any) -> Any:
    """A notebook with the outputs of a run in a fresh kernel, which lacks LLAMA3_CKPT_DIR."""
    from nbclient import NotebookClient

    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, resources=where, record_timing=False, **options)
    outside = ("LLAMA3_CKPT_DIR", "MPLBACKEND")
    client.execute(env={name: os.environ[name] for name in os.environ if name not in outside})
    for cell in notebook.cells:  # what is printed in pieces becomes one text, up to a picture
        for output in (outputs := cell.get("outputs", [])) and outputs[1:]:
            before = outputs[outputs.index(output) - 1]
            if before.get("name") == output.get("name", ""):
                before["text"] += output["text"]
                outputs.remove(output)
    return notebook


def run(path: Path) -> None:
    """Run a notebook, and store its outputs in it and its pictures beside this file."""
    import nbformat

    notebook = executed(nbformat.read(path, as_version=4), path.parent)
    nbformat.write(notebook, path)
    for name, png in of_the_readme(notebook).items():
        (HERE / f"{name}.png").write_bytes(png)


def real_table(model_path: str) -> dict[str, Any]:
    """What the table of the second notebook holds for another model."""
    notebook = json.loads((HERE.parent / NOTEBOOKS[1]).read_text())
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    wanted = (
        "from-part-1 exact trace sum answers without-heads sums any-model "
        "leave-out leave-out-run leave-out-check leave-out-plot"
    )
    names: dict[str, Any] = {"__name__": "notebook"}
    os.environ["LLAMA3_CKPT_DIR"] = model_path
    with mock.patch.object(pictures, "show"):
        for name in wanted.split():
            exec(compile(cells[name], name, "exec"), names)
    answers = {}  # without the prompt and the sums, which only the demo has learned
    for name, row in names["answers"].items():
        answers[name] = [
            (said, None if math.isnan(chance) else round(chance, 4), *rest)
            for said, chance, *rest in row[2:]
        ]
    return {"model": names["source"].found, "asked": names["asked"][2:], "answers": answers}


def main() -> None:
    os.chdir(HERE.parent)
    if sys.argv[1:] == ["--real"]:
        REAL.write_text(json.dumps(real_table(os.environ["LLAMA3_CKPT_DIR"]), indent=1) + "\n")
        return
    os.environ.pop("LLAMA3_CKPT_DIR", None)
    for name in NOTEBOOKS:
        run(HERE.parent / name)
    from demo import chinese  # which needs NOTEBOOKS

    chinese.main()


if __name__ == "__main__":
    main()
