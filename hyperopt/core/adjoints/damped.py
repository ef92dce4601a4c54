"""The damped implicit adjoint: a small multiple of the identity is added to the adjoint system.

    ((1 + damping) I - J^T) v = g,      for a trained problem  (H + damping I) u = d_w E

It is used where ``I - J`` is singular or indefinite, or where the weights are not trained: directions of curvature far below
``damping`` get at most ``1 / damping`` instead of the inverse of their curvature, and negative curvature down to ``-damping``
does no harm. Along an eigenvector with eigenvalue ``h`` of ``I - J^T`` the result is ``h / (h + damping)`` times the exact one.
The system is solved as ``(I - M) v = g / (1 + damping)`` with ``M = J^T / (1 + damping)``.

References: Martens, ICML 2010 (Tikhonov damping); Koh & Liang, ICML 2017, arXiv 1703.04730, section 4.2 (influence functions).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint, LinearSystem
from hyperopt.core.checks import POLICIES, check_choice, check_kind, check_number
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.loop import relative
from hyperopt.core.operator import LinearOperator, Wrapped
from hyperopt.core.status import AdjointBox


@dataclass(frozen=True)
class Damped(ImplicitAdjoint):
    """The damped implicit adjoint; inexact, at the cost of its linear solver and one vjp more.

    The status is that of the damped system, and the residual is the one that the result leaves in the system without damping.

    Args:
        damping: number above 0 that is added to the diagonal, in the units of ``I - J``. For a trained problem these are the
            units of its Hessian or, if ``linear_solver`` iterates ``v <- M v + b`` (``Neumann``), of ``step`` times it.
        linear_solver: solves the damped system.
        policy: what to do if that fails: ``raise``, ``warn`` (the 1st, 10th, ... time) or ``ignore``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of its range; the message names it.

    Reference: Martens, ICML 2010; Koh & Liang, ICML 2017, arXiv 1703.04730, section 4.2.

    Example:
        >>> import torch, hyperopt
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), adjoint=hyperopt.Damped(damping=0.5))
        >>> solution.value.sum().backward()
        >>> round(a.grad.item(), 4)  # 2 / (1 - 0.5 + 0.5); the exact one is 2 / (1 - 0.5)
        2.0
    """

    damping: float = 0.01
    linear_solver: LinearSolver = field(default_factory=GMRES)
    policy: str = "warn"

    exact = False
    remedy = "Damped is never exact; use an exact adjoint, such as Implicit()"

    def __post_init__(self) -> None:
        check_number(self, "damping", 0.0, open_low=True)
        check_kind(self, "linear_solver", LinearSolver)
        check_choice(self, "policy", tuple(policy for policy in POLICIES if policy != "fallback"))

    @property
    def iterates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the linear solver iterates ``v <- M v + b``."""
        return self.linear_solver.iterates

    def solve(self, system: LinearSystem) -> Tensor:
        """Solve the damped system, and measure the residual without damping."""
        factor = 1 / (1 + self.damping)
        found = AdjointBox()
        damped = replace(system, operator=Scaled(system.operator, factor), b=factor * system.b, box=found)
        v = Implicit(self.linear_solver, self.policy).solve(damped)
        stats = found.stats
        assert stats is not None
        with torch.no_grad():
            scale = torch.linalg.vector_norm(system.b, dim=1)
            left = torch.linalg.vector_norm(system.b - system.operator.complement(v), dim=1)
        system.keep(
            v, replace(stats, residual=relative(left, scale), scale=scale, vjps=stats.vjps + 1, method="Damped " + stats.method)
        )
        return v


class Scaled(Wrapped):
    """A multiple of another operator."""

    def __init__(self, of: LinearOperator, factor: float) -> None:
        super().__init__(of)
        self.factor = factor

    def _matvec(self, v: Tensor) -> Tensor:
        return self.factor * self.of.matvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.factor * self.of.rmatvec(v)

    @property
    def divisible(self) -> bool:
        """As the wrapped operator."""
        return self.of.divisible

    def select(self, index: Tensor) -> LinearOperator | None:
        """Return the same multiple of the operator on the rows in ``index``."""
        found = self.of.select(index)
        return None if found is None else Scaled(found, self.factor)
