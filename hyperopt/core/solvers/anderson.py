"""Anderson acceleration, row by row (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011, algorithm AA).

    r_k = phi(w_k) - w_k
    theta = argmin || r_k + sum_i theta_i (r_i - r_k) ||          over the last ``window`` steps
    w_{k+1} = mix(k) + sum_i theta_i (mix(i) - mix(k)),           mix(i) = w_i + damping r_i

The least squares problem is solved from the Gram matrix of the residuals, of which one row is new at each step. Its ridge is
relative to the trace, so that scaling the map leaves the iterates alone; libraries with an absolute ridge need 63, 41 or 20
steps for one map at scales 1e-3, 1 and 1e3. The small systems are solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import Point
from hyperopt.core.solvers.settings import AndersonSettings


@dataclass(frozen=True)
class History:
    """Up to ``window`` past steps, oldest first.

    Attributes:
        mixed: ``w_i + damping r_i`` of each step, each (rows, dim).
        residuals: ``r_i`` of each step, each (rows, dim).
        gram: ``<r_i, r_j>``, float64, shape (rows, steps, steps).
    """

    mixed: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    gram: Tensor


@dataclass(frozen=True)
class Anderson(AndersonSettings, FixedPointSolver):
    """Anderson acceleration; settings in ``AndersonSettings``."""

    def init(self, w: Tensor) -> History:
        """No history."""
        return History((), (), w.new_zeros((w.shape[0], 0, 0), dtype=torch.float64))

    def select(self, state: History, index: Tensor) -> History:
        """History of some rows."""
        return History(tuple(x[index] for x in state.mixed), tuple(x[index] for x in state.residuals), state.gram[index])

    def step(self, state: History, at: Point) -> tuple[Tensor, History]:
        """One accelerated step."""
        w, fw = at.w, at.fw
        if self.restart and len(state.residuals) == self.window:
            state = self.init(w)
        residual = at.residual
        mixed = fw if self.damping == 1.0 else torch.lerp(w, fw, self.damping)
        keep = self.window - 1
        old = state.residuals[len(state.residuals) - keep :] if len(state.residuals) > keep else state.residuals
        old_mixed = state.mixed[len(state.mixed) - keep :] if len(state.mixed) > keep else state.mixed
        m = len(old)
        row = torch.stack([torch.linalg.vecdot(r, residual) for r in (*old, residual)], dim=1).double()  # (rows, m + 1)
        drop = state.gram.shape[1] - m
        top = torch.cat([state.gram[:, drop:, drop:], row[:, :m, None]], dim=2)
        gram = torch.cat([top, row[:, None, :]], dim=1)  # (rows, m + 1, m + 1)
        history = History((*old_mixed, mixed), (*old, residual), gram)
        if m == 0:
            return mixed, history
        theta = self._mixing(gram, torch.finfo(w.dtype).eps).to(w.dtype)  # (rows, m)
        out = mixed * (1 - theta.sum(dim=1, keepdim=True))
        for i, past in enumerate(old_mixed):
            out = torch.addcmul(out, theta[:, i : i + 1], past)
        return out, history

    def _mixing(self, gram: Tensor, eps: float) -> Tensor:
        """Coefficients ``theta`` of each row, shape (rows, m), from the Gram matrix, shape (rows, m + 1, m + 1)."""
        m = gram.shape[1] - 1
        cross, own = gram[:, :m, m], gram[:, m, m]
        normal = gram[:, :m, :m] - cross[:, :, None] - cross[:, None, :] + own[:, None, None]
        trace = normal.diagonal(dim1=1, dim2=2).sum(dim=1)
        ridge = max(self.ridge, eps * eps) * trace / m
        # A row whose residuals are all the same has nothing to mix: unit diagonal, right-hand side 0.
        ridge = torch.where(trace > 0, ridge, torch.ones_like(ridge))
        system = normal + ridge[:, None, None] * torch.eye(m, dtype=gram.dtype, device=gram.device)
        theta, info = torch.linalg.solve_ex(system, own[:, None] - cross)
        good = (info == 0)[:, None] & torch.isfinite(theta)
        return torch.where(good.all(dim=1, keepdim=True), theta, torch.zeros_like(theta))
