"""A direct solve: LU of the dense ``I - M`` of each row, built column by column with ``dim`` products.

For small states, and the reference for all other methods. One or two refinements with the measured residual recover what the
factorisation lost. Costs ``dim`` vjps once, ``rows * dim^2`` numbers of memory and ``rows * dim^3 * 2/3`` operations.

Reference: Higham, Accuracy and Stability of Numerical Algorithms, SIAM 2002, chapters 9 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.restarted import Cycle, RestartedSolver, Run
from hyperopt.core.linear.settings import DenseSettings
from hyperopt.core.solvers.dense import finite_rows


@dataclass(frozen=True)
class Dense(DenseSettings, RestartedSolver):
    """Dense LU; settings in ``DenseSettings``."""

    def cycle(self, run: Run) -> Cycle:
        """One solve with the factors: the first, or a refinement.

        Raises:
            ValueError: the matrices would have more than ``max_entries`` numbers.
        """
        if run.kept is None:
            run.kept = self._factors(run)
        lu, pivots, singular = run.kept
        d = torch.linalg.lu_solve(lu, pivots, run.r[:, :, None].to(lu.dtype))[:, :, 0].to(run.b.dtype)
        return Cycle(run.x + torch.where(singular[:, None], 0.0, d), torch.ones_like(run.iterations), 1, singular)

    def _factors(self, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """LU factors and pivots of every row's matrix, and which rows are singular to rounding."""
        rows, dim = run.b.shape
        if rows * dim * dim > self.max_entries:
            raise ValueError(
                f"Dense: {rows} rows of {dim} unknowns make matrices of {rows * dim * dim} numbers, above "
                f"max_entries={self.max_entries}; use gmres (GMRES), or raise adjoint.linear_solver.max_entries"
            )
        matrix = dense(run, dim)
        clean = finite_rows(matrix)
        if not bool(clean.all()):
            matrix = torch.where(clean[:, None, None], matrix, torch.eye(dim, dtype=matrix.dtype, device=matrix.device))
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        diagonal = lu.diagonal(dim1=1, dim2=2).abs()
        singular = diagonal.amin(dim=1) <= dim * torch.finfo(run.b.dtype).eps * diagonal.amax(dim=1)
        if bool(singular.any()):
            lu = torch.where(singular[:, None, None], torch.eye(dim, dtype=lu.dtype, device=lu.device), lu)
        return lu, pivots, singular


def dense(run: Run, dim: int) -> Tensor:
    """``I - M`` of every row, shape (rows, dim, dim): from the operator's own matrix, if it has one, else by ``dim`` products."""
    matrix = run.operator.closed_form()
    if matrix is not None:
        return (torch.eye(dim, dtype=matrix.dtype, device=matrix.device) - matrix.mT).mT  # column by column, for LAPACK
    return run.columns(range(dim))
