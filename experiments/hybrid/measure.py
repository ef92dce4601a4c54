"""Optuna alone, hypergradients alone, and both, at the same CPU seconds.

    pip install -e ".[optuna]"
    python experiments/hybrid/measure.py [--seeds 0 1 2 3 4] [--problems strengths decays] [--budget 10]

Every way has the same rows, starts at the same structure and hyperparameters, and is judged by the best validation loss that it
has seen; the test loss is that of the same evaluation. Cells that are in results.json are not done again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from problems import PROBLEMS, Loaded, Problem, Sizes, Structure, digits
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

from hyperopt.app.nonfinite import HypergradientCheck
from hyperopt.core.policy import SolveError
from hyperopt.tasks.base import HypergradientError
from hyperopt.tasks.bilevel import BilevelTask

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent

BUDGET = 10.0  # CPU seconds
LOOK = 3  # outer steps between two evaluations
STARTUP = 4  # trials before TPE has a model, the default among them
Values = dict[str, Tensor]


class Curve(shared.Clock):
    """The best evaluation so far, at points of time.

    Args:
        budget: CPU seconds.
    """

    def __init__(self, budget: float) -> None:
        """Start the clock."""
        super().__init__(budget)
        self.best, self.rows = math.inf, list[dict[str, float]]()

    def see(self, task: BilevelTask) -> float:
        """Evaluate a task, and keep the result if it is the best in time."""
        try:
            found = task.evaluate()
        except SolveError:  # the training diverged at this structure
            return math.inf
        loss = found["val/loss"]
        if loss < self.best and not (self.over and self.rows):
            self.best = loss
            self.rows.append({"cpu": self.seconds, **{k: found[k] for k in ("val/loss", "test/loss", "test/accuracy")}})
        return loss if math.isfinite(loss) else math.inf


def moved(task: BilevelTask, lr: float, steps: float, curve: Curve) -> tuple[float, Values, int]:
    """Move the hyperparameters of a task by hypergradients; return best loss, its hyperparameters, and the steps made."""
    optimizer = torch.optim.Adam([each for group in task.groups().values() for each in group], lr=lr)
    check = HypergradientCheck(None)
    best, values, made = curve.see(task), task.values(), 0
    while made < steps and not curve.over:
        try:
            check.begin(made)
            task.step(optimizer, check)
        except (HypergradientError, SolveError):  # the training or a solve diverged at this structure
            break
        made += 1
        if made % LOOK == 0 or made == steps:
            loss = curve.see(task)
            best, values = min((best, values), (loss, task.values()), key=lambda each: each[0])
    return best, values, made


def optuna_alone(problem: Problem, data: Loaded, seed: int, curve: Curve) -> shared.Row:
    """TPE over structure and hyperparameters; each trial is one training."""
    study, first, trials = shared.tpe(seed, STARTUP), problem.start(problem.default, data, seed).values(), 0
    study.enqueue_trial({**problem.default, **dict.fromkeys(_names(first), float(next(iter(first.values())).flatten()[0]))})
    while not curve.over:
        trial = study.ask()
        task = problem.start(problem.structure(trial), data, seed)
        values = task.values()
        asked = {name: trial.suggest_float(name, problem.low, problem.high, log=True) for name in _names(values)}
        numbers = iter(asked.values())
        task.set_values(
            {name: torch.tensor([next(numbers) for _ in range(v.numel())]).view(v.shape) for name, v in values.items()}
        )
        loss = curve.see(task)
        study.tell(trial, loss if math.isfinite(loss) else 1e6)
        trials += 1
    return {"trials": trials, "outer": 0, "found": dict(study.best_params) if len(study.best_params) < 20 else {}}


def _names(values: Values) -> list[str]:
    """A name for each number of the hyperparameters."""
    return [f"{name}.{k}" for name, value in values.items() for k in range(value.numel())]


def hypergradients_alone(problem: Problem, data: Loaded, seed: int, curve: Curve) -> shared.Row:
    """One run at the default structure."""
    _, _, made = moved(problem.start(problem.default, data, seed), problem.lr, math.inf, curve)
    return {"trials": 1, "outer": made, "found": dict(problem.default)}


def both(problem: Problem, data: Loaded, seed: int, curve: Curve, warm: bool = True) -> shared.Row:
    """TPE over the structure and the outer step size; each trial is a short run by hypergradients, from the best one's values."""
    study, outer, best, best_values, found = shared.tpe(seed, STARTUP), [], math.inf, Values(), dict[str, Any]()
    study.enqueue_trial({**problem.default, "outer_lr": problem.lr})
    while not curve.over:
        trial = study.ask()
        structure: Structure = problem.structure(trial)
        task = problem.start(structure, data, seed)
        if warm:
            task.set_values({k: v for k, v in best_values.items() if k in task.values() and task.values()[k].shape == v.shape})
        loss, values, made = moved(task, trial.suggest_float("outer_lr", 0.03, 1.0, log=True), problem.outer, curve)
        study.tell(trial, loss if math.isfinite(loss) else 1e6)
        outer.append(made)
        if loss < best:
            best, best_values, found = loss, values, dict(structure)
    return {"trials": len(outer), "outer": sum(outer), "found": found}


def both_cold(problem: Problem, data: Loaded, seed: int, curve: Curve) -> shared.Row:
    """As ``both``, but each trial starts from the defaults: what the warm start is worth."""
    return both(problem, data, seed, curve, warm=False)


WAYS = {
    "Optuna alone": optuna_alone,
    "hypergradients alone": hypergradients_alone,
    "both": both,
    "both, without warm start": both_cold,
}
COLOURS = dict(zip(WAYS, ("C3", "C0", "C2", "C1"), strict=True))


def measured(name: str, way: str, seed: int, budget: float, sizes: Sizes) -> shared.Row:
    """One cell of the table."""
    torch.manual_seed(seed)
    problem = PROBLEMS[name]
    data = digits(sizes, seed, min(problem.noise, sizes.noise))
    curve = Curve(budget)
    found = WAYS[way](problem, data, seed, curve)
    return {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "budget": budget, **found, "curve": curve.rows}


def at(cell: shared.Row, seconds: float, key: str) -> float:
    """What the best evaluation by then gave."""
    return next((row[key] for row in reversed(cell["curve"]) if row["cpu"] <= seconds), math.nan)


def told(each: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(each):.4f} ± {statistics.stdev(each) if len(each) > 1 else 0.0:.4f}"


def cells_of(results: shared.Row, name: str, way: str) -> list[shared.Row]:
    """The cells of all seeds."""
    return [cell for key, cell in results.items() if key.startswith(f"{name} | {way} | ")]


def tabulate(results: shared.Row, page: Path) -> None:
    """The tables of the page."""
    for name in PROBLEMS:
        lines = ["| way | seeds | validation loss | at 10 %, 30 % | test loss | test accuracy | trials | outer steps |"]
        lines.append("|---" * 8 + "|")
        for way in WAYS:
            if cells := cells_of(results, name, way):
                last = {
                    key: told([cell["curve"][-1][key] for cell in cells]) for key in ("val/loss", "test/loss", "test/accuracy")
                }
                early = ", ".join(
                    f"{statistics.fmean(at(cell, share * cell['budget'], 'val/loss') for cell in cells):.4f}"
                    for share in (0.1, 0.3)
                )
                counts = " | ".join(f"{statistics.fmean(cell[key] for cell in cells):.0f}" for key in ("trials", "outer"))
                shown = f"{last['val/loss']} | {early} | {last['test/loss']} | {last['test/accuracy']}"
                lines.append(f"| {way} | {len(cells)} | {shown} | {counts} |")
        shared.write_table(page, name, lines)


def draw(results: shared.Row, path: Path) -> None:
    """The best validation loss over CPU seconds: means of the seeds, and their standard deviations."""
    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(9, 3.4), layout="constrained")
    for axis, name in zip(axes, PROBLEMS, strict=True):
        for way, colour in COLOURS.items():
            if not (cells := cells_of(results, name, way)):
                continue
            grid = np.geomspace(cells[0]["budget"] / 40, cells[0]["budget"], 60)
            values = np.array([[at(cell, seconds, "val/loss") for seconds in grid] for cell in cells])
            mean, deviation = values.mean(0), values.std(0)
            axis.step(grid, mean, where="post", color=colour, label=way, lw=1.6)
            axis.fill_between(grid, mean - deviation, mean + deviation, step="post", color=colour, alpha=0.12, lw=0)
        axis.set(title=name, xlabel="CPU seconds of one thread", ylabel="best validation loss", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Measure what is missing; write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--problems", nargs="*", default=[*PROBLEMS], choices=[*PROBLEMS])
    parser.add_argument("--ways", nargs="*", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--budget", type=float, default=BUDGET, help="CPU seconds of each way")
    parser.add_argument("--small", action="store_true", help="few rows, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json, README.md and curves.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(60, 60, 60, 8) if options.small else Sizes()
    path = options.out / "results.json"
    for name in options.problems:  # what the first use of torch and Optuna imports takes seconds that belong to no cell
        measured(name, "both", 0, 0.2, Sizes(60, 60, 60, 8))
    for seed in options.seeds:
        for name in options.problems:
            for way in options.ways:
                key = f"{name} | {way} | {seed}"
                if key not in shared.load(path):
                    found = measured(name, way, seed, options.budget, sizes)
                    shared.save(path, key, found)
                    print(
                        key, found["trials"], found["outer"], {k: round(v, 4) for k, v in found["curve"][-1].items()}, flush=True
                    )
    results = shared.load(path)
    tabulate(results, options.out / "README.md")
    draw(results, options.out / "curves.png")


if __name__ == "__main__":
    main()
