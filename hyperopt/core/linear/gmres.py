"""GMRES with restart: the least residual over the Krylov space, row by row.

    v_1 = r / |r|
    for j = 1 .. window:                             A V_j = V_{j+1} H_j        (Arnoldi, modified Gram-Schmidt)
        w = A v_j;  h_ij = <v_i, w>, w <- w - h_ij v_i  for i = 1 .. j;  v_{j+1} = w / |w|
    x <- x + V y,    y = argmin || |r| e_1 - H y ||  (Givens rotations, in float64)

Modified Gram-Schmidt is enough: what orthogonality it loses, it loses only as the residual converges (Paige, Rozloznik & Strakos,
SIAM J. Matrix Anal. Appl. 28, 2006). Its passes cost ``2 j`` vectors of memory traffic at step j.

Reference: Saad & Schultz, SIAM J. Sci. Stat. Comput. 7, 1986, algorithm 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.linear.restarted import Cycle, RestartedSolver, Run, freeze, unit
from hyperopt.core.linear.settings import GMRESSettings

COLLAPSED = 16.0  # times eps: what rounding leaves of a vector that lies in the space already


@dataclass(frozen=True)
class GMRES(GMRESSettings, RestartedSolver):
    """Restarted GMRES; settings in ``GMRESSettings``."""

    def cycle(self, run: Run) -> Cycle:
        """One Arnoldi process of at most ``window`` vectors; a finished row goes on as zeros."""
        rows, dim = run.b.shape
        most = min(self.window, run.left, dim)
        target, live = run.target.double(), run.active
        tiny = COLLAPSED * torch.finfo(run.b.dtype).eps
        basis = [unit(run.r, run.norm, live)]
        R = torch.eye(most, dtype=torch.float64, device=run.b.device).repeat(rows, 1, 1)
        rhs = torch.zeros(rows, most, dtype=torch.float64, device=run.b.device)
        rest = run.norm.double()  # the last entry of the rotated right-hand side: the residual, but for its sign
        turns: list[tuple[Tensor, Tensor]] = []
        steps, broken = torch.zeros_like(run.iterations), torch.zeros_like(live)
        made = 0
        for j in range(most):
            w = freeze(run.product(basis[j]), live)
            made += 1
            steps = steps + live
            size = torch.linalg.vector_norm(w, dim=1)
            w, column = orthogonalize(w, basis)
            length = torch.linalg.vector_norm(w, dim=1)
            collapsed = length <= tiny * size
            h = [*column, torch.where(collapsed, 0.0, length).double()]
            for i, (c, s) in enumerate(turns):
                h[i], h[i + 1] = c * h[i] + s * h[i + 1], c * h[i + 1] - s * h[i]
            pivot = torch.hypot(h[j], h[j + 1])
            singular = collapsed & (pivot <= tiny * size)
            used = live & ~singular
            c, s = torch.where(used, h[j] / pivot, 1.0), torch.where(used, h[j + 1] / pivot, 0.0)
            turns.append((c, s))
            for i in range(j):
                R[:, i, j] = torch.where(used, h[i], 0.0)
            R[:, j, j] = torch.where(used, pivot, 1.0)
            rhs[:, j] = torch.where(used, c * rest, 0.0)
            rest = torch.where(used, -s * rest, rest)
            met = rest.abs() <= target
            broken = broken | (live & collapsed & ~met)
            live = live & ~met & ~collapsed & torch.isfinite(rest)
            run.note(rest.abs())
            if not bool(live.any()) or j + 1 == most:
                break
            basis.append(unit(w, length, live))
        y = torch.linalg.solve_triangular(R[:, :made, :made], rhs[:, :made, None], upper=True)[:, :, 0].to(run.b.dtype)
        x = run.x
        for i, v in enumerate(basis):
            x = torch.addcmul(x, y[:, i : i + 1], v)
        return Cycle(x, steps, made, broken)


def orthogonalize(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``w`` (rows, dim) less its parts along ``basis``, and those parts in float64 (modified Gram-Schmidt, in place)."""
    parts = []
    for v in basis:
        part = torch.linalg.vecdot(v, w)
        w = w.addcmul_(part[:, None], v, value=-1)
        parts.append(part.double())
    return w, parts
