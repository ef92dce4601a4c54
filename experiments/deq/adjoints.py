"""The adjoints compared on the DEQ of ``experiment=deq_cifar10``: error and cosine to the exact gradient, products, seconds.

    python experiments/deq/adjoints.py [--warm STEPS] [--images N]

The network is trained for a few steps first, since at its initial values every adjoint looks good. All of them start from the
same Broyden solve to a relative residual of 1e-3, whose inverse estimate SHINE shares. ``exact`` is GMRES to 1e-5; the reference,
which the errors are relative to, is the same after a solve to the rounding floor or 300 steps. Seconds are wall time of forward
and backward together, one thread, after a warm-up; peak memory is that of tensors alive at once.
Writes ``adjoints`` into results.json, and adjoints.png.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from models import images, network, train
from results import HERE, write
from torch import Tensor
from torch.nn import functional

from hyperopt import GMRES, Broyden, Implicit, LinearAnderson, Neumann, OneStep, Phantom, Shine, Solution, compare_adjoints
from hyperopt.adjoints.base import Adjoint
from hyperopt.solvers.base import FixedPointSolver

EXACT = Implicit(GMRES(1e-5, max_steps=120, window=60), policy="ignore")
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
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = images(32 * options.warm + options.images)
    model = network()
    loss = train(model, rows, options.warm, 32)
    print(f"loss after {options.warm} steps: {loss:.3f}")
    part = rows.take(slice(32 * options.warm, None))
    x, y = part.x.view(-1, 3, 32, 32), part.y
    layer: Any = model.get_submodule("deq")

    def objective(solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        layer.solver, layer.adjoint = dataclasses.replace(solver, max_steps=min(solver.max_steps, 300)), adjoint
        return functional.cross_entropy(model(x), y), layer.solution

    solver = Broyden(1e-3, max_steps=60, memory=60)
    found = compare_adjoints(objective, list(model.parameters()), ADJOINTS, solver=solver, reference=EXACT)
    print(found)
    solution = layer.solution
    print(f"forward: {solution.forward.describe()}")
    found.figure().savefig(HERE / "adjoints.png", dpi=110)
    write("adjoints", [{**vars(options), **dataclasses.asdict(row)} for row in found.rows])


if __name__ == "__main__":
    main()
