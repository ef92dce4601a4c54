"""GMRES with restart: the least residual over the Krylov space, row by row.

    v_1 = r / |r|
    for j = 1 .. window:                             A V_j = V_{j+1} H_j        (Arnoldi, classical Gram-Schmidt, twice)
        w = A v_j;  h = V_j^T w;  w <- w - V_j h;  the same again;  v_{j+1} = w / |w|
        |r_j| = |r_0| / |u|,    u_1 = 1,  u_{j+1} = -<u, h> / |w|               (u^T H_j = 0)
    x <- x + V y,    y = argmin || |r| e_1 - H y ||  (QR, in float64)

The residual is the part of ``|r| e_1`` along the left null vector ``u`` of ``H``, which gives its norm. A row whose space is
exhausted continues with zero vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.checks import check_count
from hyperopt.core.linear.krylov import KrylovSolver, Recurrence
from hyperopt.core.rowwise import combine, dots, length, orthogonalise

COLLAPSED = 16.0  # times eps: a vector this short after orthogonalization is rounding, and lies in the space already


@dataclass
class Arnoldi:
    """The Krylov space of a cycle.

    Attributes:
        V: basis, shape (rows, window + 1, dim); each vector is contiguous in memory.
        H: the products in that basis, transposed, shape (rows, window, window + 1).
        u: left null vector of the filled part of ``H``, shape (rows, window + 1).
        uu: its square, shape (rows, 1).
        norm: norm of the residual at the start, shape (rows, 1).
        collapsed: rows whose last vector was in the space already, shape (rows, 1).
        j: number of products so far.
    """

    V: Tensor
    H: Tensor
    u: Tensor
    uu: Tensor
    norm: Tensor
    collapsed: Tensor
    j: int = 0


@dataclass(frozen=True)
class GMRES(KrylovSolver):
    """Restarted GMRES, one vjp a step.

    Args:
        rtol, atol: a row stops at ``||v - M v - b|| <= atol + rtol ||b||``; both at least 0, and both 0 for exactly
            ``max_steps`` steps.
        max_steps: largest number of products with ``M``, at least 1.
        window: number of vectors that are kept before a restart, at least 1.
        relative_to: what ``rtol`` is relative to, ``"row"`` or ``"batch"``, see ``LinearSolver``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Saad & Schultz, SIAM J. Sci. Stat. Comput. 7, 1986; Giraud, Langou, Rozloznik & van den Eshof, Numer. Math. 101,
    2005 (two passes of Gram-Schmidt are enough).

    Example:
        >>> import torch, hyperopt
        >>> solver = hyperopt.GMRES(rtol=1e-6)
        >>> M, b = torch.tensor([[2.0, 1.0], [0.0, -3.0]]), torch.tensor([[1.0, 2.0]])
        >>> found = solver.solve(lambda v: v @ M.T, b)
        >>> torch.allclose(found.value, torch.linalg.solve(torch.eye(2) - M, b[0]), rtol=1e-4), found.stats.status.name
        (True, 'converged')
    """

    window: int = 20

    apart = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window")

    def init(self, run: Recurrence) -> Arnoldi:
        """Take the direction of the residual as the first vector."""
        rows, dim = run.r.shape
        most = min(self.window, run.left + 1, dim)
        old: Arnoldi | None = run.kept
        V = run.r.new_empty(most + 1, rows, dim).transpose(0, 1) if old is None else old.V
        norm = (run.rr + run.tiny).sqrt()
        torch.div(run.r, norm, out=V[:, 0])
        H, u = V.new_zeros(rows, most, most + 1), V.new_zeros(rows, most + 1)
        u[:, 0] = 1.0
        run.kept = Arnoldi(V, H, u, torch.ones_like(norm), norm, torch.zeros_like(norm, dtype=torch.bool))
        return run.kept

    def step(self, run: Recurrence, state: Arnoldi) -> Arnoldi:
        """Add one vector."""
        V, j = state.V[:, : state.j + 1], state.j
        w = run.product(V[:, j])
        size = length(w)
        w, h = orthogonalise(V, w)
        rest = length(w)
        last = dots(state.u[:, None, : j + 1], h[:, :, 0])[:, :, 0] / (rest + run.tiny)
        state.collapsed = rest <= COLLAPSED * run.eps * size
        state.H[:, j, : j + 1] = h[:, :, 0]
        state.H[:, j, j + 1] = rest[:, 0]
        torch.div(w, rest.masked_fill_(state.collapsed, math.inf), out=state.V[:, j + 1])
        state.u[:, j + 1] = -last[:, 0]
        state.uu = torch.addcmul(state.uu, last, last)
        run.rr = (state.norm / state.uu) * state.norm
        state.j = j + 1
        return state

    def spent(self, run: Recurrence, state: Arnoldi) -> bool:
        """Whether the window is full."""
        return state.j == state.H.shape[1]

    def finish(self, run: Recurrence, state: Arnoldi) -> Arnoldi:
        """Solve the small least squares problem; zero columns have the coefficient 0."""
        m = state.j
        Q, R = torch.linalg.qr(state.H[:, :m, : m + 1].mT.double())
        pivot = R.diagonal(dim1=1, dim2=2)
        none = pivot.abs() <= COLLAPSED * run.eps * torch.linalg.vector_norm(state.H[:, :m, : m + 1], dim=2)
        pivot.masked_fill_(none, 1.0)
        first = (Q[:, 0] * state.norm).masked_fill_(none, 0.0)
        y = torch.linalg.solve_triangular(R, first[:, :, None], upper=True)
        run.x = combine(run.x, y.to(run.x.dtype), state.V[:, :m])
        return state

    def stuck(self, run: Recurrence, state: Arnoldi) -> Tensor:
        """Return the rows whose space is exhausted above the limit, because ``A`` is singular."""
        return state.collapsed & (run.rr > run.limit)
