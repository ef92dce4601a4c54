"""Implicit hypergradients of a trained inner problem.

    dE/dlam = d_lam E - (d_lam grad_w L)^T u,        H u = d_w E,     H = Hessian of L in w

This is the adjoint of the gradient-step map, with ``v = u / step``, and it does not depend on the solver that found ``w``. The
system is solved by the same linear solvers as every other adjoint system of this package. A learning rate or momentum of the
inner solver has a hypergradient of exactly zero here, because a minimum does not depend on the way to it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.certificate import certificate
from hyperopt.bilevel.curvature import Curvature, Hessian, Resampled, unused_of
from hyperopt.bilevel.estimate import Choice, Cost, Estimate, State
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.finite_difference import FiniteDifference, FiniteDifferences
from hyperopt.bilevel.gauss_newton import GaussNewton
from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem, InnerConstants, outer_gradient
from hyperopt.bilevel.step_map import Known, PowerSettings, StepMap, largest_curvature
from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint, LinearSystem
from hyperopt.core.certificate import UNKNOWN
from hyperopt.core.checks import check_choice, check_flag, check_kind, check_optional
from hyperopt.core.linear.cg import CG
from hyperopt.core.policy import note_once, report
from hyperopt.core.status import AdjointBox, SolveStats, Status
from hyperopt.core.tree import tree_norm

log = logging.getLogger(__name__)

CURVATURES = ("hessian", "gauss_newton", "finite_differences")


@dataclass(frozen=True)
class ProductSettings:
    """How an implicit hypergradient computes its products with second derivatives.

    Args:
        step: step of the gradient-step map, above 0, for adjoints that iterate it (None: that of the inner solver, else from
            declared constants, else ``1 / L`` by power iteration).
        warm: whether the adjoint solve and the power iteration start where those of the last outer step ended.
        curvature: ``hessian``, ``gauss_newton`` (which needs an inner loss that is a ``Composite``) or ``finite_differences``.
        resample: whether each product uses a batch of its own.
        keep: whether the graph of the gradient is kept from one Hessian product to the next. If not, each product builds it
            again, which takes less memory and more time. None: it is kept if its memory is small, see ``curvature.Hessian``.
        power: settings of the power iteration.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Bengio, Neural Computation 12, 2000; Pedregosa, ICML 2016, arXiv 1602.02355; Lorraine et al., AISTATS 2020, arXiv
    1911.02590, algorithm 2; Grazzi et al., ICML 2020, arXiv 2006.16218, algorithm 2.

    Example:
        >>> import torch, hyperopt
        >>> products = hyperopt.ProductSettings(curvature="finite_differences")
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> bilevel = hyperopt.Bilevel(problem, torch.tensor([0.5]), products=products)
        >>> round(float(bilevel.step(torch.ones(())).grad), 2)
        -0.25
    """

    step: float | None = None
    warm: bool = True
    curvature: str = "hessian"
    resample: bool = False
    keep: bool | None = True
    power: PowerSettings = field(default_factory=PowerSettings)

    def __post_init__(self) -> None:
        check_optional(self, "step", 0.0, open_low=True)
        check_flag(self, "warm")
        check_choice(self, "curvature", CURVATURES)
        check_flag(self, "resample")
        if self.keep is not None:
            check_flag(self, "keep")
        check_kind(self, "power", PowerSettings)


@dataclass(frozen=True)
class Point:
    """The point at which a hypergradient is taken, with everything that its adjoint system is made of.

    Attributes:
        problem: the losses.
        w, lam: the weights and the hyperparameters.
        state: what the method remembers.
        trained: statistics of the training that led to ``w`` (None: there was none).
        inner: the inner loss on its batch (None: each product draws its own batch).
        curvature: products with the second derivatives of the inner loss.
        b: ``d_w E``. shape: (1, dim)
        constants: constants of the losses (None: not declared).
    """

    problem: BilevelProblem
    w: Leaves
    lam: Leaves
    state: State
    trained: SolveStats | None
    inner: Evaluation | None
    curvature: Curvature
    b: Tensor
    constants: InnerConstants | None


@dataclass(frozen=True)
class Solved:
    """A solved adjoint system.

    Attributes:
        u: the computed ``H^{-1} b``; NaN if it must not be used. shape: (1, dim)
        operator: the gradient-step map of the system.
        stats: statistics of the solve.
        iterates: whether the map was iterated, so that its step matters.
        note: what to change, if the solve failed.
        choice: what ``adjoint="auto"`` chose and why (None: the adjoint was given).
        certified: whether ``u`` approximates the exact solution; if not, its distance from that is unknown.
    """

    u: Tensor
    operator: StepMap
    stats: SolveStats
    iterates: bool
    note: str = ""
    choice: Choice | None = None
    certified: bool = True


@dataclass(frozen=True)
class ImplicitEstimator(ProductSettings, Estimator):
    """The estimator for every implicit adjoint; see ``ProductSettings`` for the other arguments.

    Args:
        adjoint: the adjoint that solves the adjoint system.
        inner: the inner solver that trains ``w`` first (None: ``w`` is trained already).
    """

    adjoint: ImplicitAdjoint = field(default_factory=lambda: Implicit(CG()))
    inner: InnerSolver | None = None

    def estimate(self, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
        """Train, solve the adjoint system and compute the mixed product; see ``Estimator``."""
        trained = None
        if self.inner is not None:
            trained = self.inner.solve(problem, lam, state)
            problem = self.inner.objective(problem)  # what is trained is what is differentiated
        w, hyper = Leaves.of(state.w, "w"), Leaves.of(lam, "lam")
        loss, g_w, g_lam = outer_gradient(problem, w, hyper, problem.outer_batches.draw())
        inner = None if self.resample else Evaluation(problem, problem.inner_batches.draw())
        kind = "finite_differences" if isinstance(self.adjoint, FiniteDifference) else self.curvature
        first = self._curvature(problem, w, hyper, inner, kind)
        constants = (
            None if problem.constants is None else problem.constants(state.w, optree.tree_map(torch.Tensor.detach, hyper.tree))
        )
        if inner is None or not inner.random:  # one draw of a random loss may skip a layer that another draw uses
            refuse_untrained(w, first, g_w)
        g_w = [None if i in first.missing else g for i, g in enumerate(g_w)]  # training never moves these leaves
        b = w.matrix(g_w)
        del g_w  # as large as the weights
        solved = self.solve(Point(problem, w, hyper, state, trained, inner, first, b, constants))
        if not bool(first.gradient.isfinite().all()):
            solved = unfinished(solved)
        operator, stats, u = solved.operator, solved.stats, solved.u
        curvature = operator.curvature
        if self.warm and bool(torch.isfinite(u).all()):
            state.memory["u"] = u.detach()
        found = [subtract(g, m) for g, m in zip(g_lam, curvature.mixed(u), strict=True)]
        unused = unused_of(hyper.names, found)
        if unused and state.memory.get("unused") != list(unused):
            state.memory["unused"] = list(unused)
            log.info("neither loss depends on %s: the implicit hypergradient is exactly zero there", ", ".join(unused))
        grad = hyper.like(found)
        both = (first,) if curvature is first else (first, curvature)
        gradients, products = sum(c.gradients for c in both), sum(c.matvecs for c in both)
        stats.vjps = products - stats.jvps  # includes the products of a warm start and of the power iteration
        cost = Cost(gradients + (trained.evaluations if trained else 0), 1, products, curvature.mixed_products, stats.jvps)
        known = UNKNOWN
        if solved.certified:
            known = certificate(operator, stats, trained, u, b, tree_norm(grad), constants, solved.iterates)
        return Estimate(grad, known, float(loss), state.w, trained, stats, cost, unused, solved.note, solved.choice)

    def solve(self, at: Point) -> Solved:
        """Solve the adjoint system. A failed solve returns NaN, so that no wrong hypergradient is made from it."""
        given = self._given_step(at)
        operator = StepMap(at.curvature, self._stable_step(at.curvature, at.state) if given is None else given)
        trial = self.adjoint
        if trial.iterates and trial.policy in ("raise", "warn"):
            trial = trial.ignoring()  # a failure is reported below, once the step is known to be stable
        u, stats = self._solve(trial, operator, at)
        if given is None and operator.step * float(operator.largest) > 2:  # its products have shown that the step is not stable
            operator = StepMap(at.curvature, self._shorter(operator, at.state))
            u, stats = self._solve(trial, operator, at)
        if trial is not self.adjoint:
            report(stats, self.adjoint.policy, "adjoint")
        note = self._note(stats.status, operator)
        if stats.status >= Status.breakdown and not self._accepts(stats.status):
            u = torch.full_like(u, math.nan)
        return Solved(u, operator, stats, self.adjoint.iterates, note)

    def _solve(self, adjoint: ImplicitAdjoint, operator: StepMap, at: Point) -> tuple[Tensor, SolveStats]:
        """Return ``u`` and the statistics of a solve, which starts where the last one ended if ``warm``."""
        box = AdjointBox()
        near, start = at.state.memory.get("u") if self.warm else None, None
        if near is not None:
            start = adjoint.warm(operator, at.b, near / operator.step)
        u = operator.step * adjoint.solve(LinearSystem(operator, at.b, start, "adjoint", box))
        assert box.stats is not None
        return u, box.stats

    def _curvature(self, problem: BilevelProblem, w: Leaves, lam: Leaves, inner: Evaluation | None, kind: str) -> Curvature:
        """Return products of one kind: with one evaluation of the inner loss or, for None, each on a batch of its own."""

        def make(inner: Evaluation, keep: bool | None) -> Curvature:
            if kind == "finite_differences":
                length = self.adjoint.length if isinstance(self.adjoint, FiniteDifference) else None
                return FiniteDifferences(inner, w, lam, length)
            return GaussNewton(inner, w, lam) if kind == "gauss_newton" else Hessian(inner, w, lam, keep=keep)

        if inner is not None:
            return make(inner, self.keep)
        return Resampled(lambda: make(Evaluation(problem, problem.inner_batches.draw()), False))  # one product each

    def _accepts(self, status: Status) -> bool:
        """Whether a diverged solve is used anyway: one with a fixed number of steps under ``policy="ignore"``."""
        adjoint = self.adjoint
        asked = isinstance(adjoint, Implicit) and adjoint.linear_solver.fixed and adjoint.policy == "ignore"
        return asked and status == Status.diverged

    def _note(self, status: Status, operator: StepMap) -> str:
        """Return what to change after an adjoint solve that diverged, and log it once; else an empty text."""
        if status < Status.diverged or self._accepts(status):
            return ""
        note = "Nystrom's sketch leaves out too much of the Hessian: give it a larger rho or rank"
        if self.adjoint.iterates:
            largest, _ = largest_curvature(operator.curvature, self.power)
            note = f"the gradient-step map does not contract at step={operator.step:.4g}"
            if not largest > 0:
                note += "; the Hessian of the inner loss is zero here. Check that the inner loss depends on all of w"
            elif operator.step > 2 / largest:
                note += f"; the largest stable step is {2 / largest:.4g} (2 / L, by power iteration). Lower the argument step"
            else:
                note += ", although that is a stable step: the inner loss is not convex here"
            note += ', or use adjoint="auto"'
        if isinstance(self.adjoint, Implicit) and self.adjoint.linear_solver.fixed:
            note += '. With policy="ignore", Implicit uses the result of a fixed number of steps anyway'
        note_once(note, f"adjoint {status.name}")
        return note

    def _given_step(self, at: Point) -> float | None:
        """Return the step of the gradient-step map, 1 for an adjoint that does not depend on it; None: it must be estimated."""
        if self.step is not None:
            return self.step
        if not self.adjoint.iterates:
            return 1.0
        own = None if self.inner is None else self.inner.map_step(at.lam.tree)
        if own is None and at.constants is not None:
            return 2 / (at.constants.strong_convexity + at.constants.smoothness)
        return own

    def _stable_step(self, curvature: Curvature, state: State) -> float:
        """Return ``1 / L`` by power iteration."""
        kept = state.memory.get("power") if self.warm else None
        largest, direction = largest_curvature(curvature, self.power, None if kept is None else Known(**kept))
        if not (math.isfinite(largest) and largest > 0):
            return 1.0
        if self.warm:
            count = 1 if kept is None else kept["count"] + 1
            state.memory["power"] = {"size": largest, "direction": direction, "count": count}
        return 1 / largest

    def _shorter(self, operator: StepMap, state: State) -> float:
        """Return ``1 / L`` by a new power iteration; the last one has stopped at another eigenvalue."""
        state.memory.pop("power", None)
        found = self._stable_step(operator.curvature, state)
        return min(found, 1 / float(operator.largest))


def refuse_untrained(w: Leaves, curvature: Curvature, outer: list[Any]) -> None:
    """Refuse a leaf of ``w`` that the outer loss uses and the inner loss does not: its adjoint system has no solution.

    Raises:
        ValueError: the message names the leaf.
    """
    for i in curvature.missing:
        if outer[i] is not None and bool(outer[i].any()):
            raise ValueError(
                f"the outer loss depends on {w.names[i]}, but the inner loss does not: nothing trains it, so its adjoint system "
                "has no solution. If it is a buffer or a hyperparameter, take it out of w"
            )


def unfinished(solved: Solved) -> Solved:
    """Return a solve with the status ``nonfinite``: its inner loss has a gradient that is not finite.

    An adjoint without products, such as one step, would not meet it.
    """
    stats, bad = solved.stats, int(Status.nonfinite)
    stats = replace(stats, row_status=torch.full_like(stats.row_status, bad), residual=torch.full_like(stats.residual, math.nan))
    note = "the gradient of the inner loss is not finite: check its data, the weights and the hyperparameters"
    return replace(solved, u=torch.full_like(solved.u, math.nan), stats=stats, note=note, certified=False)


def subtract(direct: Tensor | None, mixed: Tensor | None) -> Tensor | None:
    """Return ``direct - mixed``, where None means zero."""
    if mixed is None:
        return direct
    return -mixed if direct is None else direct - mixed
