"""Writes what was measured into results.json, one key a measurement, with the date and the versions behind it."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def write(name: str, rows: Any) -> None:
    """Put ``rows`` under ``name``."""
    path = HERE / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    found[name] = {**facts, "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")
