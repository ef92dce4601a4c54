"""Convergence of the stochastic methods on a quadratic of finite sums: measured exponents beside those of theory.

    L(w, lam) = mean_i (x_i w - y_i - p_i lam)^2 / 2 + |w|^2 / 4,        E(w, lam) = mean_j (x'_j w - y'_j)^2 / 2 + |lam|^2 / 4

in float64, 64 rows each, 5 weights and 3 hyperparameters. ``h(lam) = E(w(lam), lam)`` is a strongly convex quadratic, so that
``h(lam) - min h`` is known in closed form. Writes results.json and rate.png:

    python experiments/stochastic/rate.py
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

import hyperopt
from hyperopt import F2SA, SABA, SOBA, VPBGD, Bilevel, BilevelProblem, Minibatches, StocBiO
from hyperopt.bilevel.problem import NoBatches

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
ROWS, WEIGHTS, HYPER, BATCH, RIDGE = 64, 5, 3, 8, 0.5
SEEDS = (0, 1, 2)
DOUBLE = torch.float64


class Independent(NoBatches):
    """Batches drawn with replacement, which is what the theory of SOBA is about; those of the library are epochs."""

    def __init__(self, rows: tuple[Tensor, ...], size: int, seed: int) -> None:
        """Stand before the first batch."""
        self.rows, self.size, self.generator = rows, size, torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, ...]:
        """The next batch."""
        index = torch.randint(len(self.rows[0]), (self.size,), generator=self.generator)
        return tuple(part[index] for part in self.rows)


class Quadratic:
    """The problem of a seed, with its outer objective in closed form."""

    def __init__(self, seed: int) -> None:
        """Draw the rows."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=DOUBLE)

        self.x, self.y, self.p = normal(ROWS, WEIGHTS), normal(ROWS), normal(ROWS, HYPER)
        self.xv, self.yv = normal(ROWS, WEIGHTS), normal(ROWS)
        hessian = self.x.T @ self.x / ROWS + RIDGE * torch.eye(WEIGHTS, dtype=DOUBLE)
        slope, at_zero = (torch.linalg.solve(hessian, self.x.T @ v / ROWS) for v in (self.p, self.y))
        fitted = self.xv @ slope  # the validation outputs are fitted @ lam + xv @ at_zero
        self.curvature = fitted.T @ fitted / ROWS + RIDGE * torch.eye(HYPER, dtype=DOUBLE)
        self.best = torch.linalg.solve(self.curvature, fitted.T @ (self.yv - self.xv @ at_zero) / ROWS)

    def gap(self, lam: Tensor) -> float:
        """``h(lam) - min h``."""
        away = lam - self.best
        return float(away @ self.curvature @ away) / 2

    def problem(self, size: int | None, seed: int, replacement: bool) -> BilevelProblem:
        """The two losses, on batches of ``size``."""

        def inner(w: Tensor, lam: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
            x, y, p = batch
            return (x @ w - y - p @ lam).square().mean() / 2 + RIDGE * w.square().sum() / 2

        def outer(w: Tensor, lam: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
            x, y = batch
            return (x @ w - y).square().mean() / 2 + RIDGE * lam.square().sum() / 2

        data = (self.x, self.y, self.p), (self.xv, self.yv)
        if replacement and size is not None:
            first, second = (Independent(rows, size, 2 * seed + k) for k, rows in enumerate(data))
            return BilevelProblem(inner, outer, first, second)
        first, second = (Minibatches(rows, size, 2 * seed + k) for k, rows in enumerate(data))
        return BilevelProblem(inner, outer, first, second)


def run(
    method: hyperopt.Estimator,
    steps: int,
    lr: float,
    horizon: float | None,
    size: int | None,
    seed: int,
    replacement: bool = False,
) -> list[float]:
    """The gap after each outer step; the outer step is ``lr``, or ``lr / (1 + t / horizon)``."""
    quadratic = Quadratic(seed)
    bilevel = Bilevel(quadratic.problem(size, seed, replacement), torch.zeros(WEIGHTS, dtype=DOUBLE), adjoint=method)
    lam, gaps = torch.zeros(HYPER, dtype=DOUBLE), []
    for t in range(steps):
        lam = lam - lr / (1 + t / (horizon or math.inf)) * bilevel.step(lam).grad
        gaps.append(quadratic.gap(lam))
    return gaps


def exponent(gaps: list[float], first: int) -> float:
    """``a`` of the least-squares fit ``gap ~ t^a`` from step ``first``, over steps that are evenly spaced on a log axis."""
    at = np.unique(np.geomspace(first, len(gaps) - 1, 200).astype(int))
    return float(np.polyfit(np.log(at + 1), np.log(np.array(gaps)[at]), 1)[0])


def factor(gaps: list[float], floor: float = 1e-24) -> float:
    """``q`` of the fit ``gap ~ q^t``, until rounding."""
    kept = next((t for t, gap in enumerate(gaps) if gap < floor), len(gaps))
    return float(np.exp(np.polyfit(np.arange(kept), np.log(gaps[:kept]), 1)[0]))


STEP = 0.1
RUNS: dict[str, dict[str, Any]] = {  # method, steps, outer step and its horizon, batch
    "SOBA, constant steps": {"method": lambda s: SOBA(step_size=STEP), "steps": 3000, "lr": STEP},
    "SOBA, steps 1 / t": {
        "method": lambda s: SOBA(step_size=STEP, decay=1.0, horizon=100),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "SOBA, steps 1 / t, independent batches": {
        "method": lambda s: SOBA(step_size=STEP, decay=1.0, horizon=100),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "SABA, constant steps": {"method": lambda s: SABA(step_size=STEP, seed=s), "steps": 1500, "lr": STEP},
    "stocBiO, constant steps": {"method": lambda s: StocBiO(step_size=STEP, steps=3, terms=8), "steps": 400, "lr": STEP},
    "stocBiO, outer steps 1 / t, 12 terms": {
        "method": lambda s: StocBiO(step_size=STEP, steps=1, terms=12, adjoint_step=0.4),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "F2SA, penalty growing by 0.05, outer steps 1 / t": {
        "method": lambda s: F2SA(step_size=STEP, steps=3, multiplier=1.0, growth=0.05),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "V-PBGD, T = 1, penalty to 10, outer steps 1 / t": {
        "method": lambda s: VPBGD(step_size=STEP, steps=1, start=1.0, end=10.0, ramp=300),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "V-PBGD, T = 1, penalty to 10, outer steps 1 / t, independent batches": {
        "method": lambda s: VPBGD(step_size=STEP, steps=1, start=1.0, end=10.0, ramp=300),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "V-PBGD, T = 3, penalty to 10, outer steps 1 / t, independent batches": {
        "method": lambda s: VPBGD(step_size=STEP, steps=3, start=1.0, end=10.0, ramp=300),
        "steps": 3000,
        "lr": STEP,
        "horizon": 100,
    },
    "F2SA, penalty growing by 1, all rows": {
        "method": lambda s: F2SA(step_size=0.2, steps=3, multiplier=1.0, growth=1.0),
        "steps": 600,
        "lr": STEP,
        "size": None,
    },
}


def penalties() -> dict[str, float]:
    """The gap that V-PBGD ends at, over its last penalty, the mean of the seeds; its outer step is small and its budget long."""
    found = {}
    for end in (10, 20, 40):
        method = VPBGD(step_size=0.3, steps=2, start=1.0, end=float(end), ramp=100)
        ends = [run(method, 400 + 10 * end, 3.0 / end, None, None, seed)[-1] for seed in SEEDS]
        found[str(end)] = float(np.exp(np.mean(np.log(ends))))
    return found


def measured(name: str) -> dict[str, Any]:
    """One row of the table, and the mean curve at steps that are evenly spaced on a log axis."""
    given, start = RUNS[name], time.process_time()
    size = given.get("size", BATCH)
    curves = [
        run(given["method"](s), given["steps"], given["lr"], given.get("horizon"), size, s, "independent" in name) for s in SEEDS
    ]
    mean = np.exp(np.mean(np.log(np.maximum(curves, 1e-300)), axis=0))  # geometric: a line stays a line
    fits = {"exponent": [exponent(c, len(c) // 3) for c in curves], "factor": [factor(c) for c in curves]}
    row: dict[str, Any] = {key: float(np.mean(values)) for key, values in fits.items()}
    row["last_tenth"] = float(np.mean([np.mean(c[-len(c) // 10 :]) for c in curves]))
    row |= {f"{key}_by_seed": values for key, values in fits.items()} | {"cpu_seconds": time.process_time() - start}
    at = np.unique(np.geomspace(1, len(mean), 300).astype(int)) - 1
    row |= {"steps": given["steps"], "exponent_of_mean": exponent(mean.tolist(), len(mean) // 3)}
    return {**row, "curve": [(at + 1).tolist(), mean[at].tolist()]}


def main() -> None:
    """Measure what is missing, and draw."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "seeds": len(SEEDS), "batch": BATCH, "runs": {}}
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
    for name in RUNS:
        if "curve" not in found["runs"].get(name, {}):
            found["runs"][name] = measured(name)
            print(name, {key: value for key, value in found["runs"][name].items() if key != "curve"}, flush=True)
            RESULTS.write_text(json.dumps(found) + "\n")
    if "v_pbgd" not in found:
        found["v_pbgd"] = penalties()
        ends = np.log([float(end) for end in found["v_pbgd"]])
        found["v_pbgd_exponent"] = float(np.polyfit(ends, np.log(list(found["v_pbgd"].values())), 1)[0])
        RESULTS.write_text(json.dumps(found) + "\n")
    draw(found["runs"])


def draw(runs: dict[str, Any]) -> None:
    """The figure."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 6.4), layout="constrained")
    for k, name in enumerate(RUNS):
        at, mean = runs[name]["curve"]
        for axis, scale in zip(axes, ("log", "linear"), strict=True):
            axis.plot(at, np.maximum(mean, 1e-26), label=name, lw=1.2, color=f"C{k % 10}", ls="-" if k < 10 else "--")
            axis.set(xscale=scale, yscale="log", xlabel="outer step", ylabel="h(lam) - min h")
    t = np.array([200, 3000])
    axes[0].plot(t, 2 / t, "k--", lw=1, label="1 / t")
    axes[0].plot(t, 2e2 / t.astype(float) ** 2 * 1e-3, "k:", lw=1, label="1 / t^2")
    axes[0].set(title="Here powers are straight lines", ylim=(1e-12, 1e-1))
    axes[1].set_title("Here geometric convergence is straight")
    figure.suptitle("Stochastic quadratic: gap of the outer objective, geometric mean of three seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(HERE / "rate.png", dpi=110)


if __name__ == "__main__":
    main()
