"""What the measurements of this folder share: a task built from a config, results.json, and the tables of README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hyperopt.config import Built, build
from hyperopt.repro import seed_everything
from hyperopt.schema import register
from hyperopt.tasks.base import Environment

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
Row = dict[str, Any]


def built(*overrides: str) -> Built:
    """What a config describes, its task set up as ``hyperopt`` would; one thread, on the CPU."""
    torch.set_num_threads(1)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("train", list(overrides))
    dtype = getattr(torch, cfg.precision)
    torch.set_default_dtype(dtype)
    found = build(cfg)
    found.task.setup(Environment(torch.device("cpu"), dtype, cfg.seed, False, seed_everything(cfg.seed)))
    return found


def run(directory: Path, *overrides: str) -> list[Row]:
    """Run ``hyperopt`` with ``overrides`` in ``directory``, unless it is done, and return its rows."""
    summary = directory / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
        command = [*overrides, "threads=1", "device=cpu", f"hydra.run.dir={directory}", "resume=auto", "trainer.progress=false"]
        print("hyperopt", *command, flush=True)
        subprocess.run([sys.executable, "-m", "hyperopt.cli", *command], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
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


def runs_directory(description: str | None) -> Path:
    """Where the command line says that the runs of a script are to lie."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "bilevel")
    return parser.parse_args().runs.resolve()


def spread(values: Sequence[float]) -> Row:
    """Mean and values."""
    return {"mean": statistics.fmean(values), "values": list(values)}


def save(name: str, found: Any) -> None:
    """Put one measurement into results.json, beside the others."""
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **found}
    path.write_text(json.dumps(results, indent=1) + "\n")


def write_table(name: str, lines: Sequence[str]) -> None:
    """Put a table between its two marks in README.md, if they are there."""
    readme = HERE / "README.md"
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = readme.read_text() if readme.exists() else ""
    if start in text:
        before, _, rest = text.partition(start)
        readme.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")
