"""Meta-Weight-Net: its loss has the gradient that the paper trains by, and its hypergradient is that of plain autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from composing import composed
from torch import Tensor
from torch.nn import functional

from hyperopt import Checkpointed, GradientDescent, Unrolled
from hyperopt.app.building import build
from hyperopt.app.config import ConfigError
from hyperopt.app.repro import seed_everything
from hyperopt.data.digits import Digits
from hyperopt.data.splits import Rows
from hyperopt.tasks.base import Environment
from hyperopt.tasks.weight_net import WeightNetTask, long_tailed

DOUBLE = torch.float64


def made(seed: int = 0, train: int = 60, val: int = 30, **settings: Any) -> WeightNetTask:
    given: dict[str, Any] = {
        "hidden": (8,),
        "width": 10,
        "inner": GradientDescent(step_size=0.5, max_steps=1),
        "adjoint": Unrolled(),
    }
    task = WeightNetTask(dataset=Digits(train=train, val=val, test=100, seed=seed), **{**given, **settings})
    task.setup(Environment(torch.device("cpu"), DOUBLE, seed, False, seed_everything(seed)))
    return task


def spread(task: WeightNetTask) -> None:
    """Put the classifier where losses differ, and the learned network where its weights differ from loss to loss."""
    raw = task.hyper.raw["weight_net"]
    with torch.no_grad():
        for leaf in task.model.w.values():
            leaf *= 2
        raw["second.weight"].copy_(-3 * raw["first.weight"].mT.sign() * raw["second.weight"].abs())  # it falls
        raw["first.bias"] -= 2.3 * raw["first.weight"][:, 0]


def losses_of(task: WeightNetTask, w: dict[str, Tensor]) -> Tensor:
    train = task.splits.train
    return functional.cross_entropy(task.model(w, train.x), train.y, reduction="none")


def gradients(task: WeightNetTask) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(grads: Mapping[str, Any]) -> None:
        found.extend(g.clone() for g in grads["weight_net"])

    task.step(torch.optim.SGD(task.groups()["weight_net"], lr=1e-300), keep)
    return found


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_its_gradient_weighs_each_row_by_its_loss(decay: float) -> None:
    task = made(decay=decay)
    spread(task)
    w = {name: leaf.clone().requires_grad_() for name, leaf in task.model.w.items()}
    batch = task.built.problem.inner_batches.draw()
    found = torch.autograd.grad(task.built.problem.inner_loss(w, task.hyper.read(), batch), list(w.values()))
    losses = losses_of(task, w)
    weights = task.weights(losses)
    assert float(weights.max() - weights.min()) > 0.1
    penalty = decay / 2 * torch.stack([leaf.square().sum() for leaf in w.values()]).sum()
    wanted = torch.autograd.grad((weights.detach() * losses).mean() + penalty, list(w.values()))
    for g, like in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, like, rtol=1e-5, atol=1e-8)


def by_hand(task: WeightNetTask, steps: int, detached: bool) -> list[Tensor]:
    """The outer gradient through steps ``w - step mean_i V(l_i) grad l_i`` by plain autograd."""
    theta = {name: leaf.clone().requires_grad_() for name, leaf in task.hyper.read()["weight_net"].items()}
    w = {name: leaf.clone().requires_grad_() for name, leaf in task.model.w.items()}
    for _ in range(steps):
        losses = losses_of(task, w)
        weights = task.weight_net(theta, losses.detach() if detached else losses)
        slopes = torch.autograd.grad(losses, list(w.values()), weights / len(losses), create_graph=True)
        w = {name: leaf - 0.5 * g for (name, leaf), g in zip(w.items(), slopes, strict=True)}
    outer = functional.cross_entropy(task.model(w, task.fitted.x), task.fitted.y)
    found = dict(zip(theta, torch.autograd.grad(outer, list(theta.values())), strict=True))
    return [found[name] for name in sorted(found)]


def test_one_inner_step_is_the_published_algorithm() -> None:
    task = made()
    spread(task)
    wanted = by_hand(task, 1, detached=True)
    for g, like in zip(gradients(task), wanted, strict=True):
        torch.testing.assert_close(g, like, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(segment=2)], ids=["unrolled", "checkpointed"])
def test_more_inner_steps_need_the_derivative_of_the_weight(adjoint: Any) -> None:
    task = made(inner=GradientDescent(step_size=0.5, max_steps=4), adjoint=adjoint)
    spread(task)
    right, without = by_hand(task, 4, detached=False), by_hand(task, 4, detached=True)
    found = torch.cat([g.flatten() for g in gradients(task)])
    right, without = (torch.cat([g.flatten() for g in each]) for each in (right, without))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-8)
    assert float((without - right).norm()) > 1e-2 * float(right.norm())


@pytest.mark.parametrize(("imbalance", "kept"), [(1.0, [40, 40, 40]), (4.0, [40, 20, 10]), (1e9, [40, 1, 1])])
def test_a_long_tail(imbalance: float, kept: list[int]) -> None:
    y = torch.arange(120) % 3
    rows = Rows(torch.arange(120.0)[:, None], y, torch.arange(120))
    found = long_tailed(rows, 3, imbalance)
    assert torch.bincount(found.y).tolist() == kept
    assert torch.equal(found.x[:, 0].long(), found.index) and torch.equal(found.y, found.index % 3)
    assert torch.equal(found.index, found.index.sort().values)


def test_labels_are_replaced_after_the_tail_is_cut() -> None:
    task = made(train=600, imbalance=20.0, corrupted=0.5)
    train = task.splits.train
    assert len(train) == len(task.corrupt) < 300 and int(task.corrupt.sum()) == round(len(train) / 2)
    plain = made(train=600, imbalance=20.0, corrupted=0.0).splits.train
    assert torch.equal(plain.index, train.index) and torch.equal(plain.y != train.y, task.corrupt)


def test_it_finds_the_rows_whose_labels_are_wrong() -> None:
    task = made(train=300, val=200, hidden=(), width=20, inner=GradientDescent(step_size=0.5, max_steps=3))
    val = task.splits.val
    with torch.enable_grad():
        for _ in range(50):  # a classifier that knows the clean rows: wrong labels have large losses from the start
            w = {name: leaf.clone().requires_grad_() for name, leaf in task.model.w.items()}
            slopes = torch.autograd.grad(functional.cross_entropy(task.model(w, val.x), val.y), list(w.values()))
            for leaf, g in zip(task.model.w.values(), slopes, strict=True):
                leaf -= g
    before = task.evaluate()
    optimizer = torch.optim.Adam(task.groups()["weight_net"], lr=0.02)
    for _ in range(40):
        task.step(optimizer, lambda grads: None)
    after = task.evaluate()
    assert abs(before["weight/right_labels"] - before["weight/replaced_labels"]) < 0.2
    assert after["weight/right_labels"] > after["weight/replaced_labels"] + 0.2
    assert set(task.figures()) == {"weights"}


def test_without_replaced_labels_they_have_no_measure() -> None:
    found = made(corrupted=0.0).evaluate()
    assert "weight/right_labels" in found and "weight/replaced_labels" not in found
    assert set(found) <= set(WeightNetTask.MEASURES)


def test_a_continued_run_is_the_same() -> None:
    task, other = made(batch_size=20), made(batch_size=20)
    optimizer = torch.optim.SGD(task.groups()["weight_net"], lr=0.1)
    for _ in range(2):
        task.step(optimizer, lambda grads: None)
    other.load_state_dict(task.state_dict())
    for g, like in zip(gradients(task), gradients(other), strict=True):
        assert torch.equal(g, like)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.imbalance=0.5"], r"task\.imbalance=0\.5 is not in \[1\.0, inf\); change task\.imbalance"),
        (["task.imbalance=0"], r"task\.imbalance=0 "),
        (["task.width=0"], r"task\.width=0 must be"),
        (["task.corrupted=1.5"], r"task\.corrupted=1\.5 is not in"),
        (["task.decay=-1"], r"task\.decay=-1 is not in"),
        (["dataset=diabetes"], "has numbers to predict, and this task classifies"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_any_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        build(composed("task=weight_net", *overrides))
    assert "\n" not in str(told.value)
