"""What the measurements of this folder share: a task built from a config, results.json, and the tables of README.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared
from shared import REPOSITORY, Row, spread
from shared import built as built

HERE = Path(__file__).resolve().parent


def run(directory: Path, *overrides: str) -> list[Row]:
    """Run ``hyperopt`` with ``overrides`` in ``directory``, unless it is done, and return its rows."""
    summary = directory / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
        command = [*overrides, "threads=1", "device=cpu", f"hydra.run.dir={directory}", "resume=auto", "trainer.progress=false"]
        print("hyperopt", *command, flush=True)
        subprocess.run(
            [sys.executable, "-m", "hyperopt.app.cli", *command], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL
        )
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def seconds(directory: Path) -> float:
    """Wall time of a run, from its summary."""
    return json.loads((directory / "summary.json").read_text())["seconds"]


def evaluated(rows: list[Row]) -> list[Row]:
    """The rows of steps that were evaluated."""
    return [row for row in rows if "test/loss" in row]


SHOWN = tuple(f"{part}/{kind}" for part in ("outer", "val", "test") for kind in ("loss", "accuracy"))


def study(where: Path, *overrides: str, seeds: Sequence[int] = (0, 1, 2)) -> Row:
    """Runs of some seeds, each at that of its evaluated steps which has the least ``val/loss``."""
    found: list[Row] = []
    for seed in seeds:
        out = where.with_name(f"{where.name}-{seed}")
        rows = run(out, *overrides, f"seed={seed}")
        best = min(evaluated(rows), key=lambda row: row["val/loss"])
        more = {"first outer loss": rows[0]["outer/step_loss"], "best step": best["step"], "seconds": seconds(out)}
        found.append({**more, **{key: best[key] for key in SHOWN if key in best}})
    return {key: spread([row[key] for row in found]) for key in found[0]}


def means(found: Row) -> Row:
    """The means of a study."""
    return {key: row["mean"] for key, row in found.items()}


def parsed(description: str | None, **more: Any) -> argparse.Namespace:
    """The command line of a script that runs ``hyperopt``: ``runs``, where its runs are to lie, and options with defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "bilevel")
    for name, default in more.items():
        parser.add_argument(f"--{name}", nargs="*", type=type(default[0]), default=default)
    options = parser.parse_args()
    options.runs = options.runs.resolve()
    return options


def save(name: str, found: Any) -> None:
    """Put one measurement into results.json, beside the others."""
    shared.save(HERE / "results.json", name, {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **found})


def write_table(name: str, lines: Sequence[str]) -> None:
    """Put a table between its two marks in README.md."""
    shared.write_table(HERE / "README.md", name, lines)
