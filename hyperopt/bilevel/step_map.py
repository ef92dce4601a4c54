"""The gradient-step map ``phi(w) = w - step * grad_w L(w, lam)``: its adjoint system and its largest stable step.

    (I - d_w phi)^T v = d_w E       is       step * H v = d_w E

``H`` is symmetric, so the operator is its own transpose. The solution ``u = step * v = H^{-1} d_w E`` does not depend on the
step. Only methods that iterate the map (Neumann, Anderson, one-step) need a step below ``2 / L``, with the largest eigenvalue
``L`` of H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Curvature
from hyperopt.core.checks import check_count, check_number
from hyperopt.core.operator import Complement, FunctionOperator
from hyperopt.core.status import SolveStats, Status


class StepMap(Complement):
    """The operator ``M = (d_w phi)^T = I - step * H`` on (1, dim) matrices.

    Attributes:
        largest: the largest ``|H v| / |v|`` of all products so far, a lower bound of the spectral norm of H; NaN before the
            first product.
    """

    def __init__(self, curvature: Curvature, step: float) -> None:
        self.curvature, self.step = curvature, step
        self.largest = torch.full_like(curvature.gradient[0, 0], torch.nan)
        super().__init__(FunctionOperator(self._product, symmetric=True), step)

    def _product(self, v: Tensor) -> Tensor:
        image = self.curvature.matvec(v)
        self.largest = torch.fmax(self.largest, torch.linalg.vector_norm(image) / torch.linalg.vector_norm(v))
        return image


@dataclass(frozen=True)
class PowerSettings:
    """Tolerance and budget of a power iteration.

    Args:
        rtol: relative change of the estimate at which the iteration stops, at least 0. A step size needs no more than 0.25.
        max_steps: largest number of products, at least 1.
    """

    rtol: float = 1e-2
    max_steps: int = 30

    def __post_init__(self) -> None:
        check_number(self, "rtol", 0.0)
        check_count(self, "max_steps")


@dataclass(frozen=True)
class Known:
    """What a power iteration for a similar matrix has found.

    Attributes:
        size: its estimate.
        direction: where it was attained, shape (1, dim).
        count: how many iterations there were before.
    """

    size: float
    direction: Tensor
    count: int


COLD = 1e-2  # largest tolerance of a power iteration from a random start, where the change says little about the error
MIXED_IN = 0.1  # random part of the start of a power iteration, relative to the remembered direction


def largest_curvature(
    curvature: Curvature, settings: PowerSettings | None = None, known: Known | None = None
) -> tuple[float, Tensor]:
    """Return an estimate of the spectral norm of ``H`` and the direction where it is attained, by power iteration.

    From a random start the estimate is a lower bound, with a tolerance of at most 1 %. With ``known`` it starts there, and stops
    at once if the curvature is the known one up to ``rtol``. A part of the start is random, and another one each time: the known
    direction may be an eigenvector, which the iteration would never leave.

    Args:
        curvature: products with H.
        settings: tolerance and budget.
        known: the result for a similar problem.
    """
    settings = settings or PowerSettings()
    like, count = curvature.gradient, 0 if known is None else known.count
    generator = torch.Generator().manual_seed(count)  # a generator of its own leaves the caller's random numbers alone
    v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    v = v / torch.linalg.vector_norm(v)
    if known is not None:
        v = known.direction + MIXED_IN * v
        v = v / torch.linalg.vector_norm(v)
    before, rtol = (0.0, min(settings.rtol, COLD)) if known is None else (known.size, settings.rtol)
    for _ in range(settings.max_steps):
        image = curvature.rough(v)
        size = float(torch.linalg.vector_norm(image))
        if not size > 0 or size == float("inf"):
            return size, v
        v = image / size
        if abs(size - before) <= rtol * size:
            return max(size, before), v
        before = size
    return before, v


def series(operator: StepMap, b: Tensor, most: int, rtol: float) -> tuple[Tensor, SolveStats, bool]:
    """Return ``step sum_{k < K} M^k b`` for the largest ``K <= most`` up to which every term lowers the residual ``|M^K b|``.

    For a symmetric ``M`` the logarithm of ``|M^k b|`` is convex in k. It falls until negative curvature, or a step that is too
    long, dominates, and rises from then on. At least one term is taken.

    Returns:
        The sum, shape (1, dim), NaN if the products are not finite or all zero; the statistics; whether the residual rose.
    """
    size = left = float(torch.linalg.vector_norm(b))
    total, term, terms, rose = torch.zeros_like(b), b, 0, False
    while terms < most and left > rtol * size and not rose:
        following = operator.matvec(term)
        norm = float(torch.linalg.vector_norm(following))
        rose = not norm < left
        if not rose or not terms:
            total, term, left, terms = total + term, following, norm, terms + 1
    status = Status.converged if left <= rtol * size else Status.fixed_steps
    if not math.isfinite(left):
        status = Status.nonfinite
    elif terms and not operator.largest > 0:
        status = Status.breakdown
    if status >= Status.breakdown:
        total = torch.full_like(total, math.nan)
    stats = SolveStats.of_one(status, terms, left / size if size > 0 else left, size, method="Neumann")
    return operator.step * total, stats, rose
