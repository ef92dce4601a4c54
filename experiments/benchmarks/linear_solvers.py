"""Cost of every linear solver of the adjoint system against its own products with the Jacobian alone.

    python experiments/benchmarks/linear_solvers.py [--pairs 5] [--rtol 1e-6] [--out linear_solvers.json]

A solver is run to its tolerance; then as many vjps and jvps as it has counted are made in a plain loop on the same operator
("products"), and then those and the inner products and vector updates of the textbook method ("arithmetic"). All in turn, one
thread, process CPU seconds; the ratios are medians over the rounds. Three operators:

- rows:   tanh(w A + u), 5000 rows of 200 unknowns, |A| = .9, products by autograd on one graph. A solver's vector arithmetic is
          as dear here as its products, each of which is one small matrix product.
- few:    the same with 100 rows (the dense solver's case).
- joint:  a gradient step of softmax regression on 2000 x 784 inputs, 7850 unknowns in one row: symmetric Hessian-vector products.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hyperopt
from hyperopt.adjoints.attach import GraphLinearization
from hyperopt.linsolve.base import LinearSolver
from hyperopt.status import SolveStats


def equilibrium(rows: int, state: int = 200) -> tuple[GraphLinearization, Tensor]:
    """The linearization of ``tanh(w A + u)`` at its fixed point, and a right-hand side."""
    gen = torch.Generator().manual_seed(0)
    A = torch.randn(state, state, generator=gen)
    A = A * 0.9 / torch.linalg.matrix_norm(A, 2)
    u = 0.3 * torch.randn(rows, state, generator=gen)
    w = torch.zeros(rows, state)
    for _ in range(100):
        w = torch.tanh(torch.addmm(u, w, A))
    leaf = w.requires_grad_()
    return GraphLinearization(torch.tanh(torch.addmm(u, leaf, A)), leaf, []), torch.randn(rows, state, generator=gen)


def regression(examples: int = 2000, features: int = 784, classes: int = 10) -> tuple[GraphLinearization, Tensor]:
    """The linearization of a gradient step of ridge-penalized softmax regression, and a right-hand side."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(examples, features, generator=gen) / features**0.5
    y = torch.randint(classes, (examples,), generator=gen)
    size = classes * (features + 1)
    leaf = (0.01 * torch.randn(1, size, generator=gen)).requires_grad_()
    weight, bias = leaf[0, : classes * features].view(classes, features), leaf[0, classes * features :]
    loss = functional.cross_entropy(functional.linear(x, weight, bias), y) + 0.05 * (leaf**2).sum()
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return GraphLinearization(leaf - 1.0 * slope, leaf, []), torch.randn(1, size, generator=gen)


def algebra(solver: LinearSolver, steps: int) -> int:
    """Pairs of an inner product and a vector update that the method makes in so many steps, by its textbook statement."""
    if isinstance(solver, hyperopt.GMRES):
        return sum(k % solver.window + 1 for k in range(steps)) + steps  # modified Gram-Schmidt, and the sum at the end
    if isinstance(solver, hyperopt.LinearAnderson):
        return sum(min(k, solver.window) + 1 for k in range(steps))
    return {"Neumann": 1, "BiCGStab": 6, "CG": 3, "NormalCG": 3}.get(solver.name, 0) * steps


def measure(solver: LinearSolver, lin: GraphLinearization, b: Tensor, pairs: int) -> dict[str, Any]:
    """Seconds of the solver, of its products alone, and of those with the method's own vector arithmetic."""
    pool = [b.clone() for _ in range(20)]  # as many vectors as GMRES keeps: from memory, not from the cache

    def products(vjps: int, jvps: int) -> None:
        for _ in range(vjps):
            lin(b)
        for _ in range(jvps):
            lin.rmatvec(b)

    def arithmetic(stats: SolveStats) -> None:
        products(stats.vjps, stats.jvps)
        x = b.clone()
        for k in range(algebra(solver, int(stats.iterations.max()))):
            v = pool[k % len(pool)]
            x.addcmul_(torch.linalg.vecdot(v, x)[:, None], v, value=-1e-9)
        if isinstance(solver, hyperopt.Dense):
            torch.linalg.lu_factor(torch.eye(b.shape[1]).expand(b.shape[0], -1, -1))

    with torch.no_grad():
        stats = solver.solve(lin, b).stats
        calls: dict[str, Callable[[], object]] = {
            "solve": lambda: solver.solve(lin, b),
            "products": lambda: products(stats.vjps, stats.jvps),
            "arithmetic": lambda: arithmetic(stats),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(pairs):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
    ratio = {name: statistics.median(s / a for s, a in zip(seconds["solve"], seconds[name], strict=True)) for name in calls}
    return {
        "solver": solver.name,
        "status": stats.status.name,
        "steps": int(stats.iterations.max()),
        "vjps": stats.vjps,
        "jvps": stats.jvps,
        "residual": stats.worst_residual(),
        "cpu_seconds": statistics.median(seconds["solve"]),
        "to_products": ratio["products"],
        "to_arithmetic": ratio["arithmetic"],
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--out", type=Path, default=None, help="write the measured rows here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tight = {"rtol": options.rtol, "max_steps": 1000}
    general = [
        hyperopt.Neumann(**tight),
        hyperopt.LinearAnderson(**tight),
        hyperopt.GMRES(**tight),
        hyperopt.BiCGStab(**tight),
        hyperopt.NormalCG(**tight),
    ]
    cases = {
        "rows": (equilibrium(5000), general),
        "few": (equilibrium(100), [*general, hyperopt.Dense(options.rtol)]),
        "joint": (regression(), [*general, hyperopt.CG(**tight)]),
    }
    rows = []
    columns = f"{'operator':9s} {'solver':15s} {'status':10s} {'steps':>5s} {'vjps':>5s} {'jvps':>5s}"
    print(f"{columns} {'seconds':>8s} {'x products':>10s} {'x arithmetic':>12s}")
    for name, ((lin, b), solvers) in cases.items():
        for solver in solvers:
            row = {"operator": name, **measure(solver, lin, b, options.pairs)}
            rows.append(row)
            print(
                f"{name:9s} {row['solver']:15s} {row['status']:10s} {row['steps']:5d} {row['vjps']:5d} {row['jvps']:5d} "
                f"{row['cpu_seconds']:8.3f} {row['to_products']:10.2f} {row['to_arithmetic']:12.2f}",
                flush=True,
            )
    if options.out is not None:
        machine = platform.processor() or platform.machine()
        facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": machine}
        options.out.write_text(json.dumps({**facts, "threads": 1, "rtol": options.rtol, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
