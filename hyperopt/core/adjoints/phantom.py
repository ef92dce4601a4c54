"""Phantom gradient: a few damped steps of the adjoint iteration.

    v_1 = damping g,     v_{t+1} = (1 - damping) v_t + damping (J^T v_t + g),     t = 1 .. steps - 1

This is the Neumann form, whose memory does not grow with ``steps``; at a fixed point it equals unrolling as many damped steps
of the map. With damping the series converges for some maps for which the plain one does not (a real spectrum below -1). It
costs ``steps`` vjps, including the one with the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.adjoints.implicit import ImplicitAdjoint, LinearSystem
from hyperopt.core.adjoints.onestep import truncated
from hyperopt.core.checks import check_count, check_number


@dataclass(frozen=True)
class Phantom(ImplicitAdjoint):
    """The phantom gradient.

    Args:
        steps: number of damped steps from ``v = 0``, at least 1.
        damping: in (0, 1].

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Geng et al., NeurIPS 2021, arXiv 2111.05177, section 3 (unrolling-based and Neumann-series-based phantom
    gradients).

    Example:
        >>> import torch, hyperopt
        >>> a, adjoint = torch.tensor(0.5, requires_grad=True), hyperopt.Phantom(steps=50, damping=0.5)
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), adjoint=adjoint)
        >>> solution.value.sum().backward()  # many steps give the exact 4
        >>> round(float(a.grad), 3)
        4.0
    """

    steps: int = 5
    damping: float = 0.5

    exact = False
    remedy = "Phantom is never exact; use an exact adjoint, such as Implicit()"

    def __post_init__(self) -> None:
        check_count(self, "steps")
        check_number(self, "damping", 0.0, 1.0, open_low=True)

    def solve(self, system: LinearSystem) -> Tensor:
        """Take the damped steps."""
        b = system.b
        with torch.no_grad():
            v, residual = self.damping * b, b
            for _ in range(self.steps - 1):
                image = system.operator.matvec_add(v, b)
                residual, v = image - v, torch.lerp(v, image, self.damping)
        norm = torch.linalg.vector_norm(residual, dim=1)
        system.keep(v, truncated(b, norm, self.steps - 1, "Phantom"))
        return v
