"""What the measurements of this folder share: where its results and pages are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared
from shared import REPOSITORY as REPOSITORY

HERE = Path(__file__).resolve().parent


def save(file: str, name: str, found: Any) -> dict[str, Any]:
    """Put one measurement into a file of results, beside the others; return all of them."""
    return shared.save(HERE / file, name, found)


def write_table(name: str, lines: Sequence[str], file: str = "README.md") -> None:
    """Put a table between its two marks in a page of this folder, if they are there."""
    shared.write_table(HERE / file, name, lines)
