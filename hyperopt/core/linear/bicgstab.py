"""BiCGStab: two products a step and a fixed few vectors, row by row.

    s = r - alpha A p,         alpha = <r_0, r> / <r_0, A p>
    r' = s - omega A s,        omega = <A s, s> / <A s, A s>
    x += alpha p + omega s;    p = r' + beta (p - omega A p),   beta = (<r_0, r'> / <r_0, r>) (alpha / omega)

For systems where GMRES would need more vectors than fit. Its residual is erratic: the best value of a cycle is kept. A row in
which a denominator vanishes runs away or becomes NaN; it starts anew from the best value, and is a ``breakdown`` only if the
cycle brought nothing.

Reference: van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.krylov import KrylovSolver, Recurrence, dot
from hyperopt.core.linear.settings import BiCGStabSettings
from hyperopt.core.status import Status

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # r_0, p, <r_0, r>, the best x and the square of its residual


@dataclass(frozen=True)
class BiCGStab(BiCGStabSettings, KrylovSolver):
    """Stabilized biconjugate gradients; settings in ``BiCGStabSettings``."""

    def init(self, run: Recurrence) -> State:
        """The first direction is the residual."""
        return run.r.clone(), run.r.clone(), run.rr, run.x.clone(), run.rr

    def step(self, run: Recurrence, state: State) -> State:
        """One step of two products."""
        r0, p, rho, best, least = state
        q = run.product(p)
        sigma = dot(r0, q)
        alpha = rho / (sigma + run.tiny)
        s = run.r.addcmul_(q, alpha, value=-1)
        t = run.product(s)
        omega = dot(t, s) / run.square(t)
        run.x.addcmul_(p, alpha).addcmul_(s, omega)
        run.r.addcmul_(t, omega, value=-1)
        run.rr = dot(run.r, run.r)
        better = run.rr < least
        best, least = torch.where(better, run.x, best), torch.where(better, run.rr, least)
        new = dot(r0, run.r)
        p = torch.addcmul(run.r, new / torch.addcmul(run.tiny, sigma, omega), torch.addcmul(p, q, omega, value=-1))
        return r0, p, new, best, least

    def finish(self, run: Recurrence, state: State) -> None:
        """The best value of the cycle."""
        run.x = state[3]

    def stuck(self, run: Recurrence, state: State) -> Tensor:
        """Rows whose residual has grown beyond what rounding leaves of the best; NaN shows by itself."""
        return run.rr * run.eps**2 > state[4]

    def causes(self, run: Recurrence, state: State, stuck: Tensor, idle: Tensor) -> Tensor:
        """A cycle that ended in them and brought nothing."""
        return (idle & (stuck | run.rr.isnan())) * int(Status.breakdown)
