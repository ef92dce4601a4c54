"""``Process``: an iterative method at work on one problem, which the loop drives, and ``Outcome``: how a run ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

COUPLED = 4.0  # rounding alone may raise a settled row to this many times its limit


class Process(ABC):
    """One method at work on one problem, driven by the loop. Vectors have one entry for each row in the batch, shape (rows,).

    Attributes:
        rise: a row ends as diverged if its residual is this many times its best one, and above the first.
        attentive: whether the loop checks every iteration, because an iteration costs much more than a check.
        faults: codes of ``Status`` for the rows in which the method can do no more, 0 elsewhere; None: there are none.
        first_check: number of steps before the loop's first check.
        stalled: whether the worst residual has not fallen between the last two checks; set by the loop.
        fixed: whether all steps of the budget are made; the loop then checks only for faults, at the end of each block.
        keeps_best: whether the best iterate is kept and restored; false for large iterates that a step changes in place.
        recurs: whether ``measure`` updates norms by a recurrence; no row is settled before ``confirm`` has measured them.
        steady: whether the residual falls at a rate that hardly increases, so that the end can be predicted.
        holds: whether rows that have met their limits are kept where they are while others move on.
        divisible: whether ``select`` may be called.
        closes: whether the run ends with one more evaluation, at the value.
        steps_at_the_end: whether a step before that evaluation is free.
        coupled: a settled row that is this many times above its limit depends on rows that have moved since.
        clear: a ratio of residual and limit below which rounding hides how fast the residual falls.
    """

    rise = 1e3
    attentive = False
    first_check = 0
    stalled = False
    faults: Tensor | None = None
    fixed = False
    keeps_best = True
    recurs = False
    steady = False
    holds = True
    divisible = False
    closes = False
    steps_at_the_end = True
    coupled = COUPLED
    clear = 0.0

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The present iterate, shape (rows, dim). If ``keeps_best``, a later step must not change it in place."""

    @abstractmethod
    def measure(self, *, closing: bool = False) -> Tensor:
        """Return the residual norm of each row at the present iterate; the loop keeps the tensor."""

    @abstractmethod
    def step(self) -> None:
        """Move to the next iterate."""

    @abstractmethod
    def limits(self) -> Tensor:
        """Return the residual norm at or below which each row is converged."""

    def replace(self, rows: Tensor, by: Tensor) -> None:
        """Replace the iterates of the rows in the mask ``rows`` by those of ``by``, shape (rows, dim), if ``keeps_best``."""
        raise NotImplementedError

    def hold(self, moving: Tensor) -> None:
        """Move only the rows in the mask ``moving`` from now on."""
        raise NotImplementedError

    def select(self, index: Tensor) -> bool:
        """Continue with the rows in ``index`` alone. Return False, without any change, if the problem is not divisible."""
        return False

    def whole(self) -> None:
        """Continue with all rows again, after ``select``."""
        raise NotImplementedError

    def confirm(self) -> Tensor:
        """Measure the residual norms of the value, if ``measure`` only updates them, and continue from there."""
        raise NotImplementedError

    def reconsider(self, status: Tensor, residual: Tensor, settled: bool) -> Tensor:
        """Return the codes of ``Status`` after the run, changed by what only the method knows; all rows are in the batch.

        Args:
            status: the codes that the loop derived.
            residual: residual norm of the value.
            settled: whether every row has met its limit or could make no progress.
        """
        return status


@dataclass
class Outcome:
    """How a run ended, row by row; vectors have shape (rows,).

    Attributes:
        status: codes of ``Status``.
        iterations: the iteration, from 1, at which each row met its limit or was last measured.
        residual: residual norm of the value.
        limits: the norm at or below which a row is converged.
        contraction: factor by which the residual fell in an iteration, over the last few; NaN if it is unknown.
        trace: the largest ratio of residual and limit in every iteration.
        parted: whether rows were dropped from the batch.
    """

    status: Tensor
    iterations: Tensor
    residual: Tensor
    limits: Tensor
    contraction: float | Tensor
    trace: list[float]
    parted: bool
