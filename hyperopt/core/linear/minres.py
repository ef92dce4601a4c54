"""MINRES: the least residual over the Krylov space, for a symmetric map whose eigenvalues may lie on both sides of 1.

    v = r / |r|,  s = s_old = p = p_old = 0
    repeat:  a = <s, A v>;   y = A v - a s - c s_old,   q = v - a p - c p_old         so that y = A q
             c = |y|;   s' = y / c,  p' = q / c;   x += <r, s'> p',   r -= <r, s'> s';   v = s'

It is for ``A = I - M`` with symmetric ``M``. If conjugate gradients meet negative curvature (an inner loss that is not
convex), MINRES still converges, at one product a step. The iterates are those of Paige and Saunders. Here the Lanczos process
starts at ``A r`` instead of ``r``, so that the images ``s`` of the directions ``p`` are orthonormal and the residual is
available without rotations. If the space of a row is exhausted above its limit, ``A`` is singular (``breakdown``). The
measured residual shows if ``A`` is not symmetric. Rounding in ``p`` grows as fast as the residual falls, so a row whose
residual has fallen to rounding waits for the next cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence
from hyperopt.core.linear.pending import advance
from hyperopt.core.rowwise import combine, dot, dots
from hyperopt.core.status import Status

EXHAUSTED = 16.0  # times eps |A|: an image this short is rounding, and its vector lies in the space already
GAINED = 128.0  # times eps: the least fraction of a residual that a cycle can reach

# The entries: v; s and p in a ring of shape (rows, places, 2, dim); a and c in the order of the last two places, shape
# (rows, 2, 1); the goal of the cycle; rows that take no more steps in it; those of these rows that are above the goal.
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MINRES(KrylovSolver):
    """Minimal residuals of a symmetric ``M``, one vjp a step.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number of products with ``M``, at least 1.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Paige & Saunders, SIAM J. Numer. Anal. 12, 1975, section 6; Chandra, Yale report 129, 1978 (this form).

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.MINRES(rtol=1e-5)
        >>> M, b = torch.tensor([[2.0, 0.1], [0.1, 0.3]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    def init(self, run: Recurrence) -> State:
        """Take the direction of the residual as the first vector, without predecessors."""
        v = run.r / (run.rr + run.tiny).sqrt()
        ring = v.new_zeros(len(v), max(2, run.pending.room), 2, v.shape[1])
        goal = torch.maximum(run.limit, (GAINED * run.eps) ** 2 * run.rr)
        none = torch.zeros_like(goal, dtype=torch.bool)
        return v, ring, v.new_zeros(len(v), 2, 1), goal, none, none

    def step(self, run: Recurrence, state: State) -> State:
        """Add one direction and move along it; the residual of a row whose space is exhausted may become NaN."""
        v, ring, coefficients, goal, ended, broken = state
        here, last, older = ((run.left + i) % ring.shape[1] for i in range(3))
        low, high = sorted((last, older))
        past = ring[:, low : high + 1 : high - low]
        y, at = run.product(v), int(last > older)
        dots(ring[:, last, :1], y, out=coefficients[:, at : at + 1])
        pair = combine(torch.cat([y, v], dim=1), coefficients, past.flatten(2), -1.0, here=True).unflatten(1, (2, -1))
        at = int(here < last)  # whether the last place is the older one in the next step
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
        """Apply the steps before the space was exhausted, the goal was met, or rounding exceeded the residual."""
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
        """Return the limit or, if it is larger, the least residual that the cycle can reach."""
        return state[3]

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Return the rows that take no more steps and have not met the goal."""
        return state[4] & (run.rr > state[3])

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """Return a breakdown for rows whose space was exhausted above the goal, because ``A`` is singular."""
        return state[5] * int(Status.breakdown)
