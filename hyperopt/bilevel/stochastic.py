"""What the stochastic methods share: the check that a step does not diverge, and the statistics of a step.

A method first computes everything that it would change. ``Growth`` then refuses a step that diverges before anything is
written, so that the state stays as it was after the last good step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.curvature import unused_of
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import partial_gradients
from hyperopt.core.checks import check_number
from hyperopt.core.policy import SolveError
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.tree import tree_norm

RISE = 1e3  # a residual above this multiple of the largest accepted one is examined
SLACK = 1e-4  # relative increase of the residual that may be due to rounding


@dataclass(frozen=True)
class Stochastic(Estimator):
    """The base of methods that train ``w`` themselves, by some gradient steps in each outer step.

    Args:
        step_size: step size of the gradient steps in ``w``, above 0.
    """

    step_size: float = 0.1

    def __post_init__(self) -> None:
        check_number(self, "step_size", 0.0, open_low=True)

    def step_of(self, field: str) -> tuple[float, str]:
        """Return the step size in a field, ``step_size`` if that is None, with its name as text for messages."""
        name = "step_size" if getattr(self, field) is None else field
        step: float = getattr(self, name)
        return step, f"{name}={step:g}"


class Growth:
    """A check for divergence, which compares each residual with the largest one that was accepted before.

    A large rise alone does not mean divergence: if the weights are trained already, their residual is nearly zero, and any move
    of the hyperparameters makes it rise. The method diverges if its own next step makes the residual larger still.

    Args:
        method: name of the method, for statistics and messages.
        memory: keeps the largest accepted norms, by name of the variable.
    """

    def __init__(self, method: str, memory: dict[str, Any]) -> None:
        """Use the norms that are kept in ``memory``."""
        self.method = method
        self.first: dict[str, float] = memory.setdefault("first", {})

    def check(
        self, what: str, size: float, remedy: str, after: Callable[[], float], scale: float | None = None, steps: int = 1
    ) -> SolveStats:
        """Return the statistics of a residual, relative to the largest accepted norm.

        Args:
            what: name of the variable.
            size: norm of the residual.
            remedy: the argument to change and its value, for the message.
            after: returns the norm after the step that the method is about to take; called only after a large rise.
            scale: norm of the terms whose difference the residual is; the residual is compared with at least this (None: with
                its own norm at the start of the run).
            steps: number of steps taken.

        Raises:
            SolveError: the residual has risen by more than ``RISE`` and the next step would raise it further, or it is not
                finite.
        """
        first = max(self.first.get(what, size if scale is None else 0.0), scale or 0.0)
        if not size <= RISE * first:
            if not math.isfinite(size) or not after() <= (1 + SLACK) * size:
                status = Status.diverged if math.isfinite(size) else Status.nonfinite
                raise SolveError(
                    f"{self.method} ended as {status.name}: the residual of its {what} variable is {size:.3g}, but was at most "
                    f"{first:.3g} before; the state is that of the step before. Lower {remedy} of {self.method}"
                )
            first = size
        self.first[what] = first
        relative = size / first if first > 0 else size
        return SolveStats.of_one(Status.fixed_steps, steps, relative, first, evaluations=steps, method=self.method)


def same_hyperparameters(lam: Leaves, memory: dict[str, Any], method: str) -> None:
    """Refuse hyperparameters whose structure differs from earlier steps, because the method's memory would not fit them.

    Raises:
        ValueError: the message names what has changed.
    """
    now = {name: list(leaf.shape) for name, leaf in zip(lam.names, lam.flat, strict=True)}
    before = memory.setdefault("lam", now)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{method}: {name} had shape {before.get(name)} in earlier steps and has {now.get(name)} now (None: it does not "
                "exist); give the same hyperparameters in every step, or make a new Bilevel"
            )


def later_norm(gradient: Callable[..., Any], *at: Any) -> Callable[[], float]:
    """Return a function that computes the norm of ``gradient(*at)``."""
    return lambda: tree_norm(gradient(*at))


def first_order(loss: Callable[[Any, Any], Tensor], w: Leaves, lam: Leaves) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the partial gradients of a loss, as ``partial_gradients`` does, but with zeros for leaves of ``w`` without one."""
    _, in_w, in_lam = partial_gradients(loss, w, lam)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(w.flat, in_w, strict=True)], in_lam


def penalised_gradient(
    lam: Leaves, direct: Sequence[Tensor | None], above: Sequence[Tensor | None], below: Sequence[Tensor | None], penalty: float
) -> tuple[Any, tuple[str, ...]]:
    """Return ``direct + penalty (above - below)``, a tree like ``lam``, and the names of hyperparameters without any part.

    Raises:
        ValueError: no loss depends on any hyperparameter.
    """
    unused = unused_of(lam.names, direct, above, below)
    parts = (optree.tree_leaves(lam.like(part)) for part in (direct, above, below))
    return lam.like([e + penalty * (a - b) for e, a, b in zip(*parts, strict=True)]), unused


def moved(w: Leaves, slopes: Sequence[Tensor], step: float) -> Leaves:
    """Return ``w - step * slopes`` as new leaves."""
    values = [x.detach() - step * g for x, g in zip(w.flat, slopes, strict=True)]
    return Leaves.of(w.like(values), "w")


def second_copy(w: Leaves, memory: dict[str, Any]) -> Leaves:
    """Return the penalised copy of the weights from the last step; in the first step, a copy of ``w``."""
    kept = memory.get("penalised")
    return Leaves.of(w.like([x.detach().clone() for x in w.flat] if kept is None else kept), "w")
