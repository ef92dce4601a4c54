"""Unrolled differentiation: backpropagate through the solver's own steps.

It is exact for the iterate that it returns, and not for the fixed point: after T steps of a map of contraction q the error of
its hypergradient is O(T q^T) (Grazzi et al., arXiv 2006.16218, theorem 2.1). Memory grows with the number of differentiated
steps. ``last=k`` differentiates only the last k (truncated backpropagation, Shaban et al., AISTATS 2019, arXiv 1810.10667).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperopt.core.adjoints.base import Adjoint, Problem
from hyperopt.core.captured import functorch_level, seen, transformed, underived
from hyperopt.core.checks import check_optional_count
from hyperopt.core.forward import solve_forward
from hyperopt.core.graph_modes import twice_differentiable
from hyperopt.core.loop import relative, rounding_floor
from hyperopt.core.policy import report
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.iterate import Iterate, following, iterate
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.solvers.point import Cost, Point
from hyperopt.core.status import Solution, SolveStats, Status


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through the solver's own steps.

    Args:
        last: how many of the last steps are differentiated, at least 1 (None: all).

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Franceschi et al., ICML 2017, arXiv 1703.01785; Shaban et al., AISTATS 2019, arXiv 1810.10667 (truncated).

    Example:
        >>> import torch, hyperopt
        >>> a, adjoint = torch.tensor(0.5, requires_grad=True), hyperopt.Unrolled()
        >>> solver = hyperopt.Picard(rtol=0, max_steps=2)
        >>> solution = hyperopt.fixed_point(lambda w: a * w + 1, torch.zeros(1, 1), solver=solver, adjoint=adjoint)
        >>> solution.value.sum().backward()  # w = 1 + a after two steps from 0, whose derivative is 1
        >>> round(float(a.grad), 3)
        1.0
    """

    last: int | None = None

    def __post_init__(self) -> None:
        check_optional_count(self, "last")

    def reaches_start(self, solver: FixedPointSolver) -> bool:
        """Whether all steps are differentiated."""
        return self.last is None or (solver.fixed and self.last >= solver.max_steps)

    def run(self, problem: Problem) -> Solution:
        """Solve with the graph of all steps, or of the last ones after a solve without a graph."""
        last = self.last
        if last is not None:
            return solve_by_steps(problem, lambda: self._truncated(problem, last))
        return solve_by_steps(
            problem, lambda: unroll(problem, problem.start, problem.solver.max_steps, stop=not problem.solver.fixed)
        )

    def _truncated(self, problem: Problem, last: int) -> Iterate:
        """Solve without a graph, then take ``last`` steps with one."""
        solver, phi, start = problem.solver, problem.bind(problem.args), problem.start
        head, tail = solver, solver
        if solver.fixed:
            before = max(0, solver.max_steps - last)
            if not before:
                return unroll(problem, start, solver.max_steps, stop=False)
            head = replace(solver, max_steps=before)
        else:
            # Take plain steps, whatever the solver. At the solution, an acceleration's history is rounding noise, and so is the
            # derivative of its least squares problem (for Anderson with k = 150, 1e31 times the gradient).
            tail = Picard(solver.rtol, solver.atol, max_steps=last, damping=getattr(solver, "damping", 1.0))
        with underived():
            if functorch_level():
                run = unroll(replace(problem, solver=head), start, head.max_steps, stop=not solver.fixed)
            else:
                run = iterate(head, phi, start) if solver.fixed else solve_forward(problem, phi, phi)
        stepped = unroll(replace(problem, solver=tail), run.value, last, stop=False)
        if not solver.fixed:
            stepped.stats.row_status = torch.maximum(stepped.stats.row_status, run.stats.row_status)
        stepped.stats.iterations = stepped.stats.iterations + (head.max_steps if solver.fixed else run.stats.evaluations)
        for cost in ("evaluations", "vjps", "jvps"):
            setattr(stepped.stats, cost, getattr(stepped.stats, cost) + getattr(run.stats, cost))
        return stepped


def solve_by_steps(problem: Problem, steps: Callable[[], Iterate]) -> Solution:
    """Solve by ``steps``, which records a graph, or by a plain solve if no derivative is wanted."""
    if torch.is_grad_enabled() or transformed():
        kernels = twice_differentiable() if transformed() else contextlib.nullcontext()  # fused ones have no forward mode
        with torch.enable_grad(), kernels:  # under no_grad a forward-mode tangent needs the steps too
            run = steps()
        if not torch.is_grad_enabled():
            run.value = run.value.clone()  # this drops the graph and keeps a tangent
    else:
        phi = problem.bind(problem.args)
        run = solve_forward(problem, phi, phi)
    report(run.stats, problem.policy, "inner")
    return Solution(problem.layout.tree(run.value), run.stats, problem.layout)


def unroll(problem: Problem, start: Tensor, count: int, *, stop: bool, segment: int | None = None) -> Iterate:
    """Take ``count`` steps with a graph; with ``stop``, rows stop after the step at which their residual met the tolerance.

    That step is still taken: without it, a row that starts at its solution would have no graph and a zero hypergradient. With
    ``segment``, no graph is kept, only the state before every ``segment`` steps, and backward repeats the steps.
    """
    solver, phi, cost = problem.solver, problem.bind(problem.args), Cost()
    if not solver.differentiable:
        raise ValueError(
            f"Unrolled: the steps of {solver.name} cannot be differentiated through; set last=k, which unrolls plain steps "
            "from its solution, or use another solver, Newton, or adjoint, Implicit()"
        )
    watch = Watch(solver, start, stop)

    def advance(w: Tensor, state: Any, steps: range) -> tuple[Tensor, Any]:
        at = None
        for k in steps:
            at = following(at, w) or Point(phi, w, cost, graph=solver.linearizes)
            at.active = watch.before(k, at)
            stepped, state = solver.step(state, at)
            moving = watch.after(k, at)
            w = stepped if moving is None else torch.where(moving[:, None], stepped, w)
            if watch.last == k:
                break
        return w, state

    w, state = start, solver.init(start)
    size = segment or count
    for first in range(0, count, size):
        steps = range(first, min(first + size, count))
        if segment is None or transformed():  # a transform does not allow steps to be repeated
            w, state = advance(w, state, steps)
        else:
            w, state = checkpoint(advance, w, state, steps, use_reentrant=False, preserve_rng_state=False)
        if watch.last is not None:
            break
    return Iterate(w, watch.stats(cost), solver)


class Watch:
    """Notes which rows move at each step, and their residuals. A repeated step gets what was noted the first time.

    Attributes:
        last: the step after which no row moves any more; None until then.
    """

    def __init__(self, solver: FixedPointSolver, start: Tensor, stop: bool) -> None:
        self.solver, self.stop = solver, stop
        self.active = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
        self.broken = torch.zeros_like(self.active)
        self.iterations = torch.zeros(start.shape[0], dtype=torch.long, device=start.device)
        self.residual = self.size = start.new_zeros(start.shape[0])
        self.trace: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.moving: list[Tensor | None] = []  # mask of the moving rows at the start of each step; None: all
        self.moved: list[Tensor | None] = []  # the same at its end, without the rows that broke down
        self.whole = True  # whether all rows move
        self.floor = rounding_floor(start.dtype, start.device)
        self.last: int | None = None

    @torch.no_grad()
    def before(self, k: int, at: Point) -> Tensor | None:
        """Return the mask of rows that take step ``k``, shape (rows,), and measure residuals at its point; None: all."""
        if k < len(self.moving):
            return self.moving[k]
        self.whole = self.whole or bool(seen(self.active).all())
        self.moving.append(None if self.whole else self.active)
        difference = torch.linalg.vector_norm(at.fw - at.w, dim=1)
        self.size = torch.linalg.vector_norm(at.fw, dim=1)
        self.residual = torch.where(self.active, relative(difference, self.size), self.residual)
        self.iterations = torch.where(self.active, k + 1, self.iterations)
        residual = seen(self.residual)
        self.trace.append(residual.max() if residual.numel() else residual.new_zeros(()))
        self.norms.append(torch.linalg.vector_norm(seen(difference)))
        if self.stop:
            limit = torch.maximum(self.solver.atol + self.solver.rtol * self.size, self.floor * self.size)
            self.active = self.active & ~(difference <= limit)
            self.whole = False
        return self.moving[k]

    @torch.no_grad()
    def after(self, k: int, at: Point) -> Tensor | None:
        """Return the mask of rows that step ``k`` has moved, shape (rows,); None: all."""
        if k < len(self.moved):
            return self.moved[k]
        moving = self.moving[k]
        if at.broken is not None and bool(seen(at.broken).any()):
            broken = at.broken if moving is None else at.broken & moving
            self.broken, self.whole = self.broken | broken, False
            self.active = self.active & ~self.broken
            moving = ~self.broken if moving is None else moving & ~self.broken
        self.moved.append(moving)
        if not self.whole and not bool(seen(self.active).any()):
            self.last = k
        return moving

    def stats(self, cost: Cost) -> SolveStats:
        """Return the statistics of the steps."""
        status = torch.full_like(self.iterations, int(Status.max_steps if self.stop else Status.converged))
        status = torch.where(self.active, status, int(Status.converged))
        status = torch.full_like(status, int(Status.fixed_steps)) if self.solver.fixed else status
        status = torch.where(self.broken, int(Status.breakdown), status)
        status = torch.where(torch.isfinite(self.residual), status, int(Status.nonfinite))
        taken, fall = len(self.norms), self.norms[-1] / self.norms[0]
        return SolveStats(
            seen(status).flatten(),
            seen(self.iterations).flatten(),
            seen(self.residual).flatten(),
            seen(self.size).flatten(),
            evaluations=cost.evaluations,
            vjps=cost.vjps,
            jvps=cost.jvps,
            contraction=fall ** (1 / (taken - 1)) if taken > 1 else math.nan,
            trace=torch.stack(self.trace),
            method=f"Unrolled {self.solver.name}",
        )
