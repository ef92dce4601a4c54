"""What the outer loop drives: a ``Task`` does one outer step and one evaluation; ``hyperopt.app.run`` owns everything else."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.core import distributed
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution, Status
from hyperopt.data.splits import Dataset
from hyperopt.tasks.exports import Learned
from hyperopt.tasks.trainer import TrainerSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Guard = Callable[[Mapping[str, Sequence[Tensor]]], None]
"""Called in every closure after backward with the groups' gradients themselves, ``{group: [p.grad, ...]}``, never copies of them:
it refuses a group that is not finite, and clips in place. ``guard(self.gradients())`` is all that a task writes."""


MEANS = ("outer/step_accuracy", "outer/jacobian", "warm/rows")
"""Metrics that are means over rows, beside those whose name says so."""


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
        name: of the task, for messages and files.
        MEASURES: names that an evaluation may have, so that a monitor that it never has is refused at once; empty: not known.
    """

    name: str
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
    """Refuse a setting ``dataset`` of a task that is no dataset, before anything is loaded; None is one.

    Raises:
        TypeError: says what it is and what to give.
    """
    given = owner.dataset
    if given is not None and not issubclass(type(given), Dataset):
        what = f"the class {given.__name__}, not an object of it" if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(
            f"{type(owner).__name__}: dataset is {what}, and has no method load(dtype, device) that returns "
            "hyperopt.data.splits.Splits; change dataset"
        )


@contextlib.contextmanager
def drawing(generator: torch.Generator) -> Iterator[None]:
    """Initial values from ``generator`` alone, in float32 whatever the run's precision: one seed, one network."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
