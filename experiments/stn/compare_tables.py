"""The table of COMPARISON.md and its figures, from compare.json: ``python experiments/stn/compare_tables.py``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import matplotlib
import numpy as np
from tables import HERE, shared, write_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = shared.Row
TITLES = {"ridge": "ridge", "mlp": "perceptron, MNIST", "cnn": "convolutions, Fashion-MNIST", "lstm": "LSTM, characters"}
WAYS = ("untuned", "random search", "TPE", "implicit", "first STN", "Delta-STN", "centred STN")


def cells(results: Row, problem: str, way: str) -> list[Row]:
    """The seeds of one way."""
    return [cell for key, cell in sorted(results.items()) if key.startswith(f"{problem} | {way} | ")]


def told(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def at(cell: Row, seconds: float, key: str) -> float:
    """What had been kept by then; NaN before the first point."""
    return ([float("nan")] + [row[key] for row in cell["curve"] if row["cpu"] <= seconds])[-1]


def tabulate(results: Row) -> None:
    """Write the table and the figures."""
    lines = [
        "| problem | way | seeds | validation loss | test loss | test accuracy | updates of weights | runs, rounds or steps |",
        "|---" * 8 + "|",
    ]
    for problem, title in TITLES.items():
        for way in WAYS:
            if found := cells(results, problem, way):
                last = [cell["curve"][-1] for cell in found]
                accuracy = told([row["test/accuracy"] for row in last]) if "test/accuracy" in last[0] else ""
                losses = [told([row[f"{name}/loss"] for row in last]) for name in ("val", "test")]
                counts = [f"{statistics.fmean(cell[name] for cell in found):.0f}" for name in ("updates", "tries")]
                lines.append(f"| {title} | {way} | {len(found)} | {' | '.join([*losses, accuracy, *counts])} |")
        if any(best := [cell["best"] for cell in cells(results, problem, "untuned") if cell["best"] is not None]):
            lines.append(f"| {title} | the best strength, in closed form | {len(best)} | {told(best)} | | | | |")
    write_table("comparison", lines, "COMPARISON.md")
    curves(results)
    schedules(results)


def curves(results: Row) -> None:
    """Validation and test loss of what is kept, over CPU seconds: means of the seeds."""
    figure, axes = plt.subplots(len(TITLES), 2, figsize=(10, 3 * len(TITLES)), layout="constrained")
    for row, (problem, title) in zip(axes, TITLES.items(), strict=True):
        for colour, way in enumerate(WAYS):
            if not (found := cells(results, problem, way)):
                continue
            seconds = np.geomspace(0.05, 1, 40) * max(cell["curve"][-1]["cpu"] for cell in found)
            for axis, key in zip(row, ("val/loss", "test/loss"), strict=True):
                values = np.array([[at(cell, each, key) for each in seconds] for cell in found])
                axis.step(seconds, values.mean(0), where="post", color=f"C{colour}", label=way, lw=1.4)
                axis.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel=key.replace("/", " "))
                axis.set_title(f"{title} ({len(found)} seeds)", fontsize=10)
                shared.plain_ticks(axis, "x", "y")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    figure.savefig(HERE / "compare_losses.png", dpi=110)
    plt.close(figure)


def schedules(results: Row) -> None:
    """Every hyperparameter over CPU seconds, seed by seed, of the ways that move them during the training."""
    problems = [problem for problem in TITLES if cells(results, problem, "Delta-STN")]
    names = [cells(results, problem, "Delta-STN")[0]["names"] for problem in problems]
    height = -(-sum(map(len, names)) // 4)
    figure, axes = plt.subplots(height, 4, figsize=(10, 2.2 * height), layout="constrained")
    places = iter(axes.flat)
    for problem, each in zip(problems, names, strict=True):
        line = [next(places) for _ in each]
        for way in ("implicit", "first STN", "Delta-STN", "centred STN"):
            for number, cell in enumerate(cells(results, problem, way)):
                trace = np.array(cell["trace"])
                for place in range(len(cell["names"]) if trace.size else 0):
                    label = way if number == 0 else None
                    line[place].plot(trace[:, 0], trace[:, place + 1], color=f"C{WAYS.index(way)}", lw=0.8, label=label)
        for axis, name in zip(line, each, strict=True):
            axis.set_title(f"{TITLES[problem].split(',')[0]}\n{name}", fontsize=9)
            axis.set_xlabel("CPU seconds", fontsize=9)
            axis.tick_params(labelsize=8, which="both")
            if name in ("decay", "weight_decay", "activation", "temporal_activation"):
                axis.set_yscale("log")
                shared.plain_ticks(axis)
    for axis in places:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(HERE / "compare_schedules.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tabulate(shared.load(HERE / "compare.json"))
