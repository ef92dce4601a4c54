"""The one-step hypergradient by finite differences, as in differentiable architecture search: three gradients, no second order.

    dE/dlam ~ d_lam E - step (grad_lam L(w + h g, lam) - grad_lam L(w - h g, lam)) / 2h,     g = d_w E

References: Liu, Simonyan & Yang, ICLR 2019, arXiv 1806.09055, equations 7 and 8.
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
        length: of the difference's step in ``w``, above 0 (None: where truncation and rounding balance; DARTS: 0.01).
    """

    length: float | None = None

    curvature: ClassVar[str] = "finite_differences"

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """A map that is no gradient step has no gradients to difference."""
        return f"{TRAINED}; use OneStep()"

    def __post_init__(self) -> None:
        """Check the range."""
        check_optional(self, "length", 0.0, open_low=True)
