"""Nystrom: the inverse of a low-rank sketch of ``A = I - M``, for symmetric maps whose ``A`` has few large eigenvalues.

    C = A S,  W = S^T A S,  S = rank columns of the identity, drawn at random
    A ~ C W^+ C^T:      (A_rank + rho I)^{-1} b = (b - C (rho W + C^T C)^{-1} C^T b) / rho
    x <- x + (A_rank + rho I)^{-1} (b - A x)

It costs ``rank`` independent products once, and one product a step, which measures the residual; memory is ``rank`` vectors.
One step from 0 is the method as published. More steps refine its answer if they converge, which they do if the part of ``A``
that the sketch leaves out is below ``2 rho``. If that part is larger, the answer is too large by the ratio: raise ``rho`` or
``rank``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.checks import check_count, check_number
from hyperopt.core.linear.base import LinearSolution, Products, worse_than_none
from hyperopt.core.linear.dense import Refinement
from hyperopt.core.linear.krylov import Recurrence


@dataclass(frozen=True)
class Nystrom(Refinement):
    """The Nystrom approximation, which takes ``rank`` vjps and one a step.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: applications of the sketch's inverse; 1 with ``rtol=0, atol=0`` is the method as published.
        rank: number of columns of ``I - M`` in the sketch, at least 1; at most the number of unknowns is used.
        rho: number above 0 that is added to the diagonal, in the units of ``I - M`` (for a trained problem, of the Hessian).
        seed: seed of the choice of columns, at least 0.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Hataya & Yamada, AISTATS 2023, arXiv 2302.09726, equations 5 and 6.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Nystrom(rank=2, rho=1e-3)
        >>> M = torch.diag(torch.tensor([-9.0, 0.9]))  # A = I - M has the eigenvalues 10 and 0.1
        >>> found = solver.solve(lambda v: v @ M, torch.ones(1, 2))
        >>> [round(float(x), 2) for x in found.value[0]]
        [0.1, 9.9]
    """

    rtol: float = 0.0
    max_steps: int = 1
    rank: int = 20
    rho: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "rank")
        check_number(self, "rho", 0.0, open_low=True)
        check_count(self, "seed", 0)

    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Apply the sketch's inverse; a row with a larger residual than that of 0 is marked ``diverged``."""
        found = super().solve(matvec, b, x0, trace=trace)
        worse_than_none(found.stats)
        return found

    def correction(self, run: Recurrence) -> Tensor:
        """Return the sketch's inverse times the residual."""
        if run.kept is None:
            run.kept = self._sketch(run)
        columns, inverse = run.kept
        # shapes: columns (rows, dim, rank), inverse (rows, rank, rank)
        part = columns @ (inverse @ (columns.mT @ run.r[:, :, None]))
        return (run.r - part[:, :, 0]) / self.rho

    def _sketch(self, run: Recurrence) -> tuple[Tensor, Tensor]:
        """Return the columns ``C`` and the pseudo-inverse of ``rho W + C^T C``."""
        dim = run.b.shape[1]
        drawn = torch.randperm(dim, generator=torch.Generator().manual_seed(self.seed))[: self.rank]
        columns = run.columns(drawn.tolist())
        core = self.rho * columns[:, drawn.to(columns.device)] + columns.mT @ columns
        inverse = torch.linalg.pinv((core + core.mT).double() / 2, rtol=torch.finfo(run.b.dtype).eps * len(drawn), hermitian=True)
        return columns, inverse.to(columns.dtype)
