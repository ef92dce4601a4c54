"""The loop of every iterative method: residuals are recorded on the device and read by the host only now and then.

    for k in 0, 1, ...:
        history[k] = process.measure()            residual norms of the present iterate, one for each row, on the device
        if k == next_check:                       the only place where the host reads a number
            worst = max over the rows of history / limits
            all rows met their limits: stop;  some did: hold them, or drop them from the batch;  NaN or growth: end those rows
            next_check is part of the way to where the slowest row will meet its limit, predicted from the decay of worst
        process.step()
    return the status, iterations and residual of each row, derived from what the checks found

A method is a ``Process``: it owns its iterates, its step and its residual norms. The loop decides when to stop and which rows
move, and keeps the best iterate and the statuses. Nothing is read from the device between two checks, so the host does not
wait for a GPU there, and these steps can be compiled. A check is two short reductions over the recorded norms and one read.

The loop guarantees:
- A reported residual belongs to the returned value. It was measured there, or a recurrence's estimate was confirmed there.
- A solve makes at most one evaluation, or 5 %, more than if it checked in every iteration.
- When a quarter of the rows have met their limits, they are held, or dropped if the problem is divisible, and cost no more. If
  such a row is above its limit again at the end, the rows depend on each other and its status is ``coupled_rows``. A plain
  iteration that is not divisible goes on moving all rows, which only improves them.
- Only the norms since the last check are kept: memory does not grow with the number of iterations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperopt.core.precision import product_eps
from hyperopt.core.process import Outcome, Process
from hyperopt.core.status import Status

FLOOR = 16.0  # times eps: the least relative residual that rounding allows for a map that sums some hundred terms
ROUNDED = 0.5  # times the eps to which the factors of products are rounded while their sums are not (autocast, TF32)
DROP = 0.75  # rows are dropped from a batch when at most this fraction of them is left
AHEAD = 0.8  # a steady method is checked next after this fraction of the predicted number of iterations
NEAR = 3.0  # if a steady method is predicted to end within this many iterations, the prediction is taken as exact
LATE = 20  # if no end can be predicted, checks are made / LATE iterations apart, where made counts the iterations so far
LONGEST = 64  # largest number of iterations between two checks
MANY = 10_000  # with more rows than this, checks are frequent enough that the kept norms take less than a quarter of a state


def rounding_floor(dtype: torch.dtype, device: torch.device | None = None, rounding: float = 0.0) -> float:
    """Return the least relative residual that can be asked for in ``dtype``.

    Args:
        dtype: dtype of the matrices.
        device: device of the matrices; it decides whether autocast or TF32 lowers the precision of products now.
        rounding: the eps of the numbers that the matrices were made from, if that is larger.
    """
    return max(FLOOR * torch.finfo(dtype).eps, ROUNDED * max(product_eps(dtype, device), rounding))


def relative(difference: Tensor, scale: Tensor) -> Tensor:
    """Return ``difference / scale``, 0 where both are 0."""
    return difference / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def run(process: Process, max_steps: int) -> Outcome:
    """Run ``process`` until every row has met its limit or can make no progress, for at most ``max_steps`` iterations."""
    return _Run(process, max_steps).run()


class _Run:
    """The state of one run. A vector has one entry for each row of the problem, or of the batch where a comment says so."""

    def __init__(self, process: Process, max_steps: int) -> None:
        value = process.value
        self.process, self.max_steps, (self.rows, dim) = process, max_steps, value.shape
        self.longest = LONGEST if self.rows <= MANY else min(LONGEST, max(2, dim // 4))
        self.made = 0  # iterations measured so far
        self.seen = 0  # iterations measured up to the last check
        self.next_check = max_steps if process.fixed else process.first_check
        self.expected = -1  # the iteration at which the slowest row may meet its limit; -1: not soon
        self.worst: list[float] = []  # the largest ratio of residual and limit, for every iteration that a check has covered
        self.lines: list[Tensor] = []  # residual norms of the batch in iterations that ``_count`` has not counted yet
        self.above: Tensor | None = None  # in how many of the counted iterations each row was above its limit
        self.limit = self.now = value.new_empty(0)  # limits and norms of the batch at the last check
        self.first: Tensor | None = None  # norms of the first iteration
        # Rows that ended before all had met their limits.
        self.status = torch.full((self.rows,), int(Status.max_steps), device=value.device)
        self.moving: Tensor | None = None  # mask of the rows of the batch that are not settled; None: all
        self.index: Tensor | None = None  # which rows the batch holds after others were dropped; None: all
        self.dropped: tuple[Tensor, Tensor] | None = None  # residuals and limits of rows when they were last in the batch
        self.early: Tensor | None = None  # mask of the rows that had met their limits before the others
        self.best: tuple[float, Tensor, Tensor] | None = None  # least ``worst`` at a check, with the batch's value and norms
        self.mark: tuple[Tensor, Tensor] | None = None  # norms before the last fifth of the budget, and the least norms since
        self.decay: list[tuple[int, Tensor]] = []  # iterations and norms at checks of the present batch
        self.older: list[tuple[int, Tensor]] = []  # the same for the batch before rows were dropped
        self.lost = False  # whether the last check ended rows that were diverging or faulty
        self.ended: Tensor | None = None  # the norms before rows were put back on their best iterates

    def run(self) -> Outcome:
        """Run the loop; see the function ``run``."""
        process, budget = self.process, self.max_steps - self.process.closes
        settled = self._close(False) if budget < 1 else False
        while self.made < budget and not settled:
            if self.made:
                process.step()
            closing = self.made == self.expected and process.closes and self.index is None
            self.lines.append(process.measure(closing=closing))
            self.made += 1
            last, block = self.made == budget, self.made - self.seen
            if self.made > self.next_check or block >= self.longest or last or process.attentive:
                settled = self._check(last, closing)
            # A row that ended badly is back on its best iterate, which has no closing evaluation yet.
            closed = closing and settled and not self.lost
            if process.closes and (settled or last) and not closed:
                settled = self._close(settled)
        return self._verdict(settled)

    def _here(self, vector: Tensor) -> Tensor:
        """Return the batch's entries of a vector of all rows."""
        return vector if self.index is None else vector[self.index]

    def _put(self, batch: Tensor, vector: Tensor) -> Tensor:
        """Return a vector of all rows with the batch's entries replaced by ``batch``."""
        return batch if self.index is None else vector.index_copy(0, self.index, batch)

    # ---- checks

    def _check(self, last: bool, closing: bool) -> bool:
        """Read how far the rows are, and settle those that are done. Returns whether all are settled."""
        process, block, limits = self.process, self.lines[self.seen - self.made :], self.process.limits()
        sure = not process.recurs or self.made == 1  # a recurrence's first norm was measured, its later ones are estimates
        worst, met, faults = self._read(block, limits, count=sure)
        if not sure and (last or worst[-1] <= 1 or faults or not math.isfinite(worst[-1])):
            self.lines[-1], limits, sure = process.confirm(), process.limits(), True
            (worst[-1],), met, faults = self._read(self.lines[-1:], limits, count=True)
        self.now = norms = self.lines[-1]
        self.limit, ratio = limits, worst[-1]
        if self.first is None:
            self.first = block[0]
        process.stalled = self.seen > 0 and not ratio < self.worst[-1]
        self.worst += worst
        lost = faults or not math.isfinite(ratio) or (self.best is not None and ratio > process.rise * self.best[0])
        self.lost, done = lost and sure, ratio <= 1 and not faults and sure and not process.fixed
        if self.lost or (met >= (1 if process.recurs else (1 - DROP) * len(self.now)) and not done):
            done = self._settle(self.lost, met)
        elif done:
            self.early = None if self.moving is None and self.index is None else self.status == int(Status.converged)
            here = self._here(self.status)
            ended = torch.zeros_like(here) if self.moving is None else here.masked_fill(self.moving, int(Status.converged))
            self.status = self._put(ended, self.status)
        if not done:
            if process.keeps_best and (self.best is None or ratio <= self.best[0]):
                self.best = ratio, process.value, self.now
            self._note_idle()
        if ratio > process.clear or (len(self.worst) > len(worst) and self.worst[-1 - len(worst)] > process.clear):
            if not self.decay:
                self.decay.append((self.seen + 1, block[0]))
            if self.decay[-1][0] < self.made and len(norms) == len(self.decay[-1][1]):
                self.decay = [*self.decay[-2:], (self.made, norms)]
        if len(self.lines) >= self.longest:
            self._count()
        self.seen = self.made
        self._plan()
        return done

    def _read(self, block: list[Tensor], limits: Tensor, *, count: bool) -> tuple[list[float], float, bool]:
        """Read the residuals of a block from the device, all at once.

        Args:
            block: norms of the batch, one vector for each iteration.
            limits: limits of the batch.
            count: whether rows may be settled now.

        Returns:
            The largest ratio of residual and limit in each iteration; how many rows have met their limits in the last one (0
            if nothing depends on it); whether the process reports a fault.
        """
        ratio, process = torch.stack(block).div_(limits), self.process
        if self.moving is not None:
            ratio = torch.where(self.moving, ratio, 0.0)
        parts = [ratio[:, 0] if len(limits) == 1 else ratio.amax(dim=1)]
        counts = count and len(limits) > 1 and (process.holds or process.divisible)
        if counts:
            parts.append((ratio[-1] <= 1).sum(dim=0, keepdim=True).to(ratio.dtype))
        faults = process.faults
        if faults is not None:
            parts.append(faults.amax(dim=0, keepdim=True).to(ratio.dtype))
        found = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
        return found[: len(block)], found[len(block)] if counts else 0.0, faults is not None and found[-1] > 0

    def _plan(self) -> None:
        """Choose the next check from the decay of the worst residual, and predict when the slowest row will meet its limit."""
        if self.process.fixed:
            return
        seen, self.expected = self.worst[-min(len(self.worst), 6) :], -1
        if len(seen) < 2 or not 0 < seen[-1] < seen[0] < math.inf:  # the end cannot be predicted
            self.next_check = self.made + (self.made // LATE if self.process.steady else 2)
            return
        # Take the faster of the rate over some iterations and that of the last: an accelerated method may speed up at any time.
        rate = (math.log(seen[0]) - math.log(seen[-1])) / (len(seen) - 1)
        if seen[-1] < seen[-2] < math.inf:
            rate = max(rate, math.log(seen[-2]) - math.log(seen[-1]))
        left = min(math.log(seen[-1]) / rate, self.max_steps) if rate > 0 else self.max_steps
        if self.process.steady:
            ahead = max(1, math.ceil(left)) if left <= NEAR else max(1, min(int(AHEAD * left), 2 * self.made))
        elif self.process.recurs:
            ahead = 1 if left <= 1 else 2 if left <= 2 * NEAR else 3
        else:
            ahead = 2 if left <= 4 * NEAR and self.made > 6 else 3  # the residual may drop suddenly
        self.next_check = self.made - 1 + ahead
        if left <= NEAR:
            self.expected = self.next_check

    def _count(self) -> None:
        """Count how many times each row of the batch was above its limit, and release the recorded norms."""
        if not self.lines or self.rows == 1:  # for one row ``worst`` says it all
            self.lines = []
            return
        above = (torch.stack(self.lines) > self.limit).sum(dim=0)
        if self.above is None and self.index is None:
            self.above = above
        else:
            before = torch.zeros_like(self.status) if self.above is None else self.above
            self.above = self._put(self._here(before) + above, before)
        self.lines = []

    def _note_idle(self) -> None:
        """Keep the norms before the last fifth of the budget and the least since, to tell later whether they still fell."""
        if self.mark is not None:
            self.mark = self.mark[0], self._put(torch.minimum(self._here(self.mark[1]), self.now), self.mark[1])
        elif self.index is None and 0 < self.max_steps - max(10, self.max_steps // 5) <= self.made:
            self.mark = self.now, torch.full_like(self.now, math.inf)

    # ---- rows that are done before the others

    def _settle(self, lost: bool, met: float) -> bool:
        """Settle the ``met`` rows below their limits and, if ``lost``, those that diverged. Returns whether all are settled."""
        process, now = self.process, self.now
        moving = torch.ones_like(now, dtype=torch.bool) if self.moving is None else self.moving
        ended = torch.zeros_like(moving) if process.fixed else moving & (now <= self.limit)
        status = self._here(self.status).masked_fill(ended, int(Status.converged))
        if lost:
            finite = torch.isfinite(now)
            bad = moving & ~finite
            status = status.masked_fill(bad, int(Status.nonfinite))
            if process.faults is not None:
                faulty = moving & finite & ~ended & (process.faults > 0)
                status, bad = torch.where(faulty, process.faults, status), bad | faulty
            if self.best is not None:
                _, value, least = self.best
                grown = moving & finite & ~ended & ~bad & (now > process.rise * least) & (now > self._here(self._first))
                status, bad = status.masked_fill(grown, int(Status.diverged)), bad | grown
                back = bad & ~(now <= least)
                process.replace(back, value)
                self.now = torch.where(back & finite, least, now)
            ended = ended | bad
        self.status = self._put(status, self.status)
        self.moving = moving & ~ended
        count = int(self.moving.sum()) if lost else len(now) - int(met)
        if count and not self._drop(self.moving, count):
            process.hold(self.moving)
        return count == 0

    @property
    def _first(self) -> Tensor:
        assert self.first is not None
        return self.first

    def _drop(self, left: Tensor, count: int) -> bool:
        """Drop the settled rows from the batch, if that saves enough and the problem is divisible."""
        if not self.process.divisible or count > DROP * len(left):
            return False
        inside = left.nonzero().squeeze(1)
        if not self.process.select(inside):
            return False
        self._count()
        self._leave()
        self.index = inside if self.index is None else self.index[inside]
        self.now, self.limit = self.now[inside], self.limit[inside]
        self.moving, self.best = None, None
        if len(self.decay) > 1:
            self.older, self.decay = self.decay, []
        return True

    def _leave(self) -> None:
        """Note the residuals and limits of the batch before rows are dropped from it or join it."""
        residual, limit = self.dropped or (torch.empty_like(self._first), torch.empty_like(self._first))
        self.dropped = self._put(self.now, residual), self._put(self.limit, limit)

    def _join(self) -> None:
        """Put all rows into the batch again."""
        if self.index is None:
            return
        self._count()
        self._leave()
        assert self.dropped is not None
        self.process.whole()
        self.index, self.best = None, None
        self.now, self.limit = self.dropped
        self.moving = self.status == int(Status.max_steps)

    # ---- the end

    def _close(self, settled: bool) -> bool:
        """Evaluate all rows once more, at the value to be returned. Returns whether every row is settled."""
        process, parted = self.process, self.index is not None
        if not settled:
            self._back_to_best()
        self._join()
        if settled and process.steps_at_the_end and not parted:
            process.step()
        self._count()
        line, limits = process.measure(closing=True), process.limits()
        self.made += 1
        self.seen = self.made
        if self.first is None:
            self.first = self.now = line
        if settled and self.moving is None:
            worst = float((line / limits).amax(dim=0))
            if worst <= 1:  # the usual case
                self.worst.append(worst)
                self.now, self.limit = line, limits
                return True
        done = self.status == int(Status.converged)
        counts = done if self.moving is None else done | self.moving  # other rows have ended badly and keep their status
        counts = counts if settled or self.moving is not None else torch.ones_like(done)
        ratio = torch.where(counts, line / limits, 0.0)
        self.worst.append(float(ratio.amax()))
        self.now, self.limit = torch.where(counts, line, self.now), limits
        if self.worst[-1] <= 1:
            self.status = self.status.masked_fill(counts, int(Status.converged))
            return True
        good = counts & (ratio <= 1)
        risen = done & ~good
        self.status = self.status.masked_fill(good, int(Status.converged))
        self.status = self.status.masked_fill(counts & ~torch.isfinite(line), int(Status.nonfinite))
        if self.early is not None:
            self.status = self.status.masked_fill(self.early & (ratio > process.coupled), int(Status.coupled_rows))
        self.status = self.status.masked_fill(risen & (self.status == int(Status.converged)), int(Status.max_steps))
        again = self.status == int(Status.max_steps)
        if not settled or self.made >= self.max_steps or bool((self.status == int(Status.coupled_rows)).any() | ~again.any()):
            return not bool(again.any())
        # These rows had met their limits and were above them one step later: go on with them.
        self.moving, self.early, self.best, self.next_check = again, None, None, self.made
        process.hold(again)
        return False

    def _back_to_best(self) -> None:
        """Put the rows that are not settled back on the best iterate so far, if that was better than the last."""
        if self.best is None:
            return
        self.ended = self._put(self.now, self.dropped[0]) if self.dropped is not None else self.now
        _, value, least = self.best
        stale = self.now > least
        stale = stale if self.moving is None else stale & self.moving
        self.process.replace(stale, value)
        self.now = torch.where(stale, least, self.now)

    def _verdict(self, settled: bool) -> Outcome:
        """Derive the final status of the rows that are not settled, and collect the outcome."""
        process, parted, apart = self.process, self.dropped is not None, self.index is not None
        if not settled and not process.closes:
            self._back_to_best()
        self._join()
        self._count()
        if self.moving is not None and not (process.closes or process.recurs) and (apart or not settled):
            self.now, self.limit = process.measure(), process.limits()  # all rows, at the value to be returned
        status = self.status
        if self.moving is not None:  # rows that were settled early may be above their limits after the others have moved
            risen = (status == int(Status.converged)) & (self.now > process.coupled * self.limit)
            status = status.masked_fill(risen, int(Status.coupled_rows))
        if process.fixed:
            status = status.masked_fill(status == int(Status.max_steps), int(Status.fixed_steps))
        elif not settled:
            left = status == int(Status.max_steps)
            status = status.masked_fill(left & (self.now <= self.limit), int(Status.converged))
            left = status == int(Status.max_steps)
            if self.mark is not None:
                idle = torch.isfinite(self.mark[1]) & ~(self.mark[1] < self.mark[0])
                status = status.masked_fill(left & idle, int(Status.stagnated))
            ended = self.now if self.ended is None else self.ended
            status = status.masked_fill(left & (ended > self._first), int(Status.diverged))
        status = process.reconsider(status, self.now, settled)
        if self.rows == 1:
            iterations = torch.full_like(status, min(sum(x > 1 for x in self.worst) + 1, self.made))
        else:
            above = torch.zeros_like(status) if self.above is None else self.above
            iterations = (above + 1).clamp(max=self.made)
        return Outcome(status, iterations, self.now, self.limit, self._contraction(), self.worst, parted)

    def _contraction(self) -> Tensor | float:
        """Return the factor by which the residual of all rows together fell in an iteration, over about the last five."""
        seen = self.decay if len(self.decay) > 1 else self.older
        if len(seen) < 2:
            return math.nan
        end, now = seen[-1]
        begin, before = next(((k, norms) for k, norms in reversed(seen) if k <= end - 5), seen[0])
        if self.moving is not None:
            now, before = (torch.where(torch.isfinite(now) & torch.isfinite(before), x, 0.0) for x in (now, before))
        return (torch.linalg.vector_norm(now) / torch.linalg.vector_norm(before)) ** (1 / (end - begin))
