"""Conjugate gradients, row by row, for symmetric maps.

    p = r / <r, r>
    repeat:  c = <p, A p>;   x += p / c;   r -= A p / c;   p += r / <r, r>

This is the usual recurrence with its directions divided by ``<r, r>``. No ratio of two steps is needed then, and the curvature
along ``p`` is ``c <r, r>``, with ``r`` before the step.

It is for ``A = I - M`` with a symmetric ``M`` whose eigenvalues are below 1, as for a gradient step on a convex loss,
``M = I - step * Hessian``. There it needs the fewest products of all methods. In two other cases a row ends at its last good
iterate: at a direction of negative curvature (status ``negative_curvature``), and if ``A`` is not symmetric (``breakdown``),
which is tested at steps 4, 16, 64, ... by ``<r', r> = 0`` for the residuals ``r`` and ``r'`` before and after. A
preconditioner of the weights (``w - P grad``) makes ``M`` asymmetric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence
from hyperopt.core.linear.pending import advance
from hyperopt.core.rowwise import dot, length
from hyperopt.core.status import Status

State = tuple[Tensor, Tensor, Tensor]  # p, 1 / <r, r>, and the least curvature of the cycle


@dataclass(frozen=True)
class CG(KrylovSolver):
    """Conjugate gradients, one vjp a step, for symmetric ``M`` with eigenvalues below 1.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number of products with ``M``, at least 1.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Hestenes & Stiefel, J. Res. Nat. Bur. Stand. 49, 1952, section 3.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.CG(rtol=1e-6)
        >>> M, b = torch.tensor([[0.5, 0.1], [0.1, 0.3]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    def init(self, run: Recurrence) -> State:
        """Take the residual, divided by its square, as the first direction."""
        inverse = 1 / (run.rr + run.tiny)
        return run.r * inverse, inverse, torch.full_like(inverse, math.inf)

    def step(self, run: Recurrence, state: State) -> State:
        """Make one step; the residual of a row whose curvature is not positive becomes NaN."""
        p, inverse, least = state
        q = run.product(p)
        c = dot(p, q, inverse, torch.finfo(p.dtype).tiny ** 0.5)  # the added number matters only where r is 0
        if run.kept is None:  # the rounding of a curvature that is 0
            run.kept = torch.add(run.tiny, length(q) / (length(p) + run.tiny), alpha=run.eps)
        run.r.addcdiv_(q, torch.nn.functional.threshold(c, 0.0, math.nan), value=-1)
        before, run.rr = run.rr, run.square(run.r)
        run.pending.add((p,), c, inverse)
        inverse, checked = run.rr.reciprocal(), run.taken in (4, 16, 64, 256, 1024)
        if not (run.pending.full or checked):
            return torch.addcmul(p, run.r, inverse), inverse, least
        _, _, least = self.finish(run, state)
        if checked:
            asymmetric = self._asymmetric(run, p, q, c, before)
            least, run.rr = least.masked_fill(asymmetric, 0.0), run.rr.masked_fill(asymmetric, math.nan)
        return p.addcmul_(run.r, inverse), inverse, least

    def _asymmetric(self, run: Recurrence, p: Tensor, q: Tensor, c: Tensor, before: Tensor) -> Tensor:
        """Return the rows in which ``c <r', r> = c <r', r'> + <r', q>`` is further from 0 than rounding allows."""
        off = torch.addcmul(dot(run.r, q), c, run.rr).abs_()
        size = torch.addcmul(length(q), run.kept / run.eps, length(p))  # |A p| + |A| |p|
        return off > math.sqrt(run.eps) * size * (before + run.rr).sqrt()

    def finish(self, run: Recurrence, state: State) -> State:
        """Apply the steps before the first one whose curvature was not positive."""
        p, inverse, least = state
        if not len(run.pending):
            return state
        directions, c, inverses = run.pending.take()
        curvature = torch.nan_to_num(c / inverses, math.inf, math.inf, -math.inf)  # NaN follows such a step, or a bad product
        lowest = torch.cummin(torch.cat([least[:, None], curvature], dim=1), dim=1).values
        run.x = advance(run.x, directions, 1 / c, lowest[:, 1:] <= run.kept[:, None])
        return p, inverse, lowest[:, -1]

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Return the rows in which a curvature was not positive."""
        return state[2] <= run.kept

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """Return ``negative_curvature`` or, if the curvature was 0, ``breakdown``."""
        return stuck * int(Status.breakdown) + (state[2] < -run.kept)  # negative_curvature is the next code
