"""``Training``: an inner solver at work, as the loop of all methods runs it, and ``Watch``, which judges its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Hessian, differentiate
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.core.loop import rounding_floor, run
from hyperopt.core.policy import SolveError
from hyperopt.core.process import Process
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import total_norm

if TYPE_CHECKING:
    from hyperopt.bilevel.inner.base import InnerSolver

TINY = 1e-30  # a limit in place of 0, since norms are divided by it
PROBE = 16  # steps between two norms that are judged where no tolerance asks for one
RISE = 1e3  # a gradient this many times the scale of the problem is no training any more


def curvature_at(problem: BilevelProblem, w: Leaves, lam: Any, batch: Any) -> Callable[[], Hessian]:
    """What makes the Hessian of the inner loss at a point; it is evaluated anew."""
    return lambda: Hessian(Evaluation(problem, batch), w, Leaves.of(lam, "lam"))


def steepness(make: Callable[[], Hessian]) -> float:
    """The largest curvature ``L`` at a point, NaN where the inner loss has no second derivative."""
    try:
        return largest_curvature(make())[0]
    except RuntimeError:
        return math.nan


class Training(Process):
    """An inner solver at work: the loop's process of one row, whose residual is the norm of the gradient on a fresh batch.

    The weights are changed in place, and no copy of them is kept. A fixed number of steps is read at its start, at its end and
    once in a block of the loop, where a gradient that has grown beyond all bounds since ends it.

    Attributes:
        stuck: whether the method can do no more, at the weights as they are.
    """

    holds = False
    steady = True
    keeps_best = False
    stuck = False

    def __init__(self, solver: InnerSolver, problem: BilevelProblem, w: Leaves, lam: Any, memory: dict[str, Any]) -> None:
        """Nothing is evaluated yet; ``memory`` is what the trainings before have left."""
        self.solver, self.problem, self.w, self.lam, self.memory = solver, problem, w, lam, memory
        self.work = solver.begin(w.flat, lam, memory)
        self.watch = Watch(solver, memory, w)
        self.fixed = solver.fixed
        self.batch: Any = None
        self.grads: list[Tensor] | None = None  # at the present weights; None: not taken yet
        self.norm = w.flat[0].new_empty(1)
        self.most = self.limit = self.bound = self.norm  # most: the largest norm that was judged since the last look

    def run(self) -> SolveStats:
        """Train, and refuse a training that diverges."""
        while True:
            outcome = run(self, self.solver.max_steps - self.watch.steps + (self.grads is not None))
            status = Status(int(outcome.status))
            if status not in (Status.diverged, Status.nonfinite):
                break
            self._look()  # the scale may be raised, and then it goes on
        if status != Status.converged and not self.stuck:
            self.step()
        self.solver.finish(self.work, self.memory)
        self.watch.norm, self.watch.met = float(outcome.residual), status == Status.converged
        return self.watch.stats(status)

    def _look(self) -> None:
        """See how the norm is to the scale.

        Raises:
            SolveError: it has grown beyond all bounds.
        """
        watch = self.watch
        watch.see(watch.steps - 1, float(self.most), curvature_at(self.problem, self.w, self.lam, self.batch))
        if watch.lost:
            raise SolveError(self.solver.diverged(self.problem, self.w, self.lam, self.batch, watch.growth))
        self.most = self.norm
        self.limit, self.bound = (torch.full_like(self.norm, max(x, TINY)) for x in (watch.limit, watch.bound))

    @property
    def value(self) -> Tensor:
        """The first of the weights, for the loop to see one row and its device."""
        return self.w.flat[0].detach().reshape(1, -1)

    @property
    def faults(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the method can do no more, or the gradient has grown beyond all bounds."""
        if self.stuck:
            return torch.full_like(self.norm, int(Status.stagnated), dtype=torch.long)
        return (self.most > self.bound) * int(Status.diverged)

    def measure(self, *, closing: bool = False) -> Tensor:
        """The norm of the gradient, unless it is there."""
        if self.grads is None:
            self.grads = self.take()
            self.norm = total_norm(self.grads).reshape(1)
            k = self.watch.steps
            self.watch.steps += 1
            if k == 0:
                self.most = self.norm
                self._look()
            elif not self.fixed or k % PROBE == 0 or k & (k - 1) == 0 or k + 1 == self.solver.max_steps:
                self.most = torch.maximum(self.most, self.norm)
        return self.norm

    def take(self) -> list[Tensor]:
        """The gradient on a fresh batch."""
        self.batch = self.problem.inner_batches.draw()
        return gradient(self.problem.inner_on(self.batch), self.w, self.lam)[1]

    def step(self) -> None:
        """One update, in place."""
        assert self.grads is not None
        with torch.no_grad():
            self.solver.update(self.w.flat, self.grads, self.lam, self.work)
        self.grads = None

    def limits(self) -> Tensor:
        """The tolerance; 1 where there is none."""
        return torch.ones_like(self.limit) if self.fixed else self.limit

    def replace(self, rows: Tensor, by: Tensor) -> None:
        """Not needed: there is no best iterate."""
        raise NotImplementedError

    def hold(self, moving: Tensor) -> None:
        """Not needed: there is one row."""
        raise NotImplementedError

    def reconsider(self, status: Tensor, residual: Tensor, settled: bool) -> Tensor:
        """A gradient that ends above the first is no divergence of a training from trained weights, or on fresh batches."""
        return status if settled else status.masked_fill(status == int(Status.diverged), int(Status.max_steps))


class Watch:
    """The norm of the gradient while a training runs, relative to a scale of the problem's own.

        scale = |grad L(w_0)|, or |H(w_0) w_0| if a relative tolerance is asked for and that is larger

    at ``w_0``, the very first start of the run. The second term is what the first is a difference of: at weights that are trained
    already the gradient alone says nothing. A gradient that rises beyond ``RISE`` times the scale is no divergence if only the
    hyperparameters have moved since the last training, nor while it is below ``RISE L |w|``, with the largest curvature ``L`` and
    the weights ``w`` at the start of this training. The scale is raised then.

    Attributes:
        met: whether the norm is within the tolerance.
        lost: whether it has grown beyond all bounds, or is not finite.
        growth: how many times the scale it is.
        limit, bound: the norm that the tolerance asks for, and the one that is beyond all bounds.
        steps: gradients of the training.
        gradients, products: inner gradients and Hessian products that were spent on the scale.
    """

    def __init__(self, solver: InnerSolver, memory: dict[str, Any], w: Leaves) -> None:
        """Nothing seen yet; ``memory`` keeps the scale, and ``w`` is where this training starts."""
        self.solver, self.memory = solver, memory
        self.size = total_norm([leaf.detach() for leaf in w.flat])  # it is read only where it matters
        self.floor = max(rounding_floor(leaf.dtype, leaf.device) for leaf in w.flat)
        self.norm = math.nan
        self.steps, self.growth = 0, 1.0
        self.limit, self.bound = 0.0, math.inf
        self.gradients = self.products = 0
        self.met = self.lost = False

    def see(self, k: int, norm: float, curvature: Callable[[], Hessian]) -> None:
        """Judge the norm of the gradient at the start of step ``k``; ``curvature`` makes the Hessian there."""
        self.norm, rtol = norm, self.solver.rtol
        scale = self.memory.get("scale", 0.0)
        if not scale:
            scale = max(self.norm, self._image(curvature)) if rtol else self.norm
        elif RISE * scale < self.norm < math.inf and (k == 0 or self.norm <= RISE * self._steepness(curvature)):
            scale = self.norm
        if math.isfinite(scale):  # a step that was refused must not spoil those after it
            self.memory["scale"] = scale
        self.growth = self.norm / scale if scale > 0 else math.inf if self.norm > 0 else 1.0
        self.bound = RISE * scale
        self.lost = not self.norm <= self.bound
        self.limit = self.solver.atol + (max(rtol, self.floor) * scale if rtol else 0.0)
        self.met = not self.solver.fixed and self.norm <= self.limit

    def _image(self, curvature: Callable[[], Hessian]) -> float:
        """``|H w|``; 0 where the inner loss has no second derivative."""
        try:
            made = curvature()
            image = made.matvec(made.matrix([leaf.detach() for leaf in made.w.flat]))
        except RuntimeError:
            return 0.0
        self._spend(made)
        size = float(torch.linalg.vector_norm(image))
        return size if math.isfinite(size) else 0.0

    def _steepness(self, curvature: Callable[[], Hessian]) -> float:
        """``L |w|``, NaN where the inner loss has no second derivative."""

        def counted() -> Hessian:
            nonlocal made
            made = curvature()
            return made

        made: Hessian | None = None
        largest = steepness(counted)
        if made is not None:
            self._spend(made)
        return largest * float(self.size)

    def _spend(self, curvature: Hessian) -> None:
        self.gradients += curvature.gradients
        self.products += curvature.matvecs

    def stats(self, ended: Status | None = None) -> SolveStats:
        """Statistics of the training; the residual is the last norm, relative to the scale.

        ``ended`` is how it ended where it did not meet its tolerance (None: by ``max_steps``).
        """
        ended = ended or (Status.fixed_steps if self.solver.fixed else Status.max_steps)
        scale = self.memory["scale"]
        residual = self.norm / scale if scale > 0 else self.norm
        numbers = [torch.tensor([x], dtype=torch.float64) for x in (residual, scale)]
        code, steps = torch.tensor([int(Status.converged if self.met else ended)]), torch.tensor([self.steps])
        spent = self.steps + self.gradients
        return SolveStats(code, steps, *numbers, evaluations=spent, vjps=self.products, method=type(self.solver).__name__)


def gradient(loss: Callable[[Any, Any], Tensor], w: Leaves, lam: Any) -> tuple[Tensor, list[Tensor]]:
    """The inner loss, as a function of ``(w, lam)``, and its gradient, without a graph.

    Raises:
        ValueError: the loss does not depend on ``w``.
    """
    with torch.enable_grad():
        value = loss(w.tree, lam)
        found = differentiate(value, w.flat, create_graph=False)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(w.flat, found, strict=True)]
