"""``PositiveDefinite``: a covariance, a precision or a metric as a hyperparameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import PositiveDefiniteTransform, Transform

from hyperopt.spaces.space import Space


@dataclass(frozen=True, repr=False)
class PositiveDefinite(Space):
    """Symmetric matrices whose eigenvalues are above 0 (by projection: at least 0).

    By reparametrisation the value is ``L L^T``, where ``L`` is the lower triangle of the raw variable with the exponential of
    its diagonal. The projection is the nearest such matrix in the Frobenius norm (Higham 1988, theorem 2.1).

    Attributes:
        init: initial value, nested lists, or None for the identity.
        by: how the value stays in the space, ``"reparametrisation"`` or ``"projection"``, see ``Space``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Higham, Linear Algebra and its Applications 103, 1988, theorem 2.1 (the projection).

    Example:
        >>> import torch, hyperopt
        >>> space = hyperopt.PositiveDefinite([[2.0, 1.0], [1.0, 2.0]])
        >>> hyper = hyperopt.Hyperparameters({"x": space}, shapes={"x": (2, 2)}, dtype=torch.float64)
        >>> [round(float(x), 6) for x in torch.linalg.eigvalsh(hyper.read()["x"])]
        [1.0, 3.0]
    """

    init: Any = None

    @property
    def bounds(self) -> str:
        """The cone."""
        return "the positive definite matrices (symmetric, with eigenvalues above 0)"

    def start(self, shape: torch.Size) -> Any:
        """Return the identity."""
        return torch.eye(shape[-1], dtype=torch.float64)

    def transform(self) -> Transform:
        """Return the map from a Cholesky factor, whose diagonal is given by its logarithm."""
        return PositiveDefiniteTransform()

    def inside(self, value: Tensor, *, interior: bool) -> Tensor:
        """Whether each matrix is symmetric, to rounding, with eigenvalues above 0 (or at least 0), shape (...,)."""
        slack = 100 * torch.finfo(value.dtype).eps * value.abs().amax((-2, -1))
        least = torch.linalg.eigvalsh(value.double())[..., 0]
        symmetric = (value - value.mT).abs().amax((-2, -1)) <= slack
        return symmetric & ((least > 0) if interior else (least >= -slack))

    def project(self, value: Tensor) -> Tensor:
        """Take the symmetric part, and raise its negative eigenvalues to 0."""
        eigenvalues, vectors = torch.linalg.eigh((value + value.mT) / 2)
        return (vectors * eigenvalues.clamp(min=0)[..., None, :]) @ vectors.mT
