"""Conjugate gradients, row by row, for symmetric maps.

    p = r
    repeat:  alpha = <r, r> / <p, A p>;   x += alpha p;   r' = r - alpha A p;   p = r' + (<r', r'> / <r, r>) p;   r = r'

For ``A = I - M`` with ``M`` symmetric and its eigenvalues below 1: a gradient step on a convex loss, ``M = I - step * Hessian``.
There it needs the fewest products of all methods. What it is not made for ends a row, never with a wrong number: a direction of
negative curvature (status ``indefinite``), and an ``A`` that is not symmetric (``breakdown``), which is told at steps 2, 3, 5, 9,
... by ``<p, A q> = <q, A p>`` of two directions at hand. A preconditioner of the weights (``w - P grad``) makes ``M`` asymmetric.

Reference: Hestenes & Stiefel, J. Res. Nat. Bur. Stand. 49, 1952, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.recurrence import Recurrence, dot
from hyperopt.core.linear.restarted import Cycle, RestartedSolver, Run
from hyperopt.core.linear.settings import CGSettings
from hyperopt.core.status import Status


@dataclass(frozen=True)
class CG(CGSettings, RestartedSolver):
    """Conjugate gradients; settings in ``CGSettings``."""

    def cycle(self, run: Run) -> Cycle:
        """Until the recurrence meets the target."""
        rec = Recurrence(run)
        d, r = torch.zeros_like(rec.r0), rec.r0
        p, rr = r, dot(r, r)
        past: tuple[Tensor, Tensor] | None = None
        while rec.going:
            q = rec.freeze(run.product(p))
            curvature, size = dot(p, q), torch.linalg.vector_norm(p, dim=1) * torch.linalg.vector_norm(q, dim=1)
            least = rec.eps * size
            rec.break_down(curvature <= least, torch.where(curvature < -least, int(Status.indefinite), int(Status.breakdown)))
            if past is not None and rec.made & (rec.made - 1) == 0:
                rec.break_down(asymmetric(past, (p, q), rec.eps))
            past = (p, q)
            alpha = rec.ratio(rr, curvature)
            d, r = torch.addcmul(d, alpha, p), torch.addcmul(r, alpha, q, value=-1)
            new = dot(r, r)
            rec.advance(d, new.sqrt())
            p, rr = rec.freeze(torch.addcmul(r, rec.ratio(new, rr), p)), new
        return rec.cycle()


def asymmetric(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Rows in which ``<p, A q>`` and ``<q, A p>`` differ by more than rounding, given two pairs ``(p, A p)``."""
    (p, ap), (q, aq) = one, two
    sizes = [torch.linalg.vector_norm(x, dim=1) for x in (p, aq, q, ap)]
    return (dot(p, aq) - dot(q, ap)).abs() > math.sqrt(eps) * torch.maximum(sizes[0] * sizes[1], sizes[2] * sizes[3])
