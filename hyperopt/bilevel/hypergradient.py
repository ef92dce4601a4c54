"""``hypergradient``: the hypergradient of a trained inner problem, and ``Bilevel``, the same from one outer step to the next."""

from __future__ import annotations

import copy
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
from hyperopt.bilevel.problem import BilevelProblem, Leaves
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


def estimator_of(adjoint: Adjoint | Estimator | str | None, inner: InnerSolver | None, products: ProductSettings) -> Estimator:
    """The estimator that an adjoint makes for trained inner problems; ``"auto"`` and None are ``Auto()``.

    Raises:
        TypeError: it is neither an adjoint nor an estimator, or needs what a trained problem does not have; or ``inner`` is no
            inner solver.
        ValueError: it goes through training, and the inner solver is missing or cannot be differentiated through; or it has no
            use for the inner solver or for the products.
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
    if isinstance(adjoint, FiniteDifference):  # its products are differences of gradients already
        refuse_ignored(adjoint, None, products, ("curvature",))
    if isinstance(adjoint, ImplicitAdjoint) and not isinstance(adjoint, Shine):
        if not adjoint.iterates:  # the solution of the adjoint system does not depend on a step
            method = adjoint.linear_solver if isinstance(adjoint, Implicit) else adjoint
            refuse_ignored(method, None, products, ("step", "power"))
        given = {field.name: getattr(products, field.name) for field in fields(ProductSettings)}
        if isinstance(adjoint, Auto):
            return AutoEstimator(**given, inner=inner, auto=adjoint)
        return ImplicitEstimator(**given, adjoint=adjoint, inner=inner)
    if isinstance(adjoint, Unrolled | Checkpointed):
        if not isinstance(inner, DifferentiableSolver):
            what = "there is no inner solver" if inner is None else f"{inner.name} cannot be differentiated through"
            raise ValueError(
                f"{type(adjoint).__name__} goes back through training, but {what}; give inner=GradientDescent(...), "
                'HeavyBall(...) or InnerAdam(...), or an implicit adjoint such as adjoint="auto"'
            )
        refuse_ignored(adjoint, None, products, unused)
        return UnrolledEstimator(adjoint, inner)
    raise TypeError(
        f'adjoint={adjoint!r} is not an adjoint of a trained problem; give "auto", Implicit(CG()), Unrolled(), OneStep(), ...'
    )


def refuse_unstarted(problem: BilevelProblem, inner: InnerSolver | None) -> None:
    """Refuse a problem that says where training starts, without an inner solver that trains.

    Raises:
        ValueError: names ``initial``.
    """
    if problem.initial is not None and inner is None:
        raise ValueError(
            "the problem has initial=..., where each training starts, but nothing trains: give inner=GradientDescent(...)"
        )


def estimated(estimator: Estimator, problem: BilevelProblem, lam: Any, state: State) -> Estimate:
    """An estimate.

    Raises:
        SolveError: a solve failed; names hyperparameters that are not finite, which would explain it.
    """
    try:
        return estimator.estimate(problem, lam, state)
    except SolveError as error:
        bad = [name for name, leaf in named(lam, "lam") if not bool(leaf.isfinite().all())]
        if bad:
            raise SolveError(
                f"{', '.join(bad)} has entries that are not finite, so that nothing can be trained: {error}"
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
    r"""The hypergradient of a trained inner problem.

    .. math:: dE/d\lambda = d_\lambda E - (d_\lambda \nabla_w L)^T u, \qquad H u = d_w E.

    Args:
        problem: the two losses.
        w: the inner variables, a tree of tensors: trained already, or, with ``inner``, where training starts. Not changed.
        lam: the hyperparameters, a tree of tensors; need not require grad.
        adjoint: how to differentiate. ``"auto"`` chooses by what it meets, see ``hyperopt.bilevel.auto``, and says in
            ``estimate.choice`` what it chose and why.
        inner: trains ``w`` first; methods that differentiate through training need it.
        step: of the gradient-step map, for adjoints that iterate it (default: the inner solver's, else from declared constants,
            else from power iteration).
        curvature: ``"hessian"``, ``"gauss_newton"`` or ``"finite_differences"``; of implicit adjoints.
        resample: whether each of their products has a batch of its own.

    Returns:
        ``Estimate``: ``grad`` in the structure of ``lam``, ``certificate``, ``loss``, ``w``, statistics and cost.

    Raises:
        TypeError, ValueError: losses that are no scalars, or depend on nothing; see the messages.
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
    if inner is not None or isinstance(adjoint, Estimator):  # both may move it
        w = optree.tree_map(lambda x: x.detach().clone(), w)
    products = ProductSettings(step=step, warm=False, curvature=curvature, resample=resample)
    estimator = estimator_of(adjoint, inner, products)
    problem.place(w, lam)
    return tied.whole(estimated(estimator, problem, lam, State(w)))


class Bilevel:
    """A bilevel problem under way: trained weights, warm starts and the memory of every method, in one place.

    Args:
        problem: the two losses.
        w: where the inner variables start, a tree in which one tensor at several places is one variable. Its tensors are changed
            in place: with ``Functional`` they are the module's own.
        inner: trains them before each hypergradient, from where they are.
        adjoint: how to differentiate; ``"auto"`` chooses by what it meets, and says so in ``estimate.choice``.
        products: how implicit adjoints take their products, and whether they start where the last one ended; see
            ``ProductSettings``.

    Attributes:
        state: what is carried along.
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
        """Nothing is trained yet."""
        refuse_unstarted(problem, inner)
        self._tied = Tied(w)
        self.problem, w = self._tied.apart(problem, w)
        self.estimator = estimator_of(adjoint, inner, products or ProductSettings())
        self.state = State(optree.tree_map(lambda x: x.detach(), w))

    @property
    def w(self) -> Any:
        """The inner variables."""
        return self._tied.expand(self.state.w) if self._tied.any else self.state.w

    def step(self, lam: Any) -> Estimate:
        """Train from where the weights are, and return the hypergradient there; ``lam`` itself is not changed."""
        self.problem.place(self.state.w, lam)
        return self._tied.whole(estimated(self.estimator, self.problem, lam, self.state))

    def objective(self, lam: Any, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """The outer loss at the fixed point of the gradient-step map, and that point: see ``hyperopt.core.verify.Objective``.

        The primitive alone is at work here, on the next batch of each loss, from the present weights, at the step ``1 / L`` by
        power iteration. No state changes.
        """
        problem = self.problem.at_next_batch()
        batch = problem.inner_batches.draw()
        largest, _ = largest_curvature(Hessian(Evaluation(problem, batch), Leaves.of(self.w, "w"), Leaves.of(lam, "lam")))
        phi = GradientMap(problem, GradientDescent(step_size=1 / largest))
        solution = fixed_point(phi, self.w, (lam,), rows="joint", solver=solver, adjoint=adjoint, policy="ignore")
        return problem.outer(solution.value, lam, problem.outer_batches.draw()), solution

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, as plain containers and tensors."""
        return {
            "w": optree.tree_leaves(self.state.w),
            "memory": self.state.memory,
            "inner_batches": self.problem.inner_batches.state_dict(),
            "outer_batches": self.problem.outer_batches.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, the weights in place: all of it, or nothing.

        Raises:
            TypeError: an entry of another kind.
            ValueError: names the entry that is missing, unknown, or of another shape or dtype; nothing was changed.
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
