"""A fixed-point method at work: the loop's process for ``w = phi(w)``, to a tolerance or for a fixed number of steps.

    residual_i = ||phi(w)_i - w_i||           limit_i = atol + rtol s_i

The scale ``s_i`` is ``||phi(w)_i||``, kept between two numbers that the problem sets at the start, ``ref = max(||w_0||,
||phi(w_0)||)``: at least ``eps ref``, so that a solution at exactly 0 can be met, and at most 10 ``ref``, or what the residual at
the start allows, so that a state that runs away does not take its own size for a tolerance. A linear system gives its scale.

- One last evaluation of all rows ends a solve that a derivative is wanted of, made through ``last``, in which the caller builds
  its graph. It is made one step after the tolerance was met, which is free; at the value itself for a method that linearizes.
- With ``rtol=0, atol=0`` exactly ``max_steps`` steps are made, and nothing is read. The value is the iterate after them; the last
  evaluation is at the iterate before it, so that T steps are T evaluations, but at the value itself for a method that linearizes.
- Tolerances are raised to the rounding floor of the dtype, which no residual can pass.
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

GROWN = 10.0  # a state this many times the problem's own size has to show more than a small relative residual
FALLEN = 1e-2  # namely a residual that has fallen to this part of the first


@dataclass
class Iterate:
    """Result of a run.

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
    rounding: float = 0.0,
) -> Iterate:
    """Run ``solver`` on ``phi`` from ``w0``.

    Args:
        solver: the method; its ``rtol``, ``atol`` and ``max_steps`` are the limits.
        phi: the map on (rows, dim) matrices.
        w0: initial state, shape (rows, dim).
        last: used in place of ``phi`` for one more evaluation of all rows, of the value. Without it none is made after the
            tolerance is met, and the value is the iterate at which it was.
        some: ``some(index)`` is the map of the rows in ``index``, or None; given, stopped rows are dropped.
        scale: what each row's residual is relative to, shape (rows,); by default see above.
        trace: measure the residual at every evaluation, also when the number of steps is fixed.
        rounding: the eps of the numbers that ``phi`` returns, where that is larger than the dtype's own.

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
    """A solver on a map; see ``iterate``."""

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
        """Nothing is evaluated yet."""
        self.solver, self.phi, self.last, self.some = solver, phi, last, some
        self.given = None if scale is None else positive(scale)
        self.closes, self.steps_at_the_end = last is not None, not solver.linearizes
        self.rise, self.attentive, self.holds, self.divisible = solver.rise, solver.linearizes, solver.holds, some is not None
        self.steady = not solver.holds
        self._set_floor(rounding_floor(w0.dtype, w0.device, rounding))
        # What autocast lowers of the map, the first evaluation shows; until then it is taken to be all.
        self.unseen = torch.is_autocast_enabled(w0.device.type) and not functorch_level()
        self.rounding = rounding
        # With an absolute tolerance the loop's ratios are not relative residuals, which are then taken at every evaluation.
        self.trace: list[Tensor] = []
        self.cost = Cost()
        self.w, self.state = w0, solver.init(w0)
        self.part: Map = phi  # the map of the batch
        self.rows: Tensor | None = None  # the rows in the batch, where others were dropped
        self.home: Tensor | None = None  # the iterates of all rows, where some were dropped
        self.moving: Tensor | None = None
        self.at: Point | None = None
        self.bounds: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # of all rows: see ``_bounds``
        self.size: Tensor = w0

    def _set_floor(self, floor: float) -> None:
        """Let ``floor`` be the least relative residual that is asked for."""
        self.floor = floor
        self.rtol = max(self.solver.rtol, floor)
        self.clear = 4 * floor / self.rtol if not self.solver.atol else 0.0

    def _observe(self) -> Point:
        """The point of the iterate, whose evaluation shows the precision of the map."""
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
        """Evaluate the map at the iterate, unless the step that led there did."""
        at, self.at = following(self.at, self.w), None  # what the last step has used makes room
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
        """Least and largest scale of each row, the size from which on a state counts as grown, and the first residual."""
        ref = torch.maximum(torch.linalg.vector_norm(at.w, dim=1), torch.linalg.vector_norm(at.fw, dim=1))
        if len(ref) > 1:
            ref = torch.where(ref > 0, ref, ref.amax())  # a row that starts at 0 has no size of its own
        grown = GROWN * ref
        most = torch.maximum(grown, (FALLEN / self.rtol) * residual)
        return positive(torch.finfo(ref.dtype).eps * ref), most, grown, residual

    def _here(self, vector: Tensor) -> Tensor:
        return vector if self.rows is None else vector[self.rows]

    def _scale(self) -> Tensor:
        """What the residuals are relative to now."""
        if self.given is not None:
            return self._here(self.given)
        assert self.at is not None and self.bounds is not None
        self.size = torch.linalg.vector_norm(self.at.fw, dim=1)
        return torch.clamp(self.size, self._here(self.bounds[0]), self._here(self.bounds[1]))

    def limits(self) -> Tensor:
        """``atol + rtol s``."""
        limit = self.rtol * self._scale()
        return limit + self.solver.atol if self.solver.atol else limit

    def step(self) -> None:
        """One step of the method."""
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
        """Rows that do not move keep their iterate, and a method may spare work on them."""
        self.moving = moving
        if self.at is not None:
            self.at.active = moving

    def replace(self, rows: Tensor, by: Tensor) -> None:
        """Other iterates in some rows, which will be evaluated anew."""
        self.w = torch.where(rows[:, None], by, self.w)

    def select(self, index: Tensor) -> bool:
        """Drop the other rows, where the map can be had for some."""
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
        """All rows again; a method's history is not."""
        assert self.home is not None and self.rows is not None
        self.w = self.home.index_copy_(0, self.rows, self.w)
        self.part, self.rows, self.home, self.moving, self.faults, self.at = self.phi, None, None, None, None, None
        self.state = self.solver.init(self.w)

    def reconsider(self, status: Tensor, residual: Tensor, settled: bool) -> Tensor:
        """Rows whose state has run away are not solved; rows at the rounding floor of a large state are."""
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
        """Statistics of a run."""
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
    """``scale``, raised where it is 0 to a number too small to mean anything else, since residuals are divided by it."""
    info = torch.finfo(scale.dtype)
    return scale.clamp(min=info.tiny / info.eps)


def following(at: Point | None, w: Tensor) -> Point | None:
    """The point of the iterate ``w``, if the step that led there from ``at`` has evaluated the map at it."""
    return at.trial if at is not None and at.trial is not None and at.trial.w is w else None


def _fixed(solver: FixedPointSolver, phi: Map, w0: Tensor, last: Map, scale: Tensor | None, trace: bool) -> Iterate:
    """Exactly ``max_steps`` steps; the residual is measured at the last evaluation and at two before it."""
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
    residual = relative(norms[end], sizes[end])
    status = torch.where(torch.isfinite(residual), int(Status.fixed_steps), int(Status.nonfinite))
    if broken is not None:
        status = torch.where(broken & torch.isfinite(residual), int(Status.breakdown), status)
    stats = SolveStats(
        status,
        torch.full_like(status, solver.max_steps),
        residual,
        sizes[end],
        evaluations=cost.evaluations,
        vjps=cost.vjps,
        jvps=cost.jvps,
        contraction=_decay(norms, sizes[end], end, rounding_floor(w0.dtype, w0.device)),
        trace=torch.stack([relative(norms[k], sizes[k]).max() for k in sorted(norms)]) if trace else w0.new_empty(0),
        method=solver.name,
    )
    return Iterate(w, stats, solver, state)


def _decay(norms: dict[int, Tensor], size: Tensor, end: int, floor: float) -> Tensor | float:
    """Contraction factor from the decay of the residual of all rows over the last steps; NaN where it cannot be told.

    A Rayleigh quotient would say 0 for a rotation of radius 0.9; the decay says 0.9. At the rounding floor only the whole run
    tells.
    """
    early, late = min(1, end), max(0, end - 4)
    if early == end:
        return math.nan
    late = late if late < end else early
    first, before, now = torch.linalg.vector_norm(torch.stack([norms[early], norms[late], norms[end]]), dim=1)
    clear = now > 4 * floor * torch.linalg.vector_norm(size)
    return torch.where(clear, (now / before) ** (1 / (end - late)), (now / first) ** (1 / (end - early)))
