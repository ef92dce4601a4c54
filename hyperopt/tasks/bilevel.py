"""Trained problems as tasks; a subclass gives the two losses and the data.

    min over lam   E(w(lam), lam)     outer loss, on the rows to which the hyperparameters are fitted
    subject to     w(lam) = argmin L(., lam)     inner loss, a training loss

One outer step trains ``w`` from its present values, takes one hypergradient there and updates the hyperparameters. An
evaluation trains a copy at the present hyperparameters and changes nothing.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import optree
import torch
from torch import Tensor, nn

from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.finite_difference import FiniteDifference
from hyperopt.bilevel.hypergradient import Bilevel
from hyperopt.bilevel.implicit import ProductSettings
from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.inner.gradient_descent import GradientDescent
from hyperopt.bilevel.over_ranks import over_ranks
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.checkpointed import Checkpointed
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.checks import check_flag
from hyperopt.core.policy import SolveError
from hyperopt.core.solvers.anderson import Anderson
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution, Status
from hyperopt.data.splits import Dataset, Rows, Splits
from hyperopt.spaces.hyperparameters import Hyperparameters
from hyperopt.spaces.space import Real
from hyperopt.tasks.base import (
    Environment,
    FixedSettings,
    GradientCheck,
    HypergradientError,
    StepRecord,
    Task,
    check_dataset,
    load_splits,
)
from hyperopt.tasks.exports import LearnedModel, named
from hyperopt.tasks.scores import loss_of, scores

Found = TypeVar("Found")


@dataclass(frozen=True)
class BilevelSetup:
    """What a subclass builds.

    Attributes:
        problem: the two losses and their batches.
        w: the initial inner variables, a tree of tensors.
        shapes: the shape of each hyperparameter that is not a single number, see ``Hyperparameters``.
        rows: the rows on which ``<name>/loss`` and ``<name>/accuracy`` are measured, by name.
        module: the model, if it has buffers, which are then part of every checkpoint.
        whole: the problem on all rows, for the training of an evaluation (None: ``problem``).
    """

    problem: BilevelProblem
    w: Any
    shapes: Mapping[str, Any]
    rows: Mapping[str, Rows]
    module: nn.Module | None = None
    whole: BilevelProblem | None = None


@dataclass(eq=False)
class BilevelTask(FixedSettings, Task):
    """A trained problem as a task.

    Attributes:
        inner: the inner solver that trains the model (None: gradient descent).
        adjoint: how to differentiate (None: the rule of ``hyperopt.bilevel.auto``).
        products: how an implicit adjoint computes its products.
        warm_start: whether each training starts where the last one ended; else it starts from the initial weights.
        dataset: the rows (None: digits).
        solver: the solver of ``mode=check``, for the fixed point of the gradient step.
        spaces: names of the settings that are spaces; they are the hyperparameters.
        hyper: the hyperparameters, after ``setup``.
        bilevel: the problem with its present state, after ``setup``.
        built: what the subclass has built, after ``setup``.
        splits: the dataset, after ``setup``.
    """

    inner: InnerSolver | None = None
    adjoint: Adjoint | Estimator | None = None
    products: ProductSettings = field(default_factory=ProductSettings)
    warm_start: bool = True
    dataset: Dataset | None = None

    solver: ClassVar[FixedPointSolver] = Anderson(rtol=1e-8, max_steps=1000)

    spaces: ClassVar[tuple[str, ...]]

    hyper: Hyperparameters = field(init=False, repr=False)
    bilevel: Bilevel = field(init=False, repr=False)
    built: BilevelSetup = field(init=False, repr=False)
    splits: Splits = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the flag and the dataset."""
        check_flag(self, "warm_start")
        check_dataset(self)

    @abstractmethod
    def build(self, env: Environment) -> BilevelSetup:
        """Return the losses, the model and the rows, from ``self.splits``."""

    def predict(self, w: Any, x: Tensor) -> Tensor:
        """Return the outputs of the model at ``w``: logits, or numbers; there need not be one. shape: (n, outputs)."""
        raise NotImplementedError(f"task={self.name} has no model that predicts for rows")

    def outer(self, w: Any, lam: Any, batch: Any) -> Tensor:
        """Return the mean loss of the model on a batch ``(x, y)``."""
        return loss_of(self.predict(w, batch[0]), batch[1])

    def setup(self, env: Environment) -> None:
        """Load the rows and build the problem.

        Raises:
            ValueError: there are no validation rows, labels do not fit, or a hyperparameter starts outside its space.
        """
        self.load(env)
        built = self.build(env)
        whole = None if built.whole is None else over_ranks(built.whole)
        self.built = built = replace(built, problem=over_ranks(built.problem), whole=whole)
        self.hyper = self.hyperparameters(env)
        # An estimator trains the weights itself and takes no inner solver; evaluations still train by one.
        adjoint, products = self.adjoint, self.products
        inner = None if isinstance(adjoint, Estimator) else self._inner
        if isinstance(adjoint, Estimator | Unrolled | Checkpointed):
            products = None  # only implicit adjoints have them
        elif isinstance(adjoint, FiniteDifference):
            products = replace(products, curvature="hessian")
        self.bilevel = Bilevel(built.problem, built.w, inner=inner, adjoint=adjoint, products=products)
        self._w0 = None if self.warm_start else optree.tree_map(torch.clone, self.bilevel.w)
        self._steps = 0  # number of outer steps so far

    def load(self, env: Environment) -> None:
        """Load the rows; called before ``build``."""
        self.splits = load_splits(self, env)
        check_labels(self.splits)

    def hyperparameters(self, env: Environment) -> Hyperparameters:
        """Return the initial hyperparameters; called after ``build``."""
        spaces = {name: getattr(self, name) for name in self.spaces}
        return Hyperparameters(spaces, self.built.shapes, dtype=env.dtype, device=env.device, key="task")

    @property
    def _inner(self) -> InnerSolver:
        return self.inner or GradientDescent()

    def groups(self) -> dict[str, list[Tensor]]:
        """Return the raw hyperparameters by name."""
        return self.hyper.groups()

    def values(self) -> dict[str, Tensor]:
        """Return the hyperparameters by name, in the user's units."""
        return named(self.hyper.read())

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set hyperparameters to values in the user's units; see ``Task.set_values``."""
        self.hyper.write(values)

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one outer step; see ``Task.step``."""
        records: list[StepRecord] = []
        start = self._state()  # restored in every call of the closure, since a line search needs one fixed function

        def closure() -> float:
            if records:
                self._return_to(start)
            self._cold()
            optimizer.zero_grad()
            lam = self.hyper.values()
            estimate = self.bilevel.step(lam)
            refuse_failed_solve(self._steps, estimate.statuses(), estimate.note)
            try:
                estimate.backward(lam)
            except SolveError as error:
                raise HypergradientError(f"step {self._steps}: {error}") from error
            check(self.gradients())
            records.append(StepRecord(estimate.loss, estimate.metrics(), estimate.statuses()))
            return estimate.loss

        optimizer.step(closure)
        self.hyper.project_()
        first = StepRecord.first_of(records).over_ranks()
        first.metrics.update(self.hyper.metrics())
        self._steps += 1
        return first

    def evaluate(self) -> dict[str, float]:
        """Train at the present hyperparameters, measure on all rows, and restore the state."""
        return self._at_trained(self.measure)

    def learned(self) -> LearnedModel:
        """Return the hyperparameters, and the model as an evaluation trains it.

        Raises:
            NotImplementedError: there is no model that predicts.
        """
        if type(self).predict is BilevelTask.predict:
            return super().learned()
        weights = self._at_trained(lambda w: optree.tree_map(torch.clone, w))
        return LearnedModel.on(self.splits, self.state_of(weights), self.hyper.read())

    def hyperparameter_values(self) -> dict[str, Tensor]:
        """Return the values in their spaces; see ``Task.hyperparameter_values``."""
        leaves = {name: optree.tree_leaves(tree) for name, tree in self.hyper.read().items()}
        return {name: torch.cat([leaf.flatten() for leaf in each]) for name, each in leaves.items() if each}

    def state_of(self, w: Any) -> Mapping[str, Tensor]:
        """Return the weights as the state of ``predictor`` (default: unchanged)."""
        return w

    def _at_trained(self, measure: Callable[[Any], Found]) -> Found:
        """Train at the present hyperparameters, return ``measure(w)``, and restore the state."""
        start = self._state()
        self._cold()
        self._inner.solve(self.built.whole or self.built.problem, self.hyper.read(), self.bilevel.state)
        found = measure(self.bilevel.w)
        self._return_to(start)
        return found

    def measure(self, w: Any) -> dict[str, float]:
        """Return ``<name>/loss``, and ``<name>/accuracy`` if there are classes, of a model on each set of rows."""
        return scores(self.built.rows, lambda x: self.predict(w, x))

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return the outer loss at the fixed point of the gradient step, whatever ``inner`` is; see ``Task.objective``."""
        return self.bilevel.objective(self.hyper.values(), solver, adjoint)

    def state_dict(self) -> dict[str, Any]:
        """Return the hyperparameters, the weights, and what the method remembers."""
        return {"hyper": self.hyper.state_dict(), "steps": self._steps, **self._live()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, in place."""
        self.hyper.load_state_dict(state["hyper"])
        self._steps = state["steps"]
        self._return_to(state)

    def describe(self) -> dict[str, Any]:
        """Return sizes, the dataset with its checksums, and the rows behind each metric."""
        return {
            "name": self.name,
            "hyperparameters": self.sizes(),
            "weights": sum(leaf.numel() for leaf in optree.tree_leaves(self.bilevel.w)),
            **self.describe_data(),
        }

    def describe_data(self) -> dict[str, Any]:
        """Return the dataset with its checksums, and the rows behind each metric."""
        return {
            "dataset": self.splits.name,
            "checksums": self.splits.checksums,
            "classes": self.splits.num_classes,
            "rows": {name: len(rows) for name, rows in self.built.rows.items()},
        }

    def _live(self) -> dict[str, Any]:
        """Return everything that training and hypergradients change, without copying it."""
        module = self.built.module
        return {"bilevel": self.bilevel.state_dict(), "buffers": {} if module is None else dict(module.named_buffers())}

    def _state(self) -> dict[str, Any]:
        return copy.deepcopy(self._live())

    @torch.no_grad()
    def _return_to(self, state: Mapping[str, Any]) -> None:
        self.bilevel.load_state_dict(state["bilevel"])
        if self.built.module is not None:
            for name, buffer in self.built.module.named_buffers():
                buffer.copy_(state["buffers"][name])

    @torch.no_grad()
    def _cold(self) -> None:
        """Without warm starts, restore the initial weights."""
        if self._w0 is not None:
            for leaf, first in zip(optree.tree_leaves(self.bilevel.w), optree.tree_leaves(self._w0), strict=True):
                leaf.copy_(first)


@torch.no_grad()
def starting_at(trees: Mapping[str, Any]) -> Hyperparameters:
    """Return unbounded hyperparameters with the values of trees of tensors, such as the initial weights of a network."""
    first: Tensor = next(leaf for tree in trees.values() for leaf in optree.tree_leaves(tree))
    spaces = {name: Real(per="element") for name in trees}
    made = Hyperparameters(spaces, trees, dtype=first.dtype, device=first.device, key="task")
    for name, tree in trees.items():
        for leaf, start in zip(optree.tree_leaves(made.raw[name]), optree.tree_leaves(tree), strict=True):
            leaf.copy_(start)
    return made


def refuse_failed_solve(step: int, statuses: Mapping[str, Status], note: str) -> None:
    """Refuse a hypergradient whose solve broke down; ``check`` could say only that it is not finite.

    Raises:
        HypergradientError: the message names the step, the solve, and what to change.
    """
    for name, status in statuses.items():
        if status >= Status.breakdown:
            raise HypergradientError(f"step {step}: the {name} solve ended as {status.name}: {note or status.message}")


def check_labels(splits: Splits) -> None:
    """Refuse a dataset without validation rows, and labels outside its classes.

    Raises:
        ValueError: the message names the split and the labels.
    """
    if not len(splits.val):
        raise ValueError(
            f"dataset={splits.name} has no validation rows (dataset.val=0), but the hyperparameters are fitted to them; "
            "raise dataset.val"
        )
    for name in ("train", "val", "test"):
        y = getattr(splits, name).y
        if y.is_floating_point() != (splits.num_classes == 0):
            what = f"there are {splits.num_classes} classes, but the targets have dtype {y.dtype}"
            raise ValueError(f"dataset={splits.name}: {what}; change dataset")
        if splits.num_classes and len(y) and not 0 <= int(y.min()) <= int(y.max()) < splits.num_classes:
            raise ValueError(
                f"dataset={splits.name}: the {name} rows have labels from {int(y.min())} to {int(y.max())}, but there are "
                f"{splits.num_classes} classes, 0 to {splits.num_classes - 1}; change the labels or num_classes"
            )
