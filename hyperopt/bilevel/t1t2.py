"""T1-T2: the adjoint system with the identity instead of the Hessian of the inner loss.

    dE/dlam ~ d_lam E - (d_lam grad_w L)^T d_w E

It takes one mixed product and nothing else. Its direction is right if the curvature is about the same in all directions.
One-step differentiation is the same up to the factor ``step``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.bilevel.step_map import StepMap
from hyperopt.core.adjoints.implicit import ImplicitAdjoint, LinearSystem
from hyperopt.core.adjoints.onestep import truncated
from hyperopt.core.solvers.base import FixedPointSolver

TRAINED = "is for trained inner problems, whose map is a gradient step"


@dataclass(frozen=True)
class T1T2(ImplicitAdjoint):
    """The T1-T2 adjoint of a trained problem: the identity instead of the Hessian. It takes no arguments.

    Reference: Luketina, Berglund, Greff & Raiko, ICML 2016, arXiv 1511.06727, section 2.

    Example:
        >>> import torch, hyperopt
        >>> adjoint = hyperopt.T1T2()
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.tensor([0.5]), torch.ones(()), adjoint=adjoint)
        >>> round(float(estimate.grad), 3)  # the curvature is 4 here, which T1-T2 takes to be 1: four times the exact -0.25
        -1.0
    """

    exact = False
    iterates = False
    remedy = "T1T2 never is; give an exact adjoint, such as adjoint=Implicit(hyperopt.CG())"

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """Return why this cannot be the adjoint of a general map, which has no step to divide by."""
        return f"{TRAINED}; use OneStep()"

    def solve(self, system: LinearSystem) -> Tensor:
        """Return ``v = b / step``, which is ``u = b``.

        Raises:
            TypeError: the map is not a gradient step.
        """
        if not isinstance(system.operator, StepMap):
            raise TypeError(f"T1T2 {TRAINED}; use OneStep()")
        b = system.b
        v = b / system.operator.step
        system.keep(v, truncated(b, torch.linalg.vector_norm(b, dim=1), 0, "T1T2"))
        return v
