"""``InnerSolver``: trains ``w`` for given hyperparameters. The driver owns stopping, divergence and statistics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor, nn

from hyperopt.bilevel.curvature import Hessian, differentiate
from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.inner.rates import refuse_unfit
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.settings import InnerSettings
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.core.loop import rounding_floor
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import tree_norm

RISE = 1e3  # a gradient this many times the scale of the problem is no training any more
PROBE = 16  # steps between two looks at the gradient's norm where no tolerance asks for one


class InnerSolver(InnerSettings, ABC):
    """A method that minimises the inner loss; a step is one ``update``."""

    @property
    def name(self) -> str:
        """The method's name in statistics and messages."""
        return type(self).__name__

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
        memory = state.memory.setdefault("inner", {})
        work = self.begin(w.flat, lam, memory)
        watch = Watch(self, memory, w)
        batch = None
        for k in range(self.max_steps):
            batch = problem.inner_batches.draw()
            _, grads = gradient(problem.inner_on(batch), w, lam)
            if watch.wants(k):
                watch.see(k, grads, curvature_at(problem, w, lam, batch))
                if watch.lost:
                    raise SolveError(self.diverged(problem, w, lam, batch, watch.growth))
                if watch.met:
                    break
            with torch.no_grad():
                self.update(w.flat, grads, lam, work)
        self.finish(work, memory)
        if problem.refresh is not None:
            problem.refresh(state.w, lam, batch)
        return watch.stats()

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
        rate_names: its settings that may be hyperparameters, one for all weights or one for each; see ``rates``.
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
        gradients, products: inner gradients and Hessian products that were spent on the scale.
    """

    def __init__(self, solver: InnerSettings, memory: dict[str, Any], w: Leaves) -> None:
        """Nothing seen yet; ``memory`` keeps the scale, and ``w`` is where this training starts."""
        self.solver, self.memory = solver, memory
        self.size = nn.utils.get_total_norm([leaf.detach() for leaf in w.flat])  # it is read only where it matters
        self.floor = max(rounding_floor(leaf.dtype, leaf.device) for leaf in w.flat)
        self.norm = math.nan
        self.steps, self.growth = 0, 1.0
        self.gradients = self.products = 0
        self.met = self.lost = False

    def wants(self, k: int) -> bool:
        """Whether the norm is to be looked at in step ``k``: reading it makes a GPU wait, so only as often as is needed."""
        self.steps = k + 1
        return not self.solver.fixed or k % PROBE == 0 or k & (k - 1) == 0 or k + 1 == self.solver.max_steps

    def see(self, k: int, grads: Sequence[Tensor], curvature: Callable[[], Hessian]) -> None:
        """Measure at the start of step ``k``; ``curvature`` makes the Hessian there."""
        self.norm, rtol = tree_norm(list(grads)), self.solver.rtol
        scale = self.memory.get("scale", 0.0)
        if not scale:
            scale = max(self.norm, self._image(curvature)) if rtol else self.norm
        elif RISE * scale < self.norm < math.inf and (k == 0 or self.norm <= RISE * self._steepness(curvature)):
            scale = self.norm
        if math.isfinite(scale):  # a step that was refused must not spoil those after it
            self.memory["scale"] = scale
        self.growth = self.norm / scale if scale > 0 else math.inf if self.norm > 0 else 1.0
        self.lost = not self.norm <= RISE * scale
        limit = self.solver.atol + (max(rtol, self.floor) * scale if rtol else 0.0)
        self.met = not self.solver.fixed and self.norm <= limit

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
