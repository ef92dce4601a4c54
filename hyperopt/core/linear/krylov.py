"""The loop's process for a linear system ``A x = b`` with ``A = I - M``, in cycles that start from measured residuals.

    r = b - A x                          measured, one product for all rows
    the method's steps from (x, r)       until its recurrence says that every row is done or can do no more
    r = b - A x                          measured again; rows that are not done start again from here

A method is ``init`` and ``step`` on ``run.x``, ``run.r`` and ``run.rr``; it may keep more vectors in its own state. All
vectors are in a unit of the size of ``b``, so that squares neither overflow nor underflow and a scaled loss takes the same
steps. A row whose ``r`` is 0 must stay where it is. Rows without a right-hand side, finished rows and failed rows therefore
need no mask: their ``r`` is set to 0. A step makes no tests. If a method breaks down, its numbers become infinite or NaN,
which the next check finds, and ``run.pending`` applies only the steps before that to ``x``.

Guarantees:
- The reported residual was measured at the returned value. A recurrence only says when to measure.
- Every measurement covers all rows, including settled ones, in one unit, so that rows that depend on each other are found.
- A settled row does not move any more. A cycle that made a row worse is undone for that row, and ends it.
- A row whose right-hand side is 0 has the solution 0. A row whose ``x0`` is worse than 0, or not finite, starts at 0.
- With ``rtol=0, atol=0`` exactly ``max_steps`` steps are made, and the host reads nothing.
- Tolerances are raised to the rounding floor of the dtype, below which no residual can fall.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, LinearSolver, Products
from hyperopt.core.linear.pending import Pending
from hyperopt.core.loop import FLOOR, relative, rounding_floor, run
from hyperopt.core.operator import LinearOperator, as_operator
from hyperopt.core.precision import product_eps
from hyperopt.core.process import COUPLED, Outcome, Process
from hyperopt.core.rowwise import dot, full_precision, length
from hyperopt.core.status import SolveStats, Status

FIRST = 2  # number of steps before the first check of a solve that starts at 0
IDLE = 0.99  # a cycle that leaves more than this fraction of a row's residual ends the row


class KrylovSolver(LinearSolver):
    """A linear solver by recurrences, ``init`` and ``step``, which must not mix rows.

    Attributes:
        apart: whether some rows may start a cycle while others continue. The state must then be a tuple of tensors with one
            entry for each row.
    """

    apart: ClassVar[bool] = True

    @abstractmethod
    def init(self, run: Recurrence) -> Any:
        """Return the state at the start of a cycle, from ``run.x`` and its residual ``run.r``, whose square is ``run.rr``."""

    @abstractmethod
    def step(self, run: Recurrence, state: Any) -> Any:
        """Make one step: change ``run.x`` and ``run.r`` in place, set ``run.rr``, and return the next state."""

    def finish(self, run: Recurrence, state: Any) -> Any:
        """Apply pending steps to ``run.x``, if the method has any, and return the state."""
        return state

    def goal(self, run: Recurrence, state: Any) -> Tensor:
        """Return the squared residual of the recurrence at which a cycle can gain no more, shape (rows, 1)."""
        return run.limit

    def spent(self, run: Recurrence, state: Any) -> bool:
        """Whether the cycle must end here for all rows."""
        return False

    def stuck(self, run: Recurrence, state: Any) -> Tensor | None:
        """Return the rows that are known to be unable to continue, shape (rows, 1); None: there are none."""
        return None

    def causes(self, run: Recurrence, state: Any, stuck: Tensor, idle: Tensor) -> Tensor:
        """Return codes of ``Status`` for such rows, 0 elsewhere, shape (rows, 1); ``idle``: rows whose cycle gained nothing."""
        return stuck * int(Status.breakdown)

    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Solve to the tolerance, or by exactly ``max_steps`` steps, starting at 0 by default."""
        if not b.numel():
            zeros = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
            empty = b.new_zeros(b.shape[0])
            return LinearSolution(b, SolveStats(zeros + Status.converged, zeros, empty, empty, method=self.name))
        kind = b.device.type
        products = torch.autocast(kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        operator = as_operator(matvec)
        floor = rounding_floor(b.dtype, b.device, operator.rounding)
        with full_precision(b):  # for the method's own products, not those of the operator
            return Recurrence(self, operator, b, x0, trace, products, floor).solve()


class Recurrence(Process):
    """A Krylov method applied to a system; numbers for each row have shape (rows, 1).

    Attributes:
        x: the present value in units of ``b``, shape (rows, dim).
        r: its residual by the recurrence, shape (rows, dim).
        rr: the square of that residual; squares are compared, so that no root is taken.
        limit: the square at or below which a row is converged.
        unit: a power of 2 near the size of ``b``, so that scaling is exact.
        size: what residuals are relative to, in this unit.
        pending: steps that are not applied to ``x`` yet.
        taken: number of steps in this cycle.
        left: number of steps left.
        kept: what a method keeps from one cycle to the next.
        eps: machine epsilon.
        tiny: the smallest normal number, as a tensor, which is added to avoid divisions by 0.
        zero: 0 as a tensor.
    """

    recurs = True
    keeps_best = False  # the process itself undoes a cycle that made a row worse
    coupled = COUPLED**2  # since squares are compared
    clear = math.inf  # the contraction is not estimated

    def __init__(
        self,
        method: KrylovSolver,
        operator: LinearOperator,
        b: Tensor,
        x0: Tensor | None,
        trace: bool,
        products: Any = None,
        floor: float = 0.0,
    ) -> None:
        """Measure the start; ``products`` is a context for products, and ``floor`` the least relative residual in it."""
        self.within = products or nullcontext()
        self.method, self.operator, self.b = method, operator, b
        info = torch.finfo(b.dtype)
        self.eps, self.tiny, self.zero = info.eps, b.new_full((), info.tiny), b.new_zeros(())
        self.products = operator.matvecs, operator.rmatvecs
        self.scale = method.sizes(b)
        size, exponent = torch.frexp(self.scale[:, None])
        self.size, self.unit = size, torch.ldexp(torch.ones_like(size), exponent)
        self.shares = self._shares() if len(b) > 1 else None
        norm = size if method.by_row else length(b) / self.unit
        self.rr = norm * norm
        self.base = self.zero.expand_as(b)  # the x of the last measurement, or the one before if it was better
        self.r = b / self.unit
        bound = max(method.rtol, floor or FLOOR * self.eps) * self.size
        if method.atol:
            bound += method.atol / self.unit
        self.limit = self.square(bound)
        if x0 is not None:
            x = x0 / self.unit
            r, rr = self._residual(x)
            better = rr < self.rr
            self.base, self.r = torch.where(better, x, self.base), torch.where(better, r, self.r)
            self.rr = torch.where(better, rr, self.rr)
            self.limit = self._limit(self.square(FLOOR * self.eps * self.base))
        self.x, self.known = self.base, self.rr  # known: the squared residual that was measured at base
        self.state: Any = None
        self.kept: Any = None
        self.pending = Pending(b)
        self.first_check = 0 if x0 is not None else FIRST  # 0 only solves rows with b = 0
        self.taken, self.left = 0, method.max_steps
        self.measured: tuple[Tensor, Tensor, Tensor] | None = None  # residual, its square, and mask of the rows that continue
        self.codes: Tensor | None = None
        self.moving: Tensor | None = None
        self.trace: list[Tensor] | None = [] if trace else None

    # ---- for the methods

    def product(self, v: Tensor) -> Tensor:
        """Return ``A v``."""
        with self.within:
            return self.operator.complement(v)

    def transposed(self, v: Tensor) -> Tensor:
        """Return ``A^T v``."""
        if not self.operator.transposable:
            raise TypeError(
                f"{self.method.name} needs products with the transpose, which this operator does not offer: give it an "
                "rmatvec(v), or choose another linear solver"
            )
        with self.within:
            return v - self.operator.rmatvec(v)

    def columns(self, places: list[int]) -> Tensor:
        """Return the columns of ``A`` at ``places``, by one product each, shape (rows, dim, len(places))."""
        found = []
        for i in places:
            direction = torch.zeros_like(self.b)
            direction[:, i] = 1.0
            found.append(self.product(direction))
        return torch.stack(found, dim=2)

    def square(self, a: Tensor) -> Tensor:
        """Return ``|a|^2`` of each row, shape (rows, 1); it is never 0, so that it can be divided by."""
        return torch.addcmul(self.tiny, a, a) if a.shape[1] == 1 else dot(a, a, self.tiny)

    # ---- Process

    @property
    def value(self) -> Tensor:
        """The value of the last measurement, or the one before if it was better."""
        if self.measured is None or self.method.fixed:
            return self.x
        return torch.where(self.measured[1] < self.known, self.x, self.base)

    @property
    def attentive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the cycle is at its end."""
        told = self.pending.told and self.pending.room > 1
        return self.state is not None and (told or self.taken == self.b.shape[1] or self.method.spent(self, self.state))

    @property
    def faults(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A reason to measure, between measurements; after one, codes of ``Status``."""
        if self.measured is not None:
            return self.codes
        if self.state is None or (len(self.pending) and not self.stalled):
            return None
        if len(self.pending):
            self.state = self.method.finish(self, self.state)
        if self.method.spent(self, self.state):
            return torch.ones_like(self.rr[:, 0])
        found = self.method.stuck(self, self.state)
        found = None if found is None else found[:, 0]
        return found if found is None or self.moving is None else found & self.moving

    def measure(self, *, closing: bool = False) -> Tensor:
        """Return the squared residual of the recurrence."""
        if self.trace is not None:
            self.trace.append((self.rr.sqrt() / self.size).nan_to_num(0.0).amax())
        if self.moving is None:
            return self.rr[:, 0]
        return torch.where(self.moving, self.rr[:, 0], self.known[:, 0])  # the recurrence of a settled row has ended

    def limits(self) -> Tensor:
        """Return the square of ``rtol |b| + atol`` (at least of the rounding floor); within a cycle, the cycle's goal."""
        inside = self.state is not None and self.measured is None
        return (self.method.goal(self, self.state) if inside else self.limit)[:, 0]

    def _limit(self, rounding: Tensor) -> Tensor:
        """Return the limit, raised to the square of the rounding floor of ``x``.

        The floor is at most ``sqrt(eps) |b|``: if a nearly singular system has more rounding, it is not solved.
        """
        if self.method.rtol >= math.sqrt(self.eps):
            return self.limit
        return torch.maximum(self.limit, torch.fmin(rounding, self.eps * self.size * self.size))

    def step(self) -> None:
        """Make one step of the method; first start a cycle if there is none."""
        if self.state is None or self.measured is not None:
            self._start()
        self.taken, self.left = self.taken + 1, self.left - 1
        self.state = self.method.step(self, self.state)

    def hold(self, moving: Tensor) -> None:
        """Let only the rows in the mask ``moving`` move."""
        self.moving, self.codes = moving, None

    def confirm(self) -> Tensor:
        """Measure the residuals. A row that became worse keeps its old value, and a row that gained nothing ends."""
        if self.state is None:
            return self.known[:, 0]
        self.state = self.method.finish(self, self.state)
        going = self.rr > self.method.goal(self, self.state)
        stuck = self.method.stuck(self, self.state)
        going = going if stuck is None else going > stuck  # going and not stuck
        done = self.known <= self.limit  # rows that were done before the cycle stay done, whatever the products are
        self.x = torch.where(done, self.base, self.x)
        r, now = self._residual(self.x)
        rounding = self.square(FLOOR * self.eps * self.x)
        rr = torch.where(done | (rounding > self.known), self.known, now)  # rounding of a large x hides whether it is better
        self.measured, self.limit = (r, rr, going), self._limit(rounding)
        idle = rr > IDLE**2 * self.known
        codes = (idle > going) * int(Status.stagnated)
        if stuck is not None:
            codes = torch.maximum(codes, self.method.causes(self, self.state, stuck, idle))
        codes = codes.masked_fill(done, int(Status.coupled_rows))[:, 0]
        self.codes = codes if self.moving is None else codes * self.moving
        # A row that was done has not moved. If it is above its limit now, it depends on rows that moved, unless it is NaN.
        found = torch.where(done, torch.fmax(now, self.known), now if self.method.fixed else torch.minimum(rr, self.known))
        return torch.addcmul(found, rr, self.zero)[:, 0]  # inf becomes NaN

    # ---- inside

    def _residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``b - A x`` and its square, by one product."""
        b = self.b / self.unit
        if self.shares is None:
            r = b.sub_(self.product(x))
        else:
            r = b.addcdiv_(self.product(x * self.shares), self.shares, value=-1)
        return r, dot(r, r)

    def _shares(self) -> Tensor:
        """Return the unit of each row relative to the largest one, shape (rows, 1).

        A measurement uses one unit for all rows, because if rows depend on each other, a product with rows in different units
        would be one with another matrix. Rows so small that the products would lose them keep a larger unit.
        """
        half = torch.finfo(torch.float16)
        low = max(product_eps(self.b.dtype, self.b.device), self.operator.rounding) == half.eps
        info = half if low else torch.finfo(self.b.dtype)
        return (self.unit / self.unit.amax()).clamp_(min=info.tiny / info.eps)

    def _start(self) -> None:
        """Start a cycle, in all rows or in those that do not continue the last one."""
        going, r, rr = None, self.r, self.rr
        if self.measured is not None:
            r, rr, going = self.measured
            self.base = torch.where((rr < self.known) | self.method.fixed, self.x, self.base)
            self.known = torch.minimum(rr, self.known)
        if self.moving is not None:
            moving = self.moving[:, None]
            r, rr = torch.where(moving, r, self.zero), torch.where(moving, rr, self.zero)
            going = going if going is None else going & moving
        if self.method.apart and going is not None:
            self.x, self.r = torch.where(going, self.x, self.base), torch.where(going, self.r, r)
            self.rr = torch.where(going, self.rr, rr)
            new = self.method.init(self)
            each = [going.view(-1, *(1,) * (old.dim() - 1)) for old in self.state]
            self.state = tuple(map(torch.where, each, self.state, new))
        else:
            self.x, self.r, self.rr = self.base.clone(), r, rr
            self.state = self.method.init(self)
        self.measured, self.codes, self.taken = None, None, 0

    def solve(self) -> LinearSolution:
        """Run the method; see ``KrylovSolver.solve``."""
        steps = self.method.max_steps
        if self.method.fixed:
            for _ in range(steps):
                if self.state is not None and self.measured is None and self.method.spent(self, self.state):
                    self.confirm()
                self.step()
                self.measure()
            rr = self.confirm()
            assert self.codes is not None
            ended = torch.where(rr > self.limits(), self.codes, 0).clamp(min=int(Status.fixed_steps))
            status = torch.where(torch.isfinite(rr), ended, int(Status.nonfinite))
            return self._solution(status, torch.full_like(status, steps), rr)
        outcome: Outcome = run(self, steps + 1)
        return self._solution(outcome.status, outcome.iterations - 1, outcome.residual)

    def _solution(self, status: Tensor, iterations: Tensor, rr: Tensor) -> LinearSolution:
        """Return the value with its statistics. A row with non-finite products gets ``b`` as its value; 0 would hide it."""
        value = self.value
        del self.r, self.x, self.base, self.state, self.measured, self.kept  # memory
        value = value * self.unit
        value = torch.where((status == int(Status.nonfinite))[:, None], self.b, value)
        trace = self.b.new_empty(0)
        if self.trace:
            first = len(self.trace) - (self.method.max_steps if self.method.fixed else len(self.trace) - 1)
            trace = torch.stack(self.trace)[first : first + int(iterations.max())]
        stats = SolveStats(
            status,
            iterations,
            relative(rr.sqrt(), self.size[:, 0]),
            self.scale,
            vjps=self.operator.matvecs - self.products[0],
            jvps=self.operator.rmatvecs - self.products[1],
            trace=trace,
            method=self.method.name,
        )
        return LinearSolution(value, stats)
