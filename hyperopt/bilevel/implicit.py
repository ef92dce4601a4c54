"""Implicit hypergradients of a trained inner problem.

    dE/dlam = d_lam E - (d_lam grad_w L)^T u,        H u = d_w E,     H = Hessian of L in w

which is the adjoint of the gradient-step map, ``v = u / step``, whatever solver has found ``w``. The system is solved by the same
linear solvers as every other adjoint system of this package. What the map does not depend on, a learning rate or momentum of the
inner solver, has a hypergradient of exactly zero here: at a minimum it changes nothing how one has got there.

References: Bengio, Neural Computation 12, 2000; Pedregosa, ICML 2016, arXiv 1602.02355; Lorraine et al., AISTATS 2020,
arXiv 1911.02590, algorithm 2; Grazzi et al., ICML 2020, arXiv 2006.16218, algorithm 2.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.certificate import certificate
from hyperopt.bilevel.curvature import Curvature, Hessian, unused_of
from hyperopt.bilevel.estimate import Cost, Estimate, State
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.finite_difference import FiniteDifference
from hyperopt.bilevel.finite_differences import FiniteDifferences
from hyperopt.bilevel.gauss_newton import GaussNewton
from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.problem import BilevelProblem, Leaves, outer_gradient
from hyperopt.bilevel.resampled import Resampled
from hyperopt.bilevel.settings import ProductSettings
from hyperopt.bilevel.step_map import StepMap, largest_curvature
from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint, LinearSystem
from hyperopt.core.linear.cg import CG
from hyperopt.core.policy import note_once
from hyperopt.core.status import AdjointBox, Status
from hyperopt.core.tree import tree_norm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImplicitEstimator(ProductSettings, Estimator):
    """Any implicit adjoint on the gradient-step map; settings in ``ProductSettings``.

    Attributes:
        adjoint: how the adjoint system is solved.
        inner: trains ``w`` first (None: it is trained already).
    """

    adjoint: ImplicitAdjoint = field(default_factory=lambda: Implicit(CG()))
    inner: InnerSolver | None = None

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Train, solve the adjoint system, take the mixed product; see ``Estimator``."""
        trained = None if self.inner is None else self.inner.solve(problem, lam, state)
        w, hyper = Leaves.of(state.w, "w"), Leaves.of(lam, "lam")
        loss, g_w, g_lam = outer_gradient(problem, w, hyper, problem.outer_batches.draw())
        curvature = self._curvature(problem, w, hyper)
        constants = (
            None if problem.constants is None else problem.constants(state.w, optree.tree_map(torch.Tensor.detach, hyper.tree))
        )
        refuse_untrained(w, curvature, g_w)
        b = curvature.matrix(g_w)
        operator, box = StepMap(curvature, self._step(curvature, state, lam, constants)), AdjointBox()
        near, start = state.memory.get("u") if self.warm else None, None
        if near is not None:
            start, _ = self.adjoint.warm(operator, b, near / operator.step)
        u = operator.step * self.adjoint.solve(LinearSystem(operator, b, start, "adjoint", box))
        stats = box.stats
        assert stats is not None
        stats.vjps = curvature.matvecs - stats.jvps  # those of a warm start, and of the power iteration, among them
        note = self._note(stats.status, operator)
        if stats.status >= Status.breakdown and not self._accepts(stats.status):
            u = torch.full_like(u, math.nan)  # what is there is no solution, and a number made of it would be a wrong one
        elif self.warm:
            state.memory["u"] = u.detach()
        found = [subtract(g, m) for g, m in zip(g_lam, curvature.mixed(u), strict=True)]
        unused = unused_of(hyper.names, found)
        if unused and state.memory.get("unused") != list(unused):
            state.memory["unused"] = list(unused)
            log.info("neither loss depends on %s: the implicit hypergradient is exactly zero there", ", ".join(unused))
        grad = hyper.like(found)
        gradients = curvature.gradients + (trained.evaluations if trained else 0)
        cost = Cost(gradients, 1, curvature.matvecs, curvature.mixed_products, stats.jvps)
        known = certificate(operator, stats, trained, u, b, tree_norm(grad), constants, self.adjoint.iterates)
        return Estimate(grad, known, float(loss), state.w, trained, stats, cost, unused, note)

    def _curvature(self, problem: BilevelProblem, w: Leaves, lam: Leaves) -> Curvature:
        """The products that the adjoint, or the settings, ask for."""
        kind = getattr(self.adjoint, "curvature", self.curvature)

        def make() -> Curvature:
            batch = problem.inner_batches.draw()
            if kind == "finite_differences":
                length = self.adjoint.length if isinstance(self.adjoint, FiniteDifference) else None
                return FiniteDifferences(problem, w, lam, batch, length)
            return {"hessian": Hessian, "gauss_newton": GaussNewton}[kind](problem, w, lam, batch)

        return Resampled(make) if self.resample else make()

    def _accepts(self, status: Status) -> bool:
        """Whether a fixed number of steps that left more residual than none would is to be used all the same."""
        adjoint = self.adjoint
        asked = isinstance(adjoint, Implicit) and adjoint.linear_solver.fixed and adjoint.policy == "ignore"
        return asked and status == Status.diverged

    def _note(self, status: Status, operator: StepMap) -> str:
        """What to change where the adjoint diverged."""
        if status < Status.diverged or self._accepts(status):
            return ""
        note = "raise adjoint.linear_solver.rho or rank"  # Nystrom
        if self.adjoint.iterates:
            largest, _ = largest_curvature(operator.curvature, self.power)
            stable = f"{2 / largest:.4g} (2 / L, by power iteration)" if largest > 0 else "any: the Hessian is 0"
            note = (
                f"the gradient-step map does not contract at step={operator.step:.4g}; the largest stable step is {stable}: "
                "lower it, use adjoint=cg, or see whether the inner loss is convex here"
            )
        if isinstance(self.adjoint, Implicit) and self.adjoint.linear_solver.fixed:
            note += "; adjoint.policy=ignore uses what the fixed number of steps gives all the same"
        note_once(note, f"adjoint {status.name}")
        return note

    def _step(self, curvature: Curvature, state: State, lam: Any, constants: Any) -> float:
        """The step of the map; 1 for an adjoint to which it makes no difference."""
        if self.step is not None:
            return self.step
        if not self.adjoint.iterates:
            return 1.0
        own = None if self.inner is None else self.inner.map_step(lam)
        if own is not None:
            return own
        if constants is not None:
            return 2 / (constants.strong_convexity + constants.smoothness)
        largest, direction = largest_curvature(curvature, self.power, state.memory.get("largest"))
        if self.warm:
            state.memory["largest"] = direction
        return 1 / largest if math.isfinite(largest) and largest > 0 else 1.0


def refuse_untrained(w: Leaves, curvature: Curvature, outer: list[Any]) -> None:
    """Refuse a leaf of ``w`` that the outer loss uses and no training moves: its Hessian is 0, and there is no adjoint.

    Raises:
        ValueError: names it.
    """
    for i in curvature.missing:
        if outer[i] is not None and bool(outer[i].any()):
            raise ValueError(
                f"the outer loss depends on {w.names[i]}, on which the inner loss does not: nothing trains it, and its adjoint "
                "has no solution. If it is a buffer or a hyperparameter, take it out of w"
            )


def subtract(direct: Tensor | None, mixed: Tensor | None) -> Tensor | None:
    """``direct - mixed``, None standing for zero."""
    if mixed is None:
        return direct
    return -mixed if direct is None else direct - mixed
