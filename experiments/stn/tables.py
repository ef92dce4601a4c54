"""What the measurements of this folder share: files of results, and tables of README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def save(file: str, name: str, found: Any) -> dict[str, Any]:
    """Put one measurement into a file of results, beside the others; return all of them."""
    path = HERE / file
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = found
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def write_table(name: str, lines: Sequence[str]) -> None:
    """Put a table between its two marks in README.md, if they are there."""
    readme = HERE / "README.md"
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = readme.read_text() if readme.exists() else ""
    if start in text:
        before, _, rest = text.partition(start)
        readme.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")
