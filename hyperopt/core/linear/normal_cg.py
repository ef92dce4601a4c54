"""Conjugate gradients on the normal equations ``A^T A x = A^T b`` (CGNR in its stable form, CGLS), row by row.

    s = A^T r,  p = s
    repeat:  alpha = <s, s> / <A p, A p>;   x += alpha p;   r -= alpha A p
             s' = A^T r;   p = s' + (<s', s'> / <s, s>) p;   s = s'

It converges for any regular ``A``, however its spectrum lies, and its residual never rises, but the condition number is
squared. ``A p`` is a vjp. ``A^T r`` is a jvp, computed as the vjp of the vjp on the graph at the solution, so the map is not
called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence

SINGULAR = 16.0  # times eps |A| |r|: the rounding of an A^T r that is 0

State = tuple[Tensor, Tensor]  # the direction p, and <s, s> of the previous step


@dataclass(frozen=True)
class NormalCG(KrylovSolver):
    """Conjugate gradients on the normal equations, one vjp and one jvp a step.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number of steps, at least 1.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Bjorck, Numerical Methods for Least Squares Problems, SIAM 1996, algorithm 7.4.1; Paige & Saunders, ACM TOMS 8,
    1982.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.NormalCG(rtol=1e-5)
        >>> M, b = torch.tensor([[2.0, 1.0], [0.0, -3.0]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(hyperopt.FunctionOperator(lambda v: v @ M.T, lambda v: v @ M), b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    max_steps: int = 200

    def init(self, run: Recurrence) -> State:
        """Start without a direction; the first step finds one."""
        return torch.zeros_like(run.r), torch.full_like(run.rr, torch.inf)

    def step(self, run: Recurrence, state: State) -> State:
        """Make one step: a product with the transpose, and one with ``A``."""
        p, before = state
        s = run.transposed(run.r)
        gamma, now = run.square(s), run.rr
        p = torch.addcmul(s, gamma / before, p)
        q = run.product(p)
        stretch = run.square(q)
        if run.kept is None:  # an estimate of |A|^2 from below
            run.kept = [torch.maximum(gamma / (now + run.tiny), stretch / run.square(p)), None]
        run.kept[1] = gamma, now
        alpha = gamma / stretch
        run.x.addcmul_(p, alpha)
        run.r.addcmul_(q, alpha, value=-1)
        run.rr = run.square(run.r)
        return p, gamma

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Return the rows in which ``A^T r`` is 0 and ``r`` is not: the system has no solution."""
        largest, (gamma, rr) = run.kept
        return (gamma <= run.tiny + (SINGULAR * run.eps) ** 2 * largest * rr) & (run.rr > run.limit)
