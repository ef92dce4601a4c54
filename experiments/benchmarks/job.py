"""The whole job: ``experiment=equilibrium_mnist`` beside the loop of the notebook that it comes from, step by step.

    python experiments/benchmarks/job.py [--steps 15]

Both train the same model from the same initial values on the same 5,000 images with SGD, and their losses are compared at every
step. The notebook's loop is written from its description: A and ``B x`` are made anew at every iteration, T = 10 without a graph,
and each of K = 20 Neumann terms has a graph of its own. Steps are taken in turn; process CPU seconds, one thread. A step costs
the same along the run for the notebook and for fixed T and K, so that the ratio of a few steps is that of 500. The last row is
the two products with the images, ``B x`` and the gradient in B, which every step has however it solves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from facts import built, facts, store
from torch import Tensor
from torch.nn import functional

T, K = 10, 20
WAYS = {
    "`experiment=equilibrium_mnist`, T = 10, K = 20": [],
    "the same to tolerances of 1e-3, from warm starts": [
        "task.warm_start=true",
        "solver.rtol=1e-3",
        "adjoint.linear_solver.rtol=1e-3",
        "adjoint.linear_solver.relative_to=batch",
    ],
}


def task_step(*overrides: str) -> Callable[[], float]:
    """Outer steps of the experiment."""
    made = built("experiment=equilibrium_mnist", *overrides)
    optimizer = made.optimizer.build(made.task.groups())
    return lambda: made.task.step(optimizer, lambda groups: None).loss


def notebook_step() -> Callable[[], float]:
    """Outer steps of the notebook's loop."""
    made = built("experiment=equilibrium_mnist")
    task: Any = made.task
    cell, head, rows = task.model.cell, task.model.classifier, task.rows["outer"]
    inner, outer = [*cell.parameters()], [head.weight, head.bias]
    optimizer = torch.optim.SGD([*inner, *outer], 0.01)

    def phi(w: Tensor) -> Tensor:
        return torch.tanh(w @ cell.recurrent.matrix() + rows.x @ cell.B.T + cell.c)

    def step() -> float:
        with torch.no_grad():
            w = torch.zeros(len(rows.x), cell.state_size)
            for _ in range(T):
                w = phi(w)
        leaf = w.clone().requires_grad_()
        loss = functional.cross_entropy(head(leaf), rows.y)
        g, *direct = torch.autograd.grad(loss, [leaf, *outer])
        v = g
        for _ in range(K):
            v = torch.autograd.grad(phi(leaf), leaf, v)[0] + g
        for parameter, gradient in zip([*inner, *outer], [*torch.autograd.grad(phi(leaf), inner, v), *direct], strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss.item()

    return step


def images_step() -> Callable[[], None]:
    """The two products with the images that every step has, ``B x`` and the gradient in B, and nothing else."""
    made = built("experiment=equilibrium_mnist")
    task: Any = made.task
    x, B, c = task.rows["outer"].x, task.model.cell.B.detach(), task.model.cell.c.detach()
    v = torch.randn(len(x), len(B), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        torch.addmm(c, x, B.T)
        v.T @ x

    return step


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    steps: dict[str, Callable[[], float | None]] = {"the notebook's loop (from its description)": notebook_step()}
    steps |= {name: task_step(*overrides) for name, overrides in WAYS.items()}
    steps["the two products with the images alone"] = images_step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[Any]] = {name: [] for name in steps}
    for _ in range(options.steps + 1):
        for name, step in steps.items():
            start = time.process_time()
            losses[name].append(step())
            seconds[name].append(time.process_time() - start)
    base, *_ = steps
    lines = ["| one outer step | CPU seconds | notebook / this | largest difference of the loss |", "|---|---|---|---|"]
    rows = []
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(seconds[base][1:], seconds[name][1:], strict=True))
        off = [abs(a - b) for a, b in zip(losses[base], losses[name], strict=True) if b is not None]
        shown = f"{max(off):.1e}" if off else "-"
        rows.append({"way": name, "seconds": statistics.median(seconds[name][1:]), "ratio": ratio, "loss": losses[name]})
        lines.append(f"| {name} | {rows[-1]['seconds']:.3f} | {ratio:.1f} | {shown} |")
    store("job", {**facts(), "steps": options.steps, "rows": rows}, lines)


if __name__ == "__main__":
    main()
