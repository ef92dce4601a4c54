"""``adjoint="auto"``, the default for a trained problem: the adjoint is chosen by how each solve goes.

    H u = d_w E,      or, where training does not reach that solution,      u = step sum_{k < K} (I - step H)^k d_w E

The rule, in the order in which it is tried:

1. If the problem declares its constants, the inner loss is strongly convex, and conjugate gradients (CG) are used.
2. Otherwise CG is tried. If it meets its tolerance and no negative curvature, its solution is used, provided that training can
   have followed it: the weights are trained, or the solution is no longer than the steps of ``inner`` could have made it.
3. If CG meets negative curvature, or breaks down, where the gradient of the inner loss is zero up to rounding, the weights are
   at a saddle, and MINRES is used if it converges; a note says so.
4. Everywhere else (weights that are still being trained, a singular Hessian, noisy products) the Neumann series is summed from
   zero as long as each term lowers the residual. The result is the derivative of K steps of gradient descent from the present
   weights: curvature above ``1 / (K step)`` is inverted, a flat direction is multiplied by ``K step``, and negative curvature
   ends the series before it can grow.
5. If that ends the series before 10 terms and the loss is a ``Composite``, the Gauss-Newton matrix is used in the series.
6. If the inner loss is another function at each draw (minibatches, dropout), the Hessian of one draw says little about some
   directions. Then the solution of rule 2 is used only if it leaves at most a tenth of ``d_w E`` as residual in the system of a
   second draw, and each product of the series uses a draw of its own, as each step of training does.

The weights count as trained if no ``inner`` was given, if ``inner`` met its tolerance, or if the gradient and the curvature
show that at most a tenth of the way to the minimum is left. CG that ran out of steps is then accepted too, with a residual of
at most 1 %. K is the number of steps of ``inner``, clipped to 20 to 100. The step is ``1 / L``, with ``L`` by power iteration;
after gradient descent the series is no longer than training has been.

Why not use the exact solution everywhere? At an indefinite Hessian it is the derivative of a saddle point, which training
leaves; at a nearly singular one it is dominated by directions that training has not resolved. ``experiments/adjoint_choice``
measures both. After 30 outer steps on six small networks this rule has the smallest loss of seven methods on three of them, and
a loss at most 6 % above the smallest on the others. On batches of 64 rows for 100 weights its mean hypergradient is 3 % off;
with one batch for all products it is 63 % off.

After CG was not used, it is tried again 1, 2, 4, ..., 32 outer steps later. ``state.memory["auto"]`` keeps what must be
remembered.
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
from hyperopt.bilevel.step_map import StepMap, series
from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint, LinearSystem
from hyperopt.core.checks import check_count, check_number, check_optional_count
from hyperopt.core.linear.cg import CG
from hyperopt.core.linear.gmres import GMRES
from hyperopt.core.linear.minres import MINRES
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.policy import note_once
from hyperopt.core.status import SolveStats, Status

log = logging.getLogger(__name__)

FEW = 10  # if the Hessian's series ends with fewer terms, the Gauss-Newton matrix's is used
TERMS = (20, 100)  # smallest and largest default number of terms
TRAINED_WITHIN = 0.1  # weights count as trained if at most this part of the way to the minimum is left
NEARLY = 1e-2  # largest residual of CG without convergence that is accepted at trained weights
SECOND_DRAW = 0.1  # largest relative residual of a solution in the system of a second draw
SADDLE = (
    "the weights are at a saddle of the inner loss: its gradient is 0 and its Hessian has negative curvature. The hypergradient "
    "is that of the saddle, which training from other weights leaves; start from random weights"
)
LONGEST_WAIT = 32  # largest number of outer steps between two attempts by CG


@dataclass(frozen=True)
class Auto(ImplicitAdjoint):
    """CG, MINRES or a truncated Neumann series, by the rule in the docstring of ``hyperopt.bilevel.auto``.

    As the adjoint of ``hyperopt.fixed_point`` it is exact: it tries CG, then MINRES, then GMRES.

    Args:
        rtol: relative tolerance of CG and MINRES, above 0.
        max_steps: largest number of products in one attempt by CG or MINRES, at least 1.
        terms: largest number of terms of the Neumann series, at least 1 (None: the steps of ``inner``, clipped to 20 to 100).

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Lorraine, Vicol & Duvenaud, AISTATS 2020, arXiv 1911.02590; Grazzi et al., ICML 2020, arXiv 2006.16218.

    Example:
        >>> import torch, hyperopt
        >>> adjoint = hyperopt.Auto(rtol=1e-6)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.tensor([0.5]), torch.ones(()), adjoint=adjoint)
        >>> round(float(estimate.grad), 3)  # w = 1 / (1 + lam) = 0.5, dE/dlam = -0.25
        -0.25
    """

    rtol: float = 1e-6
    max_steps: int = 100
    terms: int | None = None

    exact = True
    iterates = False

    def __post_init__(self) -> None:
        check_number(self, "rtol", 0.0, open_low=True)
        check_count(self, "max_steps")
        check_optional_count(self, "terms")

    def solve(self, system: LinearSystem) -> Tensor:
        """Solve the system by the first of CG, MINRES and GMRES that meets the tolerance."""
        limits: dict[str, Any] = {"rtol": self.rtol, "max_steps": self.max_steps}
        chain = (MINRES(**limits), GMRES(**{**limits, "max_steps": max(200, self.max_steps)}, window=40))
        return Implicit(CG(**limits), policy="fallback", fallback=chain).solve(system)


@dataclass(frozen=True)
class AutoEstimator(ImplicitEstimator):
    """The estimator behind ``adjoint="auto"``.

    Attributes:
        auto: the settings.
    """

    auto: Auto = Auto()

    def solve(self, at: Point) -> Solved:
        """Choose a method, solve the system, and log the choice if it differs from that of the last outer step."""
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
        """The number of steps of ``inner``, but at least the smallest number of terms."""
        return max(TERMS[1] if self.inner is None else self.inner.max_steps, TERMS[0])

    def _inner_step(self, at: Point) -> float:
        """The step size of the inner solver if it takes plain gradient steps, else infinity."""
        step = None if self.inner is None else self.inner.map_step(at.lam.tree)
        return math.inf if step is None else step

    def _stationary(self, at: Point, operator: StepMap) -> bool:
        """Whether the gradient of the inner loss is zero up to rounding, given the curvature and the size of ``w``."""
        size = torch.linalg.vector_norm(at.w.point)
        slope = torch.linalg.vector_norm(at.curvature.gradient)
        return bool(slope <= torch.finfo(at.b.dtype).eps ** (2 / 3) * operator.largest * size)

    def _trained(self, at: Point, operator: StepMap, length: float) -> bool:
        """Whether the weights count as trained; see the docstring of the module.

        If the gradient has fallen to a fraction r of the first, then at most ``r L |u| / |b|`` of the way is left in directions
        that are as flat as those of ``u``. ``length`` is ``|u| / |b|``.
        """
        trained = at.trained
        if trained is None or trained.status == Status.converged or self._stationary(at, operator):
            return True
        return trained.worst_residual() * length * float(operator.largest) <= TRAINED_WITHIN

    def _drawn_again(self, at: Point) -> Evaluation | None:
        """A second draw of the inner loss; None if it is the same function, or if each product has a draw of its own anyway."""
        if at.inner is None or at.inner.replay is None:
            return None
        other = Evaluation(at.problem, at.problem.inner_batches.draw())
        if at.inner.replay.random:
            return other
        one, two = (optree.tree_leaves(draw.batch) for draw in (at.inner, other))
        if len(one) == len(two) and all(x is y for x, y in zip(one, two, strict=True)):
            return None
        # Values are compared and not batches: the value of a mean over the ranks is the same on each of them.
        with torch.enable_grad():  # a loss may take derivatives itself
            first, second = (float(draw(at.w.tree, at.lam.tree).detach()) for draw in (at.inner, other))
        return None if first == second else other

    def _declared(self, at: Point) -> Solved:
        """Solve by conjugate gradients; a breakdown means that the declared constants are wrong."""
        adjoint = Implicit(CG(rtol=self.auto.rtol, max_steps=self.auto.max_steps))
        operator, note = StepMap(at.curvature, 1.0), ""
        u, stats = self._solve(adjoint, operator, at)
        if stats.status >= Status.breakdown:
            u = torch.full_like(u, math.nan)
            note = f"{stats.status.message}. The declared constants say that the inner loss is strongly convex; check that it is"
        why = "the problem declares constants of a strongly convex inner loss"
        return Solved(u, operator, stats, False, note, Choice("CG", why, adjoint, None, self.curvature))

    def _exactly(self, at: Point, other: Evaluation | None, memory: dict[str, Any]) -> Solved | None:
        """Return the solution of the system, or None if it is not to be used; ``memory["why"]`` then says why.

        Args:
            at: the point.
            other: a second draw of the inner loss, or None if that is the same function.
            memory: what the method remembers; changed in place.
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
        broken = stats.status == Status.breakdown  # also where the curvature along the first direction is 0, as 1 - 1
        if (memory["negative"] or broken) and self._stationary(at, operator):
            name, adjoint = "MINRES", Implicit(MINRES(**limits), policy="ignore")
            u, stats = self._solve(adjoint, operator, at)
            used = stats.status == Status.converged
            why = "the weights are a saddle: no gradient, but negative curvature"
            if broken and not used:
                why = f"CG ended as breakdown at {left}, so the Hessian is nearly singular"
            else:
                note_once(SADDLE, "saddle")
        elif memory["negative"]:
            used, why = False, "the Hessian has negative curvature, so the weights are not at a minimum"
        elif stats.status == Status.converged:
            why = "it met its tolerance and no negative curvature"
            largest = float(operator.largest)
            reach = self._steps * min(1 / largest, self._inner_step(at)) if largest > 0 else math.inf
            used = length <= reach or self._trained(at, operator, length)
            if not used:
                why = (
                    f"the exact solution is {length:.2g} times the outer gradient, which {self._steps} steps of gradient descent "
                    f"cannot reach ({reach:.2g}), and the weights are not fully trained"
                )
        else:
            used = stats.status < Status.breakdown and stats.worst_residual() <= NEARLY and self._trained(at, operator, length)
            ended = f"CG ended as {stats.status.name} at {left}"
            why = f"the weights are trained, and {ended}" if used else f"{ended}, so the Hessian is nearly singular"
        if used and other is not None and size > 0:
            at.curvature.release()
            second = self._curvature(at.problem, at.w, at.lam, other, self.curvature)
            missed = float(torch.linalg.vector_norm(second.matvec(u) - at.b)) / size
            add_cost(second, at.curvature)
            used = missed <= SECOND_DRAW
            why += f"; {missed:.1e} of the outer gradient is left in the system of a second draw of the inner loss"
            if not used:
                why = (
                    f"the solution for one draw of the inner loss leaves {missed:.1e} of the outer gradient in the system of a "
                    "second draw, so it holds for the first draw only"
                )
        if used:
            memory["gap"], memory["again"] = 1, 0
            note = SADDLE if name == "MINRES" else ""
            return Solved(u, operator, stats, False, note, Choice(name, why, adjoint, None, self.curvature))
        memory["again"] = memory["steps"] + 1 + memory["gap"]
        memory["gap"], memory["why"] = min(2 * memory["gap"], LONGEST_WAIT), why
        return None

    def _truncated(self, at: Point, drawn: bool, memory: dict[str, Any]) -> Solved:
        """Sum the Neumann series as long as its terms help; each product uses its own draw if draws differ."""
        most = self.auto.terms or min(self._steps, TERMS[1])
        longest = self._inner_step(at) * self._steps * (memory["steps"] + 1)  # sum of the step sizes of all training so far

        def sum_series(curvature: Curvature, kind: str, state: State) -> tuple[StepMap, Tensor, SolveStats, bool]:
            step = self.step or min(self._stable_step(curvature, state), longest / most)
            one = curvature
            if drawn:
                one.release()
                curvature = self._curvature(at.problem, at.w, at.lam, None, kind)
                if one is not at.curvature:
                    add_cost(one, curvature)
            operator = StepMap(curvature, step)
            found = series(operator, at.b, most, self.auto.rtol)
            if self.step is None and step * float(operator.largest) > 2:
                operator = StepMap(curvature, min(self._shorter(operator, state), longest / most))
                found = series(operator, at.b, most, self.auto.rtol)
            return operator, *found

        name, kind, why = "Neumann", self.curvature, memory["why"]
        operator, u, stats, rose = sum_series(at.curvature, kind, at.state)
        negative = memory["negative"] or rose
        terms = int(stats.iterations)
        if rose and terms < FEW and kind == "hessian" and not self.resample and isinstance(at.problem.inner_loss, Composite):
            name, kind = "Neumann, Gauss-Newton", "gauss_newton"
            why += f", and ends its series after {terms} of {most} terms"
            if operator.curvature is not at.curvature:
                add_cost(operator.curvature, at.curvature)
            operator, u, stats, rose = sum_series(self._curvature(at.problem, at.w, at.lam, at.inner, kind), kind, State(None))
            terms = int(stats.iterations)
        note = ""
        if stats.status >= Status.breakdown:
            fault = "not finite" if stats.status == Status.nonfinite else "zero along the gradient of the outer loss"
            note = f"the products with the Hessian of the inner loss are {fault}: check that it depends on all of w"
        adjoint = Implicit(Neumann(rtol=0.0, max_steps=max(terms - 1, 1)), policy="ignore")
        why += f"; terms: {terms}, step: {operator.step:.3g}" + ", each product on a draw of its own" * drawn
        choice = Choice(name, why, adjoint, operator.step, kind, drawn or self.resample)
        return Solved(u, operator, stats, True, note, choice, not negative)


def add_cost(spent: Curvature, to: Curvature) -> None:
    """Add the cost of one curvature to that of another, whose counts are reported."""
    to.gradients += spent.gradients
    to.matvecs += spent.matvecs
