"""Unrolled differentiation: backpropagate through the solver's own steps.

Exact for the iterate that it returns, not for the fixed point: after T steps of a map of contraction q its hypergradient is off
by O(T q^T) (Grazzi et al., arXiv 2006.16218, theorem 2.1). Memory grows with the steps that are kept. ``last=k`` keeps the last
k only (truncated backpropagation, Shaban et al., AISTATS 2019, arXiv 1810.10667).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hyperopt.adjoints.base import Adjoint, Problem
from hyperopt.policy import report
from hyperopt.settings import UnrolledSettings
from hyperopt.solvers.forward import solve_forward
from hyperopt.solvers.iterate import FLOOR, Iterate, following, iterate, relative
from hyperopt.solvers.picard import Picard
from hyperopt.solvers.point import Cost, Point
from hyperopt.status import Solution, SolveStats, Status


@dataclass(frozen=True)
class Unrolled(UnrolledSettings, Adjoint):
    """Backpropagation through the solver; settings in ``UnrolledSettings``."""

    def run(self, problem: Problem) -> Solution:
        """Solve with the graph of all steps, or of the last ones after a solve without."""
        phi = problem.bind(problem.args)
        if not torch.is_grad_enabled():
            stepped = solve_forward(problem, phi, phi)
        elif self.last is None:
            stepped = self._steps(problem, problem.start, problem.solver.max_steps, stop=not problem.solver.fixed)
        else:
            stepped = self._truncated(problem, self.last)
        report(stepped.stats, "warn" if problem.policy == "fallback" else problem.policy, "inner")
        return Solution(problem.layout.tree(stepped.value), stepped.stats, problem.layout)

    def _truncated(self, problem: Problem, last: int) -> Iterate:
        """A solve without a graph, then ``last`` steps with one."""
        solver, phi = problem.solver, problem.bind(problem.args)
        if solver.fixed:
            before = max(0, solver.max_steps - last)
            if not before:
                return self._steps(problem, problem.start, solver.max_steps, stop=False)
            with torch.no_grad():
                run = iterate(replace(solver, max_steps=before), phi, problem.start)
            stepped = self._steps(problem, run.value, last, stop=False)
            stepped.stats.iterations = stepped.stats.iterations + before
        else:
            with torch.no_grad():
                run = solve_forward(problem, phi, phi)
            # Plain steps, whatever the solver: at its solution an acceleration's history is rounding noise, and so is the
            # derivative of its least squares problem (Anderson, k = 150: 1e31 times the gradient).
            plain = Picard(solver.rtol, solver.atol, max_steps=last, damping=getattr(solver, "damping", 1.0))
            stepped = self._steps(replace(problem, solver=plain), run.value, last, stop=False)
            stepped.stats.row_status = torch.maximum(stepped.stats.row_status, run.stats.row_status)
            stepped.stats.iterations = stepped.stats.iterations + run.stats.evaluations
        for cost in ("evaluations", "vjps", "jvps"):
            setattr(stepped.stats, cost, getattr(stepped.stats, cost) + getattr(run.stats, cost))
        return stepped

    def _steps(self, problem: Problem, start: torch.Tensor, count: int, *, stop: bool) -> Iterate:
        """``count`` steps with a graph; with ``stop``, rows stop moving after the step at which their residual met the tolerance.

        That step is still taken: without it a row that starts at its solution would have no graph, and a zero hypergradient.
        """
        solver, phi, cost = problem.solver, problem.bind(problem.args), Cost()
        if not solver.differentiable:
            raise ValueError(
                f"Unrolled: the steps of {solver.name} cannot be differentiated through; set last=k, which unrolls plain steps "
                "from its solution, or use another solver (solver=newton) or adjoint (adjoint=neumann)"
            )
        w, state, at = start, solver.init(start), None
        broken = torch.zeros(start.shape[0], dtype=torch.bool, device=start.device)
        active = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
        iterations = torch.zeros(start.shape[0], dtype=torch.long, device=start.device)
        residual = size = start.new_zeros(start.shape[0])
        first = last_norm = math.nan
        trace = []
        floor = FLOOR * torch.finfo(start.dtype).eps
        taken = 0
        for k in range(count):
            at = following(at, w) or Point(phi, w, cost, graph=solver.linearizes)
            taken += 1
            moving = active
            with torch.no_grad():
                difference = torch.linalg.vector_norm(at.fw - w, dim=1)
                size = torch.linalg.vector_norm(at.fw, dim=1)
                residual = torch.where(active, relative(difference, size), residual)
                iterations = torch.where(active, k + 1, iterations)
                trace.append(residual.max() if residual.numel() else residual.new_zeros(()))
                last_norm = float(torch.linalg.vector_norm(difference))
                first = last_norm if k == 0 else first
                if stop:
                    active = active & ~(difference <= torch.maximum(solver.atol + solver.rtol * size, floor * size))
            at.active = None if bool(moving.all()) else moving
            stepped, state = solver.step(state, at)
            if at.broken is not None:
                broken = broken | (at.broken & moving)
                active, moving = active & ~broken, moving & ~broken
            w = stepped if bool(moving.all()) else torch.where(moving[:, None], stepped, w)
            if not bool(active.any()):
                break
        status = torch.full_like(iterations, int(Status.max_steps if stop else Status.converged))
        status = torch.where(active, status, int(Status.converged))
        status = torch.full_like(status, int(Status.fixed_steps)) if solver.fixed else status
        status = torch.where(broken, int(Status.breakdown), status)
        status = torch.where(torch.isfinite(residual), status, int(Status.nonfinite))
        rate = (last_norm / first) ** (1 / (taken - 1)) if taken > 1 and first > 0 else math.nan
        stats = SolveStats(
            status,
            iterations,
            residual,
            size,
            evaluations=cost.evaluations,
            vjps=cost.vjps,
            jvps=cost.jvps,
            contraction=rate,
            trace=torch.stack(trace),
            method=f"Unrolled {solver.name}",
        )
        return Iterate(w, stats, solver)
