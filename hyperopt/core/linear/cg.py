"""Conjugate gradients, row by row, for symmetric maps.

    p = r / <r, r>
    repeat:  c = <p, A p>;   x += p / c;   r -= A p / c;   p += r / <r, r>

This is the usual recurrence with its directions divided by ``<r, r>``: then no ratio of two steps is needed, and the curvature
along ``p`` is ``c <r, r>`` before the step.

For ``A = I - M`` with ``M`` symmetric and its eigenvalues below 1: a gradient step on a convex loss, ``M = I - step * Hessian``.
There it needs the fewest products of all methods. What it is not made for ends a row at the iterate before, never with a wrong
number: a direction of negative curvature (status ``negative_curvature``), and an ``A`` that is not symmetric (``breakdown``),
which is told at steps 4, 16, 64, ... by ``<p, A x> = <x, A p>``, where ``A x`` is the right-hand side less the residual. A
preconditioner of the weights (``w - P grad``) makes ``M`` asymmetric.

Reference: Hestenes & Stiefel, J. Res. Nat. Bur. Stand. 49, 1952, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence, dot, length
from hyperopt.core.linear.settings import CGSettings
from hyperopt.core.status import Status

State = tuple[Tensor, Tensor, Tensor]  # p, <r, r>, and the least curvature of the cycle


@dataclass(frozen=True)
class CG(CGSettings, KrylovSolver):
    """Conjugate gradients; settings in ``CGSettings``."""

    def init(self, run: Recurrence) -> State:
        """The first direction is the residual."""
        rr = run.rr + run.tiny
        return run.r / rr, rr, torch.full_like(rr, math.inf)

    def step(self, run: Recurrence, state: State) -> State:
        """One step; rows whose curvature is not positive do not move any more."""
        p, rr, least = state
        q = run.product(p)
        c = dot(p, q)
        if run.kept is None:  # what rounding leaves of a curvature that is 0
            run.kept = torch.add(run.tiny, length(q) / (length(p) + run.tiny), alpha=run.eps)
        least = torch.minimum(least, c * rr)
        c.masked_fill_(least <= run.kept, math.inf)
        run.x.addcdiv_(p, c)
        run.r.addcdiv_(q, c, value=-1)
        if run.taken in (4, 16, 64, 256, 1024):
            least = least.masked_fill_(_asymmetric(run, p, q), 0.0)
        run.rr = run.square(run.r)
        return p.addcdiv_(run.r, run.rr), run.rr, least

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Rows in which a curvature was not positive."""
        return state[2] <= run.kept

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """Negative curvature, or none."""
        return stuck * int(Status.breakdown) + (state[2] < -run.kept)  # which is the next code


def _asymmetric(run: Recurrence, p: Tensor, q: Tensor) -> Tensor:
    """Rows in which ``<p, A x>`` and ``<x, A p>`` differ by more than rounding."""
    image = torch.addcdiv(run.r, run.b, run.unit, value=-1)  # -A x
    off = torch.addcmul(p * image, q, run.x).sum(dim=1, keepdim=True).abs_()
    return off > math.sqrt(run.eps) * torch.maximum(length(p) * length(image), length(q) * length(run.x))
