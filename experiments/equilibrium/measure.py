"""Run the equilibrium studies, several seeds each, and write their tables and figures beside this file.

    python experiments/equilibrium/measure.py [digits mnist projected regularised fashion] [--runs DIR]

Every run is one ``hyperopt`` command (printed). A finished run under ``--runs`` is not run again; a stopped one continues.
"""

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

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# Step, logged after the update: outer loss and accuracy on the fitted rows, as published for the notebook's study.
PUBLISHED = {
    0: (2.302, 0.0902),
    20: (2.194, 0.3302),
    40: (2.092, 0.5572),
    60: (1.992, 0.6836),
    80: (1.893, 0.7336),
    100: (1.795, 0.7614),
    200: (1.344, 0.8158),
    300: (1.022, 0.8404),
    400: (0.821, 0.8580),
    480: (0.716, 0.8718),
}
REGULARISERS = (("0.0003", "0.99"), ("0.001", "0.9"), ("0.002", "0.8"))  # strength of L2, and largest norm of A
Row = dict[str, Any]


def run(directory: Path, overrides: Sequence[str]) -> list[Row]:
    """Run ``hyperopt`` with ``overrides`` in ``directory``, unless it is done, and return its rows."""
    summary = directory / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
        command = [*overrides, f"hydra.run.dir={directory}", "resume=auto", "trainer.progress=false"]
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
    return [row for row in rows if "test/accuracy" in row]


def at(rows: list[Row], step: int) -> Row:
    """The row of one step."""
    return next(row for row in rows if row["step"] == step)


def best(rows: list[Row]) -> Row:
    """The evaluated row of the least validation loss: what early stopping keeps."""
    return min(evaluated(rows), key=lambda row: row["val/loss"])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and values."""
    return {"mean": statistics.fmean(values), "values": list(values)}


def over_seeds(all_rows: list[list[Row]], name: str, step: int) -> dict[str, Any]:
    """One quantity at one step (-1: the last), mean and values over the seeds."""
    return spread([(rows[-1] if step < 0 else at(rows, step))[name] for rows in all_rows])


def digits(runs: Path) -> Row:
    """The default job on five seeds."""
    all_rows = {seed: run(runs / f"digits-{seed}", [f"seed={seed}"]) for seed in range(5)}
    return {
        "last": spread([rows[-1]["test/accuracy"] for rows in all_rows.values()]),
        "least val/loss": spread([best(rows)["test/accuracy"] for rows in all_rows.values()]),
        "seconds": spread([seconds(runs / f"digits-{seed}") for seed in all_rows]),
    }


def mnist(runs: Path) -> Row:
    """The published study on three seeds, against its curve."""
    all_rows = [run(runs / f"mnist-{seed}", ["experiment=equilibrium_mnist", f"seed={seed}"]) for seed in range(3)]
    curve = []
    for step, (loss, accuracy) in PUBLISHED.items():
        ours = {name: statistics.fmean(at(rows, step)[name] for rows in all_rows) for name in ("outer/loss", "outer/accuracy")}
        curve.append({"step": step, "published_loss": loss, "published_accuracy": accuracy, **ours})
    late = [row for row in curve if row["step"] >= 100]

    def largest(name: str) -> float:
        return max(abs(row[f"outer/{name}"] - row[f"published_{name}"]) for row in late)

    return {
        "curve": curve,
        "largest_loss_difference_from_100": largest("loss"),
        "largest_accuracy_difference_from_100": largest("accuracy"),
        "last": {name: over_seeds(all_rows, name, -1) for name in ("outer/accuracy", "val/accuracy", "test/accuracy")},
        "seconds": spread([seconds(runs / f"mnist-{seed}") for seed in range(3)]),
    }


def projected(runs: Path) -> Row:
    """The free matrix, projected, on three seeds."""
    all_rows = [run(runs / f"projected-{seed}", ["experiment=equilibrium_mnist_projected", f"seed={seed}"]) for seed in range(3)]
    return {
        "steps": {
            str(step): {name: over_seeds(all_rows, name, step) for name in ("test/accuracy", "val/accuracy", "val/loss")}
            for step in (40, 60, 100, 360)
        },
        "least val/loss": {
            "step": [best(rows)["step"] for rows in all_rows],
            "test/accuracy": spread([best(rows)["test/accuracy"] for rows in all_rows]),
        },
        "seconds": spread([seconds(runs / f"projected-{seed}") for seed in range(3)]),
    }


def regularised(runs: Path) -> Row:
    """The same with a strength of L2, a radius of A and a stopping step chosen on the validation half, seed by seed."""
    table = []
    chosen: dict[str, list[Row]] = {"val/loss": [], "val/accuracy": []}
    for seed in range(3):
        base = ["experiment=equilibrium_mnist_projected", f"seed={seed}"]
        found = [("0", "0.99", run(runs / f"projected-{seed}", base))]
        for strength, radius in REGULARISERS:
            overrides = [*base, f"task.cell.max_norm={radius}"]
            overrides += [f"task.l2.{group}={strength}" for group in ("A", "B", "classifier")]
            found.append((strength, radius, run(runs / f"l2-{strength}-{radius}-{seed}", [*overrides, "trainer.max_steps=241"])))
        for by, of_seed in chosen.items():
            sign = 1 if by == "val/loss" else -1
            candidates = []
            for strength, radius, rows in found:
                row = min(evaluated(rows), key=lambda row: (sign * row[by], row["val/loss"]))
                measured = {k: row[k] for k in ("step", "val/loss", "val/accuracy", "test/accuracy")}
                candidates.append({"seed": seed, "by": by, "l2": strength, "max_norm": radius, **measured})
            table += candidates
            of_seed.append(min(candidates, key=lambda row: (sign * row[by], row["val/loss"])))
    accuracy = {by: spread([row["test/accuracy"] for row in rows]) for by, rows in chosen.items()}
    return {"candidates": table, "chosen": chosen, "test/accuracy": accuracy}


# normalize, optimizer.lr, each task.l2 strength, trainer.max_steps: what was compared by val/loss on seed 0.
FASHION_CANDIDATES = (
    *(("unit", lr, "0", 241) for lr in ("0.05", "0.1", "0.2")),
    *(("standard", lr, "0", 241) for lr in ("0.05", "0.1", "0.2")),
    *(("standard", "0.1", l2, 201) for l2 in ("0.001", "0.003", "0.01")),
)


def fashion(runs: Path) -> Row:
    """The projected study on Fashion-MNIST: candidates on seed 0, the chosen settings on three, logistic regression beside."""
    names = [f"{split}/{what}" for split in ("outer", "val", "test") for what in ("accuracy", "loss")]
    candidates = []
    for normalize, lr, l2, steps in FASHION_CANDIDATES:
        settings = [f"dataset.normalize={normalize}", f"optimizer.lr={lr}"]
        settings += [f"trainer.max_steps={steps}", "trainer.eval_every=20"]
        settings += [f"task.l2.{group}={l2}" for group in ("A", "B", "classifier")]
        directory = runs / f"fashion-{normalize}-{lr}-{l2}"
        row = best(run(directory, ["experiment=equilibrium_fashion", "seed=0", *settings]))
        found = {name: row[name] for name in ("step", "val/loss", "val/accuracy")}
        candidates.append({"normalize": normalize, "lr": lr, "l2": l2, **found})
    all_rows = [run(runs / f"fashion-{seed}", ["experiment=equilibrium_fashion", f"seed={seed}"]) for seed in range(3)]
    regressions = [logistic_regression(seed) for seed in range(3)]
    return {
        "candidates": candidates,
        "least val/loss": {name: spread([best(rows)[name] for rows in all_rows]) for name in ("step", *names)},
        "last": {name: spread([rows[-1][name] for rows in all_rows]) for name in ("step", *names)},
        "seconds": spread([seconds(runs / f"fashion-{seed}") for seed in range(3)]),
        "logistic regression": {name: spread([row[name] for row in regressions]) for name in ("C", "seconds", *names)},
    }


def logistic_regression(seed: int) -> Row:
    """scikit-learn's logistic regression on the rows of one seed of `fashion`, C chosen by the validation loss."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    from hyperopt.data.files import default_root
    from hyperopt.data.mnist import FashionMNIST

    splits = FashionMNIST(train=5000, val=5000, seed=seed, normalize="standard", root=str(REPOSITORY / default_root())).load()
    parts = {"outer": splits.train, "val": splits.val, "test": splits.test}
    candidates = []
    start = time.perf_counter()
    for strength in (0.003, 0.01, 0.03, 0.1):
        model = LogisticRegression(C=strength, max_iter=1000).fit(splits.train.x.numpy(), splits.train.y.numpy())
        row: Row = {"C": strength}
        for name, rows in parts.items():
            chances = model.predict_proba(rows.x.numpy())
            row[f"{name}/loss"] = float(log_loss(rows.y.numpy(), chances, labels=model.classes_))
            row[f"{name}/accuracy"] = float((chances.argmax(1) == rows.y.numpy()).mean())
        candidates.append(row)
    return {**min(candidates, key=lambda row: row["val/loss"]), "seconds": time.perf_counter() - start}


# Of each study's figure: axes by axes, the curves as (quantity, label, style, colour).
CURVES = {
    "mnist": [
        [("outer/loss", "fitted", "-", "C0"), ("test/loss", "test", "--", "C1")],
        [("outer/accuracy", "fitted", "-", "C0"), ("test/accuracy", "test", "--", "C1")],
    ],
    "projected": [
        [("outer/loss", "fitted", "-", "C0"), ("val/loss", "validation", "--", "C2")],
        [("test/accuracy", "test", "-", "C1"), ("val/accuracy", "validation", "--", "C2")],
    ],
}


def draw(runs: Path, study: str) -> None:
    """Write the figure of a study: loss and accuracy against the outer step, one curve a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, curves, name in zip(figure.subplots(1, 2), CURVES[study], ("loss", "accuracy"), strict=True):
        for seed in range(3):
            rows = [json.loads(line) for line in (runs / f"{study}-{seed}" / "metrics.jsonl").read_text().splitlines()]
            for key, label, style, colour in curves:
                points = [(row["step"], row[key]) for row in evaluated(rows)]
                axes.plot(*zip(*points, strict=True), style, color=colour, alpha=0.7, label=None if seed else label)
        if study == "mnist":
            axes.plot(list(PUBLISHED), [pair[name == "accuracy"] for pair in PUBLISHED.values()], "k.", label="published, fitted")
        elif name == "loss":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0.85, 0.96)
        axes.set(xlabel="outer step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(HERE / f"equilibrium_{study}.png", dpi=110)


STUDIES = {"digits": digits, "mnist": mnist, "projected": projected, "regularised": regularised, "fashion": fashion}


def main() -> None:
    """Measure the studies named on the command line, by default all, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="default: all")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "equilibrium")
    options = parser.parse_args()
    import torch

    path = HERE / "results.json"
    results: Row = json.loads(path.read_text()) if path.exists() else {}
    for name in options.studies or STUDIES:
        facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        results[name] = {**facts, **STUDIES[name](options.runs.resolve())}
        path.write_text(json.dumps(results, indent=2) + "\n")
        if name in CURVES:
            draw(options.runs.resolve(), name)
    print(json.dumps({name: results[name] for name in options.studies or STUDIES}, indent=2))


if __name__ == "__main__":
    main()
