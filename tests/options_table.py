"""The list of options in ``configs/README.md``, from the files' own comments; ``python tests/options_table.py`` writes it."""

from __future__ import annotations

import itertools
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PAGE = CONFIGS / "README.md"
START, END = "<!-- options -->\n", "<!-- end of options -->\n"


def described(path: Path) -> str:
    """Return the first sentence of the first comment of a file, after Hydra's own line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("#").strip() for line in comment).replace("|", "\\|")
    return text.partition(". ")[0].removesuffix(".")


def table() -> str:
    """Return one table with a row for each option, by group."""
    rows = ["| option | what it is |", "|---|---|"]
    for path in sorted(CONFIGS.glob("*/**/*.yaml"), key=lambda path: (path.parent.as_posix(), path.name)):
        rows.append(f"| `{path.parent.relative_to(CONFIGS).as_posix()}={path.stem}` | {described(path)} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """Return the page with the list as it is now."""
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
