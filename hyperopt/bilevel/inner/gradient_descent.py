"""Gradient descent: ``w <- w - step_size grad L(w)``, the map that the adjoints of a trained problem differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.inner.rates import check_rate, move, plain_rates, rate_text, rates, smallest


@dataclass(frozen=True)
class GradientDescent(DifferentiableSolver):
    """Gradient descent.

    Args:
        step_size: a number above 0, or the name of a hyperparameter (an entry of a mapping ``lam``) that holds one number, or a
            tree like ``w`` of numbers or of tensors that broadcast to the weights.
    """

    step_size: Any = 0.1

    rate_names = ("step_size",)

    def __post_init__(self) -> None:
        """Check the ranges."""
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

    def remedy(self, lam: Any) -> str:
        """Return the advice to lower the step size."""
        return f"lower step_size={rate_text(self.step_size, lam, 'GradientDescent: step_size')} of GradientDescent"
