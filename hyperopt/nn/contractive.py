"""Matrices that always are contractions in the spectral norm, and the normalisation of a cell's weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hyperopt.core.checks import require_choice
from hyperopt.nn.householder import HouseholderProduct

NORMS = (None, "weight", "spectral")
"""The choices of ``norm`` in ``normalise``."""


@torch.no_grad()
def spectral_norm_bound(matrix: Tensor, squarings: int = 10) -> Tensor:
    """Return an upper bound of the spectral norm from matrix products alone, since an SVD is slow on a GPU.

    With ``G = A^T A`` and ``m = 2^squarings``: ``|A| = |G^m|^(1 / 2m) <= |G^m|_F^(1 / 2m) <= n^(1 / 4m) |A|``, so 10 squarings
    give at most 0.2 % too much for n = 1000. The computation is in float64, and the bound includes its rounding.

    Args:
        matrix: A. shape: (n, m)
        squarings: number of squarings; each halves the relative excess.

    Returns:
        A float64 scalar on the matrix's device; NaN or inf if an entry is.
    """
    a = matrix.detach().double()
    largest = a.abs().amax()
    a = a / torch.where(largest > 0, largest, 1.0)
    log_norm = torch.zeros((), dtype=a.dtype, device=a.device)
    power = a.T @ a
    for k in range(squarings + 1):
        scale = torch.linalg.matrix_norm(power)  # keeps the powers in range; the norm is the product of the scales
        safe = torch.where(scale > 0, scale, 1.0)
        log_norm = log_norm + safe.log() / 2 ** (k + 1)
        if k < squarings:
            power = (power / safe) @ (power / safe)
    # A product of matrices of Frobenius norm 1 has an error of at most n eps, and a norm of at least 1 / sqrt(n).
    slack = 1 + 4 * max(a.shape) ** 1.5 * torch.finfo(a.dtype).eps
    return largest * log_norm.exp() * slack


def clipping(a: Tensor, radius: float) -> tuple[float, Callable[[float], Tensor]]:
    """Return the spectral norm of ``a`` and the function ``r -> U min(S, r) V^T`` that clips its singular values.

    For a norm of at most ``2 radius`` it uses the eigenvectors of ``A^T A``, ``A V min(1, r / S) V^T``, which is faster than
    an SVD. The error of this grows with ``(|A| / r)^2``, so larger matrices take the SVD.

    Args:
        a: the matrix A. shape: (n, n), float64
        radius: about the radius at which it will be clipped.
    """
    far = 2 * radius
    if float(torch.linalg.matrix_norm(a)) <= far * math.sqrt(len(a)):  # otherwise |A| > far, and A^T A may even overflow
        values, v = torch.linalg.eigh(a.T @ a)
        if float(values[-1]) <= far * far:
            s = values.clamp(min=torch.finfo(a.dtype).tiny).sqrt()
            return float(s[-1]), lambda r: (a @ (v * (r / s).clamp(max=1.0))) @ v.T
    u, s, vh = torch.linalg.svd(a)
    return float(s[0]), lambda r: (u * s.clamp(max=r)) @ vh


class ContractiveMatrix(nn.Module, ABC):
    """A square matrix A with a known bound of its spectral norm.

    Attributes:
        n: number of rows of A.
    """

    n: int

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return A, differentiable in the parameters. shape: (n, n)."""

    @abstractmethod
    def norm_bound(self) -> Tensor:
        """Return an upper bound of ``|A|_2`` that includes rounding, as a float64 scalar without a gradient."""

    def project_(self) -> None:
        """Move the parameters to where A is a contraction; call after every update."""

    def forward(self) -> Tensor:
        """Return ``matrix()``."""
        return self.matrix()


class HouseholderContraction(ContractiveMatrix):
    """``A = P D P`` with P a product of reflections and ``D = diag((1 - margin) sigmoid(d))``, so ``|A| < 1 - margin``.

    Args:
        n: number of rows of A.
        reflections: number of reflections in P, 1 to n.
        margin: distance of the norm's bound from 1, in (0, 1).
        generator: generator of P (None: torch's global one); d starts at zero, so D at ``(1 - margin) / 2``.

    Attributes:
        product: P, a ``HouseholderProduct``, with the parameter ``vectors``. shape: (reflections, n)
        d: parameter. shape: (n,)

    Raises:
        ValueError: a size or the margin is out of range.
    """

    def __init__(self, n: int, reflections: int, margin: float = 0.8, *, generator: torch.Generator | None = None) -> None:
        """Check the numbers and draw P."""
        super().__init__()
        if not 0 < margin < 1:
            raise ValueError(f"margin={margin} is not in (0, 1); change margin")
        self.n, self.margin = n, margin
        self.product = HouseholderProduct(n, reflections, generator=generator)
        self.d = nn.Parameter(torch.zeros(n))

    def matrix(self) -> Tensor:
        """Return A, computed in float64 at O(n^2 reflections). shape: (n, n)."""
        diagonal = (1 - self.margin) * torch.sigmoid(self.d.double())
        dp = diagonal[:, None] * self.product.form(torch.float64)
        return self.product.rotate(dp.T, transpose=True).T.to(self.d.dtype)  # P X = (X^T P^T)^T

    def norm_bound(self) -> Tensor:
        """Return the largest entry of D, increased by what the rounding of A to its dtype may add."""
        largest = (1 - self.margin) * torch.sigmoid(self.d.detach().double()).amax()
        # |A' - A| <= eps |A|_F <= eps sqrt(n) |A|
        return largest * (1 + math.sqrt(self.n) * torch.finfo(self.d.dtype).eps + 4 * self.n * torch.finfo(torch.float64).eps)

    def extra_repr(self) -> str:
        """Return the numbers."""
        return f"margin={self.margin}"


class ProjectedMatrix(ContractiveMatrix):
    """A free matrix A that ``project_`` moves back onto the ball ``|A|_2 <= max_norm``.

    Args:
        n: number of rows of A.
        max_norm: radius of the ball, in (0, 1).
        init_scale: standard deviation of the initial entries, at least 0; A is projected before it is used.
        generator: generator of A (None: torch's global one).

    Attributes:
        A: the parameter. shape: (n, n)

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, n: int, max_norm: float = 0.99, init_scale: float = 0.01, *, generator: torch.Generator | None = None
    ) -> None:
        """Check the numbers, draw A and project it."""
        super().__init__()
        if n < 1:
            raise ValueError(f"n={n} must be at least 1; change n")
        if not 0 < max_norm < 1:
            raise ValueError(f"max_norm={max_norm} is not in (0, 1); change max_norm")
        if not 0 <= init_scale < math.inf:
            raise ValueError(f"init_scale={init_scale} is not in [0, inf); change init_scale")
        self.n, self.max_norm = n, max_norm
        self._outside = False  # whether the latest projection moved A; it affects the speed of the next one, not A
        drawn = torch.randn(n, n, generator=generator, dtype=torch.float64)
        self.A = nn.Parameter((init_scale * drawn).to(torch.get_default_dtype()))
        self.project_()

    def matrix(self) -> Tensor:
        """Return A itself. shape: (n, n)."""
        return self.A

    def norm_bound(self) -> Tensor:
        """Return ``spectral_norm_bound(A)``."""
        return spectral_norm_bound(self.A)

    @torch.no_grad()
    def project_(self) -> None:
        """Replace A by the nearest matrix of norm at most ``max_norm`` in the Frobenius norm, by clipping singular values.

        The decomposition, in float64, is skipped if a cheaper bound already shows that A is inside. A matrix with non-finite
        entries is left as it is; the check of the outer loss finds them.
        """
        a = self.A.detach().double()
        cheap = torch.minimum(torch.linalg.matrix_norm(a), (a.abs().sum(0).amax() * a.abs().sum(1).amax()).sqrt())
        if not bool(cheap > self.max_norm) or not bool(cheap.isfinite()):
            return
        # If A was outside after the last update, it probably is again, and the closer bound would be wasted.
        if not self._outside and bool(spectral_norm_bound(a) <= self.max_norm):
            return
        largest, clip = clipping(a, self.max_norm)
        # Rounding to A's dtype may add eps sqrt(n) |A| to the norm, and the products about eps n, so A is clipped a bit more.
        slack = math.sqrt(self.n) * torch.finfo(self.A.dtype).eps + 4 * self.n * torch.finfo(a.dtype).eps
        self._outside = largest > self.max_norm
        if self._outside:
            self.A.copy_(clip(self.max_norm * (1 - slack)))

    def extra_repr(self) -> str:
        """Return the numbers."""
        return f"n={self.n}, max_norm={self.max_norm}"


def normalise(module: nn.Module, norm: str | None) -> None:
    """Normalise every parameter of ``module`` that is called ``weight`` and has at least two dimensions, in place.

        weight:    W = g v / |v|, for each output channel                            Salimans & Kingma, 2016, arXiv 1602.07868
        spectral:  W = V / |V|_2, by a power iteration with one step a solve         Miyato et al., 2018, arXiv 1802.05957

    This keeps the Jacobian of a cell from growing. The spectral norm is that of the weight as a matrix (output channels) x
    (the rest). It bounds a linear layer, and a convolution up to a factor of its kernel's size. The vectors of the power
    iteration are updated once for each forward of the ``DEQ`` in training mode, and not in eval mode.

    Args:
        module: a cell.
        norm: ``"weight"``, ``"spectral"``, or None to do nothing.

    Raises:
        ValueError: the norm is unknown, or there is nothing to normalise.

    Reference: Salimans & Kingma, NIPS 2016, arXiv 1602.07868; Miyato et al., ICLR 2018, arXiv 1802.05957.

    Example:
        >>> import torch, hyperopt
        >>> cell = torch.nn.Linear(4, 4)
        >>> hyperopt.nn.normalise(cell, "weight")
        >>> sorted(name for name, _ in cell.named_parameters())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    require_choice("", "norm", norm, NORMS)
    if norm is None:
        return
    owners = [inner for inner in module.modules() if inner._parameters.get("weight") is not None and inner.weight.dim() >= 2]  # pyright: ignore[reportCallIssue]
    if not owners:
        raise ValueError(f"norm={norm!r}: {type(module).__name__} has no matrix or kernel called weight; set norm to null")
    for owner in owners:
        (parametrizations.weight_norm if norm == "weight" else parametrizations.spectral_norm)(owner)
