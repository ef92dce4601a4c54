"""Neumann series: ``v = sum_{k=0..K} M^k b``, by ``v <- M v + b`` from ``v = b``.

With ``rtol=0, atol=0`` exactly ``max_steps`` = K products are made; else as many as the tolerance needs. It converges if the
spectral radius of ``M`` is below 1, at that rate. The error of K terms is at most ``q^(K+1) / (1 - q) ||b||`` for ``||M|| <=
q``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, LinearSolver, Products, fitted_start, solve_by_iteration
from hyperopt.core.solvers.picard import Picard


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The truncated Neumann series ``v = b + M b + ... + M^K b``.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number K of products with ``M``, at least 1.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Lorraine et al., AISTATS 2020, arXiv 1911.02590, section 4; Grazzi et al., ICML 2020, arXiv 2006.16218, eq. 10.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Neumann(rtol=1e-6)
        >>> M, b = torch.tensor([[0.5, 0.1], [0.1, 0.3]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    iterates = True

    def warm(self, matvec: Products, b: Tensor, near: Tensor) -> Tensor:
        """Return one step from the best multiple of ``near``."""
        return fitted_start(matvec, b, near)

    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Sum the series."""
        picard = Picard(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
        return solve_by_iteration(picard, self, matvec, b, x0, trace)
