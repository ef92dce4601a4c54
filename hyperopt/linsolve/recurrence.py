"""What the short-recurrence methods share within one cycle: the residual scaled to norm 1, live rows, the best value."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.linsolve.restarted import Cycle, Run, freeze, unit
from hyperopt.status import Status


class Recurrence:
    """One cycle of a method that updates ``d`` and its residual ``r = r_0 - A d``, of rows whose ``r_0`` has norm 1.

    Squares of a residual of norm 1 neither overflow nor underflow, so a loss scaled by any factor takes the same steps.

    Attributes:
        r0: the residual at the start, scaled to norm 1; zeros in rows that are done, shape (rows, dim).
        live: rows that still move, shape (rows,).
        eps: machine epsilon.
    """

    def __init__(self, run: Run) -> None:
        """Scale the residual."""
        self.run, self.live = run, run.active
        self.r0 = unit(run.r, run.norm, run.active)
        self.target = run.target / run.norm
        self.eps = torch.finfo(run.b.dtype).eps
        self.best = torch.ones_like(run.norm)
        self.kept = torch.zeros_like(run.b)
        self.steps = torch.zeros_like(run.iterations)
        self.broken = torch.zeros_like(run.active)
        self.cause = torch.full_like(run.status, int(Status.breakdown))
        self.made = 0

    @property
    def going(self) -> bool:
        """Whether there are steps left and rows to move."""
        return self.made < self.run.left and bool(self.live.any())

    def ratio(self, top: Tensor, bottom: Tensor) -> Tensor:
        """``top / bottom`` in the live rows, as a column; 0 in the others, which so stay where they are."""
        return torch.where(self.live, top / bottom, 0.0)[:, None]

    def freeze(self, v: Tensor) -> Tensor:
        """``v`` in the live rows, zeros in the others, whatever they hold."""
        return freeze(v, self.live)

    def break_down(self, rows: Tensor, cause: Tensor | None = None) -> None:
        """End rows in which the method can do no more, before this step changes them, with the codes of ``Status`` ``cause``."""
        ended = self.live & rows
        if cause is not None:
            self.cause = torch.where(ended, cause, self.cause)
        self.broken = self.broken | ended
        self.live = self.live & ~rows

    def advance(self, d: Tensor, norm: Tensor) -> None:
        """A step is done: ``d`` is the correction now, ``norm`` its residual's norm by the recurrence."""
        self.made += 1
        self.steps = self.steps + self.live
        better = self.live & ((norm < self.best) | self.run.solver.fixed)
        self.best = torch.where(better, norm, self.best)
        self.kept = d if bool(better.all()) else torch.where(better[:, None], d, self.kept)
        self.run.note(norm * self.run.norm)
        self.live = self.live & (norm > self.target) & torch.isfinite(norm)

    def cycle(self) -> Cycle:
        """The result of the cycle."""
        return Cycle(torch.addcmul(self.run.x, self.run.norm[:, None], self.kept), self.steps, self.made, self.broken, self.cause)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, shape (rows,)."""
    return torch.linalg.vecdot(a, b)
