"""One-step differentiation: the derivative of the last application of the map, with its state held fixed.

    v = g      instead of      v = J^T v + g

This is also called Jacobian-free backpropagation, and costs one vjp. It keeps only the first term of the Neumann series, so
for a map that contracts by q its error is about ``q / (1 - q)`` times the gradient. It is right for the map of a fast solver
(Newton, q near 0), a descent direction for small q, and wrong near q = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.adjoints.implicit import ImplicitAdjoint, LinearSystem
from hyperopt.core.loop import relative
from hyperopt.core.status import SolveStats


@dataclass(frozen=True)
class OneStep(ImplicitAdjoint):
    """The one-step adjoint ``v = g``. It has no arguments.

    Reference: Fung et al., AAAI 2022, arXiv 2103.12803; Bolte, Pauwels & Vaiter, NeurIPS 2023, arXiv 2305.13768.

    Example:
        >>> import torch, hyperopt
        >>> a, adjoint = torch.tensor(0.5, requires_grad=True), hyperopt.OneStep()
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), adjoint=adjoint)
        >>> solution.value.sum().backward()  # with w = 2 held fixed, d(a w + 1)/da = 2; the exact derivative is 4
        >>> round(float(a.grad), 3)
        2.0
    """

    exact = False
    remedy = "OneStep is never exact; use an exact adjoint, such as Implicit()"

    def solve(self, system: LinearSystem) -> Tensor:
        """Return ``v = b``."""
        b = system.b
        system.keep(b, truncated(b, torch.linalg.vector_norm(b, dim=1), 0, "OneStep"))
        return b


def truncated(b: Tensor, residual: Tensor, products: int, method: str) -> SolveStats:
    """Return the statistics of an adjoint iteration from ``v = 0`` that stops early.

    ``residual`` is the last measured one, at the iterate before the value; the residual at ``v = 0`` is ``b``.
    """
    scale = torch.linalg.vector_norm(b, dim=1)
    return SolveStats.of_steps(products + 1, relative(residual, scale), scale, vjps=products, method=method)
