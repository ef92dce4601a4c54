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
from hyperopt.solvers.iterate import FLOOR, Iterate, iterate, relative
from hyperopt.solvers.picard import Picard
from hyperopt.status import Solution, SolveStats, Status


@dataclass(frozen=True)
class Unrolled(UnrolledSettings, Adjoint):
    """Backpropagation through the solver; settings in ``UnrolledSettings``."""

    def run(self, problem: Problem) -> Solution:
        """Solve with the graph of all steps, or of the last ones after a solve without."""
        if not torch.is_grad_enabled():
            stepped = solve_forward(problem, lambda w: problem.call(w, problem.args), lambda w: problem.call(w, problem.args))
        elif self.last is None:
            stepped = self._steps(problem, problem.start, problem.solver.max_steps, stop=not problem.solver.fixed)
        else:
            stepped = self._truncated(problem, self.last)
        report(stepped.stats, "warn" if problem.policy == "fallback" else problem.policy, "inner")
        return Solution(problem.layout.tree(stepped.value), stepped.stats, problem.layout)

    def _truncated(self, problem: Problem, last: int) -> Iterate:
        """A solve without a graph, then ``last`` steps with one."""
        solver = problem.solver

        def phi(w: torch.Tensor) -> torch.Tensor:
            return problem.call(w, problem.args)

        if solver.fixed:
            before = max(0, solver.max_steps - last)
            start, used = problem.start, 0
            if before:
                with torch.no_grad():
                    run = iterate(replace(solver, max_steps=before), phi, problem.start)
                start, used = run.value, before
            stepped = self._steps(problem, start, min(last, solver.max_steps), stop=False)
        else:
            with torch.no_grad():
                run = solve_forward(problem, phi, phi)
            start, used = run.value, run.stats.evaluations
            # Plain steps, whatever the solver: at its solution an acceleration's history is rounding noise, and so is the
            # derivative of its least squares problem (Anderson, k = 150: 1e31 times the gradient).
            plain = Picard(solver.rtol, solver.atol, max_steps=last, damping=getattr(solver, "damping", 1.0))
            stepped = self._steps(replace(problem, solver=plain), start, last, stop=False)
            stepped.stats.row_status = torch.maximum(stepped.stats.row_status, run.stats.row_status)
        stepped.stats.evaluations += used
        stepped.stats.iterations = stepped.stats.iterations + used
        return stepped

    def _steps(self, problem: Problem, start: torch.Tensor, count: int, *, stop: bool) -> Iterate:
        """``count`` steps with a graph; with ``stop``, rows stop moving after the step at which their residual met the tolerance.

        That step is still taken: without it a row that starts at its solution would have no graph, and a zero hypergradient.
        """
        solver = problem.solver
        w, state = start, solver.init(start)
        active = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
        iterations = torch.zeros(start.shape[0], dtype=torch.long, device=start.device)
        residual = size = start.new_zeros(start.shape[0])
        first = last_norm = math.nan
        trace = []
        floor = FLOOR * torch.finfo(start.dtype).eps
        taken = 0
        for k in range(count):
            fw = problem.call(w, problem.args)
            taken += 1
            moving = active
            with torch.no_grad():
                difference = torch.linalg.vector_norm(fw - w, dim=1)
                size = torch.linalg.vector_norm(fw, dim=1)
                residual = torch.where(active, relative(difference, size), residual)
                iterations = torch.where(active, k + 1, iterations)
                trace.append(residual.max() if residual.numel() else residual.new_zeros(()))
                last_norm = float(torch.linalg.vector_norm(difference))
                first = last_norm if k == 0 else first
                if stop:
                    active = active & ~(difference <= torch.maximum(solver.atol + solver.rtol * size, floor * size))
            stepped, state = solver.step(state, w, fw)
            w = stepped if bool(moving.all()) else torch.where(moving[:, None], stepped, w)
            if not bool(active.any()):
                break
        status = torch.full_like(iterations, int(Status.max_steps if stop else Status.converged))
        status = torch.where(active, status, int(Status.converged))
        status = torch.full_like(status, int(Status.fixed_steps)) if solver.fixed else status
        status = torch.where(torch.isfinite(residual), status, int(Status.nonfinite))
        rate = (last_norm / first) ** (1 / (taken - 1)) if taken > 1 and first > 0 else math.nan
        stats = SolveStats(
            status,
            iterations,
            residual,
            size,
            evaluations=taken,
            contraction=rate,
            trace=torch.stack(trace),
            method=f"Unrolled {solver.name}",
        )
        return Iterate(w, stats)
