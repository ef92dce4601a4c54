"""Conjugate gradients on the normal equations ``A^T A x = A^T b`` (CGNR in its stable form, CGLS), row by row.

    s = A^T r,  p = s
    repeat:  alpha = <s, s> / <A p, A p>;   x += alpha p;   r -= alpha A p
             s' = A^T r;   p = s' + (<s', s'> / <s, s>) p;   s = s'

Converges for any regular ``A``, however its spectrum lies, and its residual never rises; the price is the square of the condition
number. ``A p`` is a vjp; ``A^T r`` is a jvp, taken as the vjp of the vjp on the one graph at the solution: the map is not called.

Reference: Bjorck, Numerical Methods for Least Squares Problems, SIAM 1996, algorithm 7.4.1; Paige & Saunders, ACM TOMS 8, 1982.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence

SINGULAR = 16.0  # times eps |A| |r|: what rounding leaves of an A^T r that is 0

State = tuple[Tensor, Tensor]  # the direction p, and <s, s> of the step before; the first step has no direction


@dataclass(frozen=True)
class NormalCG(KrylovSolver):
    """Conjugate gradients on the normal equations, one vjp and one jvp a step.

    Its arguments are those of ``LinearSolver``.
    """

    max_steps: int = 200

    def init(self, run: Recurrence) -> State:
        """No direction yet: the first step has to bring it."""
        return torch.zeros_like(run.r), torch.full_like(run.rr, torch.inf)

    def step(self, run: Recurrence, state: State) -> State:
        """One step: a product with the transpose, and one with ``A``."""
        p, before = state
        s = run.transposed(run.r)
        gamma, now = run.square(s), run.rr
        p = torch.addcmul(s, gamma / before, p)
        q = run.product(p)
        stretch = run.square(q)
        if run.kept is None:  # |A|^2, from below
            run.kept = [torch.maximum(gamma / (now + run.tiny), stretch / run.square(p)), None]
        run.kept[1] = gamma, now
        alpha = gamma / stretch
        run.x.addcmul_(p, alpha)
        run.r.addcmul_(q, alpha, value=-1)
        run.rr = run.square(run.r)
        return p, gamma

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Rows in which ``A^T r`` has vanished and ``r`` has not: the system has no solution."""
        largest, (gamma, rr) = run.kept
        return (gamma <= run.tiny + (SINGULAR * run.eps) ** 2 * largest * rr) & (run.rr > run.limit)
