"""BiCGStab: two products a step and a small fixed number of vectors, row by row.

    s = r - alpha A p,         alpha = rho / c,    rho = <r_0, r>,    c = <r_0, A p>
    r' = s - omega A s,        omega = <A s, s> / <A s, A s>
    x += alpha p + omega s;    p = r' - rho' / c (A p - p / omega)

It is for systems where GMRES would need more vectors than fit into memory. The residual is erratic, so the best value of a
cycle is kept. A row in which a denominator vanishes diverges or becomes NaN. It starts again from the best value, and its
status is ``breakdown`` only if the cycle gained nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence
from hyperopt.core.linear.pending import advance
from hyperopt.core.rowwise import combine, dot, dots
from hyperopt.core.status import Status

# r and r_0, shape (rows, 2, dim); p; rho; the value with residual r; the least squared residual of the cycle, that of
# ``run.x``.
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BiCGStab(KrylovSolver):
    """Stabilized biconjugate gradients, two vjps a step.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number of steps, at least 1.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992, section 3.

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.BiCGStab(rtol=1e-5)
        >>> M, b = torch.tensor([[0.5, 0.4], [0.0, 0.3]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    def init(self, run: Recurrence) -> State:
        """Take the residual as the first direction."""
        return torch.stack([run.r, run.r], dim=1), run.r, run.rr, run.x, run.rr

    def step(self, run: Recurrence, state: State) -> State:
        """Make one step with two products."""
        both, p, rho, x, least = state
        r, r0 = both.unbind(dim=1)
        q = run.product(p)
        c = dot(r0, q, run.tiny)
        alpha = rho / c
        s = torch.addcmul(r, q, alpha, value=-1)
        t = run.product(s)
        omega = dot(t, s, run.tiny) / run.square(t)
        run.r = torch.addcmul(s, t, omega, value=-1, out=r)
        run.rr, rho = dots(both, r, run.tiny).unbind(dim=1)
        run.pending.add((p, s), alpha, omega, run.rr)
        p = torch.addcmul(r, torch.addcdiv(q, p, omega, value=-1), rho / c, value=-1)
        del q, s, t  # memory
        state = both, p, rho, x, least
        return self.finish(run, state) if run.pending.full else state

    def finish(self, run: Recurrence, state: State) -> State:
        """Apply all steps to the current value, and those up to the best one to ``run.x``."""
        both, p, rho, x, least = state
        if not len(run.pending):
            return state
        directions, alphas, omegas, after = run.pending.take()
        weights = torch.cat([alphas, omegas], dim=2).view(len(x), -1, 1)
        best = torch.cat([least[:, None], torch.nan_to_num(after, math.inf)], dim=1).min(dim=1)
        now = combine(x, weights, directions)
        if after.shape[1] == 1:
            found = now
        else:
            later = torch.arange(weights.shape[1], device=x.device)[:, None] >= 2 * best.indices[:, None]
            found = advance(x, directions, weights, later)
        run.x = torch.where(best.indices > 0, found, run.x)
        return both, p, rho, now, best.values

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Return the rows whose residual exceeds the best one so far that rounding destroys it; NaN is found elsewhere."""
        return run.rr * run.eps**2 > state[4]

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """Return a breakdown for rows in which the cycle ended and gained nothing."""
        return (idle & (stuck | run.rr.isnan())) * int(Status.breakdown)
