"""The notebooks in Chinese: their text from demo/zh, their code and outputs from the English ones.

    python demo/chinese.py

writes notebook.zh.ipynb and notebooks/*.zh.ipynb. A file in demo/zh has a part for each text cell:

    <!-- the cell's id, and the first 12 hexadecimal digits of the SHA-256 of its English text -->
    the Chinese text

After an English cell has changed, its part no longer fits, and this names it with the digits that
it should have: change the Chinese text, then the digits.
"""

import copy
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.append(str(HERE.parent))

from demo.notebooks import NOTEBOOKS  # noqa: E402

PART = re.compile(r"^<!-- (\S+) ([0-9a-f]{12}) -->\n", re.MULTILINE)
GLOSSARY = HERE / "zh" / "glossary.md"


def digest(text: str) -> str:
    """What stands for an English text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parts_of(name: str) -> dict[str, tuple[str, str]]:
    """The Chinese texts of a notebook by the cells' ids, each with the digest of what it is of."""
    content = (HERE / "zh" / Path(name).with_suffix(".md").name).read_text()
    _, *found = PART.split(content)
    return {i: (of, text.strip()) for i, of, text in zip(*[iter(found)] * 3, strict=True)}


def path_of(name: str) -> Path:
    """Where the Chinese notebook is."""
    return HERE.parent / name.replace(".ipynb", ".zh.ipynb")


def in_chinese(name: str) -> dict[str, Any]:
    """A notebook in Chinese. Raises ValueError for the cells that have no translation of today."""
    notebook = json.loads((HERE.parent / name).read_text())
    parts, cells, stale = parts_of(name), [], []
    for cell in notebook["cells"]:
        cells.append(cell := copy.deepcopy(cell))
        if cell["cell_type"] == "markdown":
            english = "".join(cell["source"])
            of, text = parts.get(cell["id"], ("", ""))
            if of != digest(english):
                stale.append(f"{cell['id']} {digest(english)}")
            cell["source"] = text.splitlines(keepends=True)
    if stale:
        raise ValueError(f"{name}: cells whose Chinese text is not of this English one: {stale}")
    glossary = {"cell_type": "markdown", "id": "glossary", "metadata": {}}
    glossary["source"] = GLOSSARY.read_text().strip().splitlines(keepends=True)
    cells.insert(1, glossary)
    return notebook | {"cells": cells}


def main() -> None:
    for name in NOTEBOOKS:
        content = json.dumps(in_chinese(name), indent=1, ensure_ascii=False)
        path_of(name).write_text(content + "\n")


if __name__ == "__main__":
    main()
