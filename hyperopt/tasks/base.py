"""``Task``: what one outer step and one evaluation do. ``hyperopt.app.run`` drives a task and owns everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.core import distributed
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution, Status
from hyperopt.core.text import called
from hyperopt.data.digits import Digits
from hyperopt.data.own import Own, as_dataset
from hyperopt.data.reading import DataError
from hyperopt.data.splits import Splits
from hyperopt.tasks.exports import LearnedModel
from hyperopt.tasks.trainer import TrainerSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GradientCheck = Callable[[Mapping[str, Sequence[Tensor]]], None]
"""A check of the gradients ``{group: [p.grad, ...]}``, which a task calls in every closure after ``backward``, as
``check(self.gradients())``. It refuses a group that is not finite and clips in place, so copies will not do."""


MEANS = ("outer/step_accuracy", "outer/jacobian", "warm/rows")
"""Metrics that are means over rows, in addition to those whose names end in ``_mean``."""

NUMBERS = "has numbers to predict, and this task classifies; give a dataset of classes"

SPLIT_MEASURES = tuple(f"{split}/{kind}" for split in ("outer", "val", "test") for kind in ("loss", "accuracy"))
"""The metrics of a task that fits a model on one split, selects it on another and tests it on a third."""


class HypergradientError(ArithmeticError):
    """A hypergradient, an outer loss or one of their solves cannot be used; the message names the step and the group."""


@dataclass(frozen=True)
class Environment:
    """What a run gives its task.

    Attributes:
        device: device of modules and data.
        dtype: floating-point dtype of parameters and data.
        seed: seed of the run, for splits and initialisation.
        compile: whether to compile the map (``torch.compile``).
        generator: a seeded CPU generator, whose state is part of every checkpoint.
        trainer: the settings of the outer loop, which a schedule of the task may need.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    compile: bool
    generator: torch.Generator
    trainer: TrainerSettings = field(default_factory=TrainerSettings)


@dataclass
class StepRecord:
    """The results of one outer step.

    Attributes:
        loss: the outer loss before the update (the first evaluation of the closure), logged as ``outer/step_loss``.
        metrics: numbers of this step by name: ``inner/iterations`` (of the slowest row), ``inner/iterations_mean`` (over the
            rows), ``inner/residual``, ``inner/contraction``, ``inner/fallbacks`` (number of equilibria that used one), the same
            for ``adjoint``, ``hypergrad/error_estimate``, ``hypergrad/is_bound``, and ``cost/evaluations``, ``cost/vjps`` and
            ``cost/jvps`` of this step, over all calls of the closure (the run logs totals).
        statuses: how the solves ended, by the names ``inner`` and ``adjoint``.
        rows: weight of this rank in a mean over the ranks.
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, Status] = field(default_factory=dict)
    rows: int = 1

    def over_ranks(self) -> StepRecord:
        """Return the record of all ranks: sums of costs, means weighted by rows, and the largest of every other number."""
        if distributed.ranks() == 1:
            return self
        records: list[StepRecord] = distributed.from_all(self)
        weights = torch.tensor([float(record.rows) for record in records], dtype=torch.float64)
        metrics = {}
        for name in self.metrics:
            values = torch.tensor([record.metrics[name] for record in records], dtype=torch.float64)
            if name.startswith("cost/"):
                metrics[name] = float(values.sum())
            elif name.endswith("_mean") or name in MEANS:
                metrics[name] = float((values * weights).sum() / weights.sum())
            else:
                metrics[name] = float(values.max())
        statuses = {name: max(record.statuses[name] for record in records) for name in self.statuses}
        return StepRecord(self.loss, metrics, statuses, sum(record.rows for record in records))

    @staticmethod
    def first_of(records: Sequence[StepRecord]) -> StepRecord:
        """Return the record of the first call of a closure, with the costs of all calls added up."""
        first = records[0]
        for cost in [name for name in first.metrics if name.startswith("cost/")]:
            first.metrics[cost] = sum(record.metrics[cost] for record in records)
        return first


class Task(ABC):
    """A bilevel problem as the outer loop sees it.

    Subclasses set ``name`` and implement the methods below; ``setup`` is called once, before ``groups``.

    Attributes:
        name: name of the task in files and messages.
        classifies: whether the targets of its dataset must be class labels.
        MEASURES: the metrics that an evaluation may return, so that another ``trainer.monitor`` is refused early (empty: not
            known).
    """

    name: str = "own"
    classifies: ClassVar[bool] = False
    MEASURES: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def setup(self, env: Environment) -> None:
        """Load the data and build the modules on ``env.device`` in ``env.dtype``."""

    @abstractmethod
    def groups(self) -> dict[str, list[Tensor]]:
        """Return the hyperparameters as named groups of leaf tensors that require grad, each tensor in one group."""

    def values(self) -> dict[str, Tensor]:
        """Return the hyperparameters by name, in the user's units, without a graph.

        Names and values are those of ``learned().hyperparameters``, or those of the model's parameters if the hyperparameters are
        the model (default: the tensors of ``groups`` themselves, numbered in a group of several).
        """
        groups = self.groups()
        return {
            name if len(group) == 1 else f"{name}.{k}": tensor.detach()
            for name, group in groups.items()
            for k, tensor in enumerate(group)
        }

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set hyperparameters to values like those of ``values``, in place; those that are not named stay.

        Raises:
            ValueError: a value is outside of the space of its hyperparameter; nothing was changed.
        """
        own = self.values()
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} has an entry that is not finite")
        for name, value in values.items():
            own[name].copy_(value)

    @abstractmethod
    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one outer step.

        Build a closure (``zero_grad``, loss, ``backward``, ``check(self.gradients())``, return the loss) and pass it to
        ``optimizer.step``, which may call it several times; then project hyperparameters that have a constraint.

        Args:
            optimizer: the optimizer of the tensors of ``groups()``.
            check: see ``GradientCheck``.

        Returns:
            The record of the first evaluation, with the costs of all evaluations; on several ranks, the record of all ranks,
            see ``StepRecord.over_ranks``.
        """

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        check: GradientCheck,
        loss: Callable[[], Tensor],
        record: Callable[[float], StepRecord] = StepRecord,
        rows: int = 1,
    ) -> StepRecord:
        """Let the optimizer make one step on a loss; this is all that ``step`` does in most tasks.

        Args:
            optimizer: see ``step``.
            check: see ``GradientCheck``.
            loss: the loss on the rows of this rank. It must be the same function in every call, since a line search makes
                several.
            record: makes the record of an evaluation from its loss, after ``backward`` and before ``check``.
            rows: number of rows of this rank, over which ``loss`` is a mean.

        Returns:
            The record of the first evaluation, with the costs of all evaluations.
        """
        records: list[StepRecord] = []

        def closure() -> float:
            optimizer.zero_grad()
            value = distributed.mean_over_ranks(loss, rows=rows)
            value.backward()
            records.append(record(value.item()))
            check(self.gradients())
            return records[-1].loss

        optimizer.step(closure)
        return StepRecord.first_of(records)

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return metrics at the present hyperparameters, without gradients or any change of state.

        Their names are ``outer/*`` on the fitted rows, ``val/*`` on the rows for selection, ``test/*`` on the held-out rows.
        """

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return the outer loss and the solution found by a solver and an adjoint, for ``mode=check``; no state changes.

        Raises:
            NotImplementedError: the task has no inner equilibrium, or does not implement this.
        """
        raise NotImplementedError(
            f"task={self.name} does not implement objective(solver, adjoint), so mode=check cannot check it"
        )

    def learned(self) -> LearnedModel:
        """Return what ``hyperopt export`` keeps: the model that an evaluation at the present state measures.

        Raises:
            NotImplementedError: the task has no model that predicts.
        """
        raise NotImplementedError(f"task={self.name} has no learned() and predictor(), and cannot be exported; see Task.learned")

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Module:
        """Build the model whose weights ``learned`` returns, from the settings and these arguments only, without data.

        Args:
            shape: shape of one input, before flattening.
            classes: number of classes; 0 if the outputs are numbers.
            hyperparameters: the learned hyperparameters, if the model depends on them.

        Returns:
            A module that takes flattened rows; its initial values do not matter.
        """
        raise NotImplementedError(f"task={self.name} has no predictor(); see Task.predictor")

    def hyperparameter_values(self) -> Mapping[str, Tensor]:
        """Return the entries of each hyperparameter in its own units, of which a run shows histograms (default: the groups)."""
        groups = self.groups().items()
        return {name: torch.cat([each.detach().flatten() for each in group]) for name, group in groups if group}

    def figures(self) -> Mapping[str, Figure | bytes]:
        """Return matplotlib figures of the present state by name; an animation is the bytes of a GIF."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-for-bit resume needs (modules, warm starts, data order), as plain containers and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, in place: the tensors of ``groups()`` stay the same objects."""

    def describe(self) -> dict[str, Any]:
        """Return facts for ``run.json``: sizes, the dataset's name and checksums, the number of rows of each metric."""
        return {}

    def sizes(self) -> dict[str, int]:
        """Return the number of entries of each group of hyperparameters."""
        return {name: sum(tensor.numel() for tensor in group) for name, group in self.groups().items()}

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return ``{group: [p.grad, ...]}``, without hyperparameters that have no gradient."""
        return {name: [p.grad for p in group if p.grad is not None] for name, group in self.groups().items()}


class FixedSettings:
    """A dataclass whose arguments cannot be changed, while ``setup`` and the steps set its other attributes.

    A task is built from its settings once, so a setting that is changed later would have no effect, or only part of one.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            FrozenInstanceError: the attribute is an argument.
        """
        if name in vars(self) and any(each.name == name and each.init for each in fields(self)):  # pyright: ignore
            kind = type(self).__name__
            raise FrozenInstanceError(f"{kind}: {name} is a setting and cannot be changed; make another {kind} with {name}=...")
        super().__setattr__(name, value)


def check_dataset(owner: Any) -> None:
    """Refuse a setting ``dataset`` that does not fit the task, before anything is loaded. None is allowed.

    Raises:
        TypeError: the setting is not a dataset, or lacks a method; the message says what to give.
        ValueError: its targets are numbers, but the task classifies.
    """
    given, name = owner.dataset, type(owner).__name__
    if given is None:
        return
    try:
        dataset = as_dataset(given)
    except TypeError as error:
        raise TypeError(f"{name}: dataset: {error}; change dataset") from error
    if dataset is None:
        what = f"the class {given.__name__}, not an object of it" if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(
            f"{name}: dataset is {what}, and has no method load(dtype, device) that returns hyperopt.data.splits.Splits, nor is "
            "it a torch.utils.data.Dataset or a pair of arrays (x, y); change dataset"
        )
    if owner.classifies and getattr(dataset, "regression", False):
        raise ValueError(f"{name}: dataset={type(dataset).__name__}(...) {NUMBERS}; change dataset")


def load_splits(owner: Any, env: Environment) -> Splits:
    """Load the dataset of a task (None: the digits); a dataset without a seed uses that of the run.

    Raises:
        DataError: ``load`` does not return splits, or the targets are numbers, but the task classifies.
    """
    dataset = Digits(seed=env.seed) if owner.dataset is None else as_dataset(owner.dataset)
    assert dataset is not None  # see ``check_dataset``
    if isinstance(dataset, Own) and dataset.seed is None:
        dataset = replace(dataset, seed=env.seed)
    splits = dataset.load(env.dtype, env.device)
    if not isinstance(splits, Splits):
        what = f"{called(dataset)}.load returned {called(splits)}"
        raise DataError(f"{what}, which is not a hyperopt.data.splits.Splits; change its load")
    if owner.classifies and not splits.num_classes:
        raise DataError(f"dataset={splits.name} {NUMBERS} (labels are whole numbers); change dataset")
    return splits
