"""SHINE: the adjoint system is solved with the inverse that the forward quasi-Newton solve has built.

    v = H^T g,      H = the solver's estimate of (I - J)^{-1}           instead of solving (I - J^T) v = g
    where |v| > ratio |g|:  v = g                                       the one-step direction, row by row
    optionally, steps of a linear solver from that v

It costs one vjp to measure the residual, those of the refinement, and the one with the inputs. It is not exact: the accuracy
of H in the direction of g is unknown, so check the residual; a second derivative is refused. Without a refinement the error
need not go to 0 with the forward tolerance, since a quasi-Newton method need not learn the whole inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperopt.core.adjoints.base import Problem
from hyperopt.core.adjoints.implicit import ImplicitAdjoint, LinearSystem
from hyperopt.core.adjoints.onestep import truncated
from hyperopt.core.checks import POLICIES, check_choice, check_kind, check_number
from hyperopt.core.differentiate import InexactError
from hyperopt.core.linear.base import LinearSolver
from hyperopt.core.policy import report
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution


@dataclass(frozen=True)
class Shine(ImplicitAdjoint):
    """The inverse estimate that the forward solver has built.

    In its statistics ``iterations`` is 0 for rows that fell back to ``v = g``. A warm start ``v0`` is not used.

    Args:
        linear_solver: refines the result (None: no refinement).
        ratio: a row whose ``|v|`` is more than this many times ``|g|`` takes ``v = g`` instead; above 0.
        policy: what to do if the refinement fails: ``raise``, ``warn`` (the 1st, 10th, 100th, ... time) or ``ignore``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Ramzi, Mannel, Bai, Starck, Ciuciu & Moreau, ICLR 2022, arXiv 2106.00553, algorithm 1 and section 2.3. The paper
    falls back at a ratio of 1.3, which suits small Jacobians; for a contraction of .9 the exact |v| may be 10 |g|.

    Example:
        >>> import torch, hyperopt
        >>> a, adjoint = torch.tensor(0.5, requires_grad=True), hyperopt.Shine()
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), solver=hyperopt.Broyden(), adjoint=adjoint)
        >>> solution.value.sum().backward()  # the exact derivative of w = 1 / (1 - a) is 1 / (1 - a)^2 = 4
        >>> round(float(a.grad), 3)
        4.0
    """

    linear_solver: LinearSolver | None = None
    ratio: float = 10.0
    policy: str = "warn"

    exact = False
    remedy = "SHINE is never exact; use Implicit()"

    def __post_init__(self) -> None:
        check_number(self, "ratio", 0.0, open_low=True)
        check_choice(self, "policy", tuple(policy for policy in POLICIES if policy != "fallback"))
        check_kind(self, "linear_solver", LinearSolver, optional=True)

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """Refuse a solver that keeps no inverse estimate."""
        if solver.keeps_inverse:
            return None
        return f"needs a solver with an inverse estimate, and {solver.name} keeps none; use Broyden, Chord, or Implicit()"

    def run(self, problem: Problem) -> Solution:
        """Solve, keeping the solver's inverse estimate and the graph of the last evaluation."""
        return super().run(replace(problem, keep_state=True))

    def solve(self, system: LinearSystem) -> Tensor:
        """Apply the inverse estimate, then refine.

        Raises:
            InexactError: there is none, because the solve fell back to another method or a transform hides it.
        """
        forward, b = system.forward, system.b
        if forward is None or not forward.solver.keeps_inverse:
            why = "torch.vmap of a torch.func gradient has none" if forward is None else f"it fell back to {forward.solver.name}"
            raise InexactError(f"Shine: the forward solve left no inverse estimate ({why}); use Implicit()")
        with torch.no_grad():
            shared = forward.solver.inverse(forward.state, b, transpose=system.what == "adjoint")
            size = torch.linalg.vector_norm(b, dim=1)
            kept = torch.linalg.vector_norm(shared, dim=1) <= self.ratio * size
            v = torch.where(kept[:, None], shared, b)
            if self.linear_solver is not None:
                found = self.linear_solver.solve(system.operator, b, v, trace=system.trace)
                v, stats = found.value, found.stats
                stats.method = f"Shine + {stats.method}"
            else:
                residual = torch.linalg.vector_norm(v - system.operator.matvec(v) - b, dim=1)
                stats = replace(truncated(b, residual, 1, "Shine"), iterations=kept.long())
        system.keep(v, stats)
        report(stats, self.policy, system.what)
        return v
