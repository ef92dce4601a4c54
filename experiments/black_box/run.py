"""Random search and TPE beside hypergradients, at as many gradients of the inner loss.

    pip install -e ".[bench]"
    python experiments/black_box/run.py [--seeds 0 1 2] [--problems "ridge, 1" ...] [--methods "random search" TPE ...]

Every method of a problem has the same rows, the same first hyperparameters (the first trial of a search is where the others
start), and the same budget. A trial of a search trains the model at the hyperparameters that it draws, from where the last
trial has left the weights, by the inner solver of the implicit method and to its tolerance. At points evenly spaced in the
logarithm of the cost the model at the hyperparameters found so far (of a search: its best trial) is trained to a tight
tolerance, which is not counted: that gives the losses that are shown. Cells that are in results.json are not done again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import PROBLEMS, Problem, Row, built, get, price, put, reference, shared
from report import report

from hyperopt import SolveError
from hyperopt.tasks.base import HypergradientError
from hyperopt.tasks.bilevel import BilevelTask

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
EDGE = 1e-3  # how near to the end of an interval a search goes, as a part of it: the space is open


class Curve:
    """What has been found after what cost: measured where the cost crosses a point of a grid.

    Args:
        task: the problem.
        problem: its settings.
    """

    def __init__(self, task: BilevelTask, problem: Problem) -> None:
        """Measure the start."""
        self.task, self.problem = task, problem
        self.grid = [float(c) for c in np.geomspace(10, problem.budget, problem.points)]
        self.cost, self.rows = 0.0, [{"cost": 0.0, **reference(task, problem, get(task))}]

    def spend(self, cost: float) -> bool:
        """Add to the cost; whether that was within the budget."""
        self.cost += cost
        return self.cost <= self.problem.budget

    def see(self, lam: torch.Tensor) -> None:
        """Measure, if a point of the grid has been crossed."""
        crossed = [c for c in self.grid if c <= self.cost]
        if crossed:
            self.grid = self.grid[len(crossed) :]
            self.rows.append({"cost": self.cost, **reference(self.task, self.problem, lam)})

    def end(self, lam: torch.Tensor, cost: float) -> list[Row]:
        """Measure what was found within the budget, at the cost of that."""
        if self.rows[-1]["cost"] < cost:
            self.rows.append({"cost": cost, **reference(self.task, self.problem, lam)})
        return self.rows


def descend(cell: Row, problem: Problem, method: str) -> Row:
    """Outer steps by hypergradients until the budget is spent, or a step is refused: the last good state then stands."""
    task, optimizer = cell["task"], cell["optimizer"]
    curve, steps, last, stopped = Curve(task, problem), 0, 0.0, ""
    start, measuring = time.process_time(), 0.0
    while True:
        before = get(task)
        try:
            record = task.step(optimizer, lambda gradients: None)
        except (SolveError, HypergradientError) as error:
            stopped = str(error)
            break
        if not curve.spend(price(record.metrics, method == "unrolled")):
            break
        steps, last = steps + 1, curve.cost
        paused = time.process_time()
        curve.see(get(task))
        measuring += time.process_time() - paused
    seconds = time.process_time() - start - measuring
    return {"curve": curve.end(before, last), "tries": steps, "seconds": seconds, "stopped": stopped}


def search(cell: Row, problem: Problem, ask: Callable[[], torch.Tensor], tell: Callable[[float], None]) -> Row:
    """Trials until the budget is spent; the first is the start of the other methods."""
    task = cell["task"]
    assert task.inner is not None
    curve, trials, best, last = Curve(task, problem), 0, (math.inf, get(task)), 0.0
    start, measuring, asking = time.process_time(), 0.0, 0.0
    while True:
        paused = time.process_time()
        lam = ask() if trials else get(task)
        asking += time.process_time() - paused
        put(task, lam)
        spent = task.inner.solve(task.built.problem, task.hyper.read(), task.bilevel.state).evaluations
        if not curve.spend(spent + 1):
            break
        with torch.no_grad():
            loss = float(task.built.problem.outer(task.bilevel.w, task.hyper.read(), task.built.problem.outer_batches.draw()))
        trials, last = trials + 1, curve.cost
        best = min(best, (loss, lam), key=lambda pair: pair[0])
        paused = time.process_time()
        if trials > 1:
            tell(loss)
        asking += time.process_time() - paused
        paused = time.process_time()
        curve.see(best[1])
        measuring += time.process_time() - paused
    seconds = time.process_time() - start - measuring
    return {"curve": curve.end(best[1], last), "tries": trials, "seconds": seconds, "asking": asking}


def random_search(problem: Problem, size: int, seed: int) -> tuple[Callable[[], torch.Tensor], Callable[[float], None]]:
    """Independent uniform draws."""
    random, (low, high) = np.random.RandomState(seed), bounds(problem)
    return lambda: unit(problem, torch.from_numpy(random.uniform(low, high, size))), lambda loss: None


def tpe(problem: Problem, size: int, seed: int) -> tuple[Callable[[], torch.Tensor], Callable[[float], None]]:
    """Optuna's TPE, ten random trials first (its default)."""
    study, (low, high), asked = shared.tpe(seed, startup=10), bounds(problem), []

    def ask() -> torch.Tensor:
        asked.append(study.ask())
        return unit(problem, torch.tensor([asked[-1].suggest_float(str(k), low, high) for k in range(size)], dtype=torch.double))

    return ask, lambda loss: study.tell(asked[-1], loss) and None


def bounds(problem: Problem) -> tuple[float, float]:
    """Of the search, in the logarithm where it is uniform in that."""
    low, high = problem.low, problem.high
    if problem.log:
        return math.log(low), math.log(high)
    return low + EDGE * (high - low), high - EDGE * (high - low)


def unit(problem: Problem, drawn: torch.Tensor) -> torch.Tensor:
    """Back from the logarithm."""
    return drawn.exp() if problem.log else drawn


def measured(problem: Problem, method: str, seed: int) -> Row:
    """One cell of the table."""
    cell: dict[str, Any] = built(problem, method, seed)
    if method in problem.methods:
        return descend(cell, problem, method)
    way = {"random search": random_search, "TPE": tpe}[method]
    return search(cell, problem, *way(problem, get(cell["task"]).numel(), seed))


def main() -> None:
    """Measure what is missing; write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--methods", nargs="*")
    options = parser.parse_args()
    for name in options.problems:
        problem = PROBLEMS[name]
        for seed in options.seeds:
            for method in options.methods or (*problem.black_box, *problem.methods):
                key = f"{name} | {method} | {seed}"
                if key in shared.load(RESULTS):
                    continue
                found = measured(problem, method, seed)
                last = found["curve"][-1]
                print(key, found["tries"], f"{found['seconds']:.1f} s", {k: round(v, 5) for k, v in last.items()}, flush=True)
                shared.save(RESULTS, key, {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **found})
    report(shared.load(RESULTS), PROBLEMS)


if __name__ == "__main__":
    main()
