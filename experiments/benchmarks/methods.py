"""Cost of every solver and every adjoint against its own arithmetic.

    python experiments/benchmarks/methods.py [--rounds 7] [--out experiments/benchmarks/methods.json]

The equilibrium ``w = tanh(w A + u)`` of 5,000 rows of 200 entries, ``|A| = .9``, float32, one thread. A solver's row is one solve
to a tolerance of 1e-4; an adjoint's row is 20 steps of Picard (SHINE: of Broyden, whose inverse it needs) and a backward to that
tolerance. Methods with a dense Jacobian have 100 rows, and the map's closed form.

"Its own arithmetic" is what a loop written by hand for this map would do: the evaluations, vjps and jvps that were counted, as
``addmm`` and in-place ``tanh``, and as one product and one pass; the inner products and vector updates of the textbook method
(``algebra``); two norms an iteration, to stop on; the Jacobian and its LU factors. Nothing that keeps a solve safe is in it: no
statuses, no best iterate, no freezing of rows.

All in turn; process CPU seconds; a ratio is the median over the rounds of its ratio in the same round.
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

import hyperopt
from hyperopt import Implicit, Picard, Solution, fixed_point
from hyperopt.nn.equilibrium import TanhAffine

TOLERANCE = 1e-4
FORWARD = Picard(0.0, max_steps=20)
SOLVERS: dict[str, Any] = {
    "Picard": Picard(TOLERANCE),
    "Picard, damping .9": Picard(TOLERANCE, damping=0.9),
    "Anderson": hyperopt.Anderson(TOLERANCE),
    "Broyden": hyperopt.Broyden(TOLERANCE),
    "Newton-Krylov": hyperopt.NewtonKrylov(TOLERANCE),
    "Newton": hyperopt.Newton(TOLERANCE),
    "Chord": hyperopt.Chord(TOLERANCE),
}
ADJOINTS: dict[str, Any] = {
    "neumann": Implicit(hyperopt.Neumann(TOLERANCE)),
    "anderson": Implicit(hyperopt.LinearAnderson(TOLERANCE)),
    "gmres": Implicit(hyperopt.GMRES(TOLERANCE)),
    "bicgstab": Implicit(hyperopt.BiCGStab(TOLERANCE)),
    "normal_cg": Implicit(hyperopt.NormalCG(TOLERANCE)),
    "dense": Implicit(hyperopt.Dense()),
    "one_step": hyperopt.OneStep(),
    "phantom": hyperopt.Phantom(),
    "shine": hyperopt.Shine(),
    "unrolled": hyperopt.Unrolled(),
    "checkpointed": hyperopt.Checkpointed(),
}
FEW = ("Newton", "Chord", "dense")  # a dense Jacobian a row


class Equilibrium:
    """The map, and its arithmetic by hand."""

    def __init__(self, rows: int, state: int = 200, *, closed: bool = False) -> None:
        """Draw it."""
        gen = torch.Generator().manual_seed(0)
        A = torch.randn(state, state, generator=gen)
        self.A = (A * 0.9 / torch.linalg.matrix_norm(A, 2)).requires_grad_()
        self.u = (0.3 * torch.randn(rows, state, generator=gen)).requires_grad_()
        self.g = torch.randn(rows, state, generator=gen)
        self.w0, self.closed = torch.zeros(rows, state), closed
        self.slope, self.plain = torch.rand(rows, state, generator=gen), (self.A.detach(), self.u.detach())
        self.pool = [self.g.clone() for _ in range(20)]  # as many vectors as are kept: from memory, not from the cache

    def solve(self, solver: Any, adjoint: Any = None) -> Solution:
        """By the library: a closure, or the cell with its closed form."""
        if self.closed:
            return fixed_point(TanhAffine(), self.w0, (self.u, self.A), solver=solver, adjoint=adjoint)
        u, A = self.u, self.A
        return fixed_point(lambda w: torch.tanh(torch.addmm(u, w, A)), self.w0, solver=solver, adjoint=adjoint)

    def evaluate(self, times: int) -> Tensor:
        """Evaluations by hand."""
        A, u = self.plain
        w = self.w0
        for _ in range(times):
            w = torch.addmm(u, w, A).tanh_()
        return w

    def products(self, times: int) -> Tensor:
        """Products with the Jacobian or its transpose by hand."""
        v = self.g
        for _ in range(times):
            v = torch.addmm(self.g, v * self.slope, self.plain[0].T)
        return v

    def pairs(self, times: int) -> Tensor:
        """Inner products of each row, each followed by a vector update."""
        x = self.g.clone()
        for k in range(times):
            v = self.pool[k % len(self.pool)]
            x.addcmul_(torch.linalg.vecdot(v, x)[:, None], v, value=-1e-9)
        return x

    def norms(self, times: int) -> None:
        """The norm of a difference and of one of its terms, to stop on."""
        for k in range(times):
            torch.linalg.vector_norm(self.pool[k % 20] - self.g, dim=1)
            torch.linalg.vector_norm(self.g, dim=1)

    def factors(self, times: int) -> None:
        """Dense Jacobians in closed form, LU factors of ``I - J``, and a solve."""
        A, _ = self.plain
        for _ in range(times):
            system = torch.eye(A.shape[0]) - self.slope[:, :, None] * A.T
            torch.linalg.lu_solve(*torch.linalg.lu_factor(system), self.g[:, :, None])

    def closing(self) -> Tensor:
        """The products for A and u at the end of a backward."""
        return self.w0.T @ (self.g * self.slope)


def algebra(method: Any, steps: int) -> int:
    """Pairs of an inner product and a vector update in so many steps of the textbook method."""
    name = type(method).__name__
    if name == "GMRES":
        return sum(k % method.window + 1 for k in range(steps)) + steps  # Gram-Schmidt, and the sum at the end
    if name in ("Anderson", "LinearAnderson"):
        return sum(min(k, method.window - 1) + 1 for k in range(steps))  # a Gram row, and the mixing
    if name == "Broyden":
        return sum(2 * min(k, method.memory) + 1 for k in range(steps))  # two products with the estimate, and its new term
    return {"BiCGStab": 6, "NormalCG": 3}.get(name, 0) * steps


def cases() -> dict[str, tuple[Callable[[], object], Callable[[], object], dict[str, Any]]]:
    """``{name: (by the library, its arithmetic by hand, facts)}``."""
    many, few = Equilibrium(5000), Equilibrium(100, closed=True)
    found = {}
    for name, solver in SOLVERS.items():
        problem = few if name in FEW else many

        def solve(problem: Equilibrium = problem, solver: Any = solver) -> Solution:
            with torch.no_grad():
                return problem.solve(solver)

        stats = solve().forward
        steps = int(stats.iterations.max())
        dense = {"Newton": steps - 1, "Chord": 1}.get(name, 0)  # the last evaluation of Newton's needs no factors

        def own(
            problem: Equilibrium = problem, stats: Any = stats, steps: int = steps, solver: Any = solver, dense: int = dense
        ) -> None:
            problem.evaluate(stats.evaluations)
            problem.products(stats.vjps + stats.jvps)
            problem.norms(steps)
            inner = getattr(solver, "linear_solver", None)
            problem.pairs(algebra(solver, steps) if inner is None else algebra(inner, stats.jvps))
            problem.factors(dense)

        facts = {"kind": "solver", "status": stats.status.name, "steps": steps, "evaluations": stats.evaluations}
        found[name] = (solve, own, {**facts, "vjps": stats.vjps, "jvps": stats.jvps})
    for name, adjoint in ADJOINTS.items():
        problem = few if name in FEW else many
        forward = hyperopt.Broyden(0.0, max_steps=20) if name == "shine" else FORWARD

        def both(problem: Equilibrium = problem, adjoint: Any = adjoint, forward: Any = forward) -> Solution:
            solution = problem.solve(forward, adjoint)
            torch.autograd.grad(solution.value, [problem.u, problem.A], problem.g)
            return solution

        solution = both()
        stats = solution.adjoint
        unrolls = stats is None
        vjps, jvps = (20, 0) if stats is None else (stats.vjps, stats.jvps)
        steps = 0 if stats is None else int(stats.iterations.max())
        linear = getattr(adjoint, "linear_solver", None)
        again = 20 if name == "checkpointed" else 0

        def by_hand(
            problem: Equilibrium = problem,
            products: int = vjps + jvps,
            again: int = again,
            steps: int = steps,
            linear: Any = linear,
            forward: Any = forward,
            unrolls: bool = unrolls,
            dense: bool = name == "dense",
        ) -> None:
            problem.evaluate(20 + again)
            problem.pairs(algebra(forward, 20) + (0 if linear is None else algebra(linear, steps)))
            problem.products(0 if dense else products)
            problem.norms(0 if unrolls else steps)
            problem.factors(1 if dense else 0)
            for _ in range(20 if unrolls else 1):
                problem.closing()

        facts = {
            "kind": "adjoint",
            "status": "-" if stats is None else stats.status.name,
            "steps": steps,
            "evaluations": 20 + again,
        }
        found[name] = (both, by_hand, {**facts, "vjps": vjps, "jvps": jvps})
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="write the measured rows here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| method | status | steps | evaluations | vjps | jvps | CPU ms | x its own arithmetic |\n|" + "---|" * 8)
    for name, (library, own, facts) in cases().items():
        ratios, seconds = [], []
        for _ in range(options.rounds):
            times = []
            for call in (library, own):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            seconds.append(times[0])
            ratios.append(times[0] / times[1])
        row = {"method": name, **facts, "cpu_seconds": statistics.median(seconds), "ratio": statistics.median(ratios)}
        rows.append(row)
        counts = " | ".join(str(row[key]) for key in ("status", "steps", "evaluations", "vjps", "jvps"))
        print(f"| `{name}` | {counts} | {1e3 * row['cpu_seconds']:.1f} | {row['ratio']:.2f} |", flush=True)
    if options.out is not None:
        machine = platform.processor() or platform.machine()
        facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": machine}
        options.out.write_text(json.dumps({**facts, "threads": 1, "rounds": options.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
