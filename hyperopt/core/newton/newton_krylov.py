"""Newton-Krylov: Newton's step from a linear solver on Jacobian-vector products, without a matrix.

    solve (I - J) d = r to ||r - (I - J) d|| <= eta ||r||,        r = phi(w) - w;        w <- w + d

    eta_k = min(forcing, 0.9 (||r_k|| / ||r_{k-1}||)^2)           loose far from the solution, tight near it

Each row has its own ``eta``: its system is scaled by ``1 / (eta ||r||)``, so that one absolute tolerance of 1 serves all rows.
A step costs one evaluation, one vjp to prepare, and a jvp for each product.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hyperopt.core.checks import check_flag, check_kind, check_number
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.loop import rounding_floor
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.line_search import backtrack, remember
from hyperopt.core.solvers.point import Point


@dataclass(frozen=True)
class Progress:
    """What the method keeps of the last step.

    Attributes:
        norm: residual norm before the step, shape (rows,); infinite before the first step.
        eta: relative tolerance of its linear system, shape (rows,).
        history: residual norms for the line search, see ``hyperopt.core.solvers.line_search``.
    """

    norm: Tensor
    eta: Tensor
    history: Tensor


@dataclass(frozen=True)
class NewtonKrylov(FixedPointSolver):
    """Newton's method without a matrix.

    Args:
        rtol, atol: a row stops at ``residual <= atol + rtol * scale``; both at least 0, and both 0 for exactly ``max_steps``
            steps.
        max_steps: largest number of evaluations of the map, at least 1.
        linear_solver: solves ``(I - J) d = r``; its ``max_steps`` limits the products of a step, its tolerances are replaced.
        forcing: the largest relative residual of that solve, in (0, 1].
        line_search: whether to shorten a step until the residual falls; each trial is one evaluation.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, chapter 6; Eisenstat & Walker, SIAM J.
    Sci. Comput. 17, 1996, choice 2.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.NewtonKrylov(rtol=1e-5)
        >>> solution = hyperopt.fixed_point(torch.cos, torch.ones(1, 1), solver=solver)
        >>> round(float(solution.value), 4), solution.status.name
        (0.7391, 'converged')
    """

    max_steps: int = 50
    linear_solver: LinearSolver = field(default_factory=lambda: GMRES(window=30, max_steps=60))
    forcing: float = 0.1
    line_search: bool = True

    linearizes: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "forcing", 0.0, 1.0, open_low=True)
        check_flag(self, "line_search")
        check_kind(self, "linear_solver", LinearSolver)

    def init(self, w: Tensor) -> Progress:
        """Return the state before the first step."""
        unknown = w.new_full((w.shape[0],), torch.inf)
        return Progress(unknown, torch.full_like(unknown, self.forcing), w.new_empty((w.shape[0], 0)))

    def select(self, state: Progress, index: Tensor) -> Progress:
        """Return the state of some rows."""
        return Progress(state.norm[index], state.eta[index], state.history[index])

    def step(self, state: Progress, at: Point) -> tuple[Tensor, Progress]:
        """Solve for the step, and take it."""
        residual = at.residual
        norm = torch.linalg.vector_norm(residual, dim=1)
        eta = (0.9 * (norm / state.norm) ** 2).clamp(max=self.forcing)
        kept = 0.9 * state.eta**2  # after a lucky step, the tolerance must not tighten at once
        eta = torch.where(kept > 0.1, torch.maximum(eta, kept), eta).clamp(min=rounding_floor(norm.dtype, norm.device))
        moving = torch.isfinite(norm) & (norm > 0)
        moving = moving if at.active is None else moving & at.active
        scale = torch.where(moving, eta * norm, torch.ones_like(norm))[:, None]
        b = torch.where(moving[:, None], residual / scale, torch.zeros_like(residual))
        found = replace(self.linear_solver, rtol=0.0, atol=1.0).solve(at.jvp, b)
        direction = found.value * scale
        # The linear system is singular or too hard: its residual is no better than without a step (1), or the step is so long
        # that its rounding exceeds the residual. NaN counts as broken.
        length = torch.linalg.vector_norm(direction, dim=1)
        broken = moving & ~((found.stats.residual < 1) & (rounding_floor(norm.dtype, norm.device) * length < norm))
        direction = torch.where(broken[:, None], torch.zeros_like(direction), direction)
        at.broken = broken
        state = Progress(norm, eta, remember(state.history, at))
        return (backtrack(at, direction, state.history) if self.line_search else at.w + direction), state
