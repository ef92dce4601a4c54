"""What every benchmark writes beside its numbers, and where: results.json and the table of README.md."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
__all__ = ["HERE", "built", "facts", "load", "store"]
sys.path.append(str(HERE.parent))

from shared import built, load, save, write_table  # noqa: E402


def facts() -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
    }


def store(name: str, found: dict[str, Any], lines: Sequence[str]) -> None:
    """Keep a measurement, and print and write its table."""
    save(HERE / "results.json", name, found)
    machine = f"{found['machine']}, load {found['load']} at the start"
    said = f"This was measured on {found['date']} with torch {found['torch']} on one thread ({machine})."
    print(*lines, sep="\n", flush=True)
    write_table(HERE / "README.md", name, [*lines, "", said])
