"""The Chinese edition: it says what the English one says, of its code, formulas, links and numbers.

A cell that was changed without its translation fails here by name; how to change both is at the top
of demo/chinese.py.
"""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

from demo import chinese
from demo.notebooks import NOTEBOOKS

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
FORMULA, CODE, LINK = r"\$\$.+?\$\$|\$[^$\n]+\$", r"`[^`\n]+`", r"\]\(([^)\s]+)\)"


def markdown(notebook):
    cells = notebook["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"}


def read(path):
    return json.loads(path.read_text())


def counted(pattern, text):
    return Counter(re.findall(pattern, text, flags=re.DOTALL))


def links(text):
    """Addresses and files, those of a Chinese page as the English one's; not places in the page."""
    found = (link.replace(".zh.", ".") for link in re.findall(LINK, text))
    return Counter(link for link in found if not link.startswith("#"))


def without_marks(text):
    """A text without its formulas, code and links, in which numbers are counted."""
    for pattern in (FORMULA, CODE, LINK):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return text


def numbers(text):
    return Counter(n.rstrip(".,") for n in re.findall(r"\d[\d,.]*", without_marks(text)))


def lines(text):
    """How many headings, points of lists and rows of tables there are."""
    kinds = {"heading": r"#+ ", "point": r"(?:[-*]|\d+\.) ", "row": r"\|"}
    return {
        kind: len(re.findall(rf"^{start}", text, re.MULTILINE)) for kind, start in kinds.items()
    }


@every_notebook
def test_it_is_made_of_the_english_notebook_and_of_todays_translations(name):
    english, found = read(ROOT / name), read(chinese.path_of(name))
    assert found == chinese.in_chinese(name), "run python demo/chinese.py"
    assert chinese.parts_of(name).keys() == markdown(english).keys()  # nothing is left over
    others = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert others == [cell for cell in english["cells"] if cell["cell_type"] == "code"]


@every_notebook
def test_formulas_code_links_numbers_and_lists_are_the_same_on_both_sides(name):
    english, found = (markdown(read(p)) for p in (ROOT / name, chinese.path_of(name)))
    found.pop("glossary")
    for cell, text in english.items():
        other = found[cell]
        for kind, pattern in (("formulas", FORMULA), ("code", CODE)):
            assert counted(pattern, text) == counted(pattern, other), (cell, kind)
        assert links(text) == links(other), cell
        assert numbers(text) == numbers(other), cell
        assert lines(text) == lines(other), cell


@every_notebook
def test_its_contents_lead_to_its_sections_and_its_links_somewhere(name):
    text = "\n".join(markdown(read(chinese.path_of(name))).values())
    linked = re.findall(r"^\d+\. \[(.+)\]\(#(.+)\)$", text, flags=re.MULTILINE)
    numbered = re.findall(r"^## (\d+)\. (.+)$", text, flags=re.MULTILINE)
    for (title, target), (number, heading) in zip(linked, numbered, strict=True):
        assert title == heading
        assert target == f"{number}. {heading}".replace(" ", "-")
    for link in re.findall(LINK, text):
        if "://" not in link and not link.startswith("#"):
            assert (chinese.path_of(name).parent / link).exists(), link


def test_a_cell_that_was_changed_without_its_translation_is_named(monkeypatch, tmp_path):
    notebook = read(ROOT / NOTEBOOKS[0])
    (cell,) = (c for c in notebook["cells"] if c["id"] == "mask-text")
    cell["source"] = "Another text."
    (tmp_path / NOTEBOOKS[0]).write_text(json.dumps(notebook))
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.setattr(chinese, "HERE", tmp_path / "demo")
    with pytest.raises(ValueError, match=f"mask-text {chinese.digest('Another text.')}"):
        chinese.in_chinese(NOTEBOOKS[0])


def test_chinese_text_has_chinese_punctuation():
    """Half-width commas and full stops stand within code, English and numbers alone."""
    pages = [*(markdown(read(chinese.path_of(n))).values() for n in NOTEBOOKS)]
    texts = [text for page in pages for text in page] + [(ROOT / "README.zh.md").read_text()]
    for text in texts:
        wrong = re.findall(r"[\u4e00-\u9fff][,;:?!](?:\s|[\u4e00-\u9fff])", without_marks(text))
        assert not wrong, wrong


# --- the README -----------------------------------------------------------------------------------


def pages():
    return [(ROOT / name).read_text() for name in ("README.md", "README.zh.md")]


def test_the_readme_has_the_same_commands_code_links_and_figures():
    english, found = pages()
    assert FENCED.findall(english) == FENCED.findall(found)
    english, found = (FENCED.sub("", page) for page in (english, found))
    assert lines(english) == lines(found)
    english, found = (" ".join(page.split()) for page in (english, found))  # code spans lines
    assert counted(CODE, english) == counted(CODE, found)
    assert links(english) == links(found)
    assert numbers(english) == numbers(found)


def test_the_two_readmes_lead_to_each_other():
    english, found = pages()
    assert "README.zh.md" in english.splitlines()[0]
    assert "README.md" in found.splitlines()[0]
    for link in re.findall(LINK, found):
        assert "://" in link or (ROOT / link.split("#")[0]).exists(), link
    anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings(found)]
    for link in re.findall(r"\]\(#(.+?)\)", found):
        assert link in anchors


def headings(text):
    return re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
