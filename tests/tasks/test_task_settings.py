"""The settings of a task are the arguments of its class: named in messages, fixed once it is made, apart from its state."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from hyperopt.data import DataError
from hyperopt.data.diabetes import Diabetes
from hyperopt.data.digits import Digits
from hyperopt.data.splits import Dataset, Splits
from hyperopt.data.synthetic import Synthetic
from hyperopt.spaces.space import Positive
from hyperopt.stn import declare
from hyperopt.tasks.base import Environment
from hyperopt.tasks.cleaning import CleaningTask
from hyperopt.tasks.coupled import CoupledTask
from hyperopt.tasks.distillation import DataDistillationTask
from hyperopt.tasks.equilibrium import EquilibriumTask
from hyperopt.tasks.implicit import ImplicitTask
from hyperopt.tasks.linear import BiasRegularizationTask, L2Task
from hyperopt.tasks.network import AugmentationTask, WeightDecayTask
from hyperopt.tasks.quadratic import QuadraticTask
from hyperopt.tasks.stn_images import StnImagesTask
from hyperopt.tasks.stn_quadratic import StnQuadraticTask
from hyperopt.tasks.stn_ridge import StnRidgeTask

BAD: list[tuple[type, str, Any]] = [
    (AugmentationTask, "scale", 0.0),
    (BiasRegularizationTask, "beta", 0.0),
    (CleaningTask, "corrupted", 1.5),
    (CoupledTask, "y_shape", (3,)),
    (DataDistillationTask, "images_per_class", 0),
    (EquilibriumTask, "state_size", 0),
    (EquilibriumTask, "l2", 0.1),
    (EquilibriumTask, "fitted", "test"),
    (ImplicitTask, "pretrain_iterations", 0),
    (L2Task, "selection_rows", -1),
    (L2Task, "retrain", 1),
    (QuadraticTask, "least", 0.0),
    (StnImagesTask, "eval_rows", 0),
    (StnQuadraticTask, "activation", "step"),
    (StnRidgeTask, "noise", -1.0),
    (WeightDecayTask, "hidden", (0,)),
]
KINDS = sorted({kind for kind, _, _ in BAD}, key=lambda kind: kind.__name__)
WITH_ROWS = [kind for kind in KINDS if "dataset" in kind.__dataclass_fields__]


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_a_bad_value_is_told_with_the_class_and_its_argument(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {name}=.*; (change|lower) {name}$"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_stays_as_it_is(kind: type) -> None:
    made = kind()
    for item in dataclasses.fields(kind):
        if item.init:
            before = getattr(made, item.name)
            with pytest.raises(dataclasses.FrozenInstanceError, match=rf"{kind.__name__}: {item.name} is a setting"):
                setattr(made, item.name, before)
            assert getattr(made, item.name) is before


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_no_argument_and_can_be_set(kind: type) -> None:
    made = kind()
    for item in dataclasses.fields(kind):
        if not item.init:
            setattr(made, item.name, "set twice")
            setattr(made, item.name, "by setup and a step")
            assert not item.repr
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{item.name}'"):
                kind(**{item.name: None})


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_told_apart_by_what_they_are_and_not_by_their_settings(kind: type) -> None:
    one, two = kind(), kind()
    assert one != two and len({one, two, one}) == 2


def test_a_task_with_other_settings_is_another_task() -> None:
    first = L2Task(l2=Positive(0.1), dataset=Digits(train=20, val=20, test=20))
    other = dataclasses.replace(first, batch_size=5)
    assert (first.batch_size, other.batch_size, other.l2) == (None, 5, first.l2)
    env = Environment(torch.device("cpu"), torch.float64, 0, False, torch.Generator().manual_seed(0))
    first.setup(env)
    assert not hasattr(other, "hyper") and len(first.splits.train) == 20


class Own:
    """A dataset that derives from nothing."""

    def load(self, dtype: torch.dtype, device: torch.device) -> Splits:
        """That of the digits."""
        return Digits(train=30, val=20, test=10).load(dtype, device)


class WithMore(Own):
    """One with an argument more, which has a default."""

    def load(self, dtype: torch.dtype, device: torch.device, copies: int = 1) -> Splits:
        """The same."""
        return super().load(dtype, device)


class Static:
    """One whose method is static."""

    @staticmethod
    def load(dtype: torch.dtype, device: torch.device) -> Splits:
        """That of the digits."""
        return Own().load(dtype, device)


class OfTheClass:
    """One whose method is that of the class."""

    @classmethod
    def load(cls, *where: Any) -> Splits:
        """That of the digits."""
        return Own().load(*where)


class Explicit(Dataset):
    """One that says what it is."""

    def load(self, dtype: torch.dtype, device: torch.device) -> Splits:
        """That of the digits."""
        return Own().load(dtype, device)


@pytest.mark.parametrize("own", [Own(), WithMore(), Static(), OfTheClass(), Explicit()], ids=lambda own: type(own).__name__)
def test_a_dataset_of_ones_own_is_one(own: Any) -> None:
    assert issubclass(type(own), Dataset)
    task = EquilibriumTask(state_size=4, dataset=own)
    task.setup(Environment(torch.device("cpu"), torch.float64, 0, False, torch.Generator().manual_seed(0)))
    assert {name: len(rows) for name, rows in task.rows.items()} == {"outer": 30, "val": 20, "test": 10}


class LoadsNothing:
    """Its ``load`` takes neither a dtype nor a device."""

    def load(self) -> Splits:
        """What cannot be called."""
        raise AssertionError


NONE = [
    ((torch.zeros(4, 2), torch.zeros(4), torch.zeros(4)), "a tuple"),
    ("digits", "a str"),
    (torch.zeros(4, 2), "a Tensor"),
    (LoadsNothing(), "a LoadsNothing"),
    (Digits, "the class Digits, not an object of it"),
    (EquilibriumTask(), "a EquilibriumTask"),
    (L2Task(), "a L2Task"),
    (Positive(), "a Positive"),
    (declare.Positive(), "a Positive"),
]


@pytest.mark.parametrize("kind", WITH_ROWS)
@pytest.mark.parametrize(("given", "what"), NONE, ids=[what for _, what in NONE])
def test_something_else_is_refused_as_a_dataset(kind: type, given: Any, what: str) -> None:
    message = rf"^{kind.__name__}: dataset is {what}, and has no method load.* or a pair of arrays \(x, y\); change dataset$"
    with pytest.raises(TypeError, match=message):
        kind(dataset=given)
    assert kind(dataset=None).dataset is None


CLASSIFY = [CleaningTask, DataDistillationTask, EquilibriumTask, ImplicitTask, StnImagesTask]
NUMBERS = [(Diabetes(), "Diabetes"), (Synthetic(targets="numbers"), "Synthetic")]


@pytest.mark.parametrize("kind", CLASSIFY)
@pytest.mark.parametrize(("given", "what"), NUMBERS, ids=[what for _, what in NUMBERS])
def test_numbers_to_predict_are_refused_when_a_task_that_classifies_is_made(kind: type, given: Any, what: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{kind.__name__}: dataset={what}\(\.\.\.\) has numbers to predict, .*; change dataset$"
    ):
        kind(dataset=given)
    assert kind(dataset=Synthetic()).dataset == Synthetic()


@pytest.mark.parametrize("kind", [kind for kind in WITH_ROWS if kind not in CLASSIFY])
def test_other_tasks_take_numbers(kind: type) -> None:
    assert kind(dataset=Diabetes()).dataset == Diabetes()


class Silent:
    """A dataset of numbers that does not say so beforehand."""

    def load(self, dtype: torch.dtype, device: torch.device) -> Splits:
        """That of the diabetes study."""
        return Diabetes().load(dtype, device)


NUMBERS_LATER = [Silent(), (torch.zeros(30, 2), torch.arange(30) / 2), TensorDataset(torch.zeros(30, 2), torch.zeros(30, 1))]


@pytest.mark.parametrize("kind", CLASSIFY)
@pytest.mark.parametrize("given", NUMBERS_LATER, ids=lambda given: type(given).__name__)
def test_what_does_not_say_so_is_refused_once_it_is_there(kind: type, given: Any) -> None:
    task = kind(dataset=given)
    with pytest.raises(DataError, match=r"^dataset=.* has numbers to predict, and this task classifies; .*; change dataset$"):
        task.setup(Environment(torch.device("cpu"), torch.float64, 0, False, torch.Generator().manual_seed(0)))


class Odd:
    """A dataset whose ``load`` forgets to return."""

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return nothing."""


def test_what_loads_no_splits_is_named() -> None:
    with pytest.raises(
        DataError, match=r"Odd\.load returned NoneType, which is not a hyperopt\.data\.splits\.Splits; change its load"
    ):
        EquilibriumTask(dataset=Odd()).setup(  # pyright: ignore[reportArgumentType]
            Environment(torch.device("cpu"), torch.float64, 0, False, torch.Generator().manual_seed(0))
        )
