"""``adjoint="auto"``: the adjoint of a trained problem, chosen by what it meets; the default.

    H u = d_w E,      or, where training does not follow that solution,      u = step sum_{k < K} (I - step H)^k d_w E

The rule, in the order in which it is tried:

1. If the problem declares its constants, the inner loss is strongly convex: conjugate gradients (CG).
2. Otherwise CG is tried. If it meets its tolerance, and no negative curvature, its solution is used where training can have
   followed it: the weights are trained, or the solution is no longer than the steps of ``inner`` could make it.
3. If CG met negative curvature where the gradient of the inner loss is zero to rounding, the weights are a saddle: MINRES.
4. Everywhere else (weights on their way, a singular Hessian, noisy products) the Neumann series is summed from nothing, as long
   as each term lowers the residual. That is the derivative of K steps of gradient descent from the present weights: curvature
   above ``1 / (K step)`` is inverted, flat directions count for ``K step``, and negative curvature ends the series in time.
5. If it ends the series before 10 terms and the loss is a ``Composite``, the series is that of the Gauss-Newton matrix.
6. Where the inner loss is another function each time it is drawn (minibatches, dropout), the Hessian of one draw is no guide to
   directions that the draw says little of. Then the solution of line 2 counts only if it leaves at most a tenth of ``d_w E`` in
   the system of a second draw, and each product of the series is made on a draw of its own, as each step of training is.

"Trained" means: no ``inner`` was given, its tolerance was met, or a tenth of its way is left by the gradient and the curvature.
Then CG counts also where it ran out of steps with at most a hundredth of the residual left. K is the number of steps of
``inner``, 20 to 100. The step is ``1 / L``, ``L`` by power iteration; after gradient descent the series is no longer than
training has been.

Why not the exact solution everywhere: at an indefinite Hessian it is the derivative of a saddle, which training leaves, and at a
nearly singular one it is dominated by directions that training has not resolved. ``experiments/adjoint_choice`` measures both:
after 30 outer steps on six small networks this rule has the least loss of seven methods on three of them, and at most 6 % more
on the others. On batches of 64 rows for 100 weights its mean hypergradient is 3 % off; with one for all products, 63 %.
CG that was of no use is tried again after 1, 2, 4, ..., 32 outer steps. What is remembered lies in ``state.memory["auto"]``.

References: Lorraine, Vicol & Duvenaud, AISTATS 2020, arXiv 1911.02590; Grazzi et al., ICML 2020, arXiv 2006.16218.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.curvature import Curvature
from hyperopt.bilevel.estimate import Choice, State
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.implicit import ImplicitEstimator, Point, Solved
from hyperopt.bilevel.problem import Composite
from hyperopt.bilevel.step_map import StepMap
from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint, LinearSystem
from hyperopt.core.checks import check_count, check_number, check_optional_count
from hyperopt.core.linear.cg import CG
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.linear.minres import MINRES
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.status import SolveStats, Status

log = logging.getLogger(__name__)

FEW = 10  # terms: a Hessian series that negative curvature ends before gives way to that of the Gauss-Newton matrix
TERMS = (20, 100)  # least and most terms
DONE = 0.1  # part of its way that training may have left, by Newton's method, at weights that count as trained
NEARLY = 1e-2  # the residual of CG, out of steps, that is small enough at trained weights
KNOWN = 0.1  # the residual, in the system of a second draw, at which a solution of the first is one of their mean as well
LONGEST = 32  # most outer steps between two attempts by CG


@dataclass(frozen=True)
class Auto(ImplicitAdjoint):
    """CG, MINRES or a truncated Neumann series, chosen by what it meets; the rule is that of ``hyperopt.bilevel.auto``.

    As the adjoint of ``hyperopt.fixed_point``, at a solution, it is exact: CG, then MINRES, then GMRES.

    Args:
        rtol: relative tolerance of CG and MINRES, above 0.
        max_steps: most products of one attempt by CG or MINRES, at least 1.
        terms: most terms of the Neumann series (None: as many as ``inner`` takes steps, at least 20 and at most 100).
    """

    rtol: float = 1e-6
    max_steps: int = 100
    terms: int | None = None

    exact = True
    iterates = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number(self, "rtol", 0.0, open_low=True)
        check_count(self, "max_steps")
        check_optional_count(self, "terms")

    def solve(self, system: LinearSystem) -> Tensor:
        """Solve to the tolerance by the first of the three that can."""
        limits: dict[str, Any] = {"rtol": self.rtol, "max_steps": self.max_steps}
        chain = (MINRES(**limits), GMRES(**{**limits, "max_steps": max(200, self.max_steps)}, window=40))
        return Implicit(CG(**limits), policy="fallback", fallback=chain).solve(system)


@dataclass(frozen=True)
class AutoEstimator(ImplicitEstimator):
    """The estimator behind ``adjoint="auto"``.

    Attributes:
        auto: what it was given.
    """

    auto: Auto = Auto()

    def solve(self, at: Point) -> Solved:
        """Choose, solve, and log the choice where it is another than in the outer step before."""
        memory = at.state.memory.setdefault("auto", {"steps": 0, "again": 0, "gap": 1, "negative": False, "why": "", "said": ""})
        if at.constants is not None:
            solved = self._declared(at)
        else:
            other = self._drawn_again(at)
            solved = self._exactly(at, other, memory) or self._truncated(at, other is not None, memory)
        memory["steps"] += 1
        choice = solved.choice
        assert choice is not None
        if memory["said"] != choice.name:
            memory["said"] = choice.name
            log.info('adjoint="auto" uses %s', choice)
        return solved

    @property
    def _steps(self) -> int:
        """Steps of a training, and at least the least number of terms."""
        return max(TERMS[1] if self.inner is None else self.inner.max_steps, TERMS[0])

    def _own(self, at: Point) -> float:
        """The step of the inner solver where it takes plain gradient steps, else infinity."""
        own = None if self.inner is None else self.inner.map_step(at.lam.tree)
        return math.inf if own is None else own

    def _stationary(self, at: Point, operator: StepMap) -> bool:
        """Whether the gradient of the inner loss is what rounding leaves of zero, given the curvature and the size of ``w``."""
        size = torch.linalg.vector_norm(at.curvature.matrix([leaf.detach() for leaf in at.w.flat]))
        slope = torch.linalg.vector_norm(at.curvature.gradient)
        return bool(slope <= torch.finfo(at.b.dtype).eps ** (2 / 3) * operator.largest * size)

    def _trained(self, at: Point, operator: StepMap, length: float) -> bool:
        """Whether the weights count as a minimum: given as trained, trained to a tolerance, or next to there.

        A gradient that has fallen to a part r of the first leaves at most ``r L |u| / |b|`` of the way in directions as flat as
        those of ``u``; ``length`` is ``|u| / |b|``.
        """
        trained = at.trained
        if trained is None or trained.status == Status.converged or self._stationary(at, operator):
            return True
        return trained.worst_residual() * length * float(operator.largest) <= DONE

    def _drawn_again(self, at: Point) -> Evaluation | None:
        """The inner loss drawn a second time; None where that is the same function, or each product has its own draw already."""
        if at.inner is None or at.inner.replay is None:
            return None
        other = Evaluation(at.problem, at.problem.inner_batches.draw())
        if at.inner.replay.random:
            return other
        one, two = (optree.tree_leaves(draw.batch) for draw in (at.inner, other))
        if len(one) == len(two) and all(x is y for x, y in zip(one, two, strict=True)):
            return None
        # The values, and not the batches: those of a loss that is a mean over the ranks are the same on each.
        with torch.enable_grad():  # a loss may take derivatives itself
            first, second = (float(draw(at.w.tree, at.lam.tree).detach()) for draw in (at.inner, other))
        return None if first == second else other

    def _declared(self, at: Point) -> Solved:
        """Conjugate gradients, whose breakdown would say that the constants are wrong."""
        adjoint = Implicit(CG(rtol=self.auto.rtol, max_steps=self.auto.max_steps))
        operator, note = StepMap(at.curvature, 1.0), ""
        u, stats = self._solve(adjoint, operator, at)
        if stats.status >= Status.breakdown:
            u = torch.full_like(u, math.nan)
            note = f"{stats.status.message}. The constants of the problem declare a strongly convex inner loss: see whether it is"
        why = "the problem declares constants of a strongly convex inner loss"
        return Solved(u, operator, stats, False, note, Choice("CG", why, adjoint, None, self.curvature))

    def _exactly(self, at: Point, other: Evaluation | None, memory: dict[str, Any]) -> Solved | None:
        """The solution of the system where it is of use; else None, and ``memory["why"]``.

        Args:
            at: where.
            other: the inner loss drawn a second time, where that is another function.
            memory: of the method.
        """
        if self.resample:
            memory["why"] = "each product is made on a batch of its own"
            return None
        if memory["steps"] < memory["again"]:
            return None
        limits: dict[str, Any] = {"rtol": self.auto.rtol, "max_steps": self.auto.max_steps}
        operator, name, adjoint = StepMap(at.curvature, 1.0), "CG", Implicit(CG(**limits), policy="ignore")
        u, stats = self._solve(adjoint, operator, at)
        left = f"a residual of {stats.worst_residual():.1e}"
        memory["negative"] = stats.status == Status.negative_curvature
        size = float(torch.linalg.vector_norm(at.b))
        length = float(torch.linalg.vector_norm(u)) / size if size > 0 else 0.0
        if memory["negative"]:
            why = "the Hessian has negative curvature, so the weights are not at a minimum"
            used = self._stationary(at, operator)
            if used:
                name, adjoint = "MINRES", Implicit(MINRES(**limits), policy="ignore")
                u, stats = self._solve(adjoint, operator, at)
                why, used = "the weights are a saddle: no gradient, but negative curvature", stats.status == Status.converged
        elif stats.status == Status.converged:
            why = "it met its tolerance, and no negative curvature"
            largest = float(operator.largest)
            reach = self._steps * min(1 / largest, self._own(at)) if largest > 0 else math.inf
            used = length <= reach or self._trained(at, operator, length)
            if not used:
                why = (
                    f"the exact solution is {length:.2g} times the outer gradient, which {self._steps} steps of gradient descent "
                    f"cannot reach ({reach:.2g}), and the weights are not trained to the end"
                )
        else:
            used = stats.status < Status.breakdown and stats.worst_residual() <= NEARLY and self._trained(at, operator, length)
            ended = f"CG ended as {stats.status.name} at {left}"
            why = f"the weights are trained, and {ended}" if used else f"{ended}, so the Hessian is nearly singular"
        if used and other is not None and size > 0:
            second = self._curvature(at.problem, at.w, at.lam, other, self.curvature)
            missed = float(torch.linalg.vector_norm(second.matvec(u) - at.b)) / size
            charge(second, at.curvature)
            used = missed <= KNOWN
            why += f"; {missed:.1e} of the outer gradient is left in the system of a second draw of the inner loss"
            if not used:
                why = (
                    f"the solution on one draw of the inner loss leaves {missed:.1e} of the outer gradient in the system of a "
                    "second draw, so it is one of that draw alone"
                )
        if used:
            memory["gap"], memory["again"] = 1, 0
            return Solved(u, operator, stats, False, "", Choice(name, why, adjoint, None, self.curvature))
        memory["again"] = memory["steps"] + 1 + memory["gap"]
        memory["gap"], memory["why"] = min(2 * memory["gap"], LONGEST), why
        return None

    def _truncated(self, at: Point, drawn: bool, memory: dict[str, Any]) -> Solved:
        """The Neumann series as long as its terms help, each product on a draw of its own where draws differ."""
        most = self.auto.terms or min(self._steps, TERMS[1])
        reach = self._own(at) * self._steps * (memory["steps"] + 1)  # how long training has been, in units of a gradient

        def summed(curvature: Curvature, kind: str, state: State) -> tuple[StepMap, Tensor, SolveStats, bool]:
            step = self.step or min(self._stable_step(curvature, state), reach / most)
            if drawn:
                one, curvature = curvature, self._curvature(at.problem, at.w, at.lam, None, kind)
                if one is not at.curvature:
                    charge(one, curvature)
            operator = StepMap(curvature, step)
            return operator, *series(operator, at.b, most, self.auto.rtol)

        name, kind, why = "Neumann", self.curvature, memory["why"]
        operator, u, stats, rose = summed(at.curvature, kind, at.state)
        negative = memory["negative"] or rose
        terms = int(stats.iterations)
        if rose and terms < FEW and kind == "hessian" and not self.resample and isinstance(at.problem.inner_loss, Composite):
            name, kind = "Neumann, Gauss-Newton", "gauss_newton"
            why += f", and ends its series after {terms} of {most} terms"
            if operator.curvature is not at.curvature:
                charge(operator.curvature, at.curvature)
            operator, u, stats, rose = summed(self._curvature(at.problem, at.w, at.lam, at.inner, kind), kind, State(None))
            terms = int(stats.iterations)
        note = ""
        if stats.status >= Status.breakdown:
            fault = "not finite" if stats.status == Status.nonfinite else "zero along the gradient of the outer loss"
            note = f"the products with the Hessian of the inner loss are {fault}: see whether it depends on all of w"
        adjoint = Implicit(Neumann(rtol=0.0, max_steps=max(terms - 1, 1)), policy="ignore")
        why += f"; terms: {terms}, step: {operator.step:.3g}" + ", each product on a draw of its own" * drawn
        choice = Choice(name, why, adjoint, operator.step, kind, drawn or self.resample)
        return Solved(u, operator, stats, True, note, choice, not negative)


def charge(spent: Curvature, on: Curvature) -> None:
    """Count what one curvature has cost with another, which is part of the hypergradient's cost."""
    on.gradients += spent.gradients
    on.matvecs += spent.matvecs


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
