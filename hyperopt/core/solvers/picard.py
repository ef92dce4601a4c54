"""Picard iteration: ``w <- (1 - damping) w + damping phi(w)``.

    while residual > tolerance:
        w <- w + damping (phi(w) - w)

It converges linearly, at the rate of the contraction factor, if ``phi`` contracts; it is also called fixed-point or Banach
iteration. It stops on the residual ``||phi(w) - w||`` and not on the damped step, which is smaller by the factor ``damping``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperopt.core.checks import check_number
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Point


@dataclass(frozen=True)
class Picard(FixedPointSolver):
    """Damped Picard iteration.

    Args:
        rtol, atol: a row stops at ``residual <= atol + rtol * scale``; both at least 0, and both 0 for exactly ``max_steps``
            steps.
        max_steps: largest number of evaluations of the map, at least 1.
        damping: in (0, 1]; 1 is the plain iteration ``w <- phi(w)``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Banach, Fundamenta Mathematicae 3, 1922.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Picard(rtol=1e-5)
        >>> solution = hyperopt.fixed_point(torch.cos, torch.ones(1, 1), solver=solver)
        >>> round(float(solution.value), 4), solution.status.name
        (0.7391, 'converged')
    """

    damping: float = 1.0

    takes_residual: ClassVar[bool] = False
    holds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "damping", 0.0, 1.0, open_low=True)

    def step(self, state: Any, at: Point) -> tuple[Tensor, Any]:
        """Make one damped step."""
        return self.mix(at.w, at.fw), state

    def mix(self, w: Tensor, fw: Tensor) -> Tensor:
        """Return ``(1 - damping) w + damping fw``."""
        return fw if self.damping == 1.0 else torch.lerp(w, fw, self.damping)
