"""Unrolled differentiation with little memory: backward repeats segments of the solve.

    forward:   keep the state after every ``segment`` steps, and no graph
    backward:  from the last segment to the first, repeat its steps with a graph and backpropagate

The hypergradient is that of ``Unrolled``, for twice the evaluations: T forward and T backward. With segments of sqrt(T)
steps the memory is that of 2 sqrt(T) steps. If a line search ends at a boundary, its last point is evaluated again.
``torch.func`` and dual numbers do not allow the repetition; there the method is ``Unrolled``.
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
        segment: number of steps in a segment, at least 1 (None: the root of the solver's ``max_steps``).

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Griewank & Walther, ACM TOMS 26, 2000; Chen, Xu, Zhang & Guestrin, arXiv 1604.06174, section 4.

    Example:
        >>> import torch, hyperopt
        >>> a, adjoint = torch.tensor(0.5, requires_grad=True), hyperopt.Checkpointed()
        >>> solver = hyperopt.Picard(rtol=0, max_steps=100)
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), solver=solver, adjoint=adjoint)
        >>> solution.value.sum().backward()  # the same derivative as Unrolled(), in less memory
        >>> round(float(a.grad), 3)
        4.0
    """

    segment: int | None = None

    def __post_init__(self) -> None:
        check_optional_count(self, "segment")

    def reaches_start(self, solver: FixedPointSolver) -> bool:
        """Return True: all steps are differentiated."""
        return True

    def run(self, problem: Problem) -> Solution:
        """Solve, keeping the state at the ends of the segments."""
        solver = problem.solver
        segment = self.segment or math.isqrt(solver.max_steps - 1) + 1  # the root, rounded up
        return solve_by_steps(
            problem, lambda: unroll(problem, problem.start, solver.max_steps, stop=not solver.fixed, segment=segment)
        )
