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

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence
from hyperopt.core.linear.pending import advance
from hyperopt.core.rowwise import combine, dot, dots
from hyperopt.core.status import Status

EXHAUSTED = 16.0  # times eps |A|: what rounding leaves of a vector that lies in the space already
GAINED = 128.0  # times eps: what a cycle can leave of a residual

# v; s and p, in turn in the places of a ring of shape (rows, places, 2, dim); a and c in the order of the last two places, shape
# (rows, 2, 1); the goal of the cycle; rows that take no more steps in it, and those of them that are above the goal.
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MINRES(KrylovSolver):
    """Minimal residuals of a symmetric map, one vjp a step; its arguments are those of ``LinearSolver``."""

    def init(self, run: Recurrence) -> State:
        """The first vector is the residual's direction, and has no predecessors."""
        v = run.r / (run.rr + run.tiny).sqrt()
        ring = v.new_zeros(len(v), max(2, run.pending.room), 2, v.shape[1])
        goal = torch.maximum(run.limit, (GAINED * run.eps) ** 2 * run.rr)
        none = torch.zeros_like(goal, dtype=torch.bool)
        return v, ring, v.new_zeros(len(v), 2, 1), goal, none, none

    def step(self, run: Recurrence, state: State) -> State:
        """One direction more, and the move along it; the residual of a row whose space is exhausted may become NaN."""
        v, ring, coefficients, goal, ended, broken = state
        here, last, older = ((run.left + i) % ring.shape[1] for i in range(3))
        low, high = sorted((last, older))
        past = ring[:, low : high + 1 : high - low]
        y, at = run.product(v), int(last > older)
        dots(ring[:, last, :1], y, out=coefficients[:, at : at + 1])
        pair = combine(torch.cat([y, v], dim=1), coefficients, past.flatten(2), -1.0, here=True).unflatten(1, (2, -1))
        at = int(here < last)  # where the last place is the older one, in the next step
        coefficients = torch.empty_like(coefficients)
        c = torch.linalg.vector_norm(pair[:, 0], dim=1, keepdim=True, out=coefficients[:, at])
        if run.kept is None:
            run.kept = torch.add(run.tiny, c, alpha=EXHAUSTED * run.eps)
        s, p = torch.div(pair, c[:, :, None], out=ring[:, here]).unbind(dim=1)
        part, before = dot(run.r, s), run.rr
        run.r.addcmul_(s, part, value=-1)
        run.rr = dot(run.r, run.r)
        run.pending.add((p,), part, c, before)
        del y, pair, v  # memory
        now = s, ring, coefficients, goal, ended, broken
        return self.finish(run, now) if run.pending.full else now

    def finish(self, run: Recurrence, state: State) -> State:
        """Take the steps before the first at which the space was exhausted, the goal met, or rounding more than the residual."""
        if not len(run.pending):
            return state
        v, ring, coefficients, goal, ended, broken = state
        directions, parts, c, before = run.pending.take()
        exhausted, above = c <= run.kept[:, None], before > goal[:, None]
        rounding = (parts * torch.linalg.vector_norm(directions, dim=2, keepdim=True)).square() * run.eps**2
        ends = exhausted | ~(above & (rounding < before))
        ends = torch.cat([ended[:, None], ends], dim=1).cummax(dim=1).values
        run.x = advance(run.x, directions, parts, ends[:, 1:])
        broken = broken | (exhausted & above & ~ends[:, :-1]).any(dim=1)
        return v, ring, coefficients, goal, ends[:, -1], broken

    def goal(self, run: Recurrence, state: State) -> Tensor:
        """The limit, or the last digits of the residual at the start of the cycle."""
        return state[3]

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Rows that take no more steps, and have not met the goal."""
        return state[4] & (run.rr > state[3])

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """``A`` is singular, where the space was exhausted above the goal."""
        return state[5] * int(Status.breakdown)
