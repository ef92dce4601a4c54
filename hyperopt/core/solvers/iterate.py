"""The driver of every fixed-point method: stopping, freezing, best iterate and statistics.

    k = 1, 2, ...:   fw = phi(w);  residual_i = ||fw_i - w_i||;  row i stops at residual_i <= atol + rtol ||fw_i||

What it guarantees:
- A residual is always ``||phi(w) - w||`` of the iterate that it is reported for, measured, never a step length.
- Rows stop one by one. A row that has stopped does not move, and is dropped from the batch where the map can take a part of
  its rows. One last evaluation of all rows ends every solve; a stopped row whose residual rose there is ``coupled_rows``.
- That last evaluation is made through ``last``, in which the caller builds its graph, so no evaluation is spent on it.
- With ``rtol=0, atol=0`` exactly ``max_steps`` steps are made. The value is the iterate after them; the last evaluation is at the
  iterate before it, so that T steps are T evaluations, but at the value itself for a method that linearises, whose step is so
  long that a graph from before it would be that of another state.
- A step may take more from its ``Point`` than ``phi(w)``; evaluations, vjps and jvps are counted there.
- Tolerances are raised to the rounding floor of the dtype, which no residual can pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Cost, Map, Point
from hyperopt.core.status import SolveStats, Status

FLOOR = 16.0  # times eps: the least relative residual that rounding lets a map of some hundred terms reach
DROP = 0.75  # rows are dropped from a batch when at most this part of them is left
COUPLED = 4.0  # a stopped row may rise to this many times its tolerance by rounding alone


def rounding_floor(dtype: torch.dtype) -> float:
    """The least relative residual that can be asked for in ``dtype``."""
    return FLOOR * torch.finfo(dtype).eps


@dataclass
class Iterate:
    """Result of a driver run.

    Attributes:
        value: shape (rows, dim).
        stats: its statistics.
        solver: the method that gave it.
        state: the method's state at the end, of all rows; None if rows were dropped.
    """

    value: Tensor
    stats: SolveStats
    solver: FixedPointSolver
    state: Any = None


def iterate(
    solver: FixedPointSolver,
    phi: Map,
    w0: Tensor,
    *,
    last: Map | None = None,
    some: Callable[[Tensor], Map | None] | None = None,
    scale: Tensor | None = None,
    trace: bool = False,
) -> Iterate:
    """Run ``solver`` on ``phi`` from ``w0``.

    Args:
        solver: the method; its ``rtol``, ``atol`` and ``max_steps`` are the limits.
        phi: the map on (rows, dim) matrices.
        w0: initial state, shape (rows, dim).
        last: used in place of ``phi`` for the last evaluation, of all rows. Without it no evaluation is made after the
            tolerance is met, and the value is the iterate at which it was.
        some: ``some(index)`` is the map of the rows in ``index``, or None; given, stopped rows are dropped.
        scale: what each row's residual is relative to, shape (rows,); by default ``||phi(w)||``.
        trace: measure the residual at every evaluation, also when the number of steps is fixed.

    Returns:
        The value and its statistics.
    """
    if w0.numel() == 0:
        (last or phi)(w0)
        empty = w0.new_zeros(w0.shape[0])
        zeros = torch.zeros_like(empty, dtype=torch.long)
        stats = SolveStats(zeros + Status.converged, zeros, empty, empty, evaluations=1, method=solver.name)
        return Iterate(w0, stats, solver, solver.init(w0))
    if solver.fixed:
        return _fixed(solver, phi, w0, last or phi, scale, trace)
    return _Adaptive(solver, phi, w0, last, some, scale).run()


def relative(difference: Tensor, scale: Tensor) -> Tensor:
    """``difference / scale``, 0 where both are 0."""
    return torch.where(difference == 0, torch.zeros_like(difference), difference / scale)


def _fixed(solver: FixedPointSolver, phi: Map, w0: Tensor, last: Map, scale: Tensor | None, trace: bool) -> Iterate:
    """Exactly ``max_steps`` steps; the residual is measured at the last evaluation and at two before it."""
    end = solver.max_steps if solver.linearizes else solver.max_steps - 1  # index of the last evaluation
    probes = {min(1, end), max(0, end - 4), end}
    w, state, cost = w0, solver.init(w0), Cost()
    residuals: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    size, broken, at = w0, None, None
    for k in range(end + 1):
        at = _evaluate(solver, phi, w, cost, last) if k == end else following(at, w) or _evaluate(solver, phi, w, cost)
        if trace or k in probes:
            difference, size = torch.linalg.vector_norm(at.fw - w, dim=1), torch.linalg.vector_norm(at.fw, dim=1)
            residuals[k] = relative(difference, size if scale is None else scale)
            norms[k] = torch.linalg.vector_norm(difference)
        if k < solver.max_steps:
            at.active = None if broken is None else ~broken
            w, state = solver.step(state, at)
            if at.broken is not None:
                broken = at.broken if broken is None else broken | at.broken
                w = torch.where(broken[:, None], at.w, w)
    residual = residuals[end]
    status = torch.where(torch.isfinite(residual), int(Status.fixed_steps), int(Status.nonfinite))
    if broken is not None:
        status = torch.where(broken & torch.isfinite(residual), int(Status.breakdown), status)
    late, floor = max(0, end - 4), 4 * rounding_floor(w0.dtype) * float(torch.linalg.vector_norm(size))
    start = late if float(norms[end]) > floor else min(1, end)  # at the rounding floor only the whole run tells
    stats = SolveStats(
        status,
        torch.full_like(status, solver.max_steps),
        residual,
        size if scale is None else scale,
        evaluations=cost.evaluations,
        vjps=cost.vjps,
        jvps=cost.jvps,
        contraction=_rate(float(norms[start]), float(norms[end]), end - start),
        trace=torch.stack([residuals[k].max() for k in sorted(residuals)]) if trace else w0.new_empty(0),
        method=solver.name,
    )
    return Iterate(w, stats, solver, state)


def _evaluate(solver: FixedPointSolver, phi: Map, w: Tensor, cost: Cost, last: Map | None = None) -> Point:
    """The map at ``w``: by ``last``, which builds the caller's graph, or in the way that the method's step needs."""
    if last is None:
        return Point(phi, w, cost, graph=solver.linearizes)
    cost.evaluations += 1
    return Point(phi, w, cost, last(w))


def following(at: Point | None, w: Tensor) -> Point | None:
    """The point of the iterate ``w``, if the step that led there from ``at`` has evaluated the map at it."""
    return at.trial if at is not None and at.trial is not None and at.trial.w is w else None


def _rate(first: float, end: float, steps: int) -> float:
    """Contraction factor from the decay of the residual norm over ``steps`` steps; NaN where it cannot be told.

    A Rayleigh quotient would say 0 for a rotation of radius 0.9; the decay says 0.9.
    """
    known = steps > 0 and first > 0 and math.isfinite(first) and math.isfinite(end)
    return (end / first) ** (1.0 / steps) if known else math.nan


class _Adaptive:
    """A run to a tolerance, row by row."""

    def __init__(
        self,
        solver: FixedPointSolver,
        phi: Map,
        w0: Tensor,
        last: Map | None,
        some: Callable[[Tensor], Map | None] | None,
        scale: Tensor | None,
    ) -> None:
        self.solver, self.phi, self.last, self.some, self.given_scale = solver, phi, last, some, scale
        rows = w0.shape[0]
        # The batch: the rows that are evaluated, all of them (index None) or those left when stopped rows were dropped. Its
        # matrices have only these rows, so that a row that was dropped costs nothing more; vectors below are of all rows.
        self.index: Tensor | None = None
        self.part = phi  # the map of the batch
        self.w = self.best_w = w0  # (batch, dim): the iterate, and the one of least residual, of every row
        self.home: tuple[Tensor, Tensor] | None = None  # both of all rows, up to date in those that are not in the batch
        self.active = torch.ones(rows, dtype=torch.bool, device=w0.device)
        self.status = torch.full((rows,), int(Status.max_steps), device=w0.device)
        self.iterations = torch.zeros(rows, dtype=torch.long, device=w0.device)
        self.residual = w0.new_full((rows,), math.inf)  # relative
        self.best = w0.new_full((rows,), math.inf)  # absolute residual norms
        self.first = w0.new_full((rows,), math.inf)
        self.best_at = torch.zeros_like(self.iterations)
        self.floor = rounding_floor(w0.dtype)
        self.difference = self.scale = self.tolerance = self.best  # absolute residual norms, what they are relative to, limits
        self.met = self.lost = torch.zeros_like(self.active)  # rows that the latest evaluation ended well, and badly
        # Rows put back on their best iterate at the end, and those of them whose best is the first: they only grew.
        self.returned = self.grew = torch.zeros_like(self.active)
        self.trace: list[Tensor] = []
        self.ratios: list[Tensor] = []  # decay of the residual from one evaluation to the next, over the rows in both
        self.cost = Cost()
        self.ahead: Point | None = None  # the next iterate's point, if the step that led there has evaluated it

    def run(self) -> Iterate:
        solver = self.solver
        state = solver.init(self.w)
        settling = False  # every row met its tolerance: the next evaluation is the last, if it says so too
        for k in range(1, solver.max_steps + 1):
            closing = self.last is not None and (settling or k == solver.max_steps)
            if closing:
                if self.index is not None:
                    self._whole()
                    state = None  # all rows are back; a method's history is not
                if k == solver.max_steps and not settling and k > 1:
                    self._take_best()
                at = _evaluate(solver, self.phi, self.w, self.cost, self.last)
                self._measure(k, at, closing=True)
                if self._closed(k):
                    break
                settling = False
                state = solver.init(self.w) if state is None else state
            else:
                at = self.ahead or _evaluate(solver, self.part, self.w, self.cost)
                self._measure(k, at)
                if self.last is None and not bool(self.active.any()):
                    break
            state = self._advance(state, at)
            settling = not bool(self.active.any())
        parted = self.index is not None
        self._whole()
        if self.last is None:
            self._take_best()
        return self._result(None if parted else state)

    def _whole(self) -> None:
        """Make all rows the batch again."""
        if self.home is not None and self.index is not None:
            self.w, self.best_w = (x.index_copy_(0, self.index, y) for x, y in zip(self.home, (self.w, self.best_w), strict=True))
        self.home, self.index, self.part, self.ahead = None, None, self.phi, None

    def _of_all(self, batch: Tensor, other: float) -> Tensor:
        """A vector of all rows from one of the batch, with ``other`` in the rest."""
        return (
            batch
            if self.index is None
            else torch.full_like(self.status, other, dtype=batch.dtype).index_copy(0, self.index, batch)
        )

    def _of_batch(self, rows: Tensor) -> Tensor:
        """The entries of the batch in a vector of all rows."""
        return rows if self.index is None else rows[self.index]

    def _measure(self, k: int, at: Point, *, closing: bool = False) -> None:
        """Residuals of the rows in the batch, what they say of each row, and the best iterate of each."""
        difference = self._of_all(torch.linalg.vector_norm(at.fw - at.w, dim=1), 0.0)
        size = self._of_all(torch.linalg.vector_norm(at.fw, dim=1), 1.0)
        scale = size if self.given_scale is None else self.given_scale
        self.tolerance = torch.maximum(self.solver.atol + self.solver.rtol * scale, self.floor * size)
        seen = self.active
        if k > 1:
            clear = seen & ~self.returned & (difference > 4 * self.floor * size)
            norms = [torch.linalg.vector_norm(torch.where(clear, x, 0.0)) for x in (difference, self.difference)]
            self.ratios.append(norms[0] / norms[1])
        self.difference, self.scale = difference, scale
        self.first = torch.where(seen & torch.isinf(self.first), difference, self.first)
        self.residual = torch.where(seen, relative(difference, scale), self.residual)
        self.iterations = torch.where(seen, k, self.iterations)
        self._keep_best(k, seen & (difference < self.best))
        shown = seen | (self.status == int(Status.converged)) if closing else seen
        self.trace.append(torch.where(shown, relative(difference, scale), 0.0).max())
        finite = torch.isfinite(difference)
        met = seen & (difference <= self.tolerance)
        grown = seen & finite & (difference > self.solver.rise * self.best) & (difference > self.first)
        self.status = torch.where(met, int(Status.converged), self.status)
        self.status = torch.where(seen & ~finite, int(Status.nonfinite), self.status)
        self.status = torch.where(grown, int(Status.diverged), self.status)
        self.met, self.lost = met, seen & (grown | ~finite)
        self.active = seen & ~met & ~self.lost
        self._replace(self.lost, self.best_w)

    def _keep_best(self, k: int, better: Tensor) -> None:
        """Keep the iterates of the rows that are ``better`` than before; those of rows at their best already need no copy."""
        kept = self._of_batch(self.difference <= self.best)
        if bool(kept.all()):
            self.best_w = self.w
        elif bool(better.any()):
            self.best_w = torch.where(self._of_batch(better)[:, None], self.w, self.best_w)
        self.best = torch.where(better, self.difference, self.best)
        self.best_at = torch.where(better, k, self.best_at)

    def _replace(self, rows: Tensor, by: Tensor) -> None:
        """Let rows of the batch have other iterates."""
        if bool(rows.any()):
            self.w = torch.where(self._of_batch(rows)[:, None], by, self.w)

    def _advance(self, state: object, at: Point) -> object:
        """Step the rows that have not stopped; rows that stop together at the very end take their step too, if it is free."""
        moving, self.ahead = self.active, None
        if self.last is not None and not bool(moving.any()):
            moving = self.met  # the last evaluation measures this step
            if self.solver.linearizes or not bool(moving.any()):
                return state
        batch = self._of_batch(moving)
        at.active = None if bool(batch.all()) else batch
        stepped, state = self.solver.step(state, at)
        if at.broken is not None:
            moving = self._break(self._of_all(at.broken, False), moving)
            batch = self._of_batch(moving)
        if bool(batch.all()):
            self.w, self.ahead = stepped, following(at, stepped)
        else:
            self.w = torch.where(batch[:, None], stepped, self.w)
        return self._drop(state)

    def _drop(self, state: object) -> object:
        """Take the rows that have stopped out of the batch, where that is worth it and the map can be taken apart."""
        if self.some is None:
            return state
        left, batch = int(self.active.sum()), self.active.numel() if self.index is None else self.index.numel()
        if not 0 < left <= DROP * batch:
            return state
        wanted = self.active.nonzero().squeeze(1)
        part = self.some(wanted)
        if part is None:
            self.some = None
            return state
        inside = wanted
        if self.home is None:
            self.home = self.w.clone(), self.best_w.clone()
        elif self.index is not None:
            inside = torch.searchsorted(self.index, wanted)
            for x, y in zip(self.home, (self.w, self.best_w), strict=True):
                x.index_copy_(0, self.index, y)
        same = self.best_w is self.w
        self.w = self.w[inside]
        self.best_w = self.w if same else self.best_w[inside]
        self.part, self.index, self.ahead = part, wanted, None
        return self.solver.select(state, inside)

    def _break(self, broken: Tensor, moving: Tensor) -> Tensor:
        """End rows in which the method broke down, on their best iterate; returns the rows that still take their step."""
        ended = broken & self.active
        self.status = torch.where(ended, int(Status.breakdown), self.status)
        self.active = self.active & ~ended
        self._replace(ended, self.best_w)
        return moving & ~broken

    def _closed(self, k: int) -> bool:
        """After an evaluation of all rows: settle the statuses, or say that the run must go on."""
        done = self.status == int(Status.converged)
        risen = done & ~(self.difference <= self.tolerance)
        if not bool(risen.any()) and not bool(self.active.any()):
            self.residual = torch.where(done, relative(self.difference, self.scale), self.residual)
            return True
        coupled = risen & ~(self.difference <= COUPLED * self.tolerance) & (self.iterations < k - 1)
        if bool(coupled.any()):
            self.status = torch.where(coupled, int(Status.coupled_rows), self.status)
            self.residual = torch.where(done, relative(self.difference, self.scale), self.residual)
            return True
        self.residual = torch.where(done, relative(self.difference, self.scale), self.residual)
        if k == self.solver.max_steps:
            self.status = torch.where(risen, int(Status.max_steps), self.status)
            return True
        self.active = self.active | risen
        return False

    def _take_best(self) -> None:
        """Put every unfinished row back on its best iterate, unless its next one is the natural successor of the best."""
        if self.last is None:
            unfinished = self.status != int(Status.converged)
            self._replace(unfinished, self.best_w)
            self.residual = torch.where(unfinished, relative(self.best, self.scale), self.residual)
            return
        stale = self.active & (self.difference > self.best)
        self.returned, self.grew = stale, stale & (self.difference > self.first) & (self.best_at == 1)
        self._replace(stale, self.best_w)

    def _result(self, state: object) -> Iterate:
        unfinished = self.status == int(Status.max_steps)
        if bool(unfinished.any()):
            window = max(10, self.solver.max_steps // 5)
            grew = unfinished & ((self.difference > self.first) | self.grew)
            idle = unfinished & ~grew & (self.iterations - self.best_at >= window)
            self.status = torch.where(grew, int(Status.diverged), self.status)
            self.status = torch.where(idle, int(Status.stagnated), self.status)
        clear = [x for x in torch.stack(self.ratios).tolist() if math.isfinite(x) and x > 0][-5:] if self.ratios else []
        stats = SolveStats(
            self.status,
            self.iterations,
            self.residual,
            self.scale,
            evaluations=self.cost.evaluations,
            vjps=self.cost.vjps,
            jvps=self.cost.jvps,
            contraction=math.prod(clear) ** (1.0 / len(clear)) if clear else math.nan,
            trace=torch.stack(self.trace),
            method=self.solver.name,
        )
        return Iterate(self.w, stats, self.solver, state)
