"""Gradient descent: ``w <- w - step_size grad L(w)``, the map that the adjoints of a trained problem differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.inner.rates import check_rate, move, plain_rates, rates, smallest


@dataclass(frozen=True)
class GradientDescent(DifferentiableSolver):
    """Gradient descent.

    Args:
        rtol, atol: training stops at ``|grad L| <= atol + rtol * scale``, see ``hyperopt.bilevel.inner.base.InnerSolver``; both
            at least 0, and both 0 for exactly ``max_steps`` steps.
        max_steps: largest number of steps, at least 1.
        step_size: a number above 0, or the name of a hyperparameter (an entry of a mapping ``lam``) that holds one number, or a
            tree like ``w`` of numbers or of tensors that broadcast to the weights.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Cauchy, Comptes Rendus 25, 1847.

    Example:
        >>> import torch, hyperopt
        >>> inner = hyperopt.GradientDescent(step_size=0.2)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.zeros(1), torch.ones(()), inner=inner)
        >>> round(float(estimate.w), 3), round(float(estimate.grad), 3)  # w = 1 / (1 + lam) = 0.5, dE/dlam = -0.25
        (0.5, -0.25)
    """

    step_size: Any = 0.1

    rate_names = ("step_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self, "step_size", 0.0, open_low=True)

    def map_step(self, lam: Any) -> float | None:
        """Return the smallest of its step sizes."""
        return smallest(self.step_size, lam, "GradientDescent: step_size")

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """Make one step in place."""
        for x, g, step in zip(w, grads, plain_rates(self.step_size, lam, "GradientDescent: step_size", w), strict=True):
            move(x, g, step)

    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Make one step in the graph; see ``DifferentiableSolver.advance``."""
        steps = rates(self.step_size, lam, "GradientDescent: step_size", w)
        return [x - step * g for x, g, step in zip(w, grads, steps, strict=True)], buffers
