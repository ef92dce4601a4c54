"""The table and the figure of results.json: see run.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from problems import Problem, Row, shared

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {"random search": "C7", "TPE": "C3", "implicit, CG": "C0", "unrolled": "C1", "SOBA": "C2", "V-PBGD": "C4"}
SHARES = (0.1, 0.3, 1.0)  # of the budget


def report(results: Row, problems: Mapping[str, Problem]) -> None:
    """Write both."""
    lines = [
        "| problem, hyperparameters | method | validation loss at 10 % | 30 % | 100 % of the budget | each seed | test loss "
        "| steps or trials | CPU s |",
        "|---" * 9 + "|",
    ]
    height = -(-(len(problems) + 1) // 3)  # the legend has a place of its own
    figure, axes = plt.subplots(height, 3, figsize=(10, 3 * height), squeeze=False, layout="constrained")
    for axis, (name, problem) in zip(axes.flat, problems.items(), strict=False):
        for method in COLOURS:
            cells = [found for key, found in results.items() if key.startswith(f"{name} | {method} |")]
            if cells:
                lines.append(line(name, method, cells, problem.budget))
                draw(axis, cells, method, problem.budget)
        axis.set(xlabel="gradients of the inner loss", ylabel="validation loss", xscale="log")
        axis.set_title(f"{name} (budget {problem.budget:,})", fontsize=10)
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[len(problems)].legend(handles, labels, loc="center")
    figure.suptitle("Validation loss against gradients that were spent, mean of the seeds; problem and number of hyperparameters")
    figure.savefig(HERE / "cost.png", dpi=110)
    plt.close(figure)
    shared.write_table(HERE / "README.md", "cost", lines)


def at(cell: Row, cost: float, key: str) -> float:
    """What had been found when so much was spent: the last point of the curve that cost no more."""
    return [row for row in cell["curve"] if row["cost"] <= cost][-1][key]


def line(name: str, method: str, cells: list[Row], budget: float) -> str:
    """One line of the table; the mean of the seeds."""
    losses = [f"{np.mean([at(cell, share * budget, 'val/loss') for cell in cells]):.4f}" for share in SHARES]
    each = ", ".join(f"{at(cell, budget, 'val/loss'):.4f}" for cell in cells)
    test = f"{np.mean([at(cell, budget, 'test/loss') for cell in cells]):.4f}"
    tries, seconds = (np.mean([cell[key] for cell in cells]) for key in ("tries", "seconds"))
    stopped = sum(bool(cell.get("stopped")) for cell in cells)
    note = f" (diverged on {stopped} of {len(cells)})" if stopped else ""
    return f"| {name} | {method}{note} | {' | '.join(losses)} | {each} | {test} | {tries:.0f} | {seconds:.1f} |"


def draw(axis: plt.Axes, cells: list[Row], method: str, budget: float) -> None:
    """One curve: the mean of what each seed had found, as a staircase."""
    costs = np.geomspace(10, budget, 60)
    values = np.array([[at(cell, cost, "val/loss") for cost in costs] for cell in cells])
    axis.step(costs, values.mean(0), where="post", label=method, color=COLOURS[method], lw=1.6)
