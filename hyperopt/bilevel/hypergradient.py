"""``hypergradient``: the hypergradient of a trained inner problem; ``Bilevel``: the same from one outer step to the next."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.auto import Auto, AutoEstimator
from hyperopt.bilevel.curvature import Hessian
from hyperopt.bilevel.estimate import Estimate, State
from hyperopt.bilevel.estimator import Estimator, refuse_ignored
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.finite_difference import FiniteDifference
from hyperopt.bilevel.gradient_map import GradientMap
from hyperopt.bilevel.implicit import ImplicitEstimator, ProductSettings
from hyperopt.bilevel.inner.base import DifferentiableSolver, InnerSolver
from hyperopt.bilevel.inner.gradient_descent import GradientDescent
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.refusals import named
from hyperopt.bilevel.step_map import largest_curvature
from hyperopt.bilevel.tied import Tied
from hyperopt.bilevel.unrolled import UnrolledEstimator
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.checkpointed import Checkpointed
from hyperopt.core.adjoints.implicit import Implicit, ImplicitAdjoint
from hyperopt.core.adjoints.shine import Shine
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.fixed_point import fixed_point
from hyperopt.core.policy import SolveError
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.state import check_entries, check_tensors
from hyperopt.core.status import Solution
from hyperopt.core.text import described


def estimator_of(adjoint: Adjoint | Estimator | str | None, inner: InnerSolver | None, products: ProductSettings) -> Estimator:
    """Return the estimator for an adjoint of a trained inner problem; ``"auto"`` and None mean ``Auto()``.

    Raises:
        TypeError: ``adjoint`` is neither an adjoint of a trained problem nor an estimator, or ``inner`` is not an inner solver.
        ValueError: the adjoint differentiates training, but the inner solver is missing or cannot be differentiated; or the
            adjoint would ignore the inner solver or a setting of the products.
    """
    if not (inner is None or isinstance(inner, InnerSolver)):
        hint = "; TorchOptimizer takes the name of an optimizer of PyTorch" if isinstance(inner, torch.optim.Optimizer) else ""
        raise TypeError(
            f"inner={inner!r} is not an inner solver: give GradientDescent(...), TorchOptimizer(...), InnerLBFGS(...), ...{hint}"
        )
    unused = ("step", "curvature", "resample", "power")
    if adjoint is None or (isinstance(adjoint, str) and adjoint == "auto"):
        adjoint = Auto()
    if isinstance(adjoint, Estimator):
        refuse_ignored(adjoint, inner, products, unused)
        return adjoint
    if isinstance(adjoint, FiniteDifference):  # it chooses the curvature itself
        refuse_ignored(adjoint, None, products, ("curvature",))
    if isinstance(adjoint, ImplicitAdjoint) and not isinstance(adjoint, Shine):
        if not adjoint.iterates:  # the solution of the adjoint system does not depend on a step
            method = adjoint.linear_solver if isinstance(adjoint, Implicit) else adjoint
            refuse_ignored(method, None, products, ("step",) if isinstance(adjoint, Auto) else ("step", "power"))
        given = {field.name: getattr(products, field.name) for field in fields(ProductSettings)}
        if isinstance(adjoint, Auto):
            return AutoEstimator(**given, inner=inner, auto=adjoint)
        return ImplicitEstimator(**given, adjoint=adjoint, inner=inner)
    if isinstance(adjoint, Unrolled | Checkpointed):
        if not isinstance(inner, DifferentiableSolver):
            what = "there is no inner solver" if inner is None else f"{inner.name} cannot be differentiated through"
            raise ValueError(
                f"{type(adjoint).__name__} differentiates training, but {what}; give inner=GradientDescent(...), "
                'HeavyBall(...) or InnerAdam(...), or an implicit adjoint such as adjoint="auto"'
            )
        refuse_ignored(adjoint, None, products, unused)
        return UnrolledEstimator(adjoint, inner)
    raise TypeError(
        f'adjoint={adjoint!r} is not an adjoint of a trained problem; give "auto", Implicit(CG()), Unrolled(), OneStep(), ...'
    )


def refuse_unstarted(problem: BilevelProblem, inner: InnerSolver | None) -> None:
    """Refuse a problem that has ``initial`` but no inner solver that would train from there.

    Raises:
        ValueError: the message names ``initial``.
    """
    if problem.initial is not None and inner is None:
        raise ValueError(
            "the problem has initial=..., the start of each training, but no inner solver: give inner=GradientDescent(...)"
        )


def estimated(estimator: Estimator, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
    """Return ``estimator.estimate(...)``.

    Raises:
        SolveError: a solve failed; the message names hyperparameters that are not finite, if that is the reason.
    """
    try:
        return estimator.estimate(problem, lam, state)
    except SolveError as error:
        bad = [name for name, leaf in named(lam, "lam") if not bool(leaf.isfinite().all())]
        if bad:
            raise SolveError(
                f"{', '.join(bad)} has entries that are not finite, so the weights cannot be trained: {error}"
            ) from error
        raise


def hypergradient(
    problem: BilevelProblem,
    w: Any,
    lam: Any,
    *,
    adjoint: Adjoint | Estimator | str | None = "auto",
    inner: InnerSolver | None = None,
    step: float | None = None,
    curvature: str = "hessian",
    resample: bool = False,
) -> Estimate:
    r"""Return the hypergradient of a trained inner problem.

    $$dE/d\lambda = d_\lambda E - (d_\lambda \nabla_w L)^T u, \qquad H u = d_w E.$$

    Args:
        problem: the two losses.
        w: the inner variables, a tree of tensors, which are not changed. They are trained already or, with ``inner``, the start
            of training.
        lam: the hyperparameters, a tree of tensors, which need not require grad.
        adjoint: how to differentiate. ``"auto"`` follows the rule in ``hyperopt.bilevel.auto``; ``estimate.choice`` then says
            what was chosen and why.
        inner: the inner solver that trains ``w`` first (None: ``w`` is trained already). Unrolling needs one.
        step: step of the gradient-step map, above 0, for adjoints that iterate it (None: that of the inner solver, else from
            declared constants, else from power iteration).
        curvature: ``"hessian"``, ``"gauss_newton"`` or ``"finite_differences"``, for implicit adjoints.
        resample: whether each product of an implicit adjoint uses a batch of its own.

    Returns:
        ``Estimate``: ``grad`` in the structure of ``lam``, ``certificate``, ``loss``, ``w``, statistics and cost.

    Raises:
        TypeError, ValueError: an argument does not fit, or a loss is not a scalar or does not depend on ``w``.
        SolveError: a solve failed under ``policy="raise"``, or training diverged.

    Reference: Lorraine et al., AISTATS 2020, arXiv 1911.02590; Grazzi et al., ICML 2020, arXiv 2006.16218.

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> lam = torch.ones(())
        >>> estimate = hyperopt.hypergradient(problem, torch.tensor([0.5]), lam)
        >>> round(float(estimate.grad), 6)
        -0.25
    """
    refuse_unstarted(problem, inner)
    tied = Tied(w)
    problem, w = tied.apart(problem, w)
    if inner is not None or isinstance(adjoint, Estimator):  # both change w in place
        w = optree.tree_map(lambda x: x.detach().clone(), w)
    products = ProductSettings(step=step, warm=False, curvature=curvature, resample=resample)
    estimator = estimator_of(adjoint, inner, products)
    problem.place(w, lam)
    return tied.whole(estimated(estimator, problem, lam, State(w)))


class Bilevel:
    """A bilevel problem with its present state: the weights, warm starts and the memory of the method.

    Args:
        problem: the two losses.
        w: the initial inner variables, a tree of tensors, which are changed in place; with ``Functional`` they are the module's
            own. A tensor at several places of the tree is one variable.
        inner: the inner solver that trains ``w`` before each hypergradient, from its present values (None: nothing is trained).
        adjoint: how to differentiate; ``"auto"`` follows the rule in ``hyperopt.bilevel.auto``, see ``estimate.choice``.
        products: how implicit adjoints compute their products, and whether solves start where the last one ended.

    Attributes:
        state: the weights and what the method remembers.

    Raises:
        TypeError, ValueError: an argument does not fit, or the method would ignore it; the message names it.

    Reference: Grazzi et al., ICML 2020, arXiv 2006.16218; Lorraine et al., AISTATS 2020, arXiv 1911.02590.

    Example:
        >>> import torch, hyperopt
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> bilevel = hyperopt.Bilevel(problem, torch.zeros(1), inner=hyperopt.InnerLBFGS())
        >>> lam = torch.ones((), requires_grad=True)
        >>> estimate = bilevel.step(lam)  # trains w to 1 / (1 + lam)
        >>> estimate.backward(lam)
        >>> round(float(bilevel.w), 3), round(float(lam.grad), 3)
        (0.5, -0.25)
    """

    def __init__(
        self,
        problem: BilevelProblem,
        w: Any,
        *,
        inner: InnerSolver | None = None,
        adjoint: Adjoint | Estimator | str | None = "auto",
        products: ProductSettings | None = None,
    ) -> None:
        refuse_unstarted(problem, inner)
        self._tied = Tied(w)
        self.problem, w = self._tied.apart(problem, w)
        self.estimator = estimator_of(adjoint, inner, products or ProductSettings())
        self.state = State(optree.tree_map(lambda x: x.detach(), w))

    def __repr__(self) -> str:
        return described(self, w=self.w, estimator=type(self.estimator), problem=self.problem)

    @property
    def w(self) -> Any:
        """The present inner variables."""
        return self._tied.expand(self.state.w) if self._tied.any else self.state.w

    def step(self, lam: Any) -> Estimate:
        """Train from the present weights and return the hypergradient where training ends; ``lam`` is not changed."""
        self.problem.place(self.state.w, lam)
        return self._tied.whole(estimated(self.estimator, self.problem, lam, self.state))

    def objective(self, lam: Any, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return the outer loss at the fixed point of the gradient-step map, and that point; see ``core.verify.Objective``.

        ``hyperopt.fixed_point`` solves the map on the next batch of each loss, from the present weights, with a step of ``1 / L``
        by power iteration. No state changes. If a tensor is at several places of ``w``, the solution lists each tensor once.

        Raises:
            ValueError: the Hessian of the inner loss is zero or not finite, so there is no stable step.
        """
        problem, w = self.problem.at_next_batch(), self.state.w
        evaluation = Evaluation(problem, problem.inner_batches.draw())
        largest, _ = largest_curvature(Hessian(evaluation, Leaves.of(w, "w"), Leaves.of(lam, "lam"), check=False))
        if not 0 < largest < math.inf:
            raise ValueError(
                f"the largest curvature of the inner loss is {largest:g} at the present weights, so its gradient-step map has no "
                "stable step; check that the inner loss has a minimum in w, and that the weights are finite"
            )
        phi = GradientMap(problem, GradientDescent(step_size=1 / largest))
        solution = fixed_point(phi, w, (lam,), rows="joint", solver=solver, adjoint=adjoint, policy="ignore")
        return problem.outer(solution.value, lam, problem.outer_batches.draw()), solution

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as plain containers and tensors."""
        return {
            "w": optree.tree_leaves(self.state.w),
            "memory": self.state.memory,
            "inner_batches": self.problem.inner_batches.state_dict(),
            "outer_batches": self.problem.outer_batches.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, the weights in place. If an entry does not fit, nothing is changed.

        Raises:
            TypeError: an entry has another type.
            ValueError: an entry is missing, unknown, or has another shape or dtype; the message names it.
        """
        check_entries(state, ("w", "memory", "inner_batches", "outer_batches"), "Bilevel")
        w, kept = Leaves.of(self.state.w, "w"), list(state["w"])
        if len(kept) != len(w.flat):
            raise ValueError(
                f"the state for Bilevel: the entry 'w' has {len(kept)} tensors, but here it has {len(w.flat)}; nothing was "
                "loaded. Give the state of the same problem"
            )
        check_tensors(dict(zip(w.names, kept, strict=True)), dict(zip(w.names, w.flat, strict=True)), "Bilevel")
        sources = {"inner_batches": self.problem.inner_batches, "outer_batches": self.problem.outer_batches}
        before = {name: copy.deepcopy(source.state_dict()) for name, source in sources.items()}
        memory = copy.deepcopy(state["memory"])
        try:
            for name, source in sources.items():
                source.load_state_dict(state[name])
        except Exception:
            for name, source in sources.items():
                source.load_state_dict(before[name])
            raise
        for leaf, new in zip(optree.tree_leaves(self.state.w), kept, strict=True):
            leaf.copy_(new)
        self.state.memory = memory
