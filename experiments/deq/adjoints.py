"""The adjoints compared on the DEQ of ``experiment=deq_cifar10``: error and cosine to the exact gradient, products, seconds.

    python experiments/deq/adjoints.py [--warm STEPS] [--images N]

The network is trained for a few steps first, since at its initial values every adjoint looks good. All of them start from the
same Broyden solve, to a relative residual of 1e-3 or 40 steps, whose inverse estimate SHINE shares; the reference, which errors
and cosines are relative to, is GMRES to 1e-6 at that same state, so that only the adjoints differ. CPU seconds of the forward and
of the backward pass, one thread, least of three; peak memory is that of tensors alive at once.
Writes ``adjoints`` into results.json, and adjoints.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch
from models import images, network, train
from results import HERE, write
from torch import Tensor
from torch.nn import functional

from hyperopt import GMRES, Broyden, Implicit, LinearAnderson, Neumann, OneStep, Phantom, Shine, Solution, compare_adjoints
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.solvers.base import FixedPointSolver

SOLVER = Broyden(1e-3, max_steps=40, memory=40)
EXACT = Implicit(GMRES(1e-5, max_steps=120, window=60), policy="ignore")
REFERENCE = Implicit(GMRES(1e-6, max_steps=200, window=100), policy="ignore")
ADJOINTS: dict[str, Adjoint] = {
    "exact (GMRES, 1e-5)": EXACT,
    "Anderson, 1e-2": Implicit(LinearAnderson(1e-2, max_steps=25), policy="ignore"),
    "SHINE": Shine(),
    "SHINE + 5 Anderson": Shine(LinearAnderson(0.0, 0.0, max_steps=5)),
    "one-step": OneStep(),
    "phantom, 5 at 0.5": Phantom(5, 0.5),
    **{f"Neumann, {k}": Implicit(Neumann(0.0, 0.0, k), policy="ignore") for k in (1, 2, 5, 10)},
}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=20, help="steps of training before the measurement, 32 images each")
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = images(32 * options.warm + options.images)
    model = network()
    loss = train(model, rows, options.warm, 32)
    print(f"loss after {options.warm} steps: {loss:.3f}")
    part = rows.take(slice(32 * options.warm, None))
    x, y = part.x.view(-1, 3, 32, 32), part.y
    layer: Any = model.get_submodule("deq")

    parameters = list(model.parameters())

    def objective(solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        layer.solver, layer.adjoint = SOLVER, adjoint  # the same state for the reference too
        return functional.cross_entropy(model(x), y), layer.solution

    found = compare_adjoints(objective, parameters, ADJOINTS, solver=SOLVER, reference=REFERENCE)
    print(found)
    print(f"forward: {layer.solution.forward.describe()}")
    table = []
    for row in found.rows:
        forward, backward = [], []
        for _ in range(3):
            started = time.process_time()
            loss_now, _ = objective(SOLVER, ADJOINTS[row.name])
            middle = time.process_time()
            torch.autograd.grad(loss_now, parameters)
            forward.append(middle - started)
            backward.append(time.process_time() - middle)
        table.append({**vars(options), **dataclasses.asdict(row), "cpu_forward": min(forward), "cpu_backward": min(backward)})
        print(row.name, f"forward {min(forward):.2f} s, backward {min(backward):.2f} s", flush=True)
    write("adjoints", table)
    draw(table)


def draw(table: list[dict[str, Any]]) -> None:
    """Write adjoints.png: cosine to the exact gradient against the seconds of the backward pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row, marker in zip(table, "*Pos^vDdXp", strict=True):
        axes.semilogx(row["cpu_backward"], row["cosine"], marker, markersize=8, label=row["name"])
    axes.set(xlabel="CPU seconds of the backward pass", ylabel="cosine to the exact gradient")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "adjoints.png", dpi=110)


if __name__ == "__main__":
    main()
