"""Gradient descent: ``w <- w - step_size grad L(w)``, the map itself that every adjoint of a trained problem is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt.bilevel.inner.base import InnerSolver, rate
from hyperopt.bilevel.settings import GradientDescentSettings


@dataclass(frozen=True)
class GradientDescent(GradientDescentSettings, InnerSolver):
    """Gradient descent; settings in ``GradientDescentSettings``."""

    def map_step(self, lam: Any) -> float | None:
        """Its own step."""
        return float(rate(self.step_size, lam, "inner.step_size"))

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> None:
        """One step."""
        step = float(rate(self.step_size, lam, "inner.step_size"))
        for x, g in zip(w, grads, strict=True):
            x.sub_(g, alpha=step)

    def remedy(self, lam: Any) -> str:
        """Name the step size."""
        return f"lower inner.step_size={float(rate(self.step_size, lam, 'inner.step_size')):g}"
