"""BiCGStab: two products a step and a fixed few vectors, row by row.

    s = r - alpha A p,         alpha = <r_0, r> / <r_0, A p>
    r' = s - omega A s,        omega = <A s, s> / <A s, A s>
    x += alpha p + omega s;    p = r' + beta (p - omega A p),   beta = (<r_0, r'> / <r_0, r>) (alpha / omega)

For systems where GMRES would need more vectors than fit. Its residual is erratic: the best value of a cycle is kept. A row in
which a denominator vanishes starts anew from its best value, and is a ``breakdown`` only if the cycle brought nothing.

Reference: van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyperopt.core.linear.recurrence import Recurrence, dot
from hyperopt.core.linear.restarted import IDLE, Cycle, RestartedSolver, Run
from hyperopt.core.linear.settings import BiCGStabSettings


@dataclass(frozen=True)
class BiCGStab(BiCGStabSettings, RestartedSolver):
    """Stabilized biconjugate gradients; settings in ``BiCGStabSettings``."""

    def cycle(self, run: Run) -> Cycle:
        """Until the recurrence meets the target or breaks down in all rows."""
        rec = Recurrence(run)
        d, r = torch.zeros_like(rec.r0), rec.r0
        p, rho = r, dot(rec.r0, r)
        while rec.going:
            q = rec.freeze(run.product(p))
            sigma = dot(rec.r0, q)
            rec.break_down(sigma.abs() <= rec.eps * torch.linalg.vector_norm(q, dim=1))
            alpha = rec.ratio(rho, sigma)
            s = torch.addcmul(r, alpha, q, value=-1)
            t = rec.freeze(run.product(rec.freeze(s)))
            tt, ts, ss = dot(t, t), dot(t, s), dot(s, s)
            omega = torch.where(rec.live & (tt > 0), ts / tt, 0.0)[:, None]
            d = torch.addcmul(torch.addcmul(d, alpha, p), omega, s)
            r = torch.addcmul(s, omega, t, value=-1)
            norm, new = torch.linalg.vector_norm(r, dim=1), dot(rec.r0, r)
            rec.advance(d, norm)
            rec.break_down((ts.abs() <= rec.eps * (tt * ss).sqrt()) | (new.abs() <= rec.eps * norm))
            beta = rec.ratio(new * alpha[:, 0], rho * omega[:, 0])
            p, rho = rec.freeze(torch.addcmul(r, beta, torch.addcmul(p, omega, q, value=-1))), new
        cycle = rec.cycle()
        cycle.broken = rec.broken & (rec.best > IDLE)
        return cycle
