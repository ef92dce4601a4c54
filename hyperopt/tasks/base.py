"""What the outer loop drives: a ``Task`` does one outer step and one evaluation; ``hyperopt.app.run`` owns everything else."""

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
from hyperopt.tasks.exports import Learned
from hyperopt.tasks.trainer import TrainerSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Guard = Callable[[Mapping[str, Sequence[Tensor]]], None]
"""Called in every closure after backward with the groups' gradients themselves, ``{group: [p.grad, ...]}``, never copies of them:
it refuses a group that is not finite, and clips in place. ``guard(self.gradients())`` is all that a task writes."""


MEANS = ("outer/step_accuracy", "outer/jacobian", "warm/rows")
"""Metrics that are means over rows, beside those whose name says so."""

NUMBERS = "has numbers to predict, and this task classifies; give a dataset of classes"


SPLIT_MEASURES = tuple(f"{split}/{kind}" for split in ("outer", "val", "test") for kind in ("loss", "accuracy"))
"""What a task measures that fits a model on one split, is selected on another and tested on a third."""


class HypergradientError(ArithmeticError):
    """A hypergradient, an outer loss or a solve behind them is not usable; the message names the step and the group."""


@dataclass(frozen=True)
class Environment:
    """What a run gives its task.

    Attributes:
        device: where modules and data live.
        dtype: floating type of parameters and data.
        seed: seed of the run; splits and initialisation come from it.
        compile: whether to compile the map (``torch.compile``).
        generator: a CPU generator, seeded, whose state is part of every checkpoint.
        trainer: the settings of the loop: how long a schedule of the task's own is.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    compile: bool
    generator: torch.Generator
    trainer: TrainerSettings = field(default_factory=TrainerSettings)


@dataclass
class StepRecord:
    """What one outer step did.

    Attributes:
        loss: the outer loss before the update (the first evaluation of the closure), logged as ``outer/step_loss``.
        metrics: named numbers of this step: ``inner/iterations`` (of the slowest row), ``inner/iterations_mean`` (over the
            rows), ``inner/residual``, ``inner/contraction``, ``inner/fallbacks`` (equilibria of the step that took one),
            the same for ``adjoint``, ``hypergrad/error_estimate``, ``hypergrad/is_bound``, and ``cost/evaluations``,
            ``cost/vjps`` and ``cost/jvps`` of this step alone, all calls of the closure counted (totals are logged).
        statuses: how the solves ended, keys ``inner`` and ``adjoint``.
        rows: how much this rank weighs in a mean over the ranks.
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, Status] = field(default_factory=dict)
    rows: int = 1

    def over_ranks(self) -> StepRecord:
        """The record of all ranks together: costs summed, means by rows, of everything else the worst, which is the largest."""
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
        """The record of the first call of a closure, its costs those of all calls together."""
        first = records[0]
        for cost in [name for name in first.metrics if name.startswith("cost/")]:
            first.metrics[cost] = sum(record.metrics[cost] for record in records)
        return first


class Task(ABC):
    """A bilevel problem as the outer loop sees it.

    Subclasses set ``name`` and implement the methods below; ``setup`` is called once, before ``groups``.

    Attributes:
        name: what to call the task in files and messages.
        classifies: whether the targets of its dataset must be labels of classes.
        MEASURES: names that an evaluation may have, so that a monitor that it never has is refused at once; empty: not known.
    """

    name: str = "own"
    classifies: ClassVar[bool] = False
    MEASURES: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def setup(self, env: Environment) -> None:
        """Load the data and build the modules on ``env.device`` in ``env.dtype``."""

    @abstractmethod
    def groups(self) -> dict[str, list[Tensor]]:
        """Return the hyperparameters, named and grouped: leaf tensors that require grad, each in one group."""

    @abstractmethod
    def step(self, optimizer: torch.optim.Optimizer, guard: Guard) -> StepRecord:
        """Do one outer step.

        Build a closure (``zero_grad``, loss, ``backward``, ``guard(self.gradients())``, return the loss) and hand it to
        ``optimizer.step``, which may call it several times; then project the hyperparameters where they have a constraint.

        Args:
            optimizer: over the tensors of ``groups()``.
            guard: see ``Guard``.

        Returns:
            The record of the first evaluation, its costs summed over all evaluations; on several ranks that of all of them, see
            ``StepRecord.over_ranks``.
        """

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        loss: Callable[[], Tensor],
        record: Callable[[float], StepRecord] = StepRecord,
        rows: int = 1,
    ) -> StepRecord:
        """Let the optimizer make one step down a loss: all that ``step`` does in most tasks.

        Args:
            optimizer: see ``step``.
            guard: see ``Guard``.
            loss: of this step on the rows of this rank; the same function at every call, since a line search makes several.
            record: makes the record of an evaluation from its loss, after ``backward`` and before ``guard``.
            rows: of this rank, whose mean ``loss`` is.

        Returns:
            The record of the first evaluation, its costs summed over all.
        """
        records: list[StepRecord] = []

        def closure() -> float:
            optimizer.zero_grad()
            value = distributed.mean_over_ranks(loss, rows=rows)
            value.backward()
            records.append(record(value.item()))
            guard(self.gradients())
            return records[-1].loss

        optimizer.step(closure)
        return StepRecord.first_of(records)

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return metrics at the present hyperparameters, without gradients or any change of state.

        Keys: ``outer/*`` on the fitted rows, ``val/*`` on those selected on, ``test/*`` on those held out.
        """

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Solve the inner problem in this way and return the outer loss and the solution, for ``mode=check``; no state changes.

        Raises:
            NotImplementedError: the task has no inner equilibrium to differentiate through, or does not offer it.
        """
        raise NotImplementedError(f"task={self.name} has no objective(solver, adjoint) to check; see Task.objective")

    def learned(self) -> Learned:
        """Return what ``hyperopt export`` keeps: what the metrics of an evaluation at the present state are measured on.

        Raises:
            NotImplementedError: the task has nothing that predicts.
        """
        raise NotImplementedError(f"task={self.name} has no learned() and predictor(), and cannot be exported; see Task.learned")

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Module:
        """Build the model that ``learned`` gives the weights of, from the settings and these facts alone, without data.

        Args:
            shape: of one input, before flattening.
            classes: 0: the outputs are numbers.
            hyperparameters: as learned, for what depends on them.

        Returns:
            A module that takes flattened rows, its initial values whatever they are.
        """
        raise NotImplementedError(f"task={self.name} has no predictor(); see Task.predictor")

    def figures(self) -> Mapping[str, Figure | bytes]:
        """Return named matplotlib figures of the present state; the bytes of a GIF are an animation."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-for-bit resume needs (modules, warm starts, data order) as plain containers and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, in place: the tensors of ``groups()`` stay the same objects."""

    def describe(self) -> dict[str, Any]:
        """Return plain facts for ``run.json``: sizes, the dataset's name and checksums, the rows behind each metric."""
        return {}

    def sizes(self) -> dict[str, int]:
        """Return how many numbers each group of hyperparameters has."""
        return {name: sum(tensor.numel() for tensor in group) for name, group in self.groups().items()}

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return ``{group: [p.grad, ...]}``, hyperparameters without a gradient left out."""
        return {name: [p.grad for p in group if p.grad is not None] for name, group in self.groups().items()}


class FixedSettings:
    """A dataclass whose arguments stay as they are, while ``setup`` and the steps set its other attributes.

    What depends on a setting is built once, so that one changed later would do nothing, or half of what it says.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            FrozenInstanceError: it is an argument of a task that has been made.
        """
        if name in vars(self) and any(each.name == name and each.init for each in fields(self)):  # pyright: ignore
            kind = type(self).__name__
            raise FrozenInstanceError(f"{kind}: {name} is a setting and stays as it is; make another {kind} with {name}=...")
        super().__setattr__(name, value)


def check_dataset(owner: Any) -> None:
    """Refuse a setting ``dataset`` of a task that cannot be its dataset, before anything is loaded; None is one.

    Raises:
        TypeError: it is no dataset, or lacks something; says what it is and what to give.
        ValueError: it says that its targets are numbers, and the task classifies.
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
    """Load the setting ``dataset`` of a task, the digits if it is None; what has no seed of its own is drawn by the run's.

    Raises:
        DataError: what was loaded are no splits, or its targets are numbers, and the task classifies.
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
