"""Picard iteration: ``w <- (1 - damping) w + damping phi(w)``.

    while residual > tolerance:
        w <- w + damping (phi(w) - w)

Converges linearly when ``phi`` contracts, at the rate of the contraction factor. Also called fixed-point or Banach iteration.
Stopped on the residual ``||phi(w) - w||``, never on the damped step, which is smaller by the factor ``damping``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Point
from hyperopt.core.solvers.settings import PicardSettings


@dataclass(frozen=True)
class Picard(PicardSettings, FixedPointSolver):
    """Damped Picard iteration; settings in ``PicardSettings``."""

    takes_residual: ClassVar[bool] = False
    holds: ClassVar[bool] = False

    def step(self, state: Any, at: Point) -> tuple[Tensor, Any]:
        """One damped step."""
        return self.mix(at.w, at.fw), state

    def mix(self, w: Tensor, fw: Tensor) -> Tensor:
        """``(1 - damping) w + damping fw``."""
        return fw if self.damping == 1.0 else torch.lerp(w, fw, self.damping)
