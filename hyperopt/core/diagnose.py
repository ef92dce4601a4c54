"""Properties of a map at a point: spectral radius and norm of ``J = d_w phi``, and the condition number of ``I - J``.

    radius      Arnoldi on J^T: the largest Ritz value                    below 1: Picard and Neumann converge, at that rate
    norm        Golub-Kahan bidiagonalization of J: largest singular value       below 1: phi contracts, bounds hold
    condition   |I - J| |(I - J)^{-1}|: how much rounding and residuals are amplified in the hypergradient

For a rotation by 90 degrees scaled by 0.9, the radius is 0.9 while a Rayleigh quotient gives 0. If ``steps`` is at least the
number of unknowns of a row, all three are exact up to rounding. Otherwise the norm is estimated from below, and so is the
radius unless J is strongly non-normal, and the smallest singular value of ``I - J`` comes from inverse iteration with GMRES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.core.checks import plain
from hyperopt.core.graph_modes import twice_differentiable
from hyperopt.core.jacobian import Jacobian
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.operator import LinearOperator
from hyperopt.core.status import Solution, Status
from hyperopt.core.text import described
from hyperopt.core.tree import layout_of

Product = Callable[[Tensor], Tensor]
COLLAPSED = 64.0  # times eps: a vector this short after orthogonalization is rounding, and lies in the space already
INVERSE_STEPS = 4  # inverse iterations; each reduces the error by the squared ratio of the two smallest singular values


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Properties of a map's Jacobian at a point; the tensors have one entry for each row, shape (rows,).

    Attributes:
        row_radius: spectral radius of ``J``.
        row_norm: Euclidean norm of ``J``.
        row_condition: condition number of ``I - J``; infinity if it is singular or nearly so.
        exact: whether the Krylov spaces were complete, so that the numbers are exact up to rounding.
        vjps, jvps: number of products.

    Example:
        >>> import torch, hyperopt
        >>> hyperopt.diagnose(lambda w: 2 * w, torch.ones(1, 3))
        Diagnosis(radius=2, norm=2, condition=1, exact=True, rows=1)
    """

    row_radius: Tensor
    row_norm: Tensor
    row_condition: Tensor
    exact: bool
    vjps: int
    jvps: int

    @property
    def radius(self) -> float:
        """The largest spectral radius over the rows (0 without rows)."""
        return _largest(self.row_radius)

    @property
    def norm(self) -> float:
        """The largest norm over the rows (0 without rows)."""
        return _largest(self.row_norm)

    @property
    def condition(self) -> float:
        """The largest condition number over the rows (0 without rows)."""
        return _largest(self.row_condition)

    def __repr__(self) -> str:
        """Return the largest numbers over the rows; ``str`` says what they mean."""
        largest = {"radius": self.radius, "norm": self.norm, "condition": self.condition}
        return described(self, **largest, exact=self.exact, rows=self.row_radius.numel())

    def __str__(self) -> str:
        """Return the three numbers and what they mean for the choice of methods."""
        if not self.radius < 1:
            advice = "Picard and Neumann do not converge; use Anderson, and GMRES for the adjoint"
        elif not self.norm < 1:
            advice = "Picard and Neumann converge, but may grow before they do: the map does not contract in norm"
        elif self.radius > 0.95:
            advice = "the map contracts slowly; Anderson, and GMRES for the adjoint, need fewer steps"
        else:
            advice = "the map contracts; Picard and Neumann are right"
        how = "exact" if self.exact else "estimated"
        return (
            f"spectral radius {self.radius:.4g}, norm {self.norm:.4g}, condition of I - J {self.condition:.3g} "
            f"({how}; the worst of {self.row_radius.numel()} rows): {advice}"
        )


def diagnose(phi: Callable[..., Any], w: Any, args: tuple[Any, ...] = (), *, rows: str = "auto", steps: int = 30) -> Diagnosis:
    """Measure the Jacobian of ``phi`` at ``w``, with one evaluation of ``phi``.

    Args:
        phi: the map, called ``phi(w, *args)``.
        w: the point: a state as given to ``fixed_point``, or a ``Solution``.
        args: further arguments of ``phi``.
        rows: as in ``fixed_point``; a ``Solution`` has its own.
        steps: dimension of each Krylov space, at least 1. Memory is ``2 * steps`` states; the cost is about ``3 * steps`` vjps
            and ``2 * steps`` jvps, plus the inverse iteration if ``steps`` is below the number of unknowns of a row.

    Returns:
        ``Diagnosis``: radius, norm and condition number, and, when printed, what they mean for the choice of methods.

    Raises:
        ValueError: ``steps`` is not a whole number of at least 1.

    Reference: Arnoldi, Quart. Appl. Math. 9, 1951; Golub & Kahan, SIAM J. Numer. Anal. 2, 1965; Trefethen & Embree, Spectra and
    Pseudospectra, Princeton 2005, for how radius and norm differ.

    Example:
        >>> import torch, hyperopt
        >>> diagnosis = hyperopt.diagnose(lambda w: 0.5 * w, torch.zeros(1, 3))
        >>> print(str(diagnosis).partition(": ")[2])
        the map contracts; Picard and Neumann are right
    """
    steps = plain(steps)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"diagnose: steps={steps!r} must be a whole number >= 1; change steps")
    layout, value = (w.layout, w.value) if isinstance(w, Solution) else (layout_of(w, rows), w)
    point = layout.matrix(optree.tree_map(lambda x: x.detach(), value)).requires_grad_()
    with torch.enable_grad(), twice_differentiable():
        out = layout.matrix(phi(layout.tree(point), *args))
    J = Jacobian(out, point)
    count, dim = point.shape
    if not point.numel():
        zero = point.detach().new_zeros(count)
        return Diagnosis(zero, zero, zero, True, 0, 0)
    generator = torch.Generator().manual_seed(0)  # a diagnosis must not advance the caller's random numbers
    start = torch.randn(count, dim, generator=generator, dtype=torch.float64).to(point)
    m = min(steps, dim)
    with torch.no_grad():
        radius = spectral_radius(J.rmatvec, start.detach(), m)
        norm = singular_values(J.matvec, J.rmatvec, start.detach(), m)[:, 0]
        both = singular_values(lambda v: v - J.matvec(v), lambda v: v - J.rmatvec(v), start.detach(), m)
        least = both[:, -1] if m == dim else torch.minimum(both[:, -1], _least_singular_value(J, start.detach()))
        tiny = torch.finfo(point.dtype).eps * dim * both[:, 0]
        condition = torch.where(least > tiny, both[:, 0] / least, torch.inf)
        condition = torch.where(torch.isnan(least), torch.nan, condition)
    return Diagnosis(radius, norm, condition, m == dim, J.rmatvecs, J.matvecs)


def spectral_radius(product: Product, start: Tensor, steps: int) -> Tensor:
    """Return the largest modulus of an operator's Ritz values after ``steps`` Arnoldi steps, shape (rows,).

    Args:
        product: ``v -> M v`` on (rows, dim), for each row separately.
        start: a random first vector, shape (rows, dim).
        steps: at most ``dim``.
    """
    rows, eps = start.shape[0], torch.finfo(start.dtype).eps
    length = torch.linalg.vector_norm(start, dim=1)
    live = length > 0
    basis = [unit(start, length, live)]
    H = torch.zeros(rows, steps, steps, dtype=torch.float64, device=start.device)
    bad = torch.zeros_like(live)
    for j in range(steps):
        w = product(basis[j])
        size = torch.linalg.vector_norm(w, dim=1)
        bad = bad | ~torch.isfinite(size)
        w, parts = _orthogonalize(w, basis)
        H[:, : j + 1, j] = torch.stack(parts, dim=1).double()
        length = torch.linalg.vector_norm(w, dim=1)
        live = live & ~bad & (length > COLLAPSED * eps * size)
        if j + 1 == steps or not bool(live.any()):
            break
        H[:, j + 1, j] = torch.where(live, length, 0.0).double()
        basis.append(unit(w, length, live))
    values = torch.linalg.eigvals(torch.where(bad[:, None, None], 0.0, H)).abs().amax(dim=1)
    return torch.where(bad, torch.nan, values.to(start.dtype))


def singular_values(product: Product, transposed: Product, start: Tensor, steps: int) -> Tensor:
    """Return the singular values of ``A`` after ``steps`` Golub-Kahan steps, largest first, shape (rows, steps).

    A row whose space is exhausted early continues with a new random vector, so that all its singular values are found.

    Args:
        product: ``v -> A v`` on (rows, dim), for each row separately.
        transposed: ``u -> A^T u``.
        start: a random first right vector, shape (rows, dim).
        steps: at most ``dim``.
    """
    rows, dim = start.shape
    generator = torch.Generator().manual_seed(1)
    right: list[Tensor] = []
    images: list[Tensor] = []
    v = start
    for k in range(steps):
        size = torch.linalg.vector_norm(v, dim=1)
        v = _orthogonalize(v, right)[0]
        length = torch.linalg.vector_norm(v, dim=1)
        spent = ~(length > COLLAPSED * torch.finfo(v.dtype).eps * size)
        if bool(spent.any()):
            fresh = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(v)
            v = torch.where(spent[:, None], _orthogonalize(fresh, right)[0], v)
            length = torch.linalg.vector_norm(v, dim=1)
        right.append(unit(v, length, length > 0))
        images.append(product(right[-1]))
        if k + 1 < steps:
            v = transposed(images[-1])
    # The singular values of A on the space are those of these images. QR keeps small ones exact; a Gram matrix squares them.
    span = torch.stack(images, dim=2).double()
    bad = ~torch.isfinite(span).all(dim=2).all(dim=1)
    values = torch.linalg.svdvals(torch.linalg.qr(torch.where(bad[:, None, None], 0.0, span)).R)
    return torch.where(bad[:, None], torch.nan, values.to(start.dtype))


def _least_singular_value(J: LinearOperator, start: Tensor) -> Tensor:
    """Return the least singular value of ``I - J`` by inverse iteration: ``x <- (I - J)^{-1} (I - J^T)^{-1} x``."""
    solver = GMRES(rtol=1e-4, max_steps=400, window=60)
    x = start
    growth = torch.zeros_like(start[:, 0])
    solved = torch.ones_like(growth, dtype=torch.bool)
    for _ in range(INVERSE_STEPS):
        x = unit(x, torch.linalg.vector_norm(x, dim=1), solved)
        y = solver.solve(J.T, x)
        growth = torch.linalg.vector_norm(y.value, dim=1)
        x = solver.solve(J, y.value)
        solved = solved & (y.stats.row_status == int(Status.converged)) & (x.stats.row_status == int(Status.converged))
        x = x.value
    return torch.where(solved, 1 / growth, 0.0)


def _orthogonalize(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return ``w`` without its parts along ``basis``, and the parts, by classical Gram-Schmidt, repeated against rounding."""
    total = [torch.zeros_like(w[:, 0]) for _ in basis]
    for _ in range(2):
        parts = [torch.linalg.vecdot(v, w) for v in basis]
        for v, part in zip(basis, parts, strict=True):
            w = torch.addcmul(w, part[:, None], v, value=-1)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return w, total


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def unit(w: Tensor, length: Tensor, live: Tensor) -> Tensor:
    """Return ``w / length`` in the live rows, and zeros in the others."""
    return torch.where(live[:, None], w / length[:, None], 0.0)
