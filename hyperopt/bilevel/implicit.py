"""Implicit hypergradients of a trained inner problem.

    dE/dlam = d_lam E - (d_lam grad_w L)^T u,        H u = d_w E,     H = Hessian of L in w

which is the adjoint of the gradient-step map, ``v = u / step``, whatever solver has found ``w``. The system is solved by the same
linear solvers as every other adjoint system of this package. What the map does not depend on, a learning rate or momentum of the
inner solver, has a hypergradient of exactly zero here: at a minimum it changes nothing how one has got there.

References: Bengio, Neural Computation 12, 2000; Pedregosa, ICML 2016, arXiv 1602.02355; Lorraine et al., AISTATS 2020,
arXiv 1911.02590, algorithm 2; Grazzi et al., ICML 2020, arXiv 2006.16218, algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt.adjoints.implicit import Implicit, ImplicitAdjoint
from hyperopt.bilevel.curvature import Curvature, Hessian
from hyperopt.bilevel.estimate import Cost, Estimate, State, tree_norm
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.problem import BilevelProblem, Leaves, outer_gradient
from hyperopt.bilevel.settings import PowerSettings
from hyperopt.bilevel.step_map import StepMap, largest_curvature
from hyperopt.certificate import certify
from hyperopt.solvers.iterate import relative
from hyperopt.status import AdjointBox, Solution, SolveStats, Status


@dataclass(frozen=True)
class ImplicitEstimator(Estimator):
    """Any implicit adjoint on the gradient-step map.

    Attributes:
        adjoint: how the adjoint system is solved.
        inner: trains ``w`` first (None: it is trained already).
        step: of the gradient-step map, for adjoints that iterate it (None: the inner solver's, else from power iteration).
        warm: start the adjoint at the solution of the outer step before.
        power: the power iteration behind the step.
    """

    adjoint: ImplicitAdjoint = field(default_factory=Implicit)
    inner: InnerSolver | None = None
    step: float | None = None
    warm: bool = True
    power: PowerSettings = field(default_factory=PowerSettings)

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Train, solve the adjoint system, take the mixed product; see ``Estimator``."""
        trained = None if self.inner is None else self.inner.solve(problem, lam, state)
        w, hyper = Leaves.of(state.w, "w"), Leaves.of(lam, "lam")
        loss, g_w, g_lam = outer_gradient(problem, w, hyper, problem.outer_batches.draw())
        curvature = Hessian(problem, w, hyper, problem.inner_batches.draw())
        b = curvature.matrix(g_w)
        step = self._step(curvature, state, lam)
        operator, box = StepMap(curvature, step), AdjointBox()
        start = None
        near = state.memory.get("u") if self.warm else None
        if near is not None:
            start, _ = self.adjoint.warm(operator, b, near / step)
        v = self.adjoint.solve(operator, b, start, "adjoint", box)
        u = step * v
        stats = box.stats
        assert stats is not None
        if stats.status >= Status.breakdown:  # a number here would be a wrong one
            u = torch.full_like(u, math.nan)
        elif self.warm:
            state.memory["u"] = u.detach()
        mixed = curvature.mixed(u)
        found = [subtract(g, m) for g, m in zip(g_lam, mixed, strict=True)]
        grad = hyper.like(found)
        cost = Cost(curvature.gradients, 1, curvature.products, curvature.mixed_products)
        if trained is not None:
            cost.inner_gradients += trained.evaluations
        certificate = certify(Solution(state.w, at_point(curvature, step, trained, u, b), curvature.layout, box), tree_norm(grad))
        return Estimate(grad, certificate, float(loss), state.w, trained, stats, cost)

    def _step(self, curvature: Curvature, state: State, lam: Any) -> float:
        """The step of the map; 1 for a linear solver to which it makes no difference."""
        if self.step is not None:
            return self.step
        if not iterates(self.adjoint):
            return 1.0
        own = None if self.inner is None else self.inner.map_step(lam)
        if own is not None:
            return own
        largest, direction = largest_curvature(curvature, self.power, state.memory.get("largest"))
        state.memory["largest"] = direction
        return 1 / largest if math.isfinite(largest) and largest > 0 else 1.0


def iterates(adjoint: ImplicitAdjoint) -> bool:
    """Whether the adjoint's value, or its convergence, depends on the step of the map."""
    return not isinstance(adjoint, Implicit) or adjoint.linear_solver.iterates


def subtract(direct: Tensor | None, mixed: Tensor | None) -> Tensor | None:
    """``direct - mixed``, None standing for zero."""
    if mixed is None:
        return direct
    return -mixed if direct is None else direct - mixed


def at_point(curvature: Curvature, step: float, trained: SolveStats | None, u: Tensor, b: Tensor) -> SolveStats:
    """How far ``w`` is from the fixed point of the gradient-step map, as the statistics of a solve that ended there.

    The residual was measured at ``w`` itself. The contraction factor is an estimate: ``u = H^{-1} b`` says that the least
    curvature is at most ``|b| / |u|``.
    """
    difference = step * torch.linalg.vector_norm(curvature.gradient, dim=1)
    moved = torch.cat([(leaf.detach()).reshape(1, -1) for leaf in curvature.w.flat], dim=1) - step * curvature.gradient
    scale = torch.linalg.vector_norm(moved, dim=1)
    residual = relative(difference, scale)
    status = Status.max_steps if trained is None else trained.status
    status = Status.max_steps if status == Status.fixed_steps else status
    least = float(torch.linalg.vector_norm(b)) / size if (size := float(torch.linalg.vector_norm(u))) > 0 else math.nan
    code = torch.full_like(residual, int(status), dtype=torch.long)
    return SolveStats(code, torch.ones_like(code), residual, scale, contraction=1 - step * least, method="gradient step")
