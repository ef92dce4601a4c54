"""``LinearSolver``: solves ``(I - M) v = b`` row by row, given products with ``M``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hyperopt.core.checks import IterativeMethod, check_choice
from hyperopt.core.operator import LinearOperator, as_operator
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.iterate import iterate
from hyperopt.core.status import SolveStats, Status
from hyperopt.core.text import described

Products = LinearOperator | Callable[[Tensor], Tensor]
"""``M`` of a system: an operator, or a function ``v -> M v``."""
RELATIVE_TO = ("row", "batch")


@dataclass(repr=False)
class LinearSolution:
    """The value, shape (rows, dim), and the statistics of a linear solve.

    ``stats.vjps`` counts the products with ``M`` and ``stats.jvps`` those with its transpose, as for ``M = J^T``.
    """

    value: Tensor
    stats: SolveStats

    def __repr__(self) -> str:
        return described(self, value=self.value, stats=self.stats)


@dataclass(frozen=True)
class LinearSolver(IterativeMethod, ABC):
    """A method for ``(I - M) v = b``; for the adjoint system ``M = J^T`` and ``b = g``.

    A row stops at ``||v - M v - b|| <= atol + rtol ||b||``. This is relative to the right-hand side, so that a loss scaled by
    a factor gives the gradient scaled by it. ``b = 0`` gives ``v = 0``.

    Args:
        relative_to: what ``rtol`` is relative to. ``row``: each row's own ``||b||``. ``batch``: the larger of that and the
            root mean square over the rows. The residual of all rows together is then at most ``sqrt(2) rtol ||b||``, and rows
            that matter little to the hypergradient, such as examples that are fitted already, are solved less accurately.

    Attributes:
        iterates: whether the method iterates ``v <- M v + b``. Its convergence for ``M = I - s A`` then depends on ``s``,
            whereas a Krylov method does the same for every ``s``.
    """

    rtol: float = 1e-6
    relative_to: str = field(default="row", kw_only=True)

    iterates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "relative_to", RELATIVE_TO)

    @property
    def by_row(self) -> bool:
        """Whether each row's residual is relative to its own right-hand side."""
        return self.relative_to == "row" or self.fixed

    def sizes(self, b: Tensor) -> Tensor:
        """Return what the residual of each row is relative to, shape (rows,)."""
        norm = torch.linalg.vector_norm(b, dim=1)
        if self.by_row or not len(norm):
            return norm
        return torch.maximum(norm, norm.square().mean().sqrt())

    def warm(self, matvec: Products, b: Tensor, near: Tensor) -> Tensor:
        """Return a start, given the solution ``near`` of a similar system."""
        return near

    @abstractmethod
    def solve(self, matvec: Products, b: Tensor, x0: Tensor | None = None, *, trace: bool = False) -> LinearSolution:
        """Solve ``(I - M) v = b`` with ``matvec(v) = M v``, all of shape (rows, dim); ``x0=None``: the method's own start."""


def solve_by_iteration(
    solver: FixedPointSolver, method: LinearSolver, matvec: Products, b: Tensor, x0: Tensor | None, trace: bool
) -> LinearSolution:
    """Solve ``v = M v + b`` as a fixed point with a forward solver; the statistics name ``method``."""

    def affine(operator: LinearOperator, b: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: operator.matvec_add(v, b)

    def some(index: Tensor) -> Callable[[Tensor], Tensor] | None:
        found = operator.select(index)
        return None if found is None else affine(found, b[index])

    operator = as_operator(matvec)
    start = b if x0 is None else x0
    part = some if operator.divisible else None
    run = iterate(solver, affine(operator, b), start, some=part, scale=method.sizes(b), trace=trace, rounding=operator.rounding)
    run.stats.method = method.name
    run.stats.vjps, run.stats.evaluations = run.stats.evaluations, 0
    if solver.fixed:  # a fixed number of terms is not a failure, unless v = 0 would be better
        worse_than_none(run.stats)
    return LinearSolution(run.value, run.stats)


def worse_than_none(stats: SolveStats) -> None:
    """Mark rows with a larger residual than that of ``v = 0`` as ``diverged``."""
    stats.row_status = torch.where(stats.residual > 1, int(Status.diverged), stats.row_status)


def fitted_start(matvec: Products, b: Tensor, v: Tensor) -> Tensor:
    """Return a start for ``(I - M) x = b`` from the solution of a similar system, row by row, by one product with M.

        alpha_i = argmin |b_i - alpha (I - M) v_i|,      x0_i = alpha_i M v_i + b_i

    Between two outer steps the right-hand side of an example may shrink to almost nothing, because the example is fitted now.
    The old solution is then wrong by orders of magnitude, while the plain start ``b`` is not. ``alpha v`` is the best start
    along the old direction, including zero, so its residual never exceeds ``|b|``, and the step from it costs no further
    product. A row whose ``v`` is zero or not finite starts at ``b``.

    Args:
        matvec: products with M.
        b: right-hand side. shape: (rows, dim)
        v: solution of a similar system. shape: (rows, dim)
    """
    moved = as_operator(matvec).matvec(v)
    image = v - moved
    alpha = torch.linalg.vecdot(image, b) / torch.linalg.vector_norm(image, dim=1).square()
    usable = torch.isfinite(alpha)  # false where moved is not finite
    start = torch.addcmul(b, alpha[:, None], moved)
    return start if bool(usable.all()) else torch.where(usable[:, None], start, b)
