"""``InnerSolver``: a method that trains ``w`` for given hyperparameters; ``Training`` is one run of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optree
from torch import Tensor

from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.inner.rates import rate_text, refuse_unfit
from hyperopt.bilevel.inner.training import Training, Watch, curvature_at, steepness
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.checks import IterativeMethod
from hyperopt.core.status import SolveStats


@dataclass(frozen=True)
class InnerSolver(IterativeMethod, ABC):
    """A method that minimises the inner loss, one ``update`` a step.

    Args:
        rtol: relative tolerance, at least 0. Training stops at ``|grad L| <= atol + rtol scale``; the scale is the larger of
            ``|grad L(w_0)|`` and ``|H(w_0) w_0|``, with the Hessian H, at the first start ``w_0`` of the run. With ``rtol=0``
            and ``atol=0`` training takes exactly ``max_steps`` steps. A tolerance below rounding is raised to it.
        atol: absolute tolerance on the norm of the gradient, at least 0.
        max_steps: largest number of steps, at least 1; each takes one inner gradient, unless the method says otherwise.
    """

    rtol: float = 0.0

    def map_step(self, lam: Any) -> float | None:
        """Return a step at which the gradient-step map contracts if this solver converges, or None if it is not known."""
        return None

    def objective(self, problem: BilevelProblem) -> BilevelProblem:
        """Return the problem whose inner loss is what this solver minimises, including the weight decay of its steps."""
        return problem

    def check_rates(self, w: Any, lam: Any) -> None:
        """Refuse hyperparameters used as rates that do not fit the tree ``w``; by default there are none."""

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> Any:
        """Return the working state of a training, made from what earlier ones left in ``memory`` (default: None)."""

    @abstractmethod
    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """Make one step: change ``w`` and ``work`` in place, given the gradient at ``w``."""

    def finish(self, work: Any, memory: dict[str, Any]) -> None:
        """Write into ``memory`` what the next training needs, as plain containers and tensors (default: nothing)."""

    def training(self, problem: BilevelProblem, w: Leaves, lam: Any, memory: dict[str, Any]) -> Training:
        """Return a training of a problem by this solver, from ``w``."""
        return Training(self, problem, w, lam, memory)

    def solve(self, problem: BilevelProblem, lam: Any, state: State) -> SolveStats:
        """Train ``state.w`` in place.

        Raises:
            SolveError: the gradient grew without bound or is not finite; the message names the largest stable step.
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

    def diverged(self, problem: BilevelProblem, w: Leaves, lam: Any, batch: Any, watch: Watch) -> str:
        """Return the message for a training that diverged at ``w``, as ``watch`` has seen."""
        text = f"{self.name} diverged: the gradient of the inner loss grew {watch.growth:.3g} times"
        if all(bool(leaf.isfinite().all()) for leaf in w.flat):
            largest = watch.measured(curvature_at(problem, w, lam, batch), steepness)
            if 0 < largest < math.inf:
                text += f"; the largest stable step of gradient descent here is {2 / largest:.4g} (2 / L, by power iteration)"
        return f"{text}; {self.remedy(lam)}"

    def remedy(self, lam: Any) -> str:
        """Return what to change if training diverges."""
        return f"lower the learning rate of {self.name}"


class DifferentiableSolver(InnerSolver):
    """An inner solver whose step is differentiable: ``update`` does in place what ``advance`` does in the graph.

    Attributes:
        keeps_buffers: whether the solver keeps tensors beside ``w``.
        rate_names: the arguments that may be hyperparameters, one for all weights or one for each; see ``rates``.
    """

    keeps_buffers: ClassVar[bool] = False
    rate_names: ClassVar[tuple[str, ...]] = ()

    def check_rates(self, w: Any, lam: Any) -> None:
        """Refuse hyperparameters used as rates that do not fit the tree ``w``; see ``rates.refuse_unfit``."""
        for name in self.rate_names:
            refuse_unfit(getattr(self, name), lam, f"{self.name}: {name}", w)

    def remedy(self, lam: Any) -> str:
        """Return the advice to lower the first of the rates."""
        if not self.rate_names:
            return super().remedy(lam)
        rate = self.rate_names[0]
        return f"lower {rate}={rate_text(getattr(self, rate), lam, f'{self.name}: {rate}')} of {self.name}"

    def buffers(self, w: Sequence[Tensor]) -> list[Tensor]:
        """Return the initial tensors beside ``w`` (default: none)."""
        return []

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> Sequence[Tensor]:
        """Return the initial tensors beside ``w``; every training starts with new ones, as in the graph."""
        return self.buffers(w)

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Sequence[Tensor]) -> None:
        """Make one step in place; a method that needs no second copies of its tensors for this overrides it."""
        moved, kept = self.advance(w, grads, work, lam)
        for x, y in zip([*w, *work], [*moved, *kept], strict=True):
            x.copy_(y)

    @abstractmethod
    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the next ``w`` and buffers, differentiable in all arguments, including rates in ``lam``."""
