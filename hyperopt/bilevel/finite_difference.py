"""The one-step hypergradient by finite differences, as in differentiable architecture search: three gradients, no second order.

    dE/dlam ~ d_lam E - step (grad_lam L(w + h g, lam) - grad_lam L(w - h g, lam)) / 2h,     g = d_w E

References: Liu, Simonyan & Yang, ICLR 2019, arXiv 1806.09055, equations 7 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hyperopt.bilevel.settings import FiniteDifferenceSettings
from hyperopt.core.adjoints.onestep import OneStep


@dataclass(frozen=True)
class FiniteDifference(FiniteDifferenceSettings, OneStep):
    """One-step differentiation with the products of ``hyperopt.bilevel.finite_differences``."""

    curvature: ClassVar[str] = "finite_differences"
