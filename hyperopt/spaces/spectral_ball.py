"""``SpectralBall``: a matrix whose spectral norm stays below a bound, such as the matrix of a contractive map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from hyperopt.core.checks import check_number
from hyperopt.spaces.space import Space


class SpectralBallTransform(Transform):
    """``A = radius B L^{-T}``, ``L L^T = I + B^T B``: a smooth map of all matrices B onto the open ball ``|A|_2 < radius``.

    It maps onto this ball since ``A^T A = radius^2 (I - L^{-1} L^{-T})``. Unlike an SVD, a Cholesky factor is differentiable
    at equal singular values.
    """

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, radius: float) -> None:
        """Keep the radius."""
        super().__init__()
        self.radius = radius

    def _call(self, x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        lower = torch.linalg.cholesky(eye + x.mT @ x)
        return self.radius * torch.linalg.solve_triangular(lower, x.mT, upper=False).mT

    def _inverse(self, y: Tensor) -> Tensor:
        a = y / self.radius
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        lower = torch.linalg.cholesky(eye - a.mT @ a)  # L^{-1}
        return torch.linalg.solve_triangular(lower, a.mT, upper=False).mT


@dataclass(frozen=True, repr=False)
class SpectralBall(Space):
    """Matrices of a spectral norm below ``radius`` (by projection: at most ``radius``).

    Attributes:
        init: initial value: a number for all entries, or nested lists with one for each entry.
        by: how the value stays in the space, ``"reparametrisation"`` or ``"projection"``, see ``Space``.
        radius: radius of the ball, above 0.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.SpectralBall([[0.3, 0.0], [0.4, 0.0]], radius=1.0)
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": (2, 2)}, dtype=torch.float64)
        >>> round(float(torch.linalg.matrix_norm(hyper.read()["x"], 2)), 6)
        0.5
    """

    init: Any = 0.0
    radius: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_number(self, "radius", 0.0, open_low=True)

    @property
    def bounds(self) -> str:
        """The ball."""
        return f"the ball of spectral norm {self.radius:g}"

    def transform(self) -> Transform:
        """Return a ``SpectralBallTransform``."""
        return SpectralBallTransform(float(self.radius))

    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether the largest singular value is below the radius (or equal to it), shape (...,)."""
        norm = torch.linalg.matrix_norm(value.double(), 2)
        return (norm < self.radius) if interior else (norm <= self.radius)

    def project(self, value: Tensor) -> Tensor:
        """Clip the singular values, which gives the nearest matrix in the Frobenius norm."""
        u, s, vh = torch.linalg.svd(value, full_matrices=False)
        # Rounding may increase the norm of the product by this, so the singular values are clipped a little more.
        slack = 8 * max(value.shape[-2:]) * torch.finfo(value.dtype).eps
        return value if bool((s <= self.radius).all()) else (u * s.clamp(max=self.radius * (1 - slack))[..., None, :]) @ vh
