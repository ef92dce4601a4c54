"""The README as it stands: its Python runs, its commands compose, its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import options_table
import pytest
from composing import composed
from hydra.core.override_parser.overrides_parser import OverridesParser

from hyperopt.app.building import build
from hyperopt.app.repro import preserved_global_state
from hyperopt.app.search.space import points, split

ROOT = Path(__file__).resolve().parents[1]
PAGES = [Path("README.md"), *(Path(name, "README.md") for name in ("hyperopt", "configs", "experiments", "tests"))]
EXAMPLES = [Path(name, "README.md") for name in ("experiments/bilevel", "experiments/stn", "hyperopt/stn")]
TEXTS = {path: (ROOT / path).read_text(encoding="utf-8") for path in (*PAGES, *EXAMPLES)}
README = TEXTS[Path("README.md")]
STUDIES = sorted(path.relative_to(ROOT) for path in (ROOT / "experiments").glob("*/*.md"))
STUDY_HEADINGS = ["Question", "Command", "Results", "What was learned"]
OTHER_FORM = {"experiments/tutorials/README.md"}  # a list of the tutorials


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", "\n".join(TEXTS.values()), re.DOTALL | re.MULTILINE)


def shell() -> list[list[str]]:
    """The words of each command on a page: the lines of bash blocks, and indented ones that begin with a program's name."""
    pages = "\n".join([*TEXTS.values(), *((ROOT / path).read_text(encoding="utf-8") for path in STUDIES if path not in TEXTS)])
    found = re.findall(r"^```bash\n(.*?)^```$", pages, re.DOTALL | re.MULTILINE)
    found += re.findall(r"^    ((?:hyperopt|python) .*)$", pages, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in dict.fromkeys("\n".join(found).splitlines())]


def commands() -> list[list[str]]:
    """The ``hyperopt`` commands that run a job, without the program's name."""
    lines = shell()
    jobs = [
        words[1:]
        for words in lines
        if words[:1] == ["hyperopt"] and words[1:2] not in (["--cfg"], ["--help"], ["report"], ["export"], ["tensorboard"])
    ]
    return [words[1:] if words[:1] == ["check"] else words for words in jobs]


@pytest.mark.cases(quick=7)
@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process: that it all imports on its own is test_imports.py's, and importing torch takes longer than the code.
    monkeypatch.chdir(tmp_path)
    with preserved_global_state():
        exec(compile(code, "README", "exec"), {"__name__": "__main__"})


@pytest.mark.cases(quick=16)
@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_the_commands_compose(argv: list[str]) -> None:
    words = [word for word in argv if word != "-m" and not word.startswith(("resume=", "ckpt_path=", "mode="))]
    parsed = OverridesParser.create().parse_overrides(words)
    first = [points(split([each])[0])[0][0] if each.is_sweep_override() else str(each.input_line) for each in parsed]
    build(composed(*first))


def test_the_scripts_are_there_with_their_options() -> None:
    scripts = [words[1:] for words in shell() if words[:1] == ["python"] and words[1].endswith(".py")]
    assert len(scripts) > 40
    assert [script for script, *_ in scripts if not (ROOT / script).is_file()] == []
    # An option stands in the script, or as an argument of a function that it calls in a module beside it.
    texts = {
        script: "".join(path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
        for script, *_ in scripts
    }
    options = [(script, word) for script, *words in scripts for word in words if word.startswith("--")]
    assert [(script, word) for script, word in options if not re.search(rf"\b{word[2:]}\b", texts[script])] == []


def test_the_pictures_and_links_are_there() -> None:
    pages = [*TEXTS, *STUDIES]
    links = {
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    }
    links = {(page, link) for page, link in links if "://" not in link}
    assert {page for page, _ in links} >= set(PAGES)
    assert [(str(page), link) for page, link in links if not (ROOT / page.parent / link).exists()] == []


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1300
    assert README.splitlines().index("```python") < 45


def test_every_study_has_one_form_and_is_in_the_table() -> None:
    headings = {
        str(path): re.findall(r"^## (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)[:4] for path in STUDIES
    }
    assert {path for path, found in headings.items() if found != STUDY_HEADINGS} == OTHER_FORM
    table = TEXTS[Path("experiments/README.md")]
    assert [path for path in STUDIES if f"]({path.relative_to('experiments')})" not in table] == []


def test_the_manual_of_the_command_line_lists_every_option() -> None:
    page = TEXTS[Path("configs/README.md")]
    assert options_table.written(page) == page, "run python tests/options_table.py"
    rows = [row.split("|") for row in options_table.table().splitlines()[2:]]
    assert [row[1] for row in rows if not row[2].strip()] == []
