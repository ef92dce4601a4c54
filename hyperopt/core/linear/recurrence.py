"""What the short-recurrence methods share within one cycle: the residual scaled to norm 1, live rows, the best value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperopt.core.linear.restarted import Cycle, Run, freeze, unit
from hyperopt.core.status import Status


class Recurrence:
    """One cycle of a method that updates ``d`` and its residual ``r = r_0 - A d``, of rows whose ``r_0`` has norm 1.

    Squares of a residual of norm 1 neither overflow nor underflow, so a loss scaled by any factor takes the same steps.

    Attributes:
        r0: the residual at the start, scaled to norm 1; zeros in rows that are done, shape (rows, dim).
        live: rows that still move, shape (rows,).
        alive: how many they are, as a number.
        eps: machine epsilon.
    """

    live: Tensor
    alive: int

    def __init__(self, run: Run) -> None:
        """Scale the residual."""
        self.run = run
        self._keep(run.active)
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
        return self.made < self.run.left and self.alive > 0

    @property
    def whole(self) -> bool:
        """Whether all rows move."""
        return self.alive == len(self.live)

    def ratio(self, top: Tensor, bottom: Tensor) -> Tensor:
        """``top / bottom`` in the live rows, as a column; 0 in the others, which so stay where they are."""
        found = top / bottom
        return (found if self.whole else torch.where(self.live, found, 0.0))[:, None]

    def freeze(self, v: Tensor) -> Tensor:
        """``v`` in the live rows, zeros in the others, whatever they hold."""
        return v if self.whole else freeze(v, self.live)

    def break_down(self, rows: Tensor, cause: Tensor | None = None) -> None:
        """End rows in which the method can do no more, before this step changes them; ``cause`` has codes of ``Status``."""
        ended = self.live & rows
        if not bool(ended.any()):
            return
        if cause is not None:
            self.cause = torch.where(ended, cause, self.cause)
        self.broken = self.broken | ended
        self._keep(self.live & ~rows)

    def advance(self, d: Tensor, norm: Tensor) -> None:
        """A step is done: ``d`` is the correction now, ``norm`` its residual's norm by the recurrence."""
        self.made += 1
        self.steps = self.steps + self.live
        better = self.live if self.run.solver.fixed else self.live & (norm < self.best)
        if bool(better.all()):
            self.best, self.kept = norm, d
        else:
            self.best, self.kept = torch.where(better, norm, self.best), torch.where(better[:, None], d, self.kept)
        self.run.note(norm * self.run.norm)
        self._keep(self.live & (norm > self.target) & (norm < math.inf))

    def cycle(self) -> Cycle:
        """The result of the cycle."""
        return Cycle(torch.addcmul(self.run.x, self.run.norm[:, None], self.kept), self.steps, self.made, self.broken, self.cause)

    def _keep(self, live: Tensor) -> None:
        self.live, self.alive = live, int(live.sum())


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, shape (rows,)."""
    return torch.linalg.vecdot(a, b)
