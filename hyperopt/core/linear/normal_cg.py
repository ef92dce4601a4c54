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

from hyperopt.core.linear.recurrence import Recurrence, dot
from hyperopt.core.linear.restarted import Cycle, RestartedSolver, Run
from hyperopt.core.linear.settings import NormalCGSettings

SINGULAR = 16.0  # times eps |A| |r|: what rounding leaves of an A^T r that is 0


@dataclass(frozen=True)
class NormalCG(NormalCGSettings, RestartedSolver):
    """Conjugate gradients on the normal equations; settings in ``NormalCGSettings``."""

    def cycle(self, run: Run) -> Cycle:
        """Until the recurrence meets the target."""
        rec = Recurrence(run)
        d, r = torch.zeros_like(rec.r0), rec.r0
        s = rec.freeze(run.transposed(r))
        p, gamma = s, dot(s, s)
        norm = torch.ones_like(gamma)
        stretch = torch.zeros_like(gamma)  # least known bound of |A|^2
        while rec.going:
            q = rec.freeze(run.product(p))
            qq = dot(q, q)
            stretch = torch.maximum(stretch, torch.where(rec.live & (gamma > 0), qq / dot(p, p), 0.0))
            rec.break_down(gamma <= (SINGULAR * rec.eps * norm) ** 2 * stretch)
            alpha = rec.ratio(gamma, qq)
            d, r = torch.addcmul(d, alpha, p), torch.addcmul(r, alpha, q, value=-1)
            norm = torch.linalg.vector_norm(r, dim=1)
            rec.advance(d, norm)
            if rec.going:
                s = rec.freeze(run.transposed(rec.freeze(r)))
                new = dot(s, s)
                p, gamma = rec.freeze(torch.addcmul(s, rec.ratio(new, gamma), p)), new
        return rec.cycle()
