"""Unrolled differentiation in the memory of a few steps: segments of the solve are taken again in backward.

    forward:   the state is kept after every ``segment`` steps, the graph of none
    backward:  from the last segment to the first, its steps are taken once more with a graph, and backpropagated

The hypergradient is that of ``Unrolled``, for twice the evaluations: T forward, T in backward. In segments of sqrt(T)
steps the memory is that of 2 sqrt(T) of them. The last point of a line search that ends at a boundary is evaluated
again. Under ``torch.func`` and for dual numbers, which forbid what the recomputation rests on, it is ``Unrolled``.

References: Griewank & Walther, ACM TOMS 26, 2000; Chen, Xu, Zhang & Guestrin, arXiv 1604.06174, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt.core.adjoints.base import Adjoint, Problem
from hyperopt.core.adjoints.unrolled import solve_by_steps, unroll
from hyperopt.core.checks import check_optional_count
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """Checkpointed backpropagation through the solver's own steps.

    Args:
        segment: steps that are kept at a time, at least 1 (None: the root of the solver's ``max_steps``).
    """

    segment: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_optional_count(self, "segment")

    def reaches_start(self, solver: FixedPointSolver) -> bool:
        """All steps do."""
        return True

    def run(self, problem: Problem) -> Solution:
        """Solve, keeping the state at the segments' ends."""
        solver = problem.solver
        segment = self.segment or math.isqrt(solver.max_steps - 1) + 1  # the root, rounded up
        return solve_by_steps(
            problem, lambda: unroll(problem, problem.start, solver.max_steps, stop=not solver.fixed, segment=segment)
        )
