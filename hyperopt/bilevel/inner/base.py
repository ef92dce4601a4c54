"""``InnerSolver``: trains ``w`` for given hyperparameters, as the ``Training`` that the loop of all methods runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor, nn

from hyperopt.bilevel.curvature import Hessian, differentiate
from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.inner.rates import refuse_unfit
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.core.checks import IterativeMethod
from hyperopt.core.loop import rounding_floor, run
from hyperopt.core.policy import SolveError
from hyperopt.core.process import Process
from hyperopt.core.status import SolveStats, Status

TINY = 1e-30  # a limit in place of 0, since norms are divided by it
PROBE = 16  # steps between two norms that are judged where no tolerance asks for one
RISE = 1e3  # a gradient this many times the scale of the problem is no training any more


@dataclass(frozen=True)
class InnerSolver(IterativeMethod, ABC):
    """A method that minimises the inner loss; a step is one ``update``.

    Args:
        rtol: the solve stops at ``|grad L| <= atol + rtol scale``, where the scale is the larger of ``|grad L(w_0)|`` and
            ``|H(w_0) w_0|`` at the very first start ``w_0`` of the run, with the Hessian H; 0 with ``atol=0`` means exactly
            ``max_steps``. It is raised to the rounding floor of the dtype.
        max_steps: most steps, of one inner gradient each unless a method says otherwise.
    """

    rtol: float = 0.0

    def map_step(self, lam: Any) -> float | None:
        """A step at which the gradient-step map contracts if this solver converges; None: not known."""
        return None

    def objective(self, problem: BilevelProblem) -> BilevelProblem:
        """The problem whose inner loss is what this solver minimises: with the weight decay of its steps, if they have one."""
        return problem

    def check_rates(self, w: Any, lam: Any) -> None:
        """Refuse hyperparameters named as rates that do not fit the tree ``w``; nothing here."""

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> Any:
        """What a solve works with, made from what the solves before it have left in ``memory``."""

    @abstractmethod
    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """Change ``w``, and ``work``, in place, given the gradient there."""

    def finish(self, work: Any, memory: dict[str, Any]) -> None:
        """Leave for the next solve what it needs, as plain containers and tensors."""

    def solve(self, problem: BilevelProblem, lam: Any, state: State) -> SolveStats:
        """Train ``state.w`` in place.

        Raises:
            SolveError: the gradient grew without bound, or is not finite; names the largest stable step.
        """
        problem = self.objective(problem)
        w = Leaves.of(state.w, "w")
        lam = optree.tree_map(lambda x: x.detach(), lam)
        self.check_rates(state.w, lam)
        training = Training(self, problem, w, lam, state.memory.setdefault("inner", {}))
        ended = training.run()
        if problem.refresh is not None:
            problem.refresh(state.w, lam, training.batch)
        return ended

    def diverged(self, problem: BilevelProblem, w: Leaves, lam: Any, batch: Any, growth: float) -> str:
        """What to say of a training in which the gradient has grown ``growth`` times, at a ``w`` of it."""
        text = f"{self.name} diverged: the gradient of the inner loss grew {growth:.3g} times"
        if all(bool(leaf.isfinite().all()) for leaf in w.flat):
            largest = steepness(curvature_at(problem, w, lam, batch))
            if 0 < largest < math.inf:
                text += f"; the largest stable step of gradient descent here is {2 / largest:.4g} (2 / L, by power iteration)"
        return f"{text}; {self.remedy(lam)}"

    def remedy(self, lam: Any) -> str:
        """What to change when training diverges."""
        return f"lower the learning rate of {self.name}"


class DifferentiableSolver(InnerSolver):
    """A method whose step can be differentiated through: ``update`` does in place what ``advance`` does in the graph.

    Attributes:
        keeps_buffers: whether it keeps tensors beside ``w``.
        rate_names: its arguments that may be hyperparameters, one for all weights or one for each; see ``rates``.
    """

    keeps_buffers: ClassVar[bool] = False
    rate_names: ClassVar[tuple[str, ...]] = ()

    def check_rates(self, w: Any, lam: Any) -> None:
        """Refuse hyperparameters named as rates that do not fit the tree ``w``; see ``rates.refuse_unfit``."""
        for name in self.rate_names:
            refuse_unfit(getattr(self, name), lam, f"{self.name}: {name}", w)

    def buffers(self, w: Sequence[Tensor]) -> list[Tensor]:
        """What is kept beside ``w``, at the start."""
        return []

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> Sequence[Tensor]:
        """What is kept beside ``w``; it starts anew with every training, as in the graph."""
        return self.buffers(w)

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Sequence[Tensor]) -> None:
        """One step, in place; a method that can do so without second copies of its tensors has its own."""
        moved, kept = self.advance(w, grads, work, lam)
        for x, y in zip([*w, *work], [*moved, *kept], strict=True):
            x.copy_(y)

    @abstractmethod
    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The next ``w`` and buffers, differentiable in all, rates in ``lam`` among them."""


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
    """

    holds = False
    steady = True
    keeps_best = False

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
        if status != Status.converged:
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
        """Whether the gradient has grown beyond all bounds."""
        return (self.most > self.bound) * int(Status.diverged)

    def measure(self, *, closing: bool = False) -> Tensor:
        """The norm of the gradient on a fresh batch, unless it is there."""
        if self.grads is None:
            self.batch = self.problem.inner_batches.draw()
            _, self.grads = gradient(self.problem.inner_on(self.batch), self.w, self.lam)
            self.norm = nn.utils.get_total_norm(self.grads).reshape(1)
            k = self.watch.steps
            self.watch.steps += 1
            if k == 0:
                self.most = self.norm
                self._look()
            elif not self.fixed or k % PROBE == 0 or k & (k - 1) == 0 or k + 1 == self.solver.max_steps:
                self.most = torch.maximum(self.most, self.norm)
        return self.norm

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
        self.size = nn.utils.get_total_norm([leaf.detach() for leaf in w.flat])  # it is read only where it matters
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
