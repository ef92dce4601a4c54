"""The loop's process for a fixed point ``w = phi(w)``, to a tolerance or for a fixed number of steps.

    residual_i = ||phi(w)_i - w_i||           limit_i = atol + rtol s_i

The scale ``s_i`` is ``||phi(w)_i||``, clamped to a range that comes from the start, with ``ref = max(||w_0||, ||phi(w_0)||)``.
It is at least ``eps ref``, so that a solution at exactly 0 can be met. It is at most 10 ``ref``, or what the residual at the
start allows, so that a state that runs away does not loosen its own tolerance. For a linear system the caller gives the scale.

- If a derivative of the solve is wanted, it ends with one more evaluation of all rows by ``last``, in which the caller builds
  its graph. This evaluation is at the value itself for a method that linearizes; for others it is one step later, which is
  free.
- With ``rtol=0, atol=0`` exactly ``max_steps`` steps are made, and the host reads nothing. The value is the iterate after
  them. The last evaluation is at the iterate before it, so that T steps cost T evaluations; for a method that linearizes it is
  at the value itself.
- Tolerances are raised to the rounding floor of the dtype, below which no residual can fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.captured import functorch_level
from hyperopt.core.draws import Watching
from hyperopt.core.loop import relative, rounding_floor, run
from hyperopt.core.process import Outcome, Process
from hyperopt.core.rowwise import distance
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Cost, Map, Point
from hyperopt.core.status import SolveStats, Status

GROWN = 10.0  # a state this many times the problem's own size is solved only if its residual has also fallen
FALLEN = 1e-2  # to this fraction of the first residual


@dataclass
class Iterate:
    """The result of a run.

    Attributes:
        value: the solution, shape (rows, dim).
        stats: statistics of the run.
        solver: the method that was used.
        state: the method's state at the end, for all rows; None if rows were dropped.
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
    rounding: float = 0.0,
) -> Iterate:
    """Run ``solver`` on ``phi`` from ``w0``.

    Args:
        solver: the method; its ``rtol``, ``atol`` and ``max_steps`` are the limits.
        phi: the map on (rows, dim) matrices.
        w0: initial state, shape (rows, dim).
        last: a map that replaces ``phi`` in one more evaluation of all rows, at the value. Without it, the value is the
            iterate that met the tolerance.
        some: a function that returns the map of the rows in ``index``, or None. If it is given, stopped rows are dropped.
        scale: what each row's residual is relative to, shape (rows,); by default as in the module's docstring.
        trace: whether to measure the residual at every evaluation even if the number of steps is fixed.
        rounding: the eps of the numbers that ``phi`` returns, if it is larger than that of the dtype.

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
    process = FixedPointProcess(solver, phi, w0, last, some, scale, rounding)
    outcome = run(process, solver.max_steps)
    return Iterate(process.value, process.stats(outcome), solver, None if outcome.parted else process.state)


class FixedPointProcess(Process):
    """A forward solver applied to a map; see ``iterate``."""

    def __init__(
        self,
        solver: FixedPointSolver,
        phi: Map,
        w0: Tensor,
        last: Map | None,
        some: Callable[[Tensor], Map | None] | None,
        scale: Tensor | None,
        rounding: float = 0.0,
    ) -> None:
        self.solver, self.phi, self.last, self.some = solver, phi, last, some
        self.given = None if scale is None else positive(scale)
        self.closes, self.steps_at_the_end = last is not None, not solver.linearizes
        self.rise, self.attentive, self.holds, self.divisible = solver.rise, solver.linearizes, solver.holds, some is not None
        self.steady = not solver.holds
        self._set_floor(rounding_floor(w0.dtype, w0.device, rounding))
        # Under autocast the first evaluation shows whether the map has lower precision; until then it is assumed.
        self.unseen = torch.is_autocast_enabled(w0.device.type) and not functorch_level()
        self.rounding = rounding
        # With an absolute tolerance the loop's ratios are not relative residuals, so these are recorded here.
        self.trace: list[Tensor] = []
        self.cost = Cost()
        self.w, self.state = w0, solver.init(w0)
        self.part: Map = phi  # the map on the rows of the batch
        self.rows: Tensor | None = None  # the rows in the batch, after others were dropped
        self.home: Tensor | None = None  # the iterates of all rows, after some were dropped
        self.moving: Tensor | None = None
        self.at: Point | None = None
        self.bounds: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # for all rows: see ``_bounds``
        self.size: Tensor = w0

    def _set_floor(self, floor: float) -> None:
        """Set the least relative residual that can be asked for."""
        self.floor = floor
        self.rtol = max(self.solver.rtol, floor)
        self.clear = 4 * floor / self.rtol if not self.solver.atol else 0.0

    def _observe(self) -> Point:
        """Evaluate the map at the iterate, and set the floor by the precision in which it was computed."""
        self.unseen = False
        with Watching() as seen:
            at = Point(self.part, self.w, self.cost, graph=self.solver.linearizes)
            _ = at.fw
        self._set_floor(rounding_floor(self.w.dtype, None, max(self.rounding, seen.eps)))
        return at

    @property
    def value(self) -> Tensor:
        """The present iterate of the batch."""
        return self.w

    def measure(self, *, closing: bool = False) -> Tensor:
        """Evaluate the map at the iterate, unless the step that led there has done so."""
        at, self.at = following(self.at, self.w), None  # release what the last step has used
        if closing:
            assert self.last is not None
            self.cost.evaluations += 1
            at = Point(self.phi, self.w, self.cost, self.last(self.w))
        elif at is None and self.unseen:
            at = self._observe()
        elif at is None:
            at = Point(self.part, self.w, self.cost, graph=self.solver.linearizes)
        at.active = self.moving
        self.at = at
        norm = torch.linalg.vector_norm(at.residual, dim=1) if self.solver.takes_residual else distance(at.fw, at.w)
        if self.bounds is None and self.given is None:
            self.bounds = self._bounds(at, norm)
        if self.solver.atol:
            self.trace.append(relative(norm, self._scale()).amax())
        return norm

    def _bounds(self, at: Point, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the least and largest scale of each row, the size above which its state has grown, and the first residual."""
        ref = torch.maximum(torch.linalg.vector_norm(at.w, dim=1), torch.linalg.vector_norm(at.fw, dim=1))
        if len(ref) > 1:
            ref = torch.where(ref > 0, ref, ref.amax())  # a row that starts at 0 has no size itself
        grown = GROWN * ref
        most = torch.maximum(grown, (FALLEN / self.rtol) * residual)
        return positive(torch.finfo(ref.dtype).eps * ref), most, grown, residual

    def _here(self, vector: Tensor) -> Tensor:
        return vector if self.rows is None else vector[self.rows]

    def _scale(self) -> Tensor:
        """Return what the residuals are relative to now."""
        if self.given is not None:
            return self._here(self.given)
        assert self.at is not None and self.bounds is not None
        self.size = torch.linalg.vector_norm(self.at.fw, dim=1)
        return torch.clamp(self.size, self._here(self.bounds[0]), self._here(self.bounds[1]))

    def limits(self) -> Tensor:
        """Return ``atol + rtol s``."""
        limit = self.rtol * self._scale()
        return limit + self.solver.atol if self.solver.atol else limit

    def step(self) -> None:
        """Make one step of the method."""
        at = self.at
        assert at is not None
        w, self.state = self.solver.step(self.state, at)
        if at.broken is not None and bool(at.broken.any()):
            broken = at.broken if self.moving is None else at.broken & self.moving
            code = torch.where(broken, int(Status.breakdown), 0)
            self.faults = code if self.faults is None else torch.maximum(self.faults, code)
            self.moving = ~broken if self.moving is None else self.moving & ~broken
        self.w = w if self.moving is None else torch.where(self.moving[:, None], w, self.w)

    def hold(self, moving: Tensor) -> None:
        """Let only the rows in the mask ``moving`` move; a method may spare work on the others."""
        self.moving = moving
        if self.at is not None:
            self.at.active = moving

    def replace(self, rows: Tensor, by: Tensor) -> None:
        """Set other iterates in some rows; they will be evaluated again."""
        self.w = torch.where(rows[:, None], by, self.w)

    def select(self, index: Tensor) -> bool:
        """Drop the other rows, if the map is available for some rows."""
        if self.some is None:
            return False
        rows = index if self.rows is None else self.rows[index]
        part = self.some(rows)
        if part is None:
            self.some, self.divisible = None, False
            return False
        if self.home is None:
            self.home = self.w.clone()
        elif self.rows is not None:
            self.home.index_copy_(0, self.rows, self.w)
        at = self.at
        assert at is not None
        self.part, self.rows, self.moving, self.faults = part, rows, None, None
        self.w, self.state = self.w[index], self.solver.select(self.state, index)
        if self.solver.linearizes or at.trial is not None:
            self.at = Point(part, self.w, self.cost, graph=self.solver.linearizes)
        else:
            self.at = Point(part, self.w, self.cost, at.fw[index])
        return True

    def whole(self) -> None:
        """Continue with all rows; the method starts with an empty history."""
        assert self.home is not None and self.rows is not None
        self.w = self.home.index_copy_(0, self.rows, self.w)
        self.part, self.rows, self.home, self.moving, self.faults, self.at = self.phi, None, None, None, None, None
        self.state = self.solver.init(self.w)

    def reconsider(self, status: Tensor, residual: Tensor, settled: bool) -> Tensor:
        """Mark rows whose state has run away as diverged, and rows at the rounding floor of a large state as converged."""
        if self.bounds is None or self.size.shape != status.shape:
            return status
        _, _, grown, first = self.bounds
        large, rounding = self.size > grown, self.floor * self.size
        lost = large & (rounding > first)
        status = status.masked_fill(lost, int(Status.diverged))
        if settled:
            return status
        left = (status == int(Status.max_steps)) | (status == int(Status.stagnated))
        status = status.masked_fill(left & (residual <= rounding), int(Status.converged))
        return status.masked_fill(left & (residual > rounding) & large & (residual > FALLEN * first), int(Status.diverged))

    def stats(self, outcome: Outcome) -> SolveStats:
        """Return the statistics of a run."""
        scale = (outcome.limits - self.solver.atol if self.solver.atol else outcome.limits) / self.rtol
        seen = [ratio * self.rtol for ratio in outcome.trace]
        return SolveStats(
            outcome.status,
            outcome.iterations,
            outcome.residual / scale,
            scale,
            evaluations=self.cost.evaluations,
            vjps=self.cost.vjps,
            jvps=self.cost.jvps,
            contraction=outcome.contraction,
            trace=torch.stack(self.trace) if self.trace else torch.tensor(seen, dtype=outcome.residual.dtype),
            method=self.solver.name,
        )


def positive(scale: Tensor) -> Tensor:
    """Return ``scale`` with zeros replaced by a tiny number, since residuals are divided by it."""
    info = torch.finfo(scale.dtype)
    return scale.clamp(min=info.tiny / info.eps)


def following(at: Point | None, w: Tensor) -> Point | None:
    """Return the point at the iterate ``w`` if the step from ``at`` has already evaluated the map there, else None."""
    return at.trial if at is not None and at.trial is not None and at.trial.w is w else None


def _fixed(solver: FixedPointSolver, phi: Map, w0: Tensor, last: Map, scale: Tensor | None, trace: bool) -> Iterate:
    """Make exactly ``max_steps`` steps; the residual is measured at the last evaluation and at two before it."""
    end = solver.max_steps if solver.linearizes else solver.max_steps - 1  # index of the last evaluation
    probes = {min(1, end), max(0, end - 4), end}
    w, state, cost = w0, solver.init(w0), Cost()
    norms: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    broken, at = None, None
    for k in range(end + 1):
        if k == end:
            cost.evaluations += 1
            at = Point(phi, w, cost, last(w))
        else:
            at = following(at, w) or Point(phi, w, cost, graph=solver.linearizes)
        if trace or k in probes:
            norms[k] = distance(at.fw, w)
            sizes[k] = torch.linalg.vector_norm(at.fw, dim=1) if scale is None else scale
        if k < solver.max_steps:
            at.active = None if broken is None else ~broken
            w, state = solver.step(state, at)
            if at.broken is not None:
                broken = at.broken if broken is None else broken | at.broken
                w = torch.where(broken[:, None], at.w, w)
    stats = SolveStats.of_steps(
        solver.max_steps,
        relative(norms[end], sizes[end]),
        sizes[end],
        evaluations=cost.evaluations,
        vjps=cost.vjps,
        jvps=cost.jvps,
        contraction=_decay(norms, sizes[end], end, rounding_floor(w0.dtype, w0.device)),
        trace=torch.stack([relative(norms[k], sizes[k]).max() for k in sorted(norms)]) if trace else w0.new_empty(0),
        method=solver.name,
    )
    if broken is not None:
        stats.row_status = stats.row_status.masked_fill(broken & torch.isfinite(stats.residual), int(Status.breakdown))
    return Iterate(w, stats, solver, state)


def _decay(norms: dict[int, Tensor], size: Tensor, end: int, floor: float) -> Tensor | float:
    """Return the contraction factor, from the decay of the residual of all rows over the last steps; NaN if it is unknown.

    For a rotation of radius 0.9 this gives 0.9, where a Rayleigh quotient would give 0. If the residual is at the rounding
    floor, the decay over the whole run is used.
    """
    early, late = min(1, end), max(0, end - 4)
    if early == end:
        return math.nan
    late = late if late < end else early
    first, before, now = torch.linalg.vector_norm(torch.stack([norms[early], norms[late], norms[end]]), dim=1)
    clear = now > 4 * floor * torch.linalg.vector_norm(size)
    return torch.where(clear, (now / before) ** (1 / (end - late)), (now / first) ** (1 / (end - early)))
