"""Public pages and tutorials: sentences of a readable length, with a verb, and no words of this project's own making."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from verbs import fragments

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 45  # words
TUTORIALS = sorted(path.relative_to(ROOT) for path in (ROOT / "experiments" / "tutorials").glob("*.py"))
PAGES = [
    path.relative_to(ROOT) for path in sorted([*ROOT.glob("[a-z]*/README.md"), *ROOT.glob("[a-z]*/*/*.md"), ROOT / "README.md"])
]
PRIVATE = r"\b(guards?|mesh|verdict|doors?|house in order|and was not\.|is any:|would is)"


def prose(path: Path) -> str:
    """The text of a page, or of the Markdown cells of a tutorial, without code, formulas, tables, headings and links."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        cells = re.findall(r"^# %% \[markdown\]\n((?:#.*\n?)*)", text, re.MULTILINE)
        text = "\n\n".join(re.sub(r"^# ?", "", cell, flags=re.MULTILINE) for cell in cells)
    text = re.sub(r"^```.*?^```$|<!--.*?-->|\$\$.*?\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`|\$[^$\n]*\$", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"^(\||#| {4}).*$", "", text, flags=re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Split at full stops, and where a paragraph or an entry of a list ends."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    blocks = [re.sub(r"^\s*(?:[-*]|\d+\.) ", "", block) for block in blocks]
    return [
        " ".join(each.split()) for block in blocks for each in re.split(r"(?<=[.!?])(?<! al\.)[\")*]*\s+", block) if each.strip()
    ]


def test_the_text_of_a_page_is_taken_apart() -> None:
    text = "One is here. Is two?\n\n- a point that goes\n  over two lines\n- and another (with more.) Last."
    assert sentences(text) == ["One is here.", "Is two?", "a point that goes over two lines", "and another (with more.", "Last."]
    assert re.search(PRIVATE, "the guard, or") and not re.search(PRIVATE, "vanguard")


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=str)
def test_sentences_are_not_long(path: Path) -> None:
    assert [each for each in sentences(prose(path)) if len(each.split()) > LONGEST] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Means over three seeds on two cores, measured with one thread.", 1),
        ("A network that learns the response of its weights to the decay.", 1),
        ("128 strengths for 400 rows of data. No time to measure all of the others.", 2),
        ("- **A**: a loop that reads the device, and one operator.\n- three seeds of each network and no more", 1),
        ("The search is short. Three seeds run the test. Measure the others with the command below!", 0),
        ("It isn't known how many rows there are. `fixed_point` returns a solution with its status.", 0),
        ("**Noise of the weights at the end.** One thread.\n\nMeans over three seeds on two cores, in seconds:", 0),
    ],
)
def test_sentences_without_a_verb_are_found(text: str, found: int, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    assert len(fragments(sentences(prose(tmp_path / "page.md")))) == found


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=str)
def test_sentences_have_a_verb(path: Path) -> None:
    assert fragments(sentences(prose(path))) == []


def docstrings(source: str) -> list[str]:
    """The docstrings of a module and of all its classes and functions."""
    nodes = ast.walk(ast.parse(source))
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]


def statements(docstring: str) -> list[str]:
    """The sentences of a docstring after its summary, which may be a noun phrase, and without formulas, sections and shapes."""
    text = re.sub(r"^(Args|Attributes|Returns|Raises|Yields|Example):\n(?:(?: .*)?\n?)*", "", docstring, flags=re.MULTILINE)
    text = re.sub(r"^References?:.*(?:\n.+)*|^ {4}.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b[Ss]hapes?( of [^:]*)?: .*", "", re.sub(r"``[^`]*``|`[^`]*`", "code", text))
    return [each for each in sentences(text)[1:] if each[0].isupper()]  # the others continue a formula


def test_sentences_of_docstrings_without_a_verb_are_found() -> None:
    one = 'def f(x):\n    """A noun phrase for the summary.\n\n    One product for each of the rows. It costs two more.\n\n'
    two = "    Args:\n        x: one number for each of the rows. shape: (rows,)\n\n    Reference: A book about it, with pages.\n"
    (found,) = [each for each in docstrings(one + two + '    """') if each]
    assert fragments(statements(found)) == ["One product for each of the rows."]


def test_sentences_of_docstrings_have_a_verb() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "hyperopt").rglob("*.py"))}
    found = {path: [fragments(statements(each)) for each in docstrings(text)] for path, text in sources.items()}
    assert len(found) > 200
    assert {str(path): [each for each in lines if each] for path, lines in found.items() if any(lines)} == {}


def uneven(text: str) -> list[str]:
    """The rows of tables that have not as many cells as the head of the table, or do not end."""
    found, head = [], 0
    for line in re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        head = bars and (head or bars)
        found += [line] if bars != head or (bars and not line.endswith("|")) else []
    return found


def test_uneven_rows_are_found() -> None:
    table = "| norm | b |\n|---|---|\n| \\|A\\| | 1 |\n| |A| | 2 |\n| 3 |\n| 4 | 5\n\n| one |\n|---|\n| 6 |\n"
    assert uneven(table) == ["| |A| | 2 |", "| 3 |", "| 4 | 5"]


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=str)
def test_rows_of_a_table_have_as_many_cells_as_its_head(path: Path) -> None:
    assert uneven((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=str)
def test_words_are_those_of_the_field(path: Path) -> None:
    text = re.sub(r"\s+", " ", prose(path))
    assert [found[0] for found in re.finditer(PRIVATE, text)] == []
