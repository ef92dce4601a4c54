"""Heavy ball: ``m <- momentum m + grad L(w)``, ``w <- w - step_size m``, from ``m = 0`` at the start of every training.

On a quadratic of condition number kappa it converges like ``1 - 2 / sqrt(kappa)`` at the best rates, gradient descent like
``1 - 2 / kappa``.

Reference: Polyak, USSR Comput. Math. Math. Phys. 4, 1964.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.inner.base import DifferentiableSolver, rate
from hyperopt.bilevel.settings import HeavyBallSettings


@dataclass(frozen=True)
class HeavyBall(HeavyBallSettings, DifferentiableSolver):
    """Gradient descent with momentum; settings in ``HeavyBallSettings``."""

    keeps_buffers = True

    def _rates(self, lam: Any) -> tuple[Any, Any]:
        return rate(self.step_size, lam, "HeavyBall: step_size"), rate(self.momentum, lam, "HeavyBall: momentum")

    def buffers(self, w: Sequence[Tensor]) -> list[Tensor]:
        """The momentum of each tensor."""
        return [torch.zeros_like(x, requires_grad=False) for x in w]

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: list[Tensor]) -> None:
        """One step, in place."""
        step, momentum = (float(x) for x in self._rates(lam))
        for x, m, g in zip(w, work, grads, strict=True):
            m.mul_(momentum).add_(g)
            x.sub_(m, alpha=step)

    def advance(
        self, w: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], lam: Any
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """One step, in the graph."""
        step, momentum = self._rates(lam)
        moving = [momentum * m + g for m, g in zip(buffers, grads, strict=True)]
        return [x - step * m for x, m in zip(w, moving, strict=True)], moving

    def remedy(self, lam: Any) -> str:
        """Name the rates."""
        step, momentum = (float(x) for x in self._rates(lam))
        return f"lower step_size={step:g} of HeavyBall (it is stable below 2 (1 + momentum) / L, with momentum={momentum:g})"
