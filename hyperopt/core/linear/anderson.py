"""Anderson acceleration of ``v <- M v + b``; on a linear system this is GMRES with a sliding window.

It converges where Neumann does not: the spectral radius of ``M`` may be 1 or above if ``I - M`` is regular and the window
spans enough of its spectrum. Reference: Walker & Ni, SIAM J. Numer. Anal. 49, 2011, theorem 2.2.
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
    """Anderson acceleration of the adjoint iteration; its arguments are those of ``LinearSolver`` and ``AndersonMixing``."""

    iterates = True

    def warm(self, matvec: Products, b: Tensor, near: Tensor) -> tuple[Tensor, int]:
        """Return one step from the best multiple of ``near``."""
        return fitted_start(matvec, b, near), 1

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
