"""Reduced rank extrapolation, row by row: several plain steps, and then their combination with the least residual.

    cycle:  w_{i+1} = phi(w_i),  r_i = phi(w_i) - w_i,      i = 0 .. k,        k = min(window, dim)
            w_0 <- sum_i gamma_i w_i,        gamma = argmin || sum_i gamma_i r_i ||,        sum_i gamma_i = 1

On a linear map of n <= k variables one cycle, of k + 1 evaluations, gives the solution, whether or not the map contracts; for
k = 1 the method is Steffensen's. Unlike Anderson's method, which mixes at every step, a cycle consists of plain steps. With
``u_i = r_{i+1} - r_i`` the constraint on gamma is eliminated:

    theta = argmin || r_k - sum_{i<k} theta_i u_i ||,        sum_i gamma_i w_i = w_k - sum_{i<k} theta_i r_i
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

RIDGE = 1e-14  # relative to a diagonal of 1 in float64: the rounding of the Gram matrix of dependent vectors


@dataclass(frozen=True)
class RRE(FixedPointSolver):
    """Cyclic reduced rank extrapolation.

    Args:
        rtol, atol: a row stops at ``residual <= atol + rtol * scale``; both at least 0, and both 0 for exactly ``max_steps``
            steps.
        max_steps: largest number of evaluations of the map, at least 1.
        window: number of plain steps of a cycle, at least 1; at most the number of entries of the state is used.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Mesina, Comput. Methods Appl. Mech. Eng. 10, 1977; Eddy, in Information Linkage between Applied Mathematics and
    Industry, 1979; Smith, Ford & Sidi, SIAM Review 29, 1987 (cycles); Sidi, Vector Extrapolation Methods, SIAM 2017.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.RRE(rtol=1e-5)
        >>> solution = hyperopt.fixed_point(lambda w: 2 - 3 * w, torch.zeros(1, 1), solver=solver)
        >>> round(float(solution.value), 4), solution.status.name
        (0.5, 'converged')
    """

    window: int = 5

    rise: ClassVar[float] = 1e9  # if the map does not contract, the plain steps of a cycle lead away before it ends

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window")

    def init(self, w: Tensor) -> Window:
        """Return an empty window; a cycle has one more residual than plain steps."""
        return Window(min(self.window, max(1, w.shape[1])) + 1)

    def select(self, state: Window, index: Tensor) -> Window:
        """Return the residuals of some rows."""
        return state.select(index)

    def step(self, state: Window, at: Point) -> tuple[Tensor, Window]:
        """Make a plain step, or the extrapolation at the end of a cycle."""
        residual = at.residual
        state = state.add(lambda out: residual if out is None else out.copy_(residual), residual)
        if state.count < state.size:
            return at.fw, state
        residuals = state.matrix
        changes = residuals.diff(dim=1)
        size = torch.linalg.vector_norm(changes.detach(), dim=2, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        unit = (changes / size).double()
        gram = unit @ unit.mT + RIDGE * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        right = residual.double()[:, :, None]
        theta, _ = torch.linalg.solve_ex(gram, unit @ right)
        # One step of iterative refinement regains the digits lost by the squared condition number of the Gram matrix.
        theta = theta + torch.linalg.solve_ex(gram, unit @ (right - unit.mT @ theta))[0]
        theta = torch.nan_to_num(theta, 0.0, 0.0, 0.0).to(size.dtype) / size
        return at.w - (theta.mT @ residuals[:, :-1])[:, 0], replace(state, count=0, kept=())
