"""Anderson acceleration of ``v <- M v + b``; on a linear system this is GMRES with a sliding window.

It converges where Neumann does not: the spectral radius of ``M`` may be 1 or above if ``I - M`` is regular and the window
spans enough of its spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, LinearSolver, Products, fitted_start, solve_by_iteration
from hyperopt.core.solvers.anderson import Anderson, AndersonMixing
from hyperopt.core.status import Status


@dataclass(frozen=True)
class LinearAnderson(LinearSolver, AndersonMixing):
    """Anderson acceleration of the adjoint iteration ``v <- M v + b``.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number of products with ``M``, at least 1.
        window: number of steps that are mixed, at least 1; it may exceed ``max_steps``.
        damping: how much of a residual is added to its iterate, in (0, 1].
        ridge: relative ridge, at least 0: ``ridge * trace(G) / window`` is added to the Gram matrix ``G`` of the residuals.
        restart: whether a full window is emptied, instead of losing its oldest step.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Walker & Ni, SIAM J. Numer. Anal. 49, 2011, theorem 2.2.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.LinearAnderson(rtol=1e-6)
        >>> M, b = torch.tensor([[2.0, 1.0], [0.0, -3.0]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    iterates = True

    def warm(self, matvec: Products, b: Tensor, near: Tensor) -> Tensor:
        """Return one step from the best multiple of ``near``."""
        return fitted_start(matvec, b, near)

    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Accelerate ``v <- M v + b``."""
        anderson = Anderson(self.rtol, self.atol, self.max_steps, self.window, self.damping, self.ridge, self.restart)
        found = solve_by_iteration(anderson, self, matvec, b, x0, trace)
        if not self.fixed:  # the rounding of a value that has run away exceeds the tolerance, so its residual says nothing
            eps = torch.finfo(b.dtype).eps
            rounding = eps * torch.linalg.vector_norm(found.value, dim=1)
            lost = rounding > max(self.rtol, math.sqrt(eps)) * found.stats.scale + self.atol
            found.stats.row_status = torch.where(lost, int(Status.diverged), found.stats.row_status)
        return found
