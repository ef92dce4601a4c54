"""The forward solve of a problem, with its fallback solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hyperopt.core.newton.newton_krylov import NewtonKrylov
from hyperopt.core.policy import note_fallback
from hyperopt.core.solvers.anderson import Anderson
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.broyden import Broyden
from hyperopt.core.solvers.iterate import Iterate, iterate
from hyperopt.core.solvers.point import Map

if TYPE_CHECKING:
    from hyperopt.core.adjoints.base import Problem


def default_fallback(solver: FixedPointSolver) -> tuple[FixedPointSolver, ...]:
    """Return the solvers to try after ``solver`` failed: Anderson, Broyden and Newton-Krylov with its tolerances."""
    rtol, atol = (solver.rtol, solver.atol) if not solver.fixed else (1e-5, 0.0)
    chain = (
        Anderson(rtol, atol, max_steps=max(200, solver.max_steps)),
        Broyden(rtol, atol, max_steps=max(200, solver.max_steps)),
        NewtonKrylov(rtol, atol),
    )
    return tuple(following for following in chain if type(following) is not type(solver))


def solve_forward(problem: Problem, phi: Map, last: Map, start: Tensor | None = None) -> Iterate:
    """Solve with ``problem.solver`` and, under ``policy="fallback"``, with its fallbacks in turn.

    Returns:
        The first result that did not fail, else the one with the least residual; its costs include all attempts.
    """
    some = problem.part if problem.droppable and start is None else None
    chain = (problem.solver,)
    if problem.policy == "fallback":
        chain += problem.fallback or default_fallback(problem.solver)
    runs: list[Iterate] = []
    for i, solver in enumerate(chain):
        begin = problem.start if start is None else start
        runs.append(iterate(solver, phi, begin, last=last, some=some, trace=problem.trace, rounding=problem.layout.rounding))
        if not runs[-1].stats.status.failed:
            break
        if i + 1 < len(chain):
            note_fallback(runs[-1].stats, chain[i + 1].name, "inner")
    best = runs[-1] if not runs[-1].stats.status.failed else min(runs, key=lambda r: _rank(r.stats.worst_residual()))
    again = best is not runs[-1]
    if again:
        last(best.value)  # the graph that backward uses must be at the returned state
    for cost in ("evaluations", "vjps", "jvps"):
        setattr(best.stats, cost, sum(getattr(run.stats, cost) for run in runs))
    best.stats.evaluations += again
    best.stats.fallbacks = tuple(run.stats.method for run in runs if run is not best)
    return best


def _rank(residual: float) -> float:
    return residual if residual == residual else float("inf")
