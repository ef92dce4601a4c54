"""The forward solve of a problem: the driver, the dropping of finished rows, and the fallbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hyperopt.policy import note_fallback
from hyperopt.solvers.anderson import Anderson
from hyperopt.solvers.iterate import Iterate, Map, iterate

if TYPE_CHECKING:
    from hyperopt.adjoints.base import Problem


def solve_forward(problem: Problem, phi: Map, last: Map, start: Tensor | None = None) -> Iterate:
    """Solve with ``problem.solver`` and, under ``policy="fallback"``, with its fallbacks in turn.

    Returns the first result that did not fail, else the one of the least residual; its evaluations count all tries.
    """
    rows = frozenset(problem.row_args)

    def part(index: Tensor) -> Map:
        args = tuple(a.detach()[index] if i in rows else a for i, a in enumerate(problem.args))
        return lambda w: problem.call(w, args)

    some: Callable[[Tensor], Map] | None = part if rows and start is None and not problem.layout.joint else None

    chain = (problem.solver,)
    if problem.policy == "fallback":
        default = () if isinstance(problem.solver, Anderson) else (Anderson(max_steps=max(200, problem.solver.max_steps)),)
        chain += tuple(problem.fallback) or default
    runs: list[Iterate] = []
    for i, solver in enumerate(chain):
        runs.append(iterate(solver, phi, problem.start if start is None else start, last=last, some=some, trace=problem.trace))
        if not runs[-1].stats.status.failed:
            break
        if i + 1 < len(chain):
            note_fallback(runs[-1].stats, chain[i + 1].name, "inner")
    best = runs[-1] if not runs[-1].stats.status.failed else min(runs, key=lambda r: _rank(r.stats.worst_residual()))
    if best is not runs[-1]:
        last(best.value)  # the graph must be at the state that is returned
    best.stats.fallbacks = tuple(run.stats.method for run in runs if run is not best)
    best.stats.evaluations = sum(run.stats.evaluations for run in runs) + (best is not runs[-1])
    return best


def _rank(residual: float) -> float:
    return residual if residual == residual else float("inf")
