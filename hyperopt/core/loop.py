"""The loop of every iterative method: history first, verdict after.

    for k in 0, 1, ...:
        history[k] = process.measure()            residual norms of the present iterate, one a row, kept on the device
        if k == next_look:                        the only place where the host reads a number
            worst = max over the rows of history / limits
            all rows met their limits: stop;  some: hold them, or drop them from the batch;  NaN, growth: end those rows
            next_look from the decay of worst:    a part of the way to where the slowest row will meet its limit
        process.step()
    status, iterations and residual of each row from what the looks have found

A method is a ``Process``: it owns its iterates, its step and its residual norms. The loop owns when to stop, which rows move, the
best iterate and the statuses. Between two looks nothing is read from the device, so that a GPU is never waited for, and the block
between them can be compiled. A look is two short reductions over the block's norms and one read.

What it guarantees:
- A residual that is reported is that of the value that is returned, measured or, for a recurrence, confirmed by a measurement.
- A solve evaluates at most one time in twenty, and at least one evaluation, more than one that looks at every iteration.
- Rows that meet their limit do not move after the look that saw it, and cost nothing where the problem can be taken apart. If
  such a row is above its limit again at the end, the rows depend on each other: ``coupled_rows``.
- The history is that since the last look: memory does not grow with the number of iterations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.status import Status

FLOOR = 16.0  # times eps: the least relative residual that rounding lets a map of some hundred terms reach
DROP = 0.75  # rows are dropped from a batch when at most this part of them is left
COUPLED = 4.0  # a held row may rise to this many times its limit by rounding alone
AHEAD = 0.7  # of the predicted way to the end: how far the next look is
LATE = 20  # where no end can be predicted, looks are one time in this many iterations apart
SHORT, LONGEST = 4, 64  # iterations of a block, which is smaller than a state where a row has more entries than SHORT


def rounding_floor(dtype: torch.dtype) -> float:
    """The least relative residual that can be asked for in ``dtype``."""
    return FLOOR * torch.finfo(dtype).eps


def relative(difference: Tensor, scale: Tensor) -> Tensor:
    """``difference / scale``, 0 where both are 0."""
    return difference / scale.clamp(min=torch.finfo(scale.dtype).tiny)


class Process(ABC):
    """One method at work on one problem, as the loop drives it; vectors are of the rows in the batch, shape (rows,).

    Attributes:
        rise: a residual this many times the best one seen, and above the first, ends a row as diverged.
        attentive: whether an iteration costs so much more than a look that every one is looked at.
        faults: codes of ``Status`` of the rows in which the method can do no more, 0 elsewhere; None: there are none.
        recurs: whether ``measure`` gives norms by a recurrence: no row is settled before ``confirm`` has measured them.
        closes: whether one more evaluation, of the value, ends the run.
        steps_at_the_end: whether a step before that evaluation is free.
        clear: a ratio of residual and limit below which rounding hides how fast the residual falls.
    """

    rise = 1e3
    attentive = False
    faults: Tensor | None = None
    recurs = False
    closes = False
    steps_at_the_end = True
    clear = 0.0

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The present iterate, shape (rows, dim). It is kept: a later step must not change it in place."""

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
        """Measure the residual norms of the value, where ``measure`` does not, and go on from the better of it and the last."""
        raise NotImplementedError

    def reconsider(self, status: Tensor, residual: Tensor, first: Tensor) -> Tensor:
        """The codes of ``Status`` in the light of what only the method knows, after the run; all rows are in the batch.

        Args:
            status: as the loop has it.
            residual: residual norm of the value.
            first: residual norm at the start.
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
        contraction: factor by which the largest residual fell in an iteration, over the last few; NaN where it cannot be told.
        trace: the largest of residual over limit in every iteration.
        parted: whether rows were dropped from the batch.
    """

    status: Tensor
    iterations: Tensor
    residual: Tensor
    limits: Tensor
    made: int
    contraction: float
    trace: list[float]
    parted: bool


def run(process: Process, max_steps: int) -> Outcome:
    """Run ``process`` until every row has met its limit or can do no more, for at most ``max_steps`` iterations."""
    return _Run(process, max_steps).run()


class _Run:
    """What the looks of one run have found; vectors are of all rows, also when some are not in the batch any more."""

    def __init__(self, process: Process, max_steps: int) -> None:
        value = process.value
        self.process, self.max_steps, (self.rows, dim) = process, max_steps, value.shape
        self.history: list[Tensor] = []  # norms of the batch since the last look
        self.longest = min(LONGEST, max(SHORT, dim))
        self.made, self.next_look, self.parted = 0, 0, False  # iterations measured; the next to look at; see Outcome
        self.worst: list[float] = []
        self.index: Tensor | None = None  # the rows in the batch, where others were dropped
        self.active: Tensor | None = None  # rows that are not settled; None: all
        self.status = torch.full((self.rows,), int(Status.max_steps), device=value.device)
        self.iterations = self.met = torch.zeros_like(self.status)  # met: as a recurrence says that is yet to be confirmed
        self.residual = self.limit = self.first = value.new_empty(0)  # set at the first look
        self.decay: list[tuple[int, float]] = []  # iteration and largest residual norm of the looks
        self.best: tuple[float, Tensor, Tensor] | None = None  # of the look with the least worst residual: it, value, norms
        self.mark: tuple[Tensor, Tensor] | None = None  # norms before the last fifth of the budget, and the least since
        self.ended = self.residual  # as seen at the last look, before rows go back to their best
        self.early: Tensor | None = None  # rows that were settled before the last look

    def run(self) -> Outcome:
        """See the function of this name."""
        process, budget = self.process, self.max_steps - self.process.closes
        settled = self._close(False) if budget < 1 else False
        while self.made < budget and not settled:
            if self.made:
                process.step()
            settled = self._iterate()
            if process.closes and (settled or self.made >= budget):
                settled = self._close(settled)
        return self._verdict(settled)

    def _iterate(self) -> bool:
        """Measure, and look where it is time; returns whether every row is settled."""
        k, self.made = self.made, self.made + 1
        self.history.append(self.process.measure())
        last = self.made >= self.max_steps - self.process.closes
        if k < self.next_look and len(self.history) < self.longest and not last and not self.process.attentive:
            return False
        return self._look(k, last)

    def _here(self, vector: Tensor) -> Tensor:
        """The entries of the batch in a vector of all rows."""
        return vector if self.index is None else vector[self.index]

    def _put(self, batch: Tensor, vector: Tensor) -> Tensor:
        """A vector of all rows with the entries of the batch in their places."""
        return batch if self.index is None else vector.index_copy(0, self.index, batch)

    def _look(self, k: int, last: bool) -> bool:
        """Read how far the rows are, settle those that are done; returns whether all are."""
        process, history, limits = self.process, self.history, self.process.limits()
        worst, least, largest, faults = self._read(torch.stack(history), limits)
        sure = not process.recurs or not self.worst  # the start was measured
        if not sure and (last or worst[-1] <= 1 or faults or not math.isfinite(worst[-1])):
            history[-1], limits, sure = process.confirm(), process.limits(), True
            (worst[-1],), least, largest, faults = self._read(history[-1][None], limits)
        now = worst[-1]
        if not self.worst:
            self.first = self.limit = self.residual = history[0]
        self.worst += worst
        grown = self.best is not None and now > process.rise * self.best[0]
        done = sure and now <= 1 and not faults
        if sure and (done or grown or faults or not math.isfinite(now) or (least <= 1 and self.rows > 1)):
            done = self._settle(k, limits, plain=done)
        else:
            if least <= 1 and not sure:
                at, inside = self._first_inside(k, limits)
                self.met = torch.where(inside & (self.met == 0), at, self.met)
            self.residual, self.limit = self._put(history[-1], self.residual), self._put(limits, self.limit)
        if not done:
            if process.recurs:  # it undoes a cycle that has made a row worse by itself
                self.met = torch.zeros_like(self.met) if sure else self.met
            elif self.best is None or now <= self.best[0]:
                self.best = now, process.value, self._here(self.residual)
            self._note_idle(k)
        self.ended = self.residual
        if now > process.clear:
            self.decay.append((k, largest))
        self.history, self.next_look = [], k + self._ahead(k)
        return done

    def _read(self, lines: Tensor, limits: Tensor) -> tuple[list[float], float, float, bool]:
        """The one read of a look.

        Returns:
            The largest ratio of residual and limit in every line; the least in the last; its largest residual; any fault.
        """
        ratio, last, faults = lines / limits, lines[-1:], self.process.faults
        if self.active is not None:
            active = self._here(self.active)
            ratio, last = torch.where(active, ratio, 0.0), torch.where(active, last, 0.0)
        parts = [ratio[:, 0], last[0]] if self.rows == 1 else [ratio.amax(dim=1), last.amax(dim=1), ratio[-1:].amin(dim=1)]
        if faults is not None:
            parts.append(faults.amax(dim=0, keepdim=True).to(ratio.dtype))
        found, count = torch.cat(parts).tolist(), len(lines)
        least = found[count + 1] if self.rows > 1 else found[count - 1]
        return found[:count], least, found[count], faults is not None and found[-1] > 0

    def _settle(self, k: int, limits: Tensor, *, plain: bool) -> bool:
        """Say of each row how it ended, if it did; ``plain``: all that move have met their limits.

        Returns:
            Whether all rows are settled.
        """
        process, now = self.process, self.history[-1]
        at, inside = self._first_inside(k, limits)
        at = torch.where(self.met > 0, self.met, at) if process.recurs else at
        self.early = None if self.active is None else ~self.active
        active = torch.ones_like(inside) if self.active is None else self._here(self.active)
        met = inside & active
        status, iterations = self._here(self.status), torch.where(met, at, k + 1)
        status = torch.where(met, int(Status.converged), status)
        ended, residual = met, now
        if not plain:
            finite = torch.isfinite(now)
            lost = active & ~finite
            status = torch.where(lost, int(Status.nonfinite), status)
            if self.best is not None:
                best = self.best[2]
                grown = active & finite & ~met & (now > process.rise * best) & (now > self._here(self.first))
                status, lost = torch.where(grown, int(Status.diverged), status), lost | grown
            if process.faults is not None:
                fault = active & ~met & (process.faults > 0)
                status, lost = torch.where(fault & finite, process.faults, status), lost | fault
            if self.best is not None:
                back = lost & ~(now <= best)
                process.replace(back, self.best[1])
                residual = torch.where(back & finite, best, now)
            ended = met | lost
        self.iterations = self._put(torch.where(active, iterations, self._here(self.iterations)), self.iterations)
        self.residual = self._put(torch.where(active, residual, self._here(self.residual)), self.residual)
        self.limit = self._put(torch.where(active, limits, self._here(self.limit)), self.limit)
        self.status = self._put(torch.where(active, status, self._here(self.status)), self.status)
        left = active & ~ended
        self.active = self._put(left, self.active if self.active is not None else torch.ones_like(self.status, dtype=torch.bool))
        if plain:
            return True
        count = int(left.sum())
        if count and not self._drop(left, count):
            process.hold(left)
        return count == 0

    def _first_inside(self, k: int, limits: Tensor) -> tuple[Tensor, Tensor]:
        """The first iteration since the last look at which each row met its limit, and whether it meets it now."""
        inside = torch.stack(self.history) <= limits
        return k + 2 - len(self.history) + inside.to(torch.uint8).argmax(dim=0), inside[-1]

    def _drop(self, left: Tensor, count: int) -> bool:
        """Take the rows that are settled out of the batch, where that is worth it and the problem can be taken apart."""
        inside = left.nonzero().squeeze(1) if count <= DROP * len(left) else None
        if inside is None or not self.process.select(inside):
            return False
        self.index, self.parted, self.best = (inside if self.index is None else self.index[inside]), True, None
        return True

    def _ahead(self, k: int) -> int:
        """Iterations from ``k`` to the next look, from the decay of the worst residual."""
        seen = self.worst[-min(len(self.worst), 6) :]
        if len(seen) < 2 or not 0 < seen[-1] < seen[0] < math.inf or math.log(seen[-1]) == math.log(seen[0]):
            return 1 + k // LATE
        left = math.log(seen[-1]) / (math.log(seen[0]) - math.log(seen[-1])) * (len(seen) - 1)
        return max(1, min(int(AHEAD * left), k + 2))

    def _note_idle(self, k: int) -> None:
        """Keep the least norms before the last fifth of the budget and since, which tell a row that no longer gets better."""
        if self.mark is not None:
            self.mark = self.mark[0], torch.minimum(self.mark[1], self.residual)
        elif k >= self.max_steps - 1 - max(10, self.max_steps // 5):
            self.mark = self.residual, torch.full_like(self.residual, math.inf)

    def _close(self, settled: bool) -> bool:
        """One more evaluation of all rows, of the value; returns whether every row is settled."""
        process = self.process
        if not settled:
            self._back_to_best()
        if self.index is not None:
            process.whole()
            self.index = self.best = None
        elif settled and process.steps_at_the_end:
            process.step()
        self.made += 1
        line = process.measure(closing=True)
        limits = process.limits()
        if not self.worst:
            self.first = self.residual = self.limit = self.ended = line
        done = self.status == int(Status.converged)
        seen = done if self.active is None else done | self.active  # the others have ended badly, and stay what they are
        seen = seen if settled else torch.ones_like(done) if self.active is None else seen
        good = seen & (line <= limits)
        risen = done & ~good
        worst, lost = torch.stack([torch.where(seen, line / limits, 0.0).amax(), risen.any().to(line.dtype)]).tolist()
        self.worst.append(worst)
        self.iterations = torch.where(seen & ~done, self.made, self.iterations)
        self.residual, self.limit = torch.where(seen, line, self.residual), torch.where(seen, limits, self.limit)
        self.status = torch.where(good, int(Status.converged), self.status)
        self.status = torch.where(seen & ~torch.isfinite(line), int(Status.nonfinite), self.status)
        if not lost or worst != worst:
            return True
        if self.early is not None:
            coupled = risen & self.early & ~(line <= COUPLED * limits)
            self.status = torch.where(coupled, int(Status.coupled_rows), self.status)
            if bool(coupled.any()):
                return True
        self.status = torch.where(risen, int(Status.max_steps), self.status)
        if self.made >= self.max_steps:
            return True
        self.active, self.early, self.best, self.next_look = risen, None, None, self.made
        process.hold(risen)
        return False

    def _back_to_best(self) -> None:
        """Put the rows that are not settled back on the best iterate seen, where that was better than the last."""
        if self.best is None:
            return
        now = self._here(self.residual)
        stale = now > self.best[2]
        stale = stale if self.active is None else stale & self._here(self.active)
        self.process.replace(stale, self.best[1])
        self.residual = self._put(torch.where(stale, self.best[2], now), self.residual)

    def _verdict(self, settled: bool) -> Outcome:
        """What is left to say of the rows that are not settled."""
        process, status = self.process, self.status
        if not settled and not process.closes:
            self._back_to_best()
        if self.index is not None:
            process.whole()
        if not settled or process.closes:
            left = status == int(Status.max_steps)
            self.iterations = torch.where(left, self.made, self.iterations)
            if self.mark is not None:
                idle = torch.isfinite(self.mark[1]) & ~(self.mark[1] < self.mark[0])
                status = torch.where(left & idle, int(Status.stagnated), status)
            status = torch.where(left & (self.ended > self.first), int(Status.diverged), status)
        status = process.reconsider(status, self.residual, self.first)
        return Outcome(
            status, self.iterations, self.residual, self.limit, self.made, self._contraction(), self.worst, self.parted
        )

    def _contraction(self) -> float:
        """Factor by which the largest residual fell in an iteration, over the last five or so."""
        seen = [(k, norm) for k, norm in self.decay if 0 < norm < math.inf]
        if len(seen) < 2:
            return math.nan
        end, now = seen[-1]
        begin, before = next(((k, norm) for k, norm in reversed(seen) if k <= end - 5), seen[0])
        return (now / before) ** (1 / (end - begin))
