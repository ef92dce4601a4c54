"""Dense systems ``(I - J) x = r``, one for each row, for the Newton and chord methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperopt.core import legacy
from hyperopt.core.captured import seen
from hyperopt.core.checks import check_number
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Point


@dataclass(frozen=True)
class DenseSolver(FixedPointSolver):
    """A method that computes the Jacobian of each row.

    Args:
        max_gib: largest memory of the Jacobians of all rows, in GiB, above 0; larger ones are refused.
    """

    max_gib: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_gib", 0.0, open_low=True)

    def check_size(self, w: Tensor) -> None:
        """Refuse a state whose Jacobians would not fit.

        Raises:
            ValueError: they take more than ``max_gib``.
        """
        rows, dim = w.shape
        size = rows * dim * dim * w.element_size() / 2**30
        if size > self.max_gib:
            raise ValueError(
                f"{self.name}: dense Jacobians of {rows} rows of {dim} entries take {size:.3g} GiB, more than "
                f"max_gib={self.max_gib}; use NewtonKrylov, which makes none, or raise max_gib"
            )


class Factors(NamedTuple):
    """LU factors of a system ``S = I - J`` for each row.

    Attributes:
        system: S if its derivative is wanted, else None. shape: (rows, dim, dim)
        lu: shape (rows, dim, dim).
        pivots: shape (rows, dim).
    """

    system: Tensor | None
    lu: Tensor
    pivots: Tensor


def factor(at: Point, rows: Tensor | None = None) -> tuple[Factors, Tensor | None]:
    """Return LU factors of ``I - J`` at a point, and a mask of the rows in which it is singular or not finite (None: none).

    Such rows get the factors of the identity, so that nothing infinite enters a derivative. The host reads one number.

    Args:
        at: the point.
        rows: indices of the rows to factor, shape (k,); None: all. The mask has one entry for each of them.
    """
    J = at.jacobian()
    J = J if rows is None else J[rows]
    eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
    system = (eye - J.mT).mT  # column-major, as LAPACK needs it: a strided copy would cost as much as the factorisation
    with torch.no_grad():
        lu, pivots, _ = torch.linalg.lu_factor_ex(system)
        # After rounding, an exactly singular matrix seldom has a pivot of exactly 0, so the pivot is compared with the largest.
        # An entry that is not finite gives a pivot that is not finite.
        size = lu.diagonal(dim1=1, dim2=2).abs()
        singular = ~(size.amin(dim=1) > torch.finfo(J.dtype).eps * size.amax(dim=1))
        bad = bool(seen(singular).any())
    if bad:
        system = torch.where(singular[:, None, None], eye, system)
        with torch.no_grad():
            lu, pivots, _ = torch.linalg.lu_factor_ex(system)
    return Factors(system if torch.is_grad_enabled() else None, lu, pivots), singular if bad else None


def solve(factors: Factors, r: Tensor, *, transpose: bool = False) -> Tensor:
    """Return ``(I - J)^{-1} r`` or ``(I - J^T)^{-1} r``, shape (rows, dim)."""
    if factors.system is None:
        return torch.linalg.lu_solve(factors.lu, factors.pivots, r[:, :, None], adjoint=transpose)[:, :, 0]
    return FactoredSolve.apply(factors.system, factors.lu, factors.pivots, r, transpose)


class FactoredSolve(torch.autograd.Function):
    """``x = S^{-1} r`` (or with S^T) from given factors of S, differentiable in S and r to every order.

        r_bar = S^{-T} x_bar,       S_bar = -r_bar x^T

    The derivative is one more solve with the same factors. Autograd's derivative of the factorisation itself costs more than ten
    times the factorisation.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(system: Tensor, lu: Tensor, pivots: Tensor, r: Tensor, transpose: bool) -> Tensor:
        """Solve."""
        return torch.linalg.lu_solve(lu, pivots, r[..., None], adjoint=transpose)[..., 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the factors and the solution."""
        *tensors, _, ctx.transpose = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve with the transpose, and form an outer product."""
        system, lu, pivots, x = ctx.saved_tensors  # read once: a checkpoint gives them only once

        def pulled(g: Tensor) -> tuple[Tensor | None, Tensor]:
            r = FactoredSolve.apply(system, lu, pivots, g, not ctx.transpose)
            left, right = (x, r) if ctx.transpose else (r, x)
            outer = (right[..., :, None] * -left[..., None, :]).mT if ctx.needs_input_grad[0] else None  # column-major like S
            return outer, r

        outer, r = legacy.each(pulled, g) if legacy.batched(g) else pulled(g)
        return outer, None, None, r, None

    @staticmethod
    def jvp(ctx: Any, system_t: Any, _: Any, __: Any, r_t: Any, ___: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve once more: ``S dx = dr - dS x``."""
        system, lu, pivots, x = ctx.saved_tensors

        def pushed(system_t: Tensor | None, r_t: Tensor | None) -> Tensor:
            moved = torch.zeros_like(x) if r_t is None else r_t
            if system_t is not None:
                change = system_t.mT if ctx.transpose else system_t
                moved = moved - (change @ x[..., None])[..., 0]
            return FactoredSolve.apply(system, lu, pivots, moved, ctx.transpose)

        batched = any(legacy.batched(t) for t in (system_t, r_t) if t is not None)
        return legacy.each(pushed, system_t, r_t) if batched else pushed(system_t, r_t)


def replace_rows(rows: Tensor, new: Factors, old: Factors) -> Factors:
    """Return the factors of ``new`` in the rows of a mask, shape (rows,), and those of ``old`` elsewhere."""
    wide = rows[:, None, None]
    system = None if new.system is None or old.system is None else torch.where(wide, new.system, old.system)
    return Factors(system, torch.where(wide, new.lu, old.lu), torch.where(rows[:, None], new.pivots, old.pivots))


def select(factors: Factors, index: Tensor) -> Factors:
    """Return the factors of some rows."""
    return Factors(*(None if x is None else x[index] for x in factors))  # pyright: ignore[reportArgumentType]
