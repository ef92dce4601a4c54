"""``adjoint="auto"``: the adjoint of a trained problem, chosen by what it meets; the default.

    H u = d_w E,      u = (1 / L) sum_{k < K} (I - H / L)^k d_w E      where the system is no guide to what training does

The rule, in the order in which it is tried:

1. The problem declares its constants: it is strongly convex, and conjugate gradients solve the system to a tolerance.
2. Otherwise conjugate gradients are tried. If they meet their tolerance, the Hessian is positive definite along all that
   matters, and their solution is used. If the weights were trained to a tolerance, or are said to be trained, it is used as well
   where only the last hundredth of the residual is missing.
3. If the Hessian is indefinite, and the gradient of the inner loss is zero to rounding, the weights are a stationary point whose
   derivative exists all the same: MINRES solves for it.
4. Everywhere else (an indefinite Hessian half way through training, a singular one, noisy products) the Neumann series is
   summed with the step ``1 / L``, ``L`` by power iteration, from nothing, as long as each term lowers the residual. That is the
   derivative of K steps of gradient descent from the present weights. Curvature above ``L / K`` is inverted, flat directions
   count for at most ``K / L``, and negative curvature ends the series before it is amplified.
5. If negative curvature ends it before 10 terms, and the loss is a ``Composite``, the series is that of the Gauss-Newton matrix.

Conjugate gradients that failed are tried again after 1, 2, 4, ..., 32 outer steps, so that the failures cost little. The exact
solution of an indefinite system is the derivative of a saddle, which training never follows: MINRES leaves 1.1 to 5 times the
outer loss that the series does. ``experiments/adjoint_choice`` has the measurements behind each line.

All that is remembered lies in ``state.memory``: the outer steps so far, when to try again, and what was said last.
References: Lorraine, Vicol & Duvenaud, AISTATS 2020, arXiv 1911.02590; Martens, ICML 2010 (negative curvature in CG).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.estimate import Choice, State
from hyperopt.bilevel.implicit import ImplicitEstimator, Point, Solved
from hyperopt.bilevel.problem import Composite
from hyperopt.bilevel.settings import AutoSettings
from hyperopt.bilevel.step_map import StepMap
from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint, LinearSystem
from hyperopt.core.linear.cg import CG
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.linear.minres import MINRES
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.status import SolveStats, Status

log = logging.getLogger(__name__)

FEW = 10  # terms: a Hessian series that negative curvature ends before gives way to that of the Gauss-Newton matrix
TERMS = (20, 100)  # least and most terms that the number of training steps is cut to
DONE = 1e-3  # part of the first gradient: weights with no more of it left count as trained
NEARLY = 1e-2  # residual at which an unfinished solve counts where the weights are said to be trained
LONGEST = 32  # outer steps between two attempts by conjugate gradients


@dataclass(frozen=True)
class Auto(AutoSettings, ImplicitAdjoint):
    """Chooses by what it meets; settings in ``AutoSettings``, the rule in ``hyperopt.bilevel.auto``.

    As the adjoint of ``hyperopt.fixed_point``, at a solution, it is exact: CG, then MINRES, then GMRES.
    """

    exact = True
    iterates = False

    def solve(self, system: LinearSystem) -> Tensor:
        """Solve to the tolerance by the first of the three that can."""
        limits: dict[str, Any] = {"rtol": self.rtol, "max_steps": self.max_steps}
        chain = (MINRES(**limits), GMRES(**{**limits, "max_steps": max(200, self.max_steps)}, window=40))
        return Implicit(CG(**limits), policy="fallback", fallback=chain).solve(system)


@dataclass(frozen=True)
class AutoEstimator(ImplicitEstimator):
    """The estimator behind ``adjoint="auto"``.

    Attributes:
        auto: its settings.
    """

    auto: Auto = Auto()

    def solve(self, at: Point) -> Solved:
        """Choose, solve, and say so when the choice is another than in the last outer step."""
        memory = at.state.memory.setdefault("auto", {"steps": 0, "again": 0, "gap": 1, "said": ""})
        if at.constants is not None:
            solved = self._declared(at)
        else:
            solved = self._exactly(at, memory)
            if isinstance(solved, str):
                solved = self._truncated(at, solved)
        memory["steps"] += 1
        choice = solved.choice
        assert choice is not None
        if memory["said"] != choice.name:
            memory["said"] = choice.name
            log.info("adjoint=auto uses %s", choice)
        return solved

    def _declared(self, at: Point) -> Solved:
        """Conjugate gradients, whose failure would say that the constants are wrong."""
        adjoint = Implicit(CG(rtol=self.auto.rtol, max_steps=self.auto.max_steps))
        operator = StepMap(at.curvature, self._step(at, iterates=False))
        u, stats = self._solve(adjoint, operator, at)
        note = ""
        if stats.status >= Status.breakdown:
            u = torch.full_like(u, math.nan)
            note = (
                f"{stats.status.message}; yet the problem's constants declare a strongly convex inner loss: see whether they hold"
            )
        why = "the problem declares constants of a strongly convex inner loss"
        return Solved(u, operator, stats, False, note, Choice("CG", why, adjoint, None, self.curvature))

    def _exactly(self, at: Point, memory: dict[str, Any]) -> Solved | str:
        """The solution of the system where there is one to be used; else why there is not."""
        if self.resample:
            return "each product is made on a batch of its own"
        if memory["steps"] < memory["again"]:
            return memory["why"]
        limits: dict[str, Any] = {"rtol": self.auto.rtol, "max_steps": self.auto.max_steps}
        operator = StepMap(at.curvature, 1.0)
        adjoint = Implicit(CG(**limits), policy="ignore")
        u, stats = self._solve(adjoint, operator, at)
        left = f"a residual of {stats.worst_residual():.1e}"
        name, why, used = "CG", "conjugate gradients met their tolerance, and no negative curvature", False
        if stats.status == Status.negative_curvature:
            if used := self._stationary(at, operator):
                adjoint = Implicit(MINRES(**limits), policy="ignore")
                u, stats = self._solve(adjoint, operator, at)
                name, why = "MINRES", "the Hessian is indefinite at weights where the gradient of the inner loss is zero"
                used = stats.status == Status.converged
            refused = "the Hessian has negative curvature, so the weights are not at a minimum"
        elif stats.status == Status.converged:
            length = float(torch.linalg.vector_norm(u) / torch.linalg.vector_norm(at.b)) if bool(at.b.any()) else 0.0
            reach = self._steps * min(1 / float(operator.largest), self._own(at) or math.inf) if length > 0 else math.inf
            used = length <= reach or self._trained(at, operator)
            refused = (
                f"the solution by conjugate gradients is {length:.2g} times the outer gradient, along directions so flat that "
                f"training, which went {reach:.2g} times a gradient, has not followed them"
            )
        else:
            used = stats.status < Status.breakdown and stats.worst_residual() <= NEARLY and self._trained(at, operator)
            why = f"the weights are trained, and conjugate gradients left {left}"
            refused = f"conjugate gradients ended as {stats.status.name} at {left}: the Hessian is next to singular"
        if used:
            memory["gap"], memory["again"] = 1, 0
            return Solved(u, operator, stats, False, "", Choice(name, why, adjoint, None, self.curvature))
        memory["again"] = memory["steps"] + 1 + memory["gap"]
        memory["gap"] = min(2 * memory["gap"], LONGEST)
        memory["why"] = refused
        return refused

    @property
    def _steps(self) -> int:
        """Steps that a training takes, at least the least number of terms."""
        return max(TERMS[1] if self.inner is None else self.inner.max_steps, TERMS[0])

    def _own(self, at: Point) -> float | None:
        """The step of the inner solver, where it takes plain gradient steps."""
        return None if self.inner is None else self.inner.map_step(at.lam.tree)

    def _trained(self, at: Point, operator: StepMap) -> bool:
        """Whether the weights count as a minimum: given as trained, trained to a tolerance, or with next to no gradient left."""
        trained = at.trained
        if trained is None or trained.status == Status.converged or trained.worst_residual() <= DONE:
            return True
        return self._stationary(at, operator)

    def _stationary(self, at: Point, operator: StepMap) -> bool:
        """Whether the gradient of the inner loss is what rounding leaves of zero, given the curvature and the size of ``w``."""
        eps = torch.finfo(at.b.dtype).eps
        size = torch.linalg.vector_norm(at.curvature.matrix([leaf.detach() for leaf in at.w.flat]))
        slope = torch.linalg.vector_norm(at.curvature.gradient)
        return bool(slope <= eps ** (2 / 3) * operator.largest * size)

    def _reach(self, at: Point) -> float:
        """How far training has gone in all outer steps, in units of a gradient; infinite where that is not known."""
        own = self._own(at)
        return math.inf if own is None else own * self._steps * (at.state.memory["auto"]["steps"] + 1)

    def _truncated(self, at: Point, why: str) -> Solved:
        """The Neumann series as long as its terms help."""
        most = self.auto.terms or min(self._steps, TERMS[1])
        curvature, kind, name = at.curvature, self.curvature, "Neumann"
        operator = StepMap(curvature, self.step or min(self._stable_step(curvature, at.state), self._reach(at) / most))
        u, stats, ended = series(operator, at.b, most, self.auto.rtol)
        terms = int(stats.iterations)
        if ended and terms < FEW and kind == "hessian" and not self.resample and isinstance(at.problem.inner_loss, Composite):
            kind, name = "gauss_newton", "Neumann, Gauss-Newton"
            curvature = self._curvature(at.problem, at.w, at.lam, at.inner, kind)
            operator = StepMap(curvature, self.step or min(self._stable_step(curvature, State(None)), self._reach(at) / most))
            u, stats, ended = series(operator, at.b, most, self.auto.rtol)
            why += f", and ends its series after {terms} of {most} terms"
            terms = int(stats.iterations)
        note = ""
        if stats.status >= Status.breakdown:
            fault = "not finite" if stats.status == Status.nonfinite else "zero along the outer gradient"
            note = f"the products with the second derivatives of the inner loss are {fault}: see whether it depends on all of w"
        adjoint = Implicit(Neumann(rtol=0.0, max_steps=max(terms - 1, 1)), policy="ignore")
        why += f"; {terms} terms with the step {operator.step:.3g} are used"
        return Solved(u, operator, stats, True, note, Choice(name, why, adjoint, operator.step, kind))


def series(operator: StepMap, b: Tensor, most: int, rtol: float) -> tuple[Tensor, SolveStats, bool]:
    """``step sum_{k < K} M^k b`` for the largest ``K <= most`` up to which every term lowers the residual ``|M^K b|``.

    For a symmetric ``M`` the logarithm of ``|M^k b|`` is convex in k: it falls until negative curvature, or a step that is too
    long, takes over, and rises from there on. At least one term is taken.

    Returns:
        The sum, shape (1, dim), NaN where the products are not finite or all zero; statistics; whether the residual rose.
    """
    size = left = float(torch.linalg.vector_norm(b))
    total, term, terms, rose = torch.zeros_like(b), b, 0, False
    while terms < most and left > rtol * size and not rose:
        following = operator.matvec(term)
        norm = float(torch.linalg.vector_norm(following))
        rose = not norm < left
        if not rose or not terms:
            total, term, left, terms = total + term, following, norm, terms + 1
    status = Status.converged if left <= rtol * size else Status.fixed_steps
    if not math.isfinite(left):
        status = Status.nonfinite
    elif terms and not operator.largest > 0:
        status = Status.breakdown
    if status >= Status.breakdown:
        total = torch.full_like(total, math.nan)
    code = torch.tensor([int(status)])
    residual, scale = (torch.tensor([x], dtype=torch.float64) for x in (left / size if size > 0 else left, size))
    return operator.step * total, SolveStats(code, torch.full_like(code, terms), residual, scale, method="Neumann"), rose
