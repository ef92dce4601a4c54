"""A direct solve: LU of the dense ``I - M`` of each row, built column by column with ``dim`` products.

It is for small states, and the reference for all other methods. One or two refinements with the measured residual recover what
the factorisation lost. It costs ``dim`` vjps once, ``rows * dim^2`` numbers of memory and ``rows * dim^3 * 2/3`` operations.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.checks import check_count
from hyperopt.core.linear.krylov import KrylovSolver, Recurrence


class Refinement(KrylovSolver):
    """``x <- x + B r`` with an approximate inverse ``B``; the residual is measured after every step."""

    apart = False

    @abstractmethod
    def correction(self, run: Recurrence) -> Tensor:
        """Return ``B r``, shape (rows, dim)."""

    def init(self, run: Recurrence) -> tuple[()]:
        """Return no state."""
        return ()

    def step(self, run: Recurrence, state: tuple[()]) -> tuple[()]:
        """Add the correction; the zero residual makes the loop measure the true one."""
        run.x += self.correction(run)
        run.rr = torch.zeros_like(run.rr)
        return ()

    def spent(self, run: Recurrence, state: tuple[()]) -> bool:
        """End the cycle after every step."""
        return True


@dataclass(frozen=True)
class Dense(Refinement):
    """LU of the dense ``I - M`` of each row, made by ``dim`` vjps.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: number of solves with the factors: one, and refinements if ``rtol`` asks for more accuracy.
        max_entries: largest number of entries (rows x dim x dim) of the matrices, at least 1; larger systems are refused.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Higham, Accuracy and Stability of Numerical Algorithms, SIAM 2002, chapters 9 and 12.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Dense()
        >>> M, b = torch.tensor([[2.0, 1.0], [0.0, -3.0]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    rtol: float = 1e-10
    max_steps: int = 10
    max_entries: int = 2**26

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "max_entries")

    def correction(self, run: Recurrence) -> Tensor:
        """Solve with the factors; the result is 0 in singular rows.

        Raises:
            ValueError: the matrices would have more than ``max_entries`` numbers.
        """
        if run.kept is None:
            run.kept = self._factors(run)
        lu, pivots, singular = run.kept
        found = torch.linalg.lu_solve(lu, pivots, run.r[:, :, None].to(lu.dtype))[:, :, 0].to(run.b.dtype)
        return found.masked_fill_(singular, 0.0)

    def stuck(self, run: Recurrence, state: tuple[()]) -> Tensor:
        """Return the singular rows."""
        return run.kept[2]

    def _factors(self, run: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
        """Return LU factors and pivots of every row's matrix, and which rows are singular up to rounding."""
        rows, dim = run.b.shape
        if rows * dim * dim > self.max_entries:
            raise ValueError(
                f"Dense: {rows} rows of {dim} unknowns make matrices of {rows * dim * dim} numbers, above "
                f"max_entries={self.max_entries}; use GMRES, or raise max_entries"
            )
        matrix = run.operator.closed_form()
        if matrix is None:
            matrix = run.columns(list(range(dim)))
        else:
            matrix = (torch.eye(dim, dtype=matrix.dtype, device=matrix.device) - matrix.mT).mT  # column-major, for LAPACK
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        diagonal = lu.diagonal(dim1=1, dim2=2).abs()
        singular = ~(diagonal.amin(dim=1) > dim * torch.finfo(run.b.dtype).eps * diagonal.amax(dim=1))  # or not finite
        return lu, pivots, singular[:, None]
