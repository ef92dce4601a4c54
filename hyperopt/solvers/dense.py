"""Dense systems ``(I - J) x = r``, one a row: what Newton and chord share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperopt.solvers.point import Point
from hyperopt.solvers.settings import DenseSettings


def check_size(settings: DenseSettings, w: Tensor) -> None:
    """Refuse a state whose Jacobians would not fit.

    Raises:
        ValueError: they take more than ``settings.max_gib``.
    """
    rows, dim = w.shape
    size = rows * dim * dim * w.element_size() / 2**30
    if size > settings.max_gib:
        raise ValueError(
            f"{type(settings).__name__}: dense Jacobians of {rows} rows of {dim} entries take {size:.3g} GiB, more than "
            f"max_gib={settings.max_gib}; use NewtonKrylov (solver=newton_krylov), which makes none, or raise max_gib"
        )


def factor(at: Point) -> tuple[Tensor, Tensor, Tensor]:
    """LU factors of ``I - J`` at a point, shapes (rows, dim, dim) and (rows, dim), and the rows in which it is singular.

    Those rows get the factors of the identity, so that nothing infinite enters a derivative either.
    """
    J = at.jacobian()
    eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
    system = eye - J
    finite = torch.isfinite(system).all(dim=2).all(dim=1)
    system = system if bool(finite.all()) else torch.where(finite[:, None, None], system, eye)
    lu, pivots, _ = torch.linalg.lu_factor_ex(system)
    # An exactly singular matrix seldom has a pivot of exactly 0 after rounding: what counts is its size beside the largest.
    size = lu.detach().diagonal(dim1=1, dim2=2).abs()
    singular = ~(size.amin(dim=1) > torch.finfo(J.dtype).eps * size.amax(dim=1))
    if bool(singular.any()):
        lu, pivots, _ = torch.linalg.lu_factor_ex(torch.where(singular[:, None, None], eye, system))
    return lu, pivots, singular | ~finite


def solve(factors: tuple[Tensor, Tensor], r: Tensor, *, transpose: bool = False) -> Tensor:
    """``(I - J)^{-1} r`` or ``(I - J^T)^{-1} r``, shape (rows, dim)."""
    return torch.linalg.lu_solve(*factors, r[:, :, None], adjoint=transpose)[:, :, 0]


def select(factors: Any, index: Tensor) -> Any:
    """The factors of some rows."""
    return tuple(x[index] for x in factors)
