"""The one-step hypergradient by finite differences, as in differentiable architecture search (DARTS), from three gradients.

    dE/dlam ~ d_lam E - step (grad_lam L(w + h g, lam) - grad_lam L(w - h g, lam)) / 2h,     g = d_w E

No second derivative is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hyperopt.bilevel.t1t2 import TRAINED
from hyperopt.core.adjoints.onestep import OneStep
from hyperopt.core.checks import check_optional
from hyperopt.core.solvers.base import FixedPointSolver


@dataclass(frozen=True)
class FiniteDifference(OneStep):
    """One-step differentiation with the products of ``hyperopt.bilevel.finite_differences``.

    Args:
        length: norm of the step ``h g`` in ``w``, above 0 (None: balances truncation and rounding errors; DARTS uses 0.01).

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Liu, Simonyan & Yang, ICLR 2019, arXiv 1806.09055, equations 7 and 8.

    Example:
        >>> import torch, hyperopt
        >>> adjoint = hyperopt.FiniteDifference()
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.tensor([0.5]), torch.ones(()), adjoint=adjoint)
        >>> round(float(estimate.grad), 3)  # one step of size 1 / 4 is exact here, where the curvature is 4
        -0.25
    """

    length: float | None = None

    curvature: ClassVar[str] = "finite_differences"

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """Return why this cannot be the adjoint of a general map, which has no gradients to difference."""
        return f"{TRAINED}; use OneStep()"

    def __post_init__(self) -> None:
        """Check the range."""
        check_optional(self, "length", 0.0, open_low=True)
