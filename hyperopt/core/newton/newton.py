"""Newton's method with a dense Jacobian for each row.

    w <- w + (I - J(w))^{-1} (phi(w) - w),        J = d_w phi

It converges quadratically near a solution at which ``I - J`` is regular, whether or not the map contracts there. A step costs
one evaluation, ``dim`` vjps for the Jacobians of all rows (none if the map has them in closed form, as ``TanhAffine`` has) and
``2/3 dim^3`` operations a row. Rows in which ``I - J`` is singular end as ``breakdown``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hyperopt.core.captured import transformed
from hyperopt.core.checks import check_flag
from hyperopt.core.newton.dense_jacobian import DenseSolver, factor, solve
from hyperopt.core.solvers.line_search import backtrack, remember
from hyperopt.core.solvers.point import Point


@dataclass(frozen=True)
class Newton(DenseSolver):
    """Newton's method with dense Jacobians.

    Args:
        rtol, atol: a row stops at ``residual <= atol + rtol * scale``; both at least 0, and both 0 for exactly ``max_steps``
            steps.
        max_steps: largest number of evaluations of the map, at least 1.
        max_gib: largest memory of the Jacobians of all rows, in GiB, above 0; larger ones are refused.
        line_search: whether to shorten a step until the residual falls; each trial is one evaluation.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, chapter 5.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Newton(rtol=1e-5)
        >>> solution = hyperopt.fixed_point(torch.cos, torch.ones(1, 1), solver=solver)
        >>> round(float(solution.value), 4), solution.status.name
        (0.7391, 'converged')
    """

    max_steps: int = 50
    line_search: bool = False

    linearizes: ClassVar[bool] = True
    rise: ClassVar[float] = 1e9  # far from the solution a step may be long, and later steps return

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "line_search")

    def init(self, w: Tensor) -> Tensor:
        """Return no residuals for the line search; check that the Jacobians fit into memory."""
        self.check_size(w)
        return w.new_empty((w.shape[0], 0))

    def select(self, state: Tensor, index: Tensor) -> Tensor:
        """Return the residuals of some rows."""
        return state[index]

    def step(self, state: Tensor, at: Point) -> tuple[Tensor, Tensor]:
        """Make one Newton step in the rows that still move."""
        residual = at.residual
        # Under a transform all rows take the step, since the members of a batch may differ in which rows move.
        rows = None if at.active is None or transformed() else at.active.nonzero().squeeze(1)
        factors, broken = factor(at, rows)
        part = residual if rows is None else residual[rows]
        direction = solve(factors, part if broken is None else torch.where(broken[:, None], 0.0, part))
        if rows is not None:
            direction = torch.zeros_like(residual).index_copy(0, rows, direction)
            if broken is not None:
                broken = torch.zeros_like(at.active).index_copy(0, rows, broken)  # pyright: ignore[reportArgumentType]
        at.broken = broken
        if not self.line_search:
            return at.w + direction, state
        state = remember(state, at)
        return backtrack(at, direction, state), state
