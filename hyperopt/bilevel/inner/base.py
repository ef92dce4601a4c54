"""``InnerSolver``: a method that trains ``w`` for given hyperparameters; a ``Training`` is one at work."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optree
from torch import Tensor

from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.inner.rates import refuse_unfit
from hyperopt.bilevel.inner.training import Training, curvature_at, steepness
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.core.checks import IterativeMethod
from hyperopt.core.status import SolveStats


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

    def training(self, problem: BilevelProblem, w: Leaves, lam: Any, memory: dict[str, Any]) -> Training:
        """This solver at work on a problem, from ``w``."""
        return Training(self, problem, w, lam, memory)

    def solve(self, problem: BilevelProblem, lam: Any, state: State) -> SolveStats:
        """Train ``state.w`` in place.

        Raises:
            SolveError: the gradient grew without bound, or is not finite; names the largest stable step.
        """
        problem = self.objective(problem)
        w = Leaves.of(state.w, "w")
        lam = optree.tree_map(lambda x: x.detach(), lam)
        self.check_rates(state.w, lam)
        training = self.training(problem, w, lam, state.memory.setdefault("inner", {}))
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
