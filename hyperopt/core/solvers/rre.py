"""Reduced rank extrapolation, row by row: a number of plain steps, then the combination of them whose residual is least.

    cycle:  w_{i+1} = phi(w_i),  r_i = phi(w_i) - w_i,      i = 0 .. k,        k = min(window, dim)
            w_0 <- sum_i gamma_i w_i,        gamma = argmin || sum_i gamma_i r_i ||,        sum_i gamma_i = 1

On a linear map of n <= k variables one cycle, of k + 1 evaluations, gives the solution, whether or not the map contracts; with
k = 1 the method is Steffensen's. Anderson's method mixes at every step; here the steps of a cycle are plain ones. With
``u_i = r_{i+1} - r_i`` the condition on gamma is gone:

    theta = argmin || r_k - sum_{i<k} theta_i u_i ||,        sum_i gamma_i w_i = w_k - sum_{i<k} theta_i r_i

References: Mesina, Comput. Methods Appl. Mech. Eng. 10, 1977; Eddy, in Information Linkage between Applied Mathematics and
Industry, 1979; Smith, Ford & Sidi, SIAM Review 29, 1987 (cycles); Sidi, Vector Extrapolation Methods, SIAM 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hyperopt.core.checks import check_count
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Point
from hyperopt.core.solvers.window import Window

RIDGE = 1e-14  # relative, on a system in float64 with a diagonal of 1: what rounding leaves of vectors that depend on each other


@dataclass(frozen=True)
class RRE(FixedPointSolver):
    """Cyclic reduced rank extrapolation.

    Args:
        window: plain steps of a cycle, at least 1; a state of fewer entries takes as many as it has.
    """

    window: int = 5

    rise: ClassVar[float] = 1e9  # where the map does not contract, the plain steps of a cycle lead away before it ends

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "window")

    def init(self, w: Tensor) -> Window:
        """No residuals; a cycle has one more of them than extrapolation takes plain steps."""
        return Window(min(self.window, max(1, w.shape[1])) + 1)

    def select(self, state: Window, index: Tensor) -> Window:
        """The residuals of some rows."""
        return state.select(index)

    def step(self, state: Window, at: Point) -> tuple[Tensor, Window]:
        """A plain step, or at the end of a cycle the extrapolation."""
        state = state.add(at.residual)
        if state.count < state.size:
            return at.fw, state
        residuals = state.matrix
        changes = residuals.diff(dim=1)
        size = torch.linalg.vector_norm(changes.detach(), dim=2, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        unit = (changes / size).double()
        gram = unit @ unit.mT + RIDGE * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        right = at.residual.double()[:, :, None]
        theta, _ = torch.linalg.solve_ex(gram, unit @ right)
        # Once more for what is left, which the square of the condition in the Gram matrix has cost.
        theta = theta + torch.linalg.solve_ex(gram, unit @ (right - unit.mT @ theta))[0]
        theta = torch.nan_to_num(theta, 0.0, 0.0, 0.0).to(size.dtype) / size
        return at.w - (theta.mT @ residuals[:, :-1])[:, 0], replace(state, count=0, kept=())
