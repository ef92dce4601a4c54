"""``Training``: one run of an inner solver, as a process of the library's loop; ``Watch``: the check of its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Hessian, differentiate
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.core.loop import rounding_floor, run
from hyperopt.core.policy import SolveError
from hyperopt.core.process import Process
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import total_norm

if TYPE_CHECKING:
    from hyperopt.bilevel.inner.base import InnerSolver

TINY = 1e-30  # smallest limit, since norms are divided by it
PROBE = 16  # number of steps between two checks of the norm if there is no tolerance
RISE = 1e3  # training diverges if the gradient exceeds this multiple of the scale


def curvature_at(problem: BilevelProblem, w: Leaves, lam: Any, batch: Any) -> Callable[[], Hessian]:
    """Return a function that builds the Hessian of the inner loss at a point, by a new evaluation."""
    return lambda: Hessian(Evaluation(problem, batch), w, Leaves.of(lam, "lam"), check=False)


def steepness(curvature: Hessian) -> float:
    """Return the largest curvature ``L`` at a point."""
    return largest_curvature(curvature)[0]


def image(curvature: Hessian) -> float:
    """Return ``|H w|`` at a point ``w``, NaN if it is not finite."""
    size = float(torch.linalg.vector_norm(curvature.matvec(curvature.w.point)))
    return size if math.isfinite(size) else math.nan


class Training(Process):
    """A training as a process of the loop: it has one row, whose residual is the norm of the gradient on a new batch.

    The weights are changed in place, and no copy of them is kept. If the number of steps is fixed, the norm is checked only at
    the start, at the end and once in each block of the loop, where a gradient that has grown without bound ends the training.

    Attributes:
        stuck: whether the method cannot improve the present weights.
    """

    holds = False
    steady = True
    keeps_best = False
    stuck = False

    def __init__(self, solver: InnerSolver, problem: BilevelProblem, w: Leaves, lam: Any, memory: dict[str, Any]) -> None:
        """Prepare a training; ``memory`` holds what earlier ones left, and nothing is evaluated yet."""
        self.solver, self.problem, self.w, self.lam, self.memory = solver, problem, w, lam, memory
        self.work = solver.begin(w.flat, lam, memory)
        self.watch = Watch(solver, memory, w)
        self.fixed = solver.fixed
        self.batch: Any = None
        self.grads: list[Tensor] | None = None  # at the present weights; None: not computed yet
        self.norm = w.flat[0].new_empty(1)
        self.most = self.limit = self.bound = self.norm  # most: the largest norm since the last check

    def run(self) -> SolveStats:
        """Train.

        Raises:
            SolveError: the training diverges.
        """
        while True:
            outcome = run(self, self.solver.max_steps - self.watch.steps + (self.grads is not None))
            status = Status(int(outcome.status))
            if status not in (Status.diverged, Status.nonfinite):
                break
            self._check_norm()  # if this raises the scale, training continues
        if status != Status.converged and not self.stuck:
            self.step()
        self.solver.finish(self.work, self.memory)
        self.watch.norm, self.watch.met = float(outcome.residual), status == Status.converged
        return self.watch.stats(status)

    def _check_norm(self) -> None:
        """Compare the norm with the scale.

        Raises:
            SolveError: the norm has grown without bound.
        """
        watch = self.watch
        watch.check(watch.steps - 1, float(self.most), curvature_at(self.problem, self.w, self.lam, self.batch))
        if watch.lost:
            raise SolveError(self.solver.diverged(self.problem, self.w, self.lam, self.batch, watch))
        self.most = self.norm
        self.limit, self.bound = (torch.full_like(self.norm, max(x, TINY)) for x in (watch.limit, watch.bound))

    @property
    def value(self) -> Tensor:
        """The first tensor of ``w`` as one row; the loop uses only its shape and device."""
        return self.w.flat[0].detach().reshape(1, -1)

    @property
    def faults(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The status if the method is stuck or the gradient has grown without bound; see ``Process``."""
        if self.stuck:
            return torch.full_like(self.norm, int(Status.stagnated), dtype=torch.long)
        return (self.most > self.bound) * int(Status.diverged)

    def measure(self, *, closing: bool = False) -> Tensor:
        """Return the norm of the gradient, which is computed once for the present weights."""
        if self.grads is None:
            self.grads = self.take()
            self.norm = total_norm(self.grads).reshape(1)
            k = self.watch.steps
            self.watch.steps += 1
            if k == 0:
                self.most = self.norm
                self._check_norm()
            elif not self.fixed or k % PROBE == 0 or k & (k - 1) == 0 or k + 1 == self.solver.max_steps:
                self.most = torch.maximum(self.most, self.norm)
        return self.norm

    def take(self) -> list[Tensor]:
        """Return the gradient on a new batch."""
        self.batch = self.problem.inner_batches.draw()
        return gradient(self.problem.inner_on(self.batch), self.w, self.lam)[1]

    def step(self) -> None:
        """Make one step in place."""
        assert self.grads is not None
        with torch.no_grad():
            self.solver.update(self.w.flat, self.grads, self.lam, self.work)
        self.grads = None

    def limits(self) -> Tensor:
        """Return the tolerance, or 1 without one."""
        return torch.ones_like(self.limit) if self.fixed else self.limit

    def reconsider(self, status: Tensor, residual: Tensor, settled: bool) -> Tensor:
        """Return the status, where a gradient that ends above the first one does not count as divergence.

        It may do so after a start at trained weights, and on new batches.
        """
        return status if settled else status.masked_fill(status == int(Status.diverged), int(Status.max_steps))


class Watch:
    """The check of the gradient's norm during training, relative to a scale of the problem.

        scale = |grad L(w_0)|, or |H(w_0) w_0| if there is a relative tolerance and that is larger

    at ``w_0``, the first start of the run. The second term is needed because the gradient alone is nearly zero if the weights
    are trained already. A norm above ``RISE`` times the scale does not mean divergence at the start of a training, where only
    the hyperparameters have moved since the last one, nor while it is below ``RISE L |w|``, with the largest curvature ``L``
    and the weights ``w`` at the start of this training. In both cases the scale is raised.

    Attributes:
        met: whether the norm is within the tolerance.
        lost: whether the norm has grown without bound or is not finite.
        growth: the norm divided by the scale.
        limit, bound: the norm that the tolerance asks for, and the norm above which training diverges.
        steps: number of gradients of the training.
        gradients, products: numbers of inner gradients and Hessian products that the scale took.
    """

    def __init__(self, solver: InnerSolver, memory: dict[str, Any], w: Leaves) -> None:
        """Prepare the check; ``memory`` keeps the scale, and ``w`` is the start of this training."""
        self.solver, self.memory = solver, memory
        self.size = total_norm([leaf.detach() for leaf in w.flat])  # a tensor, read only if it is needed
        self.floor = max(rounding_floor(leaf.dtype, leaf.device) for leaf in w.flat)
        self.norm = math.nan
        self.steps, self.growth = 0, 1.0
        self.limit, self.bound = 0.0, math.inf
        self.gradients = self.products = 0
        self.met = self.lost = False

    def check(self, k: int, norm: float, curvature: Callable[[], Hessian]) -> None:
        """Check the norm of the gradient before step ``k``; ``curvature`` builds the Hessian there."""
        self.norm, rtol = norm, self.solver.rtol
        scale = self.memory.get("scale", 0.0)
        if not scale:
            scale = max(self.norm, self.measured(curvature, image)) if rtol else self.norm  # of a number and NaN, the number
        elif RISE * scale < self.norm < math.inf:
            if k == 0 or self.norm <= RISE * self.measured(curvature, steepness) * float(self.size):
                scale = self.norm
        if math.isfinite(scale):  # a refused step must not affect later ones
            self.memory["scale"] = scale
        self.growth = self.norm / scale if scale > 0 else math.inf if self.norm > 0 else 1.0
        self.bound = RISE * scale
        self.lost = not self.norm <= self.bound
        self.limit = self.solver.atol + (max(rtol, self.floor) * scale if rtol else 0.0)
        self.met = not self.solver.fixed and self.norm <= self.limit

    def measured(self, curvature: Callable[[], Hessian], number: Callable[[Hessian], float]) -> float:
        """Return a number of the Hessian, whose cost is counted, or NaN if the inner loss has no second derivative."""
        made: Hessian | None = None
        try:
            made = curvature()
            return number(made)
        except RuntimeError:
            return math.nan
        finally:
            if made is not None:
                self.gradients += made.gradients
                self.products += made.matvecs

    def stats(self, ended: Status | None = None) -> SolveStats:
        """Return the statistics of the training; the residual is the last norm relative to the scale.

        ``ended`` is the status if the tolerance was not met (None: ``max_steps`` or ``fixed_steps``).
        """
        ended = ended or (Status.fixed_steps if self.solver.fixed else Status.max_steps)
        scale = self.memory["scale"]
        residual = self.norm / scale if scale > 0 else self.norm
        status, spent = Status.converged if self.met else ended, self.steps + self.gradients
        costs = {"evaluations": spent, "vjps": self.products}
        return SolveStats.of_one(status, self.steps, residual, scale, **costs, method=type(self.solver).__name__)


def gradient(loss: Callable[[Any, Any], Tensor], w: Leaves, lam: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the value and the gradient of a function of ``(w, lam)``, without a graph.

    Raises:
        ValueError: the loss does not depend on ``w``.
    """
    value, found = differentiate(lambda leaves, _: loss(w.like(leaves), lam), w.flat, create_graph=False)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(w.flat, found, strict=True)]
