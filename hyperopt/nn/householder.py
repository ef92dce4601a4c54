"""Orthogonal matrices as products of Householder reflections.

    P = H_1 H_2 ... H_r,    H_i = I - 2 u_i u_i^T,    u_i = v_i / |v_i|

In the compact form ``P = I - U^T T U``, the rows of U are the ``u_i``, and T is the upper triangular inverse of
``diag(1/2) + striu(U U^T)``. P is applied to a batch of rows by two thin matrix products and is never formed. No entry of T
exceeds 4 in size (off the diagonal, T_ij = -4 u_i^T H_{i+1} ... H_{j-1} u_j), so rounding errors are not amplified.

References:
    R. Schreiber and C. Van Loan, A storage-efficient WY representation for products of Householder transformations, 1989.
    T. Joffrain et al., Accumulating Householder transformations, revisited, ACM TOMS 2006 (the formula for T).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HouseholderProduct(nn.Module):
    """An orthogonal n x n matrix with ``r`` reflections as its parameters.

    The vectors may have any length: they are normalised at each use, in float64. A vector that becomes exactly zero stands for
    no reflection (its factor is I), and its gradient is zero.

    Args:
        n: number of rows of the matrix.
        reflections: number r of reflections, 1 to n; more than n give no other matrices.
        vectors: initial vectors, no row all zero (None: normal entries, so uniform directions). shape: (r, n)
        generator: generator of the initial vectors (None: torch's global one).

    Attributes:
        vectors: the parameter. shape: (r, n)

    Raises:
        ValueError: a size is out of range, or ``vectors`` has another shape, a non-finite entry or a zero row.
    """

    def __init__(
        self, n: int, reflections: int, vectors: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        """Check the sizes and draw the vectors."""
        super().__init__()
        if n < 1:
            raise ValueError(f"n={n} must be at least 1; change n")
        if not 1 <= reflections <= n:
            raise ValueError(f"reflections={reflections} must be from 1 to n={n}; change reflections")
        if vectors is None:
            # Draw in float64 whatever the default is, so that one seed gives the same matrix in every precision.
            drawn = torch.randn(reflections, n, generator=generator, dtype=torch.float64)
            vectors = drawn.to(torch.get_default_dtype())
        if vectors.shape != (reflections, n):
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}, expected (reflections, n) = {(reflections, n)}")
        zero = (vectors == 0).all(1).nonzero().flatten().tolist()
        if zero or not bool(vectors.isfinite().all()):
            what = f"row {zero[0]} is zero" if zero else "there are entries that are not finite"
            raise ValueError(f"vectors: {what}, which names no reflection; change vectors")
        self.n, self.reflections = n, reflections
        self.vectors = nn.Parameter(vectors.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U and ``T U`` of ``P = I - U^T (T U)``, in float64. shapes: (r, n)."""
        v = self.vectors.double()
        # Divide by the largest entry first: the square of a tiny or huge one would be 0 or inf. The factor needs no gradient.
        largest = v.detach().abs().amax(1, keepdim=True)
        v = v / torch.where(largest > 0, largest, 1.0)
        square = v.square().sum(1, keepdim=True)
        unit = v * torch.where(square > 0, square, 1.0).rsqrt()
        half = torch.full((self.reflections,), 0.5, dtype=v.dtype, device=v.device)
        inverse = (unit @ unit.T).triu(1) + torch.diag(half)
        return unit, torch.linalg.solve_triangular(inverse, unit, upper=True)

    def rotate(self, w: Tensor, transpose: bool = False) -> Tensor:
        """Return ``w P`` (or ``w P^T``) row by row, at O(n r) a row.

        Args:
            w: rows with any number of leading dimensions. shape: (..., n)
            transpose: whether to multiply by ``P^T``, the inverse of P.

        Returns:
            The product in the dtype of ``w``. shape: (..., n)

        Raises:
            ValueError: the rows have another size.
        """
        if w.shape[-1] != self.n:
            raise ValueError(f"rows of size {w.shape[-1]} meet a matrix of n={self.n}; change n or the rows")
        unit, scaled = (factor.to(w.dtype) for factor in self.factors())
        left, right = (scaled, unit) if transpose else (unit, scaled)
        return w - (w @ left.T) @ right

    def forward(self, w: Tensor) -> Tensor:
        """Return ``rotate(w)``."""
        return self.rotate(w)

    def form(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return P, computed in float64. shape: (n, n).

        Args:
            dtype: dtype of the result (None: that of ``vectors``).
        """
        unit, scaled = self.factors()
        eye = torch.eye(self.n, dtype=unit.dtype, device=unit.device)
        p = eye - unit.T @ scaled
        # Hundreds of reflections, or nearly parallel ones, leave an error of 1e-12 in P^T P - I; one Newton-Schulz step squares
        # it. On orthogonal matrices the step is the identity, so it changes no derivative.
        p = p @ (1.5 * eye - 0.5 * (p.T @ p))
        return p.to(self.vectors.dtype if dtype is None else dtype)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"n={self.n}, reflections={self.reflections}"
