"""MINRES: the least residual over the Krylov space of a symmetric map, whose eigenvalues may lie on both sides of 1.

    v = r / |r|,  s = s_old = p = p_old = 0
    repeat:  a = <s, A v>;   y = A v - a s - c s_old,   q = v - a p - c p_old         so that y = A q
             c = |y|;   s' = y / c,  p' = q / c;   x += <r, s'> p',   r -= <r, s'> s';   v = s'

For ``A = I - M`` with ``M`` symmetric: where conjugate gradients meet negative curvature (an inner loss that is not convex), this
goes on, at one product a step. The iterates are those of Paige and Saunders. The Lanczos process starts at ``A r`` instead of
``r``, so that the images ``s`` of the directions ``p`` are orthonormal: the residual is at hand, without rotations. A row whose
space is exhausted above its limit is singular (``breakdown``); an ``A`` that is not symmetric is seen by the measured residual.
Rounding in ``p`` grows as fast as the residual falls, so a row that has lost all but the last digits of it waits for a new cycle.

Reference: Paige & Saunders, SIAM J. Numer. Anal. 12, 1975, section 6; Chandra, Yale report 129, 1978 (this form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence, dot, length
from hyperopt.core.linear.settings import MINRESSettings
from hyperopt.core.status import Status

EXHAUSTED = 16.0  # times eps |A|: what rounding leaves of a vector that lies in the space already
GAINED = 128.0  # times eps: what a cycle can leave of a residual

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # v; s and p as one, shape (rows, 2, dim); those before; c; the least rr


@dataclass(frozen=True)
class MINRES(MINRESSettings, KrylovSolver):
    """Minimal residuals of a symmetric map; settings in ``MINRESSettings``."""

    def init(self, run: Recurrence) -> State:
        """The first vector is the residual's direction, and has no predecessors."""
        v = run.r / (run.rr + run.tiny).sqrt()
        none = torch.zeros_like(v)[:, None].expand(-1, 2, -1)
        return v, none, none, torch.zeros_like(run.rr), torch.maximum(run.limit, (GAINED * run.eps) ** 2 * run.rr)

    def step(self, run: Recurrence, state: State) -> State:
        """One direction more, and the move along it."""
        v, pair, before, c, least = state
        y = run.product(v)
        new = torch.stack([y, v], dim=1)
        new = new.addcmul_(pair, dot(pair[:, 0], y)[:, :, None], value=-1).addcmul_(before, c[:, :, None], value=-1)
        c = length(new[:, 0])
        if run.kept is None:
            run.kept = torch.add(run.tiny, c, alpha=EXHAUSTED * run.eps)
        new.div_(c.masked_fill(c <= run.kept, math.inf)[:, :, None])
        s, p = new.unbind(dim=1)
        part = dot(run.r, s).masked_fill_(run.rr <= least, 0.0)
        run.x.addcmul_(p, part)
        run.r.addcmul_(s, part, value=-1)
        run.rr = dot(run.r, run.r)
        return s, new, pair, c, least

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Rows above the limit whose space is exhausted, or whose cycle is."""
        return ((state[3] <= run.kept) | (run.rr <= state[4])) & (run.rr > run.limit)

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """Singular, where the space is exhausted."""
        return (stuck & (state[3] <= run.kept)) * int(Status.breakdown)
