"""What a user gives by mistake is refused in one sentence, before anything is trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hyperopt
from hyperopt import stn
from hyperopt.stn import Bounded, Draw, Dropout, HyperSpace, Positive, SelfTuning, convert
from hyperopt.tasks.stn_problem import ImageBatches

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
TRAIN, VAL = (X[:12], Y[:12]), (X[12:], Y[12:])
NONE = (X[:0], Y[:0])
BAD = X[:12].clone()
BAD[3, 1] = math.nan


def train_loss(model: stn.STN, batch: Any, draw: Draw) -> Tensor:
    return (model(batch[0], draw) - batch[1]).square().mean() + (draw.h["decay"] * model.squared_norm(draw)).mean()


def valid_loss(model: stn.STN, batch: Any, draw: Draw | None) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def made(train: Any = train_loss, valid: Any = valid_loss, **how: Any) -> SelfTuning:
    torch.manual_seed(0)
    space = HyperSpace({"rate": Bounded(0.3, 0.0, 0.9), "decay": Positive(0.01)})
    return SelfTuning(convert(nn.Sequential(Dropout("rate"), nn.Linear(3, 1)), space), train, valid, **how)


def rowwise(model: stn.STN, batch: Any, draw: Draw | None) -> Tensor:
    return (model(batch[0], draw) if draw is not None else model(batch[0])).square()


@pytest.mark.parametrize(
    ("how", "train", "val", "what"),
    [
        ({}, (BAD, Y[:12]), VAL, "train_loss is nan before the first update: check the data"),
        ({}, TRAIN, (BAD, Y[:12]), "valid_loss is nan before the first update: check the data"),
        ({}, TRAIN, (X[12:] / 0, Y[12:]), "valid_loss is (nan|inf) before the first update"),
        ({}, NONE, VAL, r"train_loss: the batch has no rows \(shape \(0, 3\)\); is the training set empty"),
        ({}, TRAIN, NONE, r"valid_loss: the batch has no rows \(shape \(0, 3\)\); is the validation set empty"),
        ({}, DataLoader(TensorDataset(*NONE), 4), VAL, "train is a DataLoader without batches"),
        ({}, TRAIN, DataLoader(TensorDataset(*VAL), 40, drop_last=True), "val is a DataLoader without batches.*drop_last=True"),
        ({}, [], VAL, "train is an empty list"),
        ({}, None, VAL, "a batch of type NoneType has no tensor with rows"),
        ({"train": rowwise}, TRAIN, VAL, r"train_loss returned a tensor of shape \(12, 1\); it must be a scalar"),
        ({"valid": rowwise}, TRAIN, VAL, r"valid_loss returned a tensor of shape \(8, 1\); it must be a scalar"),
        ({"train": lambda m, b, d: train_loss(m, b, d).item()}, TRAIN, VAL, "train_loss returned a float"),
        ({"valid": lambda m, b, d: (valid_loss(m, b, d), 1.0)}, TRAIN, VAL, "valid_loss returned a tuple"),
        ({"train": lambda m, b, d: train_loss(m, b, d).detach()}, TRAIN, VAL, "train_loss does not depend on the weights"),
        ({"valid": lambda m, b, d: valid_loss(m, b, d).detach()}, TRAIN, VAL, "valid_loss does not depend on weights that resp"),
        ({"train": lambda m, b, d: train_loss(m, b, d) * 1j}, TRAIN, VAL, "train_loss returned a complex number"),
    ],
)
def test_losses_and_data_are_refused_before_the_first_update(how: dict[str, Any], train: Any, val: Any, what: str) -> None:
    tuning = made(**how)
    before = [p.detach().clone() for p in tuning.model.parameters()]
    with pytest.raises((TypeError, ValueError, stn.TuningError), match=what) as error:
        tuning.step(train, val)
    assert "\n" not in str(error.value)
    assert all(map(torch.equal, before, tuning.model.parameters())) and tuning.updates == 0 and tuning.steps == 0


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: made(train=lambda model, batch: 0), r"train_loss is called train_loss\(model, batch, draw\), but takes other"),
        (lambda: made(valid=lambda model, batch: 0), r"valid_loss is called valid_loss\(model, batch, draw\), but takes other"),
        (lambda: made(train=3), "train_loss is a int; it must be a function"),
        (lambda: made(settings={"mode": "delta"}), r"settings=\{'mode': 'delta'\} is not a SelfTuningSettings"),
        (lambda: made(seed="a"), "seed='a' is not an int"),
        (lambda: made(weights=3), r"weights is an int; give a function that makes it .*functools.partial\(torch.optim.Adam"),
        (
            lambda: made(values=torch.optim.SGD([nn.Parameter(X)], 0.1)),
            "values is a SGD, which is built already; give a function",
        ),
        (lambda: convert(nn.Linear(3, 1), {"a": Positive(1.0)}), "space=.* is not a HyperSpace"),  # pyright: ignore
        (lambda: convert(len, HyperSpace({"a": Positive(1.0)})), "module=.* is not a Module; give the network"),  # pyright: ignore
        (lambda: HyperSpace(["a"]), r"space=\['a'\] does not name its hyperparameters; give \{name: Positive"),  # pyright: ignore
        (lambda: HyperSpace(Positive(1.0)), "does not name its hyperparameters"),  # pyright: ignore
        (lambda: HyperSpace([("a", Positive(1.0)), ("a", Positive(2.0))]), "two hyperparameters are called 'a'; rename one"),
        (lambda: HyperSpace({"a/low": Positive(1.0)}), "'a/low' cannot be the name of a hyperparameter; .*without a /"),
        (
            lambda: HyperSpace({"a": Positive(0.1)}, dtype=torch.bfloat16),
            "a.init=0.1 would be off .*too coarse; use torch.float32",
        ),
        (lambda: HyperSpace({"a": Bounded(1.5, 0.0, 0.9)}), r"init=1.5 is not inside \(0, 0.9\).*change init"),
        (lambda: HyperSpace({"a": Positive(-1.0)}), r"init=-1.0 is not inside \(0, inf\).*change init"),
        (lambda: HyperSpace({"a": stn.Discrete(20, 0, 16)}), "init=20 is not inside .*change init"),
    ],
)
def test_arguments_are_refused_where_they_are_given(build: Callable[[], Any], what: str) -> None:
    with pytest.raises((TypeError, ValueError), match=what) as error:
        build()
    assert "\n" not in str(error.value)


def test_the_checks_before_the_first_update_change_no_number() -> None:
    def run(checked: bool) -> list[Tensor]:
        tuning = made(weights=functools.partial(torch.optim.Adam, lr=0.1))
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            if not checked:
                patch.setattr("hyperopt.stn.step.refuse_valid_loss", lambda *given: None)
            sources = hyperopt.Minibatches(TRAIN, 4, seed=0), hyperopt.Minibatches(VAL, 4, seed=1)
            for _ in range(3):
                tuning.step(*sources)
        return [p.detach() for p in tuning.model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


def test_what_the_validation_loss_changes_before_the_first_update_is_put_back() -> None:
    calls = {"count": 0}

    def counted(model: stn.STN, batch: Any, draw: Draw | None) -> Tensor:
        calls["count"] += 1
        return valid_loss(model, batch, draw)

    tuning = made(valid=counted)
    tuning.step(TRAIN, VAL)
    tuning.step(TRAIN, VAL)
    assert calls["count"] == 2


def test_losses_that_call_the_network_without_the_draw_are_at_the_draw_in_every_check() -> None:
    held: list[bool] = []

    def bare(model: stn.STN, batch: Any, draw: Draw) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean() + (draw.h["decay"] * model.squared_norm(draw)).mean()

    def watched(model: stn.STN, batch: Any, draw: Draw | None) -> Tensor:
        held.append(model._context.draw is not None)
        return valid_loss(model, batch, draw)

    one, two = (made(train=each, valid=watched, settings=stn.SelfTuningSettings(check_every=2)) for each in (train_loss, bare))
    for _ in range(4):
        torch.manual_seed(1)  # of the dropout
        a = one.step(TRAIN, VAL)
        torch.manual_seed(1)
        assert two.step(TRAIN, VAL).as_dict() == a.as_dict()
    assert "stn/response_error" in a.metrics and all(held)


@pytest.mark.parametrize(("kind", "key"), [("train", "task.batch_size"), ("val", "task.val_batch_size")])
def test_a_batch_larger_than_its_rows_names_its_own_key(kind: str, key: str) -> None:
    class Few:
        index = torch.arange(3)

        def __len__(self) -> int:
            return 3

    rows: Any = Few()
    with pytest.raises(ValueError, match=rf"{key}=5 is more than the 3 rows of dataset.{kind}; lower {key}, or raise dataset"):
        ImageBatches(rows, (1, 2, 2), 5, 0, kind)
