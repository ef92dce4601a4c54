"""A fixed number of steps each way, in a form that ``torch.compile`` traces as one graph.

    w <- (1 - d) w + d phi(w, *args),  T times;      v <- J^T v + g,  K times;      args_bar = (d_args phi)^T v

The compiler cannot trace what makes the eager path safe: rows that stop one by one, the search for captured tensors, the
recursion for higher derivatives. It can trace Picard and Neumann with ``rtol=0, atol=0``, for a map whose differentiable
tensors are all in ``args``. The numbers are those of the eager path. ``Solution.adjoint`` stays None, since a compiled
backward cannot store statistics. Everything else runs eagerly, beside the compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.core.adjoints.base import Adjoint, Problem
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.eager import runs_eagerly
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.loop import relative
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import AdjointBox, Solution, SolveStats

REASON = (
    "hyperopt.fixed_point compiles as one graph with Picard(rtol=0, atol=0), Implicit(Neumann(rtol=0, atol=0)) and every "
    "tensor to be differentiated in args= (tensors, not trees); everything else runs eagerly, which fullgraph=True refuses"
)


@runs_eagerly(REASON)
def outside(solve: Callable[..., Solution], *args: Any, **kwargs: Any) -> Solution:
    """Call ``solve(*args, **kwargs)`` eagerly, beside the compiled graph."""
    return solve(*args, **kwargs)


def traceable(adjoint: Adjoint, problem: Problem) -> bool:
    """Whether the solve is a fixed number of steps each way, and all tensors to be differentiated are in ``args``."""
    if not (isinstance(problem.solver, Picard) and problem.solver.fixed and problem.adjoint_start is None):
        return False
    if not (isinstance(adjoint, Implicit) and isinstance(adjoint.linear_solver, Neumann) and adjoint.linear_solver.fixed):
        return False
    trees = [arg for arg in problem.args if arg is not None and not isinstance(arg, Tensor)]
    if any(isinstance(leaf, Tensor) for tree in trees for leaf in optree.tree_leaves(tree)):
        return False
    # One more evaluation shows whether the map uses other leaves. The compiler removes it, since its value is not used.
    out = problem.call(problem.start.clone(), tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in problem.args))
    return not out.requires_grad


def fixed_trips(adjoint: Adjoint, problem: Problem) -> Solution:
    """Solve a ``traceable`` problem."""
    assert isinstance(adjoint, Implicit)
    places = tuple(i for i, arg in enumerate(problem.args) if isinstance(arg, Tensor))
    tensors = [problem.args[i] for i in places]
    value, before = FixedTrips.apply(problem, places, adjoint.linear_solver.max_steps, problem.start, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    return solution(problem, value, before)


def exported(problem: Problem) -> Solution:
    """Solve for ``torch.export``, which records the steps; the exported program differentiates through them.

    Raises:
        RuntimeError: the number of steps is not fixed.
    """
    solver = problem.solver
    if not (isinstance(solver, Picard) and solver.fixed):
        raise RuntimeError(
            f"fixed_point: torch.export records a fixed number of steps, but solver={solver!r} stops at a tolerance; give "
            "solver=Picard(rtol=0, atol=0, max_steps=...)"
        )
    before = after = problem.start
    for _ in range(solver.max_steps):
        before, after = after, solver.mix(after, problem.call(after, problem.args))
    return solution(problem, after, before)


def solution(problem: Problem, value: Tensor, before: Tensor) -> Solution:
    """Return the value after all steps with its statistics; ``before`` is the value before the last step."""
    difference, size = torch.linalg.vector_norm(value.detach() - before, dim=1), torch.linalg.vector_norm(value.detach(), dim=1)
    steps = problem.solver.max_steps
    stats = SolveStats.of_steps(steps, relative(difference, size), size, evaluations=steps, method=problem.solver.name)
    return Solution(problem.layout.tree(value), stats, problem.layout, AdjointBox())


class FixedTrips(torch.autograd.Function):
    """``apply(problem, places, K, start, *tensors)`` is ``(w_T, w_{T-1})``; the tensors are the arguments at ``places``."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, places: tuple[int, ...], terms: int, start: Tensor, *tensors: Tensor) -> Any:
        """Take T steps."""
        args, solver = put(problem.args, places, tensors), problem.solver
        assert isinstance(solver, Picard)
        before = after = start
        for _ in range(solver.max_steps):
            before = after
            # The map gets a copy, since it may work in place. The compiler removes it if it can.
            after = solver.mix(before, problem.call(before.clone(), args))
        ctx.problem, ctx.places, ctx.terms = problem, places, terms
        ctx.save_for_backward(before, *tensors)
        ctx.mark_non_differentiable(before)
        return after, before

    @staticmethod
    def backward(ctx: Any, g: Tensor, unused: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take K vjps at the last evaluation, as the eager path does, and the vjp with the arguments."""
        before, *tensors = ctx.saved_tensors
        problem, places = ctx.problem, ctx.places

        def phi(w: Tensor, *given: Tensor) -> Tensor:
            return problem.call(w.clone(), put(problem.args, places, given))

        pull = torch.func.vjp(phi, before, *tensors)[1]
        v = g
        for _ in range(ctx.terms):
            v = g + pull(v)[0]
        return None, None, None, None, *pull(v)[1:]


def put(args: tuple[Any, ...], places: tuple[int, ...], tensors: Any) -> tuple[Any, ...]:
    """Return ``args`` with ``tensors`` at ``places``."""
    given = dict(zip(places, tensors, strict=True))
    return tuple(given.get(i, arg) for i, arg in enumerate(args))
