"""The same accuracy for less: 100 outer steps of the projected MNIST study, by time and by the error of the hypergradient.

    python experiments/benchmarks/accuracy.py

The floor is the hand-written gradient with cold T = K = 20 at the same parameters, timed at every fifth step of each run; ours is
the whole outer step (solves, certificate every tenth step, optimizer, projection), timed at every step. Every tenth hypergradient
is held against a float64 one, solved to 1e-9. The curve: ``experiment=equilibrium_mnist_adaptive`` at several tolerances, fixed
tolerances from warm starts, and cold fixed T = K. Process CPU seconds, one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from facts import HERE, built, facts, load, store
from torch import Tensor
from torch.nn import functional
from ways import floor

import hyperopt
from hyperopt.tasks.equilibrium import EquilibriumTask

COLD = [
    (
        f"cold, fixed T = K = {k}",
        ["equilibrium_mnist_projected", f"solver.max_steps={k}", f"adjoint.linear_solver.max_steps={k}"],
    )
    for k in (5, 10, 20)
]
WARM = [
    (
        f"warm starts, rtol {rtol:g} each way",
        [
            "equilibrium_mnist_projected",
            "task.warm_start=true",
            f"solver.rtol={rtol:g}",
            "solver.max_steps=100",
            f"adjoint.linear_solver.rtol={rtol:g}",
            "adjoint.linear_solver.max_steps=100",
        ],
    )
    for rtol in (1e-3, 1e-4)
]
DRIVEN = [
    (f"driven, rtol {a:g} and {b:g}", ["equilibrium_mnist_adaptive", f"solver.rtol={a:g}", f"adjoint.linear_solver.rtol={b:g}"])
    for a, b in ((1e-2, 1e-2), (3e-3, 3e-3), (1.7e-3, 1.7e-3), (1.5e-3, 1.5e-3), (1e-3, 1e-3), (3e-4, 3e-4))
]


def exact(task: EquilibriumTask) -> list[Tensor]:
    """The hypergradient of the fitted rows at the task's parameters, float64."""
    model, rows = copy.deepcopy(task.model).double(), task.rows["outer"]
    model.solver = hyperopt.Anderson(rtol=1e-9, max_steps=1000)
    model.adjoint = hyperopt.Implicit(hyperopt.LinearAnderson(rtol=1e-9, max_steps=1000))
    loss = functional.cross_entropy(model(rows.x.double()), rows.y)
    return list(torch.autograd.grad(loss, [p for group in model.groups().values() for p in group]))


def hand_written(task: EquilibriumTask) -> Callable[[], Any]:
    """The floor at the task's parameters."""
    cell: Any = task.model.cell
    head, rows = task.model.classifier, task.rows["outer"]
    p = {"A": cell.recurrent.matrix(), "B": cell.B, "c": cell.c, "W": head.weight, "b": head.bias}
    return floor({"x": rows.x, "y": rows.y, **{name: each.detach() for name, each in p.items()}}, 20)


def follow(experiment: str, *overrides: str) -> dict[str, Any]:
    """100 steps."""
    made = built(f"experiment={experiment}", *overrides)
    task: Any = made.task
    optimizer = made.optimizer.build(task.groups())
    ours, floors, errors = [], [], []
    for step in range(100):
        truth = exact(task) if step % 10 == 0 else None
        if step % 5 == 0:
            loop, start = hand_written(task), time.process_time()
            loop()
            floors.append(time.process_time() - start)
        found: list[Tensor] = []

        def look(groups: Any, found: list[Tensor] = found, wanted: bool = truth is not None) -> None:
            found.extend(g.clone() for each in groups.values() for g in each if wanted)

        start = time.process_time()
        task.step(optimizer, look)
        ours.append(time.process_time() - start)
        if truth is not None:
            off = sum(float((a.double() - b).square().sum()) for a, b in zip(found, truth, strict=True))
            errors.append((off / sum(float(b.square().sum()) for b in truth)) ** 0.5)
    return {
        "ratio": statistics.fmean(ours) / statistics.fmean(floors),
        "seconds": statistics.fmean(ours),
        "floor": statistics.fmean(floors),
        "errors": errors,
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Time against the largest error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, marker in (("cold", "s"), ("warm", "^"), ("driven", "o")):
        of = sorted((row for row in rows if row["way"].startswith(kind)), key=lambda row: max(row["errors"]))
        axes.plot([max(row["errors"]) for row in of], [row["ratio"] for row in of], marker, linestyle="-", label=kind)
    axes.axhline(0.6, color="k", linewidth=0.8, linestyle=":")
    axes.axvline(1e-2, color="k", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="largest relative error of ten hypergradients", ylabel="time of a step, x floor")
    axes.legend()
    figure.savefig(HERE / "accuracy.png", dpi=110)


def main() -> None:
    """Measure, print and store; rows that are not asked for stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name begins so")
    options = parser.parse_args()
    old = load(HERE / "results.json").get("accuracy", {"rows": []})["rows"]
    kept, rows = {row["way"]: row for row in old}, {}
    for name, overrides in (*DRIVEN, *WARM, *COLD):
        if name.startswith(tuple(options.only)):
            rows[name] = {"way": name, "overrides": overrides, **follow(*overrides), "load": facts()["load"]}
            print(name, rows[name]["ratio"], max(rows[name]["errors"]), flush=True)
        elif name in kept:
            rows[name] = kept[name]
    lines = ["| 100 outer steps | x floor | CPU seconds a step | largest error | mean error |", "|---|---|---|---|---|"]
    for row in rows.values():
        worst, mean = max(row["errors"]), statistics.fmean(row["errors"])
        lines.append(f"| {row['way']} | {row['ratio']:.3f} | {row['seconds']:.3f} | {worst:.1e} | {mean:.1e} |")
    draw(list(rows.values()))
    store("accuracy", {**facts(), "rows": list(rows.values())}, lines)


if __name__ == "__main__":
    main()
