"""What the measurements of this folder share: files of results, and tables of its pages."""

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


def write_table(name: str, lines: Sequence[str], file: str = "README.md") -> None:
    """Put a table between its two marks in a page of this folder, if they are there."""
    page = HERE / file
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = page.read_text() if page.exists() else ""
    if start in text:
        before, _, rest = text.partition(start)
        page.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")
