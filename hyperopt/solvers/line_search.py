"""Backtracking on the residual, row by row.

    t = 1;   while ||phi(w + t d) - (w + t d)|| > (1 + slack - 1e-4 t) ||phi(w) - w||:   t <- t / 2

With no slack the residual falls at every step, which a Newton direction allows. A quasi-Newton direction may not be one of
descent: there a slack whose sum over the steps is finite keeps the residuals bounded and every search short.

References: Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, section 8.1; Li & Fukushima, Optim. Methods
Softw. 13, 2000 (the slack).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.solvers.point import Point

DECREASE = 1e-4  # the least fall of the residual that a step must bring, times its length
HALVINGS = 10  # a row that no shorter step helps takes the shortest, and stagnates


def backtrack(at: Point, direction: Tensor, slack: float = 0.0) -> Tensor:
    """The next iterate along ``direction``, both (rows, dim); the last point probed is that of the iterate returned.

    Each try is one evaluation of the whole batch, in which the rows that were content before stay where they were; the driver
    takes the last one over.
    """
    start = torch.linalg.vector_norm(at.fw - at.w, dim=1).detach()
    t = torch.ones_like(start)
    idle = torch.zeros_like(start, dtype=torch.bool) if at.active is None else ~at.active
    idle = idle if at.broken is None else idle | at.broken
    for left in range(HALVINGS, -1, -1):
        trial = at.probe(torch.addcmul(at.w, t[:, None], direction))
        norm = torch.linalg.vector_norm(trial.fw - trial.w, dim=1).detach()
        content = idle | (norm <= (1 + slack - DECREASE * t) * start)
        if left == 0 or bool(content.all()):
            break
        t = torch.where(content, t, t / 2)
    return trial.w
