"""Anderson acceleration, row by row (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011, algorithm AA).

    r_k = phi(w_k) - w_k,    m_k = w_k + damping r_k
    theta = argmin || r_k - sum_i theta_i (r_i - r_{i-1}) ||          over the last ``window`` steps
    w_{k+1} = m_k - sum_i theta_i (m_i - m_{i-1})

The least squares problem is solved from the Gram matrix of the differences, of which each step adds one row. The ridge is
relative to the trace, so that scaling the map does not change the iterates; libraries with an absolute ridge need 63, 41 or 20
steps for one map at scales 1e-3, 1 and 1e3. The small systems are solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.checks import IterativeMethod, check_count, check_flag, check_number
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Point
from hyperopt.core.solvers.window import Window


@dataclass(frozen=True)
class History:
    """The past steps.

    Attributes:
        mixed: the differences ``m_i - m_{i-1}``.
        residuals: the differences ``r_i - r_{i-1}``.
        gram: inner products of the residual differences, float64, shape (rows, filled, filled), in the window's order.
        last: ``m`` and ``r`` of the last step, each (rows, dim); None before the first step.
    """

    mixed: Window
    residuals: Window
    gram: Tensor
    last: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class AndersonMixing(IterativeMethod):
    """The settings of Anderson acceleration, for a map and for a linear system (``hyperopt.core.linear.anderson``).

    Args:
        window: number of steps that are mixed, at least 1; it may exceed ``max_steps``.
        damping: how much of a residual is added to its iterate, in (0, 1].
        ridge: relative ridge, at least 0: ``ridge * trace(G) / window`` is added to the Gram matrix ``G`` of the residuals.
        restart: whether a full window is emptied, instead of losing its oldest step.
    """

    window: int = 5
    damping: float = 1.0
    ridge: float = 1e-10
    restart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window")
        check_number(self, "damping", 0.0, 1.0, open_low=True)
        check_number(self, "ridge", 0.0)
        check_flag(self, "restart")


@dataclass(frozen=True)
class Anderson(AndersonMixing, FixedPointSolver):
    """Anderson acceleration of ``w <- phi(w)``.

    Args:
        rtol, atol: a row stops at ``residual <= atol + rtol * scale``; both at least 0, and both 0 for exactly ``max_steps``
            steps.
        max_steps: largest number of evaluations of the map, at least 1.
        window: number of steps that are mixed, at least 1; it may exceed ``max_steps``.
        damping: how much of a residual is added to its iterate, in (0, 1].
        ridge: relative ridge, at least 0: ``ridge * trace(G) / window`` is added to the Gram matrix ``G`` of the residuals.
        restart: whether a full window is emptied, instead of losing its oldest step.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Anderson, J. ACM 12, 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011, algorithm AA.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.Anderson(rtol=1e-5, window=3)
        >>> solution = hyperopt.fixed_point(lambda w: 2 - 3 * w, torch.zeros(1, 1), solver=solver)
        >>> round(float(solution.value), 4), solution.status.name
        (0.5, 'converged')
    """

    def init(self, w: Tensor) -> History:
        """Return an empty history."""
        size = max(1, self.window - 1)
        return History(Window(size), Window(size), w.new_zeros((w.shape[0], 0, 0), dtype=torch.float64))

    def select(self, state: History, index: Tensor) -> History:
        """Return the history of some rows."""
        last = None if state.last is None else (state.last[0][index], state.last[1][index])
        return History(state.mixed.select(index), state.residuals.select(index), state.gram[index], last)

    def step(self, state: History, at: Point) -> tuple[Tensor, History]:
        """Make one accelerated step."""
        residual = at.residual
        mixed = at.fw if self.damping == 1.0 else torch.lerp(at.w, at.fw, self.damping)
        last = mixed, residual
        if self.restart and state.residuals.count == self.window - 1:
            state = self.init(mixed)
        if state.last is None or self.window == 1:
            return mixed, History(state.mixed, state.residuals, state.gram, last)
        slot, (before, previous) = state.residuals.slot, state.last
        residuals = state.residuals.add(lambda out: torch.sub(residual, previous, out=out), residual)
        mixes = state.mixed.add(lambda out: torch.sub(mixed, before, out=out), mixed)
        gram = _with_row(state.gram, slot, residuals.dot(residuals.vector(slot)).double())
        theta = self._mixing(gram, residuals.dot(residual).double(), torch.finfo(mixed.dtype).eps).to(mixed.dtype)
        return mixes.combine(mixed, theta, -1.0), History(mixes, residuals, gram, last)

    def _mixing(self, gram: Tensor, right: Tensor, eps: float) -> Tensor:
        """Return the coefficients ``theta`` of each row, shape (rows, m); 0 where the residuals do not differ."""
        diagonal = gram.diagonal(dim1=1, dim2=2)
        trace = diagonal.sum(dim=1, keepdim=True)
        ridge = trace * (max(self.ridge, eps * eps) / gram.shape[1])
        if torch.is_grad_enabled():  # a singular system has no derivative, so rows with nothing to mix get a ridge of 1
            ridge = ridge + (trace == 0)
        theta, _ = torch.linalg.solve_ex(gram + torch.diag_embed(ridge.expand_as(diagonal)), right)
        return torch.nan_to_num(theta, 0.0, 0.0, 0.0)


def _with_row(gram: Tensor, slot: int, row: Tensor) -> Tensor:
    """Return the Gram matrix, shape (rows, m, m), with new inner products ``row``, shape (rows, m), at one slot."""
    m = row.shape[1]
    if gram.shape[1] < m:  # one slot more
        gram = torch.cat([torch.cat([gram, row[:, None, : m - 1]], dim=1), row[:, :, None]], dim=2)
        return gram
    gram = gram.clone()
    gram[:, slot] = row
    gram[:, :, slot] = row
    return gram
