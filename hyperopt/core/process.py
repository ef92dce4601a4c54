"""``Process``: an iterative method at work on one problem, as the loop drives it, and ``Outcome``: how the loop says it ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

COUPLED = 4.0  # a row that was settled may rise to this many times its limit by rounding alone


class Process(ABC):
    """One method at work on one problem, as the loop drives it; vectors are of the rows in the batch, shape (rows,).

    Attributes:
        rise: a residual this many times the best one seen, and above the first, ends a row as diverged.
        attentive: whether an iteration costs so much more than a look that every one is looked at.
        faults: codes of ``Status`` of the rows in which the method can do no more, 0 elsewhere; None: there are none.
        first_look: the steps after which the loop looks for the first time.
        stalled: whether the worst residual has not fallen between the last two looks; set by the loop.
        fixed: whether all of the budget's steps are made: the loop looks only where a block ends, at faults.
        keeps_best: whether the best iterate is kept and gone back to; not of one so large that a step changes it in place.
        recurs: whether ``measure`` gives norms by a recurrence: no row is settled before ``confirm`` has measured them.
        steady: whether the residual falls at a rate that hardly rises, so that the end can be predicted.
        holds: whether rows that have met their limits are kept where they are, while others move on.
        divisible: whether ``select`` may be asked for.
        closes: whether one more evaluation, of the value, ends the run.
        steps_at_the_end: whether a step before that evaluation is free.
        coupled: a row that was settled and is this many times above its limit depends on rows that have moved since.
        clear: a ratio of residual and limit below which rounding hides how fast the residual falls.
    """

    rise = 1e3
    attentive = False
    first_look = 0
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
        """The present iterate, shape (rows, dim). Where ``keeps_best``, a later step must not change it in place."""

    @abstractmethod
    def measure(self, *, closing: bool = False) -> Tensor:
        """The residual norm of each row at the present iterate; it is kept."""

    @abstractmethod
    def step(self) -> None:
        """Go on to the next iterate."""

    @abstractmethod
    def limits(self) -> Tensor:
        """The residual norm that each row has to meet."""

    @abstractmethod
    def replace(self, rows: Tensor, by: Tensor) -> None:
        """Let the rows of a mask have the iterates ``by``, shape (rows, dim)."""

    @abstractmethod
    def hold(self, moving: Tensor) -> None:
        """Let only the rows of a mask move from now on."""

    def select(self, index: Tensor) -> bool:
        """Go on with the rows in ``index`` alone; False where the problem cannot be taken apart, and nothing was changed."""
        return False

    def whole(self) -> None:
        """Have all rows again, after ``select``."""
        raise NotImplementedError

    def confirm(self) -> Tensor:
        """Measure the residual norms of the value, where ``measure`` does not, and go on from there."""
        raise NotImplementedError

    def reconsider(self, status: Tensor, residual: Tensor, settled: bool) -> Tensor:
        """The codes of ``Status`` in the light of what only the method knows, after the run; all rows are in the batch.

        Args:
            status: as the loop has it.
            residual: residual norm of the value.
            settled: whether every row has met its limit or could do no more.
        """
        return status


@dataclass
class Outcome:
    """How a run ended, row by row; vectors have shape (rows,).

    Attributes:
        status: codes of ``Status``.
        iterations: the iteration, from 1, at which each row met its limit or was last seen.
        residual: residual norm of the value.
        limits: what it had to be.
        made: iterations that were made in all.
        contraction: factor by which the residual fell in an iteration, over the last few; NaN where it cannot be told.
        trace: the largest of residual over limit in every iteration.
        parted: whether rows were dropped from the batch.
    """

    status: Tensor
    iterations: Tensor
    residual: Tensor
    limits: Tensor
    made: int
    contraction: float | Tensor
    trace: list[float]
    parted: bool
