"""Nystrom: the inverse of a low-rank sketch of ``A = I - M``, for symmetric maps whose ``A`` has few large eigenvalues.

    C = A S,  W = S^T A S,  S = rank columns of the identity, drawn at random
    A ~ C W^+ C^T:      (A_rank + rho I)^{-1} b = (b - C (rho W + C^T C)^{-1} C^T b) / rho
    x <- x + (A_rank + rho I)^{-1} (b - A x)

Costs ``rank`` products once, which do not depend on each other, and one a step, which measures the residual; memory is ``rank``
vectors. One step from 0 is the method as published; more of them refine its answer where they converge, which they do if the part
of ``A`` that the sketch leaves out is below ``2 rho``. Where it is above, the answer is too large by the ratio: raise ``rho`` or
``rank``.

Reference: Hataya & Yamada, AISTATS 2023, arXiv 2302.09726, equations 5 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.base import LinearSolution, Products, worse_than_none
from hyperopt.core.linear.dense import Refinement
from hyperopt.core.linear.krylov import Recurrence
from hyperopt.core.linear.settings import NystromSettings


@dataclass(frozen=True)
class Nystrom(NystromSettings, Refinement):
    """The Nystrom approximation; settings in ``NystromSettings``."""

    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Apply the sketch's inverse; a row left with more residual than 0 would have is ``diverged``: never silently wrong."""
        found = super().solve(matvec, b, x0, trace=trace)
        worse_than_none(found.stats)
        return found

    def correction(self, run: Recurrence) -> Tensor:
        """The sketch's inverse times the residual."""
        if run.kept is None:
            run.kept = self._sketch(run)
        columns, inverse = run.kept
        # shapes: columns (rows, dim, rank), inverse (rows, rank, rank)
        part = columns @ (inverse @ (columns.mT @ run.r[:, :, None]))
        return (run.r - part[:, :, 0]) / self.rho

    def _sketch(self, run: Recurrence) -> tuple[Tensor, Tensor]:
        """The columns ``C`` and the pseudo-inverse of ``rho W + C^T C``."""
        dim = run.b.shape[1]
        drawn = torch.randperm(dim, generator=torch.Generator().manual_seed(self.seed))[: self.rank]
        columns = run.columns(drawn.tolist())
        core = self.rho * columns[:, drawn.to(columns.device)] + columns.mT @ columns
        inverse = torch.linalg.pinv((core + core.mT).double() / 2, rtol=torch.finfo(run.b.dtype).eps * len(drawn), hermitian=True)
        return columns, inverse.to(columns.dtype)
