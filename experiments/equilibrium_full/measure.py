"""Choose the settings of ``experiment=equilibrium_mnist_full`` by validation, run it, and write table and figure beside it.

    python experiments/equilibrium_full/measure.py [selection final] [--runs DIR]

Every run is one ``hyperopt`` command (printed). A finished run under ``--runs`` is not run again; a stopped one continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
EXPERIMENT = "experiment=equilibrium_mnist_full"
# The split on which settings were chosen: 220 updates an epoch, 12 epochs.
SPLIT = (
    "dataset.train=55000",
    "dataset.val=5000",
    "trainer.monitor=val/loss",
    "trainer.max_steps=2640",
    "trainer.eval_every=220",
    "trainer.checkpoint_every=2640",
)
WIDE = (
    "task.cell.max_norm=0.9",
    *(f"task.l2.{group}=2e-4" for group in ("A", "B", "classifier")),
    "solver.rtol=1e-2",
    "adjoint.linear_solver.rtol=5e-2",
)
CANDIDATES: dict[str, tuple[str, ...]] = {
    "max_norm 0.5, l2 3e-4, standard pixels": (),
    "max_norm 0.9, l2 2e-4, unit pixels": (*WIDE, "dataset.normalize=unit", "task.cell.input_scale=0.03"),
    "max_norm 0.9, l2 2e-4, standard pixels": WIDE,
}
SEEDS = (0, 1, 2)
SLOW = ("task.cell.max_norm=0.9", "trainer.max_steps=960")  # a map that contracts less, for 4 epochs
# Name: where it runs, and how; all on seed 0.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "warm": ("warm-0", ()),
    "cold": ("cold-0", ("task.warm_start=false",)),
    "max_norm 0.9: warm": ("slow-warm", SLOW),
    "max_norm 0.9: warm, bfloat16": ("slow-bfloat16", (*SLOW, "task.warm_dtype=bfloat16")),
    "max_norm 0.9: cold": ("slow-cold", (*SLOW, "task.warm_start=false")),
}
MEASURED = ("inner/iterations", "inner/iterations_mean", "adjoint/iterations", "adjoint/iterations_mean", "inner/contraction")
Row = dict[str, Any]


def run(directory: Path, overrides: Sequence[str]) -> list[Row]:
    """Run ``hyperopt`` with ``overrides`` in ``directory``, unless it is done, and return its rows."""
    summary = directory / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
        command = [EXPERIMENT, *overrides, f"hydra.run.dir={directory}", "resume=auto", "trainer.progress=false"]
        print("hyperopt", *command, flush=True)
        subprocess.run(
            [sys.executable, "-m", "hyperopt.app.cli", *command], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL
        )
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def facts(directory: Path) -> Row:
    """The task's facts of a run, and its seconds."""
    task = json.loads((directory / "run.json").read_text())["task"]
    return {**task, "seconds": json.loads((directory / "summary.json").read_text())["seconds"]}


def mean(rows: Iterable[Row], name: str) -> float:
    """Mean of a metric over the rows that have it."""
    return statistics.fmean(row[name] for row in rows if name in row)


def selection(runs: Path) -> list[Row]:
    """Each candidate fitted to 55,000 images, and its last step measured on the other 5,000."""
    table = []
    for number, (name, overrides) in enumerate(CANDIDATES.items()):
        last = run(runs / f"selection-{number}", [*SPLIT, *overrides])[-1]
        table.append({"candidate": name, **{key: last[key] for key in ("val/accuracy", "val/loss", "outer/loss")}})
    return table


def final(runs: Path) -> Row:
    """Three seeds, and on the first of them what warm starts save: on this map, and on one that contracts less."""
    seeds = []
    for seed in SEEDS:
        directory = runs / f"warm-{seed}"
        rows = run(directory, [f"seed={seed}"])
        found = facts(directory)
        late = rows[-found["batches_per_epoch"] :]
        seeds.append(
            {
                "seed": seed,
                "rows": {name: part["count"] for name, part in found["rows"].items()},
                **{key: rows[-1][key] for key in ("test/accuracy", "test/loss", "outer/accuracy", "outer/loss")},
                "seconds": found["seconds"],
                "warm_bytes": found["warm_bytes"],
                "staleness_mean": mean(late, "warm/staleness_mean"),
                "staleness_max": max(row["warm/staleness_max"] for row in rows if "warm/staleness_max" in row),
            }
        )
    variants = {}
    for name, (place, overrides) in VARIANTS.items():
        directory = runs / place
        rows = run(directory, ["seed=0", *overrides])
        found = facts(directory)
        later = rows[found["batches_per_epoch"] :]  # in the first epoch every row is cold
        variants[name] = {
            **{key: mean(later, key) for key in MEASURED},
            "last epoch": {key: mean(rows[-found["batches_per_epoch"] :], key) for key in MEASURED},
            "evaluations": rows[-1]["cost/evaluations"],
            "vjps": rows[-1]["cost/vjps"],
            "seconds": found["seconds"],
            "warm_bytes": found["warm_bytes"],
            "test/accuracy": rows[-1]["test/accuracy"],
        }
    accuracies = [row["test/accuracy"] for row in seeds]
    return {"test/accuracy": {"mean": statistics.fmean(accuracies), "values": accuracies}, "seeds": seeds, "variants": variants}


def draw(runs: Path) -> None:
    """Write the figure: test accuracy by epoch, and what a row costs with warm starts and without."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, *others = figure.subplots(1, 3)
    for seed in SEEDS:
        rows = [row for row in run(runs / f"warm-{seed}", [f"seed={seed}"]) if "test/accuracy" in row]
        left.plot([(row["step"] + 1) / 240 for row in rows], [row["test/accuracy"] for row in rows], label=f"seed {seed}")
    left.axhline(0.98, color="gray", linestyle="--", linewidth=1, label="0.98")
    left.set(xlabel="epoch", ylabel="test accuracy", ylim=(0.94, 0.985))
    for axes, prefix in zip(others, ("", "max_norm 0.9: "), strict=True):
        epochs: list[list[Row]] = []
        for name, style in (("warm", "-"), ("cold", "--")):
            place, overrides = VARIANTS[prefix + name]
            rows = run(runs / place, ["seed=0", *overrides])
            epochs = [rows[start : start + 240] for start in range(0, len(rows), 240)]
            for color, kind in (("C0", "inner"), ("C1", "adjoint")):
                values = [mean(epoch, f"{kind}/iterations_mean") for epoch in epochs]
                axes.plot(range(1, len(values) + 1), values, style, color=color, marker=".", label=f"{kind}, {name}")
        label = "iterations, mean over the rows\n(a warm adjoint: one product more)"
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None), title=prefix.removesuffix(": ") or "max_norm 0.5")
        axes.set_xticks(range(1, len(epochs) + 1))
    for axes in (left, *others):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(HERE / "equilibrium_mnist_full.png", dpi=110)


STUDIES = {"selection": selection, "final": final}


def main() -> None:
    """Measure the studies named on the command line, by default both, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="default: both")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "equilibrium_full")
    options = parser.parse_args()
    import torch

    path, runs = HERE / "results.json", options.runs.resolve()
    results: Row = json.loads(path.read_text()) if path.exists() else {}
    for name in options.studies or STUDIES:
        results[name] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "found": STUDIES[name](runs)}
        path.write_text(json.dumps(results, indent=2) + "\n")
    if "final" in results:
        draw(runs)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
