"""Gradient descent: ``w <- w - step_size grad L(w)``, the map itself that every adjoint of a trained problem is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver, rate
from hyperopt.bilevel.settings import GradientDescentSettings


@dataclass(frozen=True)
class GradientDescent(GradientDescentSettings, DifferentiableSolver):
    """Gradient descent; settings in ``GradientDescentSettings``."""

    def map_step(self, lam: Any) -> float | None:
        """Its own step."""
        return float(self._step(lam))

    def _step(self, lam: Any) -> Any:
        return rate(self.step_size, lam, "GradientDescent: step_size")

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """One step, in place."""
        step = float(self._step(lam))
        for x, g in zip(w, grads, strict=True):
            x.sub_(g, alpha=step)

    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """One step, in the graph."""
        step = self._step(lam)
        return [x - step * g for x, g in zip(w, grads, strict=True)], buffers

    def remedy(self, lam: Any) -> str:
        """Name the step size."""
        return f"lower step_size={float(self._step(lam)):g} of GradientDescent"
