"""The chord method: Newton with the factors of an old Jacobian.

    w <- w + (I - J(w_old))^{-1} (phi(w) - w)

It converges linearly, and the faster, the nearer ``w_old`` is. A step costs one evaluation and ``2 dim^2`` operations a row. A
row whose residual does not fall fast enough gets new factors, at one more evaluation and ``dim`` vjps of the batch. The method
is also called simplified or modified Newton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hyperopt.core.captured import seen
from hyperopt.core.checks import check_number
from hyperopt.core.newton.dense_jacobian import DenseSolver, Factors, factor, replace_rows, select, solve
from hyperopt.core.solvers.point import Point


@dataclass(frozen=True)
class Kept:
    """What the chord method keeps between steps.

    Attributes:
        factors: factors of ``I - J``; None before the first step.
        residual: norm of the last residual, shape (rows,).
    """

    factors: Factors | None
    residual: Tensor


@dataclass(frozen=True)
class Chord(DenseSolver):
    """Newton's method with the factors of an old Jacobian.

    Args:
        rtol, atol: a row stops at ``residual <= atol + rtol * scale``; both at least 0, and both 0 for exactly ``max_steps``
            steps.
        max_steps: largest number of evaluations of the map, at least 1.
        max_gib: largest memory of the Jacobians of all rows, in GiB, above 0; larger ones are refused.
        refresh: a row gets new factors when its residual has not fallen below this fraction of the last one; in (0, 1].

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, section 5.4.1.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Chord(rtol=1e-5)
        >>> solution = hyperopt.fixed_point(torch.cos, torch.ones(1, 1), solver=solver)
        >>> round(float(solution.value), 4), solution.status.name
        (0.7391, 'converged')
    """

    refresh: float = 0.5

    keeps_inverse: ClassVar[bool] = True
    rise: ClassVar[float] = 1e9  # a step far from the solution may be long, as for Newton

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "refresh", 0.0, 1.0, open_low=True)

    def init(self, w: Tensor) -> Kept:
        """Return no factors; check that they will fit into memory."""
        self.check_size(w)
        return Kept(None, w.new_full((w.shape[0],), torch.inf))

    def select(self, state: Kept, index: Tensor) -> Kept:
        """Return the state of some rows."""
        return Kept(None if state.factors is None else select(state.factors, index), state.residual[index])

    def step(self, state: Kept, at: Point) -> tuple[Tensor, Kept]:
        """Make one step, after new factors for the rows that need them."""
        residual = at.residual
        norm = torch.linalg.vector_norm(residual, dim=1).detach()
        factors = state.factors
        stale = ~(norm <= self.refresh * state.residual)
        stale = stale if at.active is None else stale & at.active
        if factors is None:
            factors, at.broken = factor(at)
        elif bool(seen(stale).any()):
            new, broken = factor(at)
            at.broken = None if broken is None else broken & stale
            factors = replace_rows(stale, new, factors)
        if at.broken is not None:
            residual = torch.where(at.broken[:, None], torch.zeros_like(residual), residual)
        return at.w + solve(factors, residual), Kept(factors, norm)

    def inverse(self, state: Kept, v: Tensor, *, transpose: bool) -> Tensor:
        """Solve with the present factors."""
        return v if state.factors is None else solve(state.factors, v, transpose=transpose)
