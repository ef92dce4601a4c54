"""``InnerSolver``: trains ``w`` for given hyperparameters. The driver owns stopping, divergence and statistics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Hessian, unaffected
from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.inner.rates import refuse_unfit
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.settings import InnerSettings
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import tree_norm

RISE = 1e3  # a gradient this many times the first one is no training any more
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
        w = Leaves.of(state.w, "w")
        lam = optree.tree_map(lambda x: x.detach(), lam)
        self.check_rates(state.w, lam)
        memory = state.memory.setdefault("inner", {})
        work = self.begin(w.flat, lam, memory)
        watch = Watch(self, memory)
        batch = None
        for k in range(self.max_steps):
            batch = problem.inner_batches.draw()
            _, grads = gradient(problem, w, lam, batch)
            if watch.wants(k):
                watch.see(k, grads)
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
            largest, _ = largest_curvature(Hessian(problem, w, Leaves.of(lam, "lam"), batch))
            if 0 < largest < math.inf:
                text += f"; the largest stable step of gradient descent here is {2 / largest:.4g} (2 / L, by power iteration)"
        return f"{text}; {self.remedy(lam)}"

    def remedy(self, lam: Any) -> str:
        """What to change when training diverges."""
        return "lower the learning rate of inner"


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
            refuse_unfit(getattr(self, name), lam, f"inner.{name}", w)

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


class Watch:
    """The norm of the gradient while a training runs: relative to that at the very first start of the run.

    Attributes:
        met: whether it is within the tolerance.
        lost: whether it has grown beyond all bounds, or is not finite.
        growth: how many times it has grown since that first start.
    """

    def __init__(self, solver: InnerSettings, memory: dict[str, Any]) -> None:
        """Nothing seen yet; ``memory`` keeps the very first norm."""
        self.solver, self.memory = solver, memory
        self.first = self.norm = math.nan
        self.steps, self.growth = 0, 1.0
        self.met = self.lost = False

    def wants(self, k: int) -> bool:
        """Whether the norm is to be looked at in step ``k``: reading it makes a GPU wait, so only as often as is needed."""
        self.steps = k + 1
        return not self.solver.fixed or k % PROBE == 0 or k & (k - 1) == 0 or k + 1 == self.solver.max_steps

    def see(self, k: int, grads: Sequence[Tensor]) -> None:
        """Measure at the start of step ``k``."""
        self.norm = tree_norm(list(grads))
        if k == 0:
            self.first = self.norm
        scale = self.memory["scale"] = self.memory.get("scale") or self.norm  # a start at a minimum says nothing
        self.growth = self.norm / scale if scale > 0 else math.inf if self.norm > 0 else 1.0
        self.lost = not self.norm <= RISE * max(scale, self.first)
        self.met = not self.solver.fixed and self.norm <= self.solver.atol + self.solver.rtol * scale

    def stats(self, ended: Status | None = None) -> SolveStats:
        """Statistics of the training; the residual is the last norm, relative to that at the very first start.

        ``ended`` is how it ended where it did not meet its tolerance (None: by ``max_steps``).
        """
        ended = ended or (Status.fixed_steps if self.solver.fixed else Status.max_steps)
        scale = self.memory["scale"]
        residual = self.norm / scale if scale > 0 else self.norm
        numbers = [torch.tensor([x], dtype=torch.float64) for x in (residual, scale)]
        code, steps = torch.tensor([int(Status.converged if self.met else ended)]), torch.tensor([self.steps])
        return SolveStats(code, steps, *numbers, evaluations=self.steps, method=type(self.solver).__name__)


def gradient(problem: BilevelProblem, w: Leaves, lam: Any, batch: Any) -> tuple[Tensor, list[Tensor]]:
    """The inner loss and its gradient on one batch, without a graph.

    Raises:
        ValueError: the loss does not depend on ``w``.
    """
    with torch.enable_grad():
        loss = problem.inner(w.tree, lam, batch)
        if not loss.requires_grad:
            unaffected()
        found = torch.autograd.grad(loss, w.flat, allow_unused=True)
    if all(g is None for g in found):
        unaffected()
    return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(w.flat, found, strict=True)]
