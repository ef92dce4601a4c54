"""Nonmonotone backtracking on the residual, row by row.

    r_max = the largest of the last 5 residual norms of the row
    t = 1;   while ||phi(w + t d) - (w + t d)|| > r_max - 1e-4 t ||phi(w) - w||:   t <- t / 2

If the residual must fall below the last one, as in many Newton codes, the search ends in minima of the residual that are not
solutions. On tanh equilibria of radius .99 with 100 entries it lost rows that full steps solve, and a quasi-Newton direction
need not be a descent direction. The largest of several residuals as the bound lets a row climb out, and still keeps it from
diverging.

Reference: Grippo, Lampariello & Lucidi, SIAM J. Numer. Anal. 23, 1986.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.captured import seen
from hyperopt.core.solvers.point import Point

DECREASE = 1e-4  # a step of length t must reduce the residual by at least this times t, relative to the bound
HALVINGS = 10  # if no shorter step helps, a row takes the shortest one, and stagnates
MEMORY = 5  # number of residuals that are remembered


def remember(history: Tensor, at: Point) -> Tensor:
    """Append the residual norms at ``at`` to ``history``, which starts with shape (rows, 0) and keeps at most 5 columns."""
    norm = torch.linalg.vector_norm(at.residual, dim=1).detach()
    return torch.cat([history[:, -(MEMORY - 1) :], norm[:, None]], dim=1)


def backtrack(at: Point, direction: Tensor, history: Tensor) -> Tensor:
    """Return the next iterate along ``direction``, shape (rows, dim); the last probed point is at that iterate.

    Each trial is one evaluation of the whole batch, in which rows whose trial was accepted do not move any more. The driver
    reuses the last one.

    Args:
        at: the current point; its residual is the latest in ``history``.
        direction: shape (rows, dim).
        history: see ``remember``.
    """
    start, most = history[:, -1], history.amax(dim=1)
    t = torch.ones_like(start)
    idle = torch.zeros_like(start, dtype=torch.bool) if at.active is None else ~at.active
    idle = idle if at.broken is None else idle | at.broken
    for left in range(HALVINGS, -1, -1):
        trial = at.probe(torch.addcmul(at.w, t[:, None], direction))
        norm = torch.linalg.vector_norm(trial.residual, dim=1).detach()
        content = idle | (norm <= most - DECREASE * t * start)
        if left == 0 or bool(seen(content).all()):
            break
        t = torch.where(content, t, t / 2)
    return trial.w
