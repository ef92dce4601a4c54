"""What the stochastic methods share: steps that are written only if they are sound, and the statistics of a step.

A method works out all that it would change first. ``Growth`` looks at it, and refuses a method that diverges before anything is
written: the state is then the last good one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.core.certificate import Certificate
from hyperopt.core.checks import check_number
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import tree_norm

RISE = 1e3  # a residual this many times the largest sound one is looked into
SLACK = 1e-4  # a step that makes the residual larger by no more than this part may do so by rounding
NONE = Certificate(math.nan, False, math.nan)  # nothing is solved to a tolerance, so nothing is known about the error


@dataclass(frozen=True)
class Stochastic(Estimator):
    """A method that trains ``w`` itself, some gradient steps in each outer step.

    Args:
        step_size: of the gradient steps in ``w``, above 0.
    """

    step_size: float = 0.1

    def __post_init__(self) -> None:
        """Check the range."""
        check_number(self, "step_size", 0.0, open_low=True)


class Growth:
    """How residuals compare with the largest that was found to be sound.

    A residual that has risen much is no divergence by itself: from weights that are trained already any move of the
    hyperparameters makes it rise, from nothing. It is one if the method's own step makes the residual larger still.

    Args:
        method: the method's name in statistics and messages.
        memory: where the sizes to compare with are kept, by name.
    """

    def __init__(self, method: str, memory: dict[str, Any]) -> None:
        """Take the sizes that are kept, if there are any."""
        self.method = method
        self.first: dict[str, float] = memory.setdefault("first", {})

    def see(
        self, what: str, size: float, remedy: str, after: Callable[[], float], scale: float | None = None, steps: int = 1
    ) -> SolveStats:
        """Statistics of a residual of norm ``size``, relative to what it is compared with.

        Args:
            what: its name.
            size: its norm.
            remedy: the argument to change, with its value.
            after: gives its norm after the step that the method is about to take; asked for only where it has risen much.
            scale: the size of what the residual is a difference of, the least that it is compared with (None: its own norm at the
                start of the run).
            steps: steps that were taken.

        Raises:
            SolveError: it has grown beyond all bounds and goes on to grow, or is not finite.
        """
        first = max(self.first.get(what, size if scale is None else 0.0), scale or 0.0)
        if not size <= RISE * first:
            if not math.isfinite(size) or not after() <= (1 + SLACK) * size:
                status = Status.diverged if math.isfinite(size) else Status.nonfinite
                raise SolveError(
                    f"{self.method} ended as {status.name}: the residual of its {what} variable is {size:.3g}, after {first:.3g} "
                    f"before; the state is that of the step before. Lower {remedy} of {self.method}"
                )
            first = size
        self.first[what] = first
        relative, code = (size / first if first > 0 else size), torch.tensor([int(Status.fixed_steps)])
        numbers = [torch.tensor([x], dtype=torch.float64) for x in (relative, first)]
        return SolveStats(code, torch.tensor([steps]), *numbers, evaluations=steps, method=self.method)


def same_hyperparameters(lam: Leaves, memory: dict[str, Any], method: str) -> None:
    """Refuse hyperparameters of another structure than in the steps before, which a method's memory is about.

    Raises:
        ValueError: names what has changed.
    """
    now = {name: list(leaf.shape) for name, leaf in zip(lam.names, lam.flat, strict=True)}
    before = memory.setdefault("lam", now)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{method}: {name} had shape {before.get(name)} in the steps before and has {now.get(name)} now (None: it is not "
                "there); give the same hyperparameters in every step, or make a new Bilevel"
            )


def later(gradient: Callable[..., Any], *at: Any) -> Callable[[], float]:
    """What gives the norm of ``gradient(*at)``."""
    return lambda: tree_norm(gradient(*at))


def first_order(loss: Callable[[Any, Any], Tensor], w: Leaves, lam: Leaves) -> tuple[list[Tensor], list[Tensor]]:
    """The partial gradients of a loss in ``w`` and in ``lam``, zeros where it does not depend on one; no second derivative.

    Raises:
        ValueError: the loss depends on neither.
    """
    with torch.enable_grad():
        value = loss(w.tree, lam.tree)
        if not value.requires_grad:
            raise ValueError("a loss depends neither on w nor on lam; is it computed from them, without detach or .item()?")
        found = torch.autograd.grad(value, [*w.flat, *lam.flat], allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip([*w.flat, *lam.flat], found, strict=True)]
    return filled[: len(w.flat)], filled[len(w.flat) :]


def moved(w: Leaves, slopes: Sequence[Tensor], step: float) -> Leaves:
    """New leaves one step down."""
    values = [x.detach() - step * g for x, g in zip(w.flat, slopes, strict=True)]
    return Leaves.of(w.like(values), "w")


def commit(problem: BilevelProblem, state: State, w: Leaves, lam: Any, batch: Any) -> None:
    """Write ``w`` into the weights, and move running statistics by it."""
    with torch.no_grad():
        for old, new in zip(optree.tree_leaves(state.w), w.flat, strict=True):
            old.copy_(new)
    if problem.refresh is not None:
        problem.refresh(state.w, lam, batch)


def second_copy(w: Leaves, memory: dict[str, Any]) -> Leaves:
    """The penalised copy of the weights as it was left, at first a copy of ``w``."""
    kept = memory.get("penalised")
    return Leaves.of(w.like([x.detach().clone() for x in w.flat] if kept is None else kept), "w")
