"""Backtracking on the residual, row by row, not monotone.

    r_max = the largest of the last 5 residual norms of the row
    t = 1;   while ||phi(w + t d) - (w + t d)|| > r_max - 1e-4 t ||phi(w) - w||:   t <- t / 2

Asking for less than the last residual, as Newton codes do, ends in minima of the residual that are no solutions: on tanh
equilibria of radius .99 with 100 entries it lost rows that full steps solve, and a quasi-Newton direction need not even be one of
descent. Asking for less than the largest of a few lets a row climb out, and still keeps it from running away.

Reference: Grippo, Lampariello & Lucidi, SIAM J. Numer. Anal. 23, 1986.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.captured import seen
from hyperopt.core.solvers.point import Point

DECREASE = 1e-4  # the least fall of the residual that a step must bring, times its length
HALVINGS = 10  # a row that no shorter step helps takes the shortest, and stagnates
MEMORY = 5  # residuals that are remembered


def remember(history: Tensor, at: Point) -> Tensor:
    """Residual norms of the last steps with that of this one, shape (rows, at most 5); without any, ``history`` is (rows, 0)."""
    norm = torch.linalg.vector_norm(at.residual, dim=1).detach()
    return torch.cat([history[:, -(MEMORY - 1) :], norm[:, None]], dim=1)


def backtrack(at: Point, direction: Tensor, history: Tensor) -> Tensor:
    """The next iterate along ``direction``, both (rows, dim); the last point probed is that of the iterate returned.

    Each try is one evaluation of the whole batch, in which the rows that were content before stay where they were; the driver
    takes the last one over.

    Args:
        at: the point, whose residual is the latest in ``history``.
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
