"""Neumann series: ``v = sum_{k=0..K} M^k b``, by ``v <- M v + b`` from ``v = b``.

With ``rtol=0, atol=0`` exactly ``max_steps`` = K products are made; else as many as the tolerance needs. It converges if the
spectral radius of ``M`` is below 1, at that rate. The error of K terms is at most ``q^(K+1) / (1 - q) ||b||`` for ``||M|| <=
q``.

Reference: Lorraine et al., AISTATS 2020, arXiv 1911.02590, section 4; Grazzi et al., ICML 2020, arXiv 2006.16218, eq. 10.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, LinearSolver, Products, fitted_start, solve_by_iteration
from hyperopt.core.solvers.picard import Picard


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The truncated Neumann series; its arguments are those of ``LinearSolver``."""

    iterates = True

    def warm(self, matvec: Products, b: Tensor, near: Tensor) -> tuple[Tensor, int]:
        """Return one step from the best multiple of ``near``."""
        return fitted_start(matvec, b, near), 1

    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Sum the series."""
        picard = Picard(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
        return solve_by_iteration(picard, self, matvec, b, x0, trace)
