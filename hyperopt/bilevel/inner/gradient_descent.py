"""Gradient descent: ``w <- w - step_size grad L(w)``, the map itself that every adjoint of a trained problem is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver
from hyperopt.bilevel.inner.rates import move, plain_rates, rates, smallest, spoken
from hyperopt.bilevel.settings import GradientDescentSettings


@dataclass(frozen=True)
class GradientDescent(GradientDescentSettings, DifferentiableSolver):
    """Gradient descent; settings in ``GradientDescentSettings``."""

    rate_names = ("step_size",)

    def map_step(self, lam: Any) -> float | None:
        """Its own step, the smallest of all."""
        return smallest(self.step_size, lam, "GradientDescent: step_size")

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """One step, in place."""
        for x, g, step in zip(w, grads, plain_rates(self.step_size, lam, "GradientDescent: step_size", w), strict=True):
            move(x, g, step)

    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """One step, in the graph."""
        steps = rates(self.step_size, lam, "GradientDescent: step_size", w)
        return [x - step * g for x, g, step in zip(w, grads, steps, strict=True)], buffers

    def remedy(self, lam: Any) -> str:
        """Name the step size."""
        return f"lower step_size={spoken(self.step_size, lam, 'GradientDescent: step_size')} of GradientDescent"
