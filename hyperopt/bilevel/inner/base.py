"""``InnerSolver``: trains ``w`` for given hyperparameters. The driver owns stopping, divergence and statistics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hyperopt.bilevel.curvature import Hessian
from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.settings import InnerSettings
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.policy import SolveError
from hyperopt.status import SolveStats, Status

RISE = 1e3  # a gradient this many times the first one is no training any more
PROBE = 16  # steps between two looks at the gradient's norm where no tolerance asks for one


class InnerSolver(InnerSettings, ABC):
    """A method that minimises the inner loss; a step is one ``update``."""

    @property
    def name(self) -> str:
        """The method's name in statistics and messages."""
        return type(self).__name__

    def map_step(self, lam: Any) -> float | None:
        """A step at which the gradient-step map is known to contract if this solver converges; None: not known."""
        return None

    def begin(self, w: Leaves, lam: Any, memory: dict[str, Any]) -> None:
        """Prepare a solve; what is kept from one to the next is in ``memory``."""

    @abstractmethod
    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> None:
        """Change ``w`` in place, given the gradient there."""

    def finish(self, memory: dict[str, Any]) -> None:
        """Put what the next solve needs into ``memory``."""

    def solve(self, problem: BilevelProblem, lam: Any, state: State) -> SolveStats:
        """Train ``state.w`` in place.

        Raises:
            SolveError: the gradient grew without bound, or is not finite; names the largest stable step size.
        """
        w = Leaves.of(state.w, "w")
        lam = optree.tree_map(lambda x: x.detach(), lam)
        memory = state.memory.setdefault("inner", {})
        self.begin(w, lam, memory)
        first = norm = math.nan
        steps, status = 0, Status.fixed_steps if self.fixed else Status.max_steps
        for k in range(self.max_steps):
            grads = gradient(problem, w, lam)
            steps = k + 1
            if not self.fixed or k % PROBE == 0 or k & (k + 1) == 0 or steps == self.max_steps:
                norm = float(nn.utils.get_total_norm(grads))
                first = norm if k == 0 else first
                scale = memory.setdefault("scale", norm)
                if not norm <= RISE * max(scale, first):
                    raise SolveError(self.diverged(problem, w, lam, steps, norm, first))
                if not self.fixed and norm <= self.atol + self.rtol * scale:
                    status = Status.converged
                    break
            with torch.no_grad():
                self.update(w.flat, grads, lam, memory)
        self.finish(memory)
        scale = memory["scale"]
        return training_stats(self.name, status, steps, norm / scale if scale > 0 else norm, scale)

    def diverged(self, problem: BilevelProblem, w: Leaves, lam: Any, steps: int, norm: float, first: float) -> str:
        """What to say of a training that diverged."""
        text = f"{self.name} diverged: the gradient of the inner loss went from {first:.3g} to {norm:.3g} in {steps} steps"
        if math.isfinite(norm):
            batch = problem.inner_batches.draw()
            largest, _ = largest_curvature(Hessian(problem, w, Leaves.of(lam, "lam"), batch))
            text += f"; the largest stable step here is {2 / largest:.4g}: 2 / L, with L = {largest:.4g} by power iteration"
        return f"{text}; {self.remedy(lam)}"

    def remedy(self, lam: Any) -> str:
        """What to change when training diverges."""
        return "lower the learning rate of inner"


def gradient(problem: BilevelProblem, w: Leaves, lam: Any) -> list[Tensor]:
    """The gradient of the inner loss on the next batch, without a graph.

    Raises:
        ValueError: the loss does not depend on ``w``.
    """
    with torch.enable_grad():
        loss = problem.inner(w.tree, lam, problem.inner_batches.draw())
        found: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss, w.flat, allow_unused=True)
    if all(g is None for g in found):
        raise ValueError("the inner loss does not depend on w: it must be computed from the w that it is given, without detach")
    return [torch.zeros_like(x) if g is None else g for x, g in zip(w.flat, found, strict=True)]


def training_stats(name: str, status: Status, steps: int, residual: float, scale: float) -> SolveStats:
    """Statistics of a training: the residual is the norm of the gradient relative to that at the first start."""
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (residual, scale)]
    return SolveStats(torch.tensor([int(status)]), torch.tensor([steps]), *numbers, evaluations=steps, method=name)


def rate(value: float | str, lam: Any, owner: str) -> Any:
    """A rate of an inner solver: the number, or the hyperparameter of that name.

    Raises:
        ValueError: ``lam`` has no such entry.
    """
    if not isinstance(value, str):
        return value
    if not isinstance(lam, dict) or value not in lam:
        has = ", ".join(map(str, lam)) if isinstance(lam, dict) else f"a {type(lam).__name__} without names"
        raise ValueError(f"{owner} names the hyperparameter {value!r}, but lam is {has}; give a number or the name of one")
    return lam[value]
