"""A chain of linear solvers: each takes over the rows in which the previous ones failed, and never makes a row worse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, LinearSolver, Products
from hyperopt.core.loop import DROP, relative, rounding_floor
from hyperopt.core.operator import LinearOperator, as_operator
from hyperopt.core.policy import note_fallback
from hyperopt.core.process import COUPLED
from hyperopt.core.status import SolveStats, Status


def solve_chain(
    chain: Sequence[LinearSolver], matvec: Products, b: Tensor, start: Tensor | None, what: str, *, trace: bool = False
) -> LinearSolution:
    """Solve ``(I - M) v = b`` by the solvers of ``chain`` in turn, until no row has failed.

    A further solver gets the right-hand side 0 for every solved row, which costs no step there, and starts from the best value
    so far. Every switch is logged under the name ``what``.

    Returns:
        The best value of each row with its status, and the costs of all solvers together. ``stats.method`` is the last solver
        that gave a row its value, and ``stats.fallbacks`` names the others that were tried. If there were several, the
        residual of the value is measured once more.
    """
    best = chain[0].solve(matvec, b, start, trace=trace)
    tried = [chain[0].name]
    for solver in chain[1:]:
        failed = best.stats.row_status > Status.fixed_steps
        if not bool(failed.any()):
            break
        note_fallback(best.stats, solver.name, what)
        tried.append(solver.name)
        usable = (best.stats.residual < 1)[:, None] & torch.isfinite(best.value)
        rest = torch.where(failed[:, None], b, 0.0)
        near = torch.where(failed[:, None], torch.where(usable, best.value, b), 0.0)
        best = _merge(best, _solve_some(solver, matvec, rest, near, failed, trace), failed)
    if len(tried) > 1:
        _check_rows(chain, as_operator(matvec), b, best)
    best.stats.fallbacks = tuple(name for name in tried if name != best.stats.method)
    return best


def _check_rows(chain: Sequence[LinearSolver], operator: LinearOperator, b: Tensor, found: LinearSolution) -> None:
    """Measure a value whose rows are from several solves; rows whose residual is larger than alone are ``coupled_rows``."""
    stats = found.stats
    residual = relative(torch.linalg.vector_norm(operator.complement(found.value) - b, dim=1), stats.scale)
    stats.vjps += 1
    floor = rounding_floor(b.dtype, b.device, operator.rounding)
    asked = [max(solver.rtol, floor) + relative(torch.full_like(stats.scale, solver.atol), stats.scale) for solver in chain]
    limit = COUPLED * torch.stack([stats.residual, *asked]).amax(dim=0)
    risen = (stats.row_status <= Status.fixed_steps) & (residual > limit)
    stats.row_status = stats.row_status.masked_fill(risen, int(Status.coupled_rows))
    stats.residual = torch.where(risen, residual, stats.residual)


def _solve_some(solver: LinearSolver, matvec: Products, b: Tensor, start: Tensor, rows: Tensor, trace: bool) -> LinearSolution:
    """Solve only the rows of a mask, if the operator is divisible; the others are 0 and converged."""
    index = rows.nonzero().squeeze(1)
    operator = as_operator(matvec).select(index) if len(index) <= DROP * len(rows) else None
    if operator is None:
        return solver.solve(matvec, b, start, trace=trace)
    found = solver.solve(operator, b[index], start[index], trace=trace)

    def spread(part: Tensor, rest: Tensor) -> Tensor:
        return rest.index_copy(0, index, part)

    stats = found.stats
    none = b.new_zeros(len(rows))
    zeros = torch.zeros_like(rows, dtype=torch.long)
    stats.row_status, stats.iterations = spread(stats.row_status, zeros), spread(stats.iterations, zeros)
    stats.residual, stats.scale = spread(stats.residual, none), spread(stats.scale, none)
    return LinearSolution(spread(found.value, torch.zeros_like(b)), stats)


def _merge(old: LinearSolution, new: LinearSolution, failed: Tensor) -> LinearSolution:
    """Return the better of two solutions for each row; only the rows in ``failed`` may change."""
    a, b = old.stats, new.stats
    solved, lower = b.row_status <= Status.fixed_steps, b.residual < a.residual
    better = failed & (solved | lower | (torch.isnan(a.residual) & ~torch.isnan(b.residual)))
    changed = bool(better.any())
    stats = SolveStats(
        torch.where(better, b.row_status, a.row_status),
        a.iterations + torch.where(failed, b.iterations, 0),
        torch.where(better, b.residual, a.residual),
        a.scale,
        vjps=a.vjps + b.vjps,
        jvps=a.jvps + b.jvps,
        contraction=a.contraction,  # a property of the map, best seen by the first method, which had all rows
        trace=b.trace if changed else a.trace,
        method=b.method if changed else a.method,
    )
    return LinearSolution(torch.where(better[:, None], new.value, old.value), stats)
