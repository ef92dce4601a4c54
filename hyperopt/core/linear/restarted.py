"""The driver of the linear solvers that work in cycles, each from a true residual.

    r = b - (I - M) x
    while a row is above its tolerance and steps are left:
        x <- the method's own cycle from (x, r), which ends when its recurrence says that all rows are done, or can do no more
        r = b - (I - M) x                                         measured, one product for all rows

What it guarantees:
- The residual that is reported was measured at the value that is returned. A recurrence only says when to measure.
- Rows stop one by one and do not move after. A cycle that made a row worse is undone for that row.
- A row whose right-hand side is 0 has the solution 0. Where ``x0`` is worse than 0, or not finite, its row starts at 0.
- With ``rtol=0, atol=0`` exactly ``max_steps`` steps are taken, but by rows at the rounding floor: nothing is left to gain.
- Tolerances are raised to the rounding floor of the dtype, which no residual can pass.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, LinearSolver, MatVec
from hyperopt.core.loop import FLOOR, relative
from hyperopt.core.operator import as_operator
from hyperopt.core.status import SolveStats, Status

IDLE = 0.99  # a cycle that leaves more than this part of a row's residual ends the row


@dataclass
class Cycle:
    """What one cycle did.

    Attributes:
        x: its result, shape (rows, dim); rows that were not active are ignored.
        steps: steps taken by each row, shape (rows,).
        made: steps taken in all.
        broken: rows in which the method can do no more, shape (rows,).
        cause: the codes of ``Status`` that these end with, shape (rows,).
    """

    x: Tensor
    steps: Tensor
    made: int
    broken: Tensor
    cause: Tensor | Status = Status.breakdown


class Run:
    """One solve: products, and where each row stands.

    Attributes:
        x: best value so far, shape (rows, dim).
        r: ``b - (I - M) x``, shape (rows, dim).
        norm: ``||r||``, shape (rows,).
        active: rows above their tolerance, shape (rows,).
        target: residual at which a cycle may end, shape (rows,).
        left: steps left.
        kept: what a method keeps from one cycle to the next.
        vjps, jvps: products with ``M`` and with its transpose, for ``M = J^T``.
    """

    def __init__(self, solver: LinearSolver, matvec: MatVec, b: Tensor, x0: Tensor | None, trace: bool) -> None:
        """Measure the start."""
        self.solver, self.operator, self.b = solver, as_operator(matvec), b
        self.vjps = self.jvps = 0
        self.tracing = trace
        self.kept: Any = None
        self.left = solver.max_steps
        self.scale, self.norm = solver.sizes(b), torch.linalg.vector_norm(b, dim=1)
        self.x, self.r = torch.zeros_like(b), b
        self.iterations = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
        self.estimates: list[Tensor] = []
        if x0 is not None:
            r = self.residual(x0)
            norm = torch.linalg.vector_norm(r, dim=1)
            better = norm < self.norm
            self.x, self.r = torch.where(better[:, None], x0, self.x), torch.where(better[:, None], r, self.r)
            self.norm = torch.where(better, norm, self.norm)
        finite = torch.isfinite(self.norm)
        status = Status.fixed_steps if solver.fixed else Status.max_steps
        self.status = torch.where(finite, int(status), int(Status.nonfinite))
        self.active = finite & ~self._met(finite)

    def product(self, v: Tensor) -> Tensor:
        """``(I - M) v``."""
        self.vjps += 1
        return self.operator.complement(v)

    def columns(self, places: Iterable[int]) -> Tensor:
        """The columns of ``I - M`` at ``places``, one product each, shape (rows, dim, places)."""
        found = []
        for i in places:
            direction = torch.zeros_like(self.b)
            direction[:, i] = 1.0
            found.append(self.product(direction))
        return torch.stack(found, dim=2)

    def transposed(self, v: Tensor) -> Tensor:
        """``(I - M)^T v``."""
        if not self.operator.transposable:
            raise TypeError(
                f"{self.solver.name} needs products with the transpose, which this operator does not offer: give a "
                "FunctionOperator with rmatvec, or choose another linear solver"
            )
        self.jvps += 1
        return v - self.operator.rmatvec(v)

    def residual(self, x: Tensor) -> Tensor:
        """``b - (I - M) x``, in one product."""
        return self.b - self.product(x)

    @property
    def target(self) -> Tensor:
        """The tolerance of each row, at least the rounding floor of a sum of terms as large as ``x``.

        The floor is at most ``sqrt(eps) ||b||``: a system so near to singular that rounding leaves more is not solved.
        """
        eps = torch.finfo(self.b.dtype).eps
        size = torch.maximum(torch.linalg.vector_norm(self.x, dim=1), self.scale)
        floor = torch.minimum(FLOOR * eps * size, math.sqrt(eps) * self.scale)
        return torch.maximum(self.solver.atol + self.solver.rtol * self.scale, floor)

    def _met(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` that are within their tolerance, settled."""
        met = rows & (self.norm <= self.target)
        return met if self.solver.fixed else self._settle(met, Status.converged)

    def _settle(self, rows: Tensor, status: Tensor | Status) -> Tensor:
        self.status = torch.where(rows, status if isinstance(status, Tensor) else int(status), self.status)
        return rows

    def note(self, estimate: Tensor) -> None:
        """Keep the largest residual over the active rows, by the recurrence of a cycle, for the trace."""
        if self.tracing:
            shown = torch.where(self.active, relative(estimate.to(self.scale.dtype), self.scale), 0.0)
            self.estimates.append(shown.max())

    def close(self, cycle: Cycle) -> None:
        """Measure the residual after a cycle, and settle the rows that are done or can do no more."""
        self.left -= cycle.made
        self.iterations = self.iterations + torch.where(self.active, cycle.steps, 0)
        x = torch.where(self.active[:, None], cycle.x, self.x)
        r = self.residual(x)
        norm, before = torch.linalg.vector_norm(r, dim=1), self.norm
        keep = self.active & torch.isfinite(norm) & ((norm < before) | self.solver.fixed)
        self.x, self.r = torch.where(keep[:, None], x, self.x), torch.where(keep[:, None], r, self.r)
        self.norm = torch.where(keep, norm, before)
        lost = self._settle(self.active & ~torch.isfinite(norm), Status.nonfinite)
        met = self._met(self.active & ~lost)
        open_ = self.active & ~lost & ~met
        broken = self._settle(open_ & cycle.broken, cycle.cause)
        idle = open_ & ~broken & ~(norm <= IDLE * before)
        if self.solver.fixed:
            idle = torch.zeros_like(idle)
        self.active = open_ & ~broken & ~self._settle(idle, Status.stagnated)

    def solution(self) -> LinearSolution:
        """The value and its statistics."""
        lost = self.status == int(Status.nonfinite)
        # A row without any finite product has its right-hand side for a value, as with the other methods: 0 would hide it.
        value = torch.where((lost & (self.x == 0).all(dim=1))[:, None], self.b, self.x)
        stats = SolveStats(
            self.status,
            self.iterations,
            torch.where(lost, math.nan, relative(self.norm, self.scale)),
            self.scale,
            vjps=self.vjps,
            jvps=self.jvps,
            trace=torch.stack(self.estimates) if self.estimates else self.b.new_empty(0),
            method=self.solver.name,
        )
        return LinearSolution(value, stats)


class RestartedSolver(LinearSolver):
    """A linear solver of cycles; a method is one ``cycle``, which must mix no rows and change no tensor of the run in place."""

    def solve(self, matvec: MatVec, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Run cycles until every row is settled; starts at 0 by default."""
        run = Run(self, matvec, b, x0, trace)
        while run.left > 0 and bool(run.active.any()):
            run.close(self.cycle(run))
        return run.solution()

    @abstractmethod
    def cycle(self, run: Run) -> Cycle:
        """From ``run.x`` and its residual ``run.r``, at most ``run.left`` steps, until the active rows are at ``run.target``."""


def unit(w: Tensor, length: Tensor, live: Tensor) -> Tensor:
    """``w / length`` in the live rows, zeros in the others, whatever they hold."""
    return freeze(w / length[:, None], live)


def freeze(v: Tensor, live: Tensor) -> Tensor:
    """``v`` in the live rows, zeros in the others, whatever they hold; no copy where all are live."""
    return v if bool(live.all()) else torch.where(live[:, None], v, 0.0)
