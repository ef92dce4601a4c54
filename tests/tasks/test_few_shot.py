"""Few-shot classification: what a task is made of, and that tasks solved together are differentiated as in a loop over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from hyperopt import CG, Checkpointed, GradientDescent, Implicit, Unrolled
from hyperopt.app.building import build
from hyperopt.app.config import ConfigError
from hyperopt.app.repro import seed_everything
from hyperopt.data.diabetes import Diabetes
from hyperopt.data.digits import Digits
from hyperopt.data.own import Own
from hyperopt.data.synthetic import Synthetic
from hyperopt.tasks.base import Environment
from hyperopt.tasks.few_shot import FewShotTask

DOUBLE = torch.float64
DIGITS = Digits(train=300, val=200, test=200)
SMALL: dict[str, Any] = {
    **{"dataset": DIGITS, "ways": 3, "shots": 2, "queries": 4, "tasks": 3, "channels": (4, 5), "val_tasks": 2, "test_tasks": 3},
    "inner": GradientDescent(step_size=0.1, max_steps=2),
}


def made(seed: int = 0, **settings: Any) -> FewShotTask:
    task = FewShotTask(**{**SMALL, **settings})
    task.setup(Environment(torch.device("cpu"), DOUBLE, seed, False, seed_everything(seed)))
    return task


def gradients(task: FewShotTask) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}

    def keep(grads: Mapping[str, Any]) -> None:
        found.update({name: [g.clone() for g in group] for name, group in grads.items()})

    task.step(torch.optim.SGD([t for group in task.groups().values() for t in group], lr=1e-300), keep)
    return found


def by_a_loop(task: FewShotTask, steps: int) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, accuracy and gradient by a loop over the tasks of the latest step, with the module itself and plain autograd."""
    theta = {name: leaf.clone().requires_grad_() for name, leaf in task.hyper.read()["initial"].items()}
    at, module, losses, right = task.episodes, task.model.module, [], []
    for x, y, query_x, query_y in zip(at.x, at.y, at.query_x, at.query_y, strict=True):
        w = theta
        for _ in range(steps):
            slopes = torch.autograd.grad(
                functional.cross_entropy(functional_call(module, w, x), y), list(w.values()), create_graph=True
            )
            w = {name: leaf - 0.1 * g for (name, leaf), g in zip(w.items(), slopes, strict=True)}
        outputs = functional_call(module, w, query_x)
        losses.append(functional.cross_entropy(outputs, query_y))
        right.append((outputs.argmax(1) == query_y).double().mean().item())
    total = torch.stack(losses).mean()
    slopes = torch.autograd.grad(total, list(theta.values()))
    return total.item(), sum(right) / len(right), dict(zip(theta, slopes, strict=True))


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(segment=1)], ids=["unrolled", "checkpointed"])
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_a_loop_over_tasks(adjoint: Any, steps: int) -> None:
    task = made(adjoint=adjoint, inner=GradientDescent(step_size=0.1, max_steps=steps))
    found = gradients(task)["initial"]
    _, _, wanted = by_a_loop(task, steps)
    for name, g in zip(sorted(wanted), found, strict=True):
        torch.testing.assert_close(g, wanted[name], rtol=1e-8, atol=1e-12)


def test_the_measures_are_those_of_a_loop() -> None:
    task = made()
    found = task.evaluate()
    for split, count in (("outer", 3), ("val", 2), ("test", 3)):
        task.episodes = task.drawn(split, 0, count)
        loss, accuracy, _ = by_a_loop(task, 2)
        assert found[f"{split}/loss"] == pytest.approx(loss, rel=1e-9)
        assert found[f"{split}/accuracy"] == pytest.approx(accuracy)
    assert set(found) == set(task.MEASURES) and "test/accuracy_2_shots_10_steps" in found


@pytest.mark.parametrize("split", ["outer", "val", "test"])
def test_a_task_has_different_classes_and_no_query_among_its_shots(split: str) -> None:
    task = made()
    rows = task.classes[split].rows
    at = task.drawn(split, 0, 20)
    assert at.x.shape == (20, 6, 1, 8, 8) and at.query_x.shape == (20, 12, 1, 8, 8)
    seen = set()
    for t in range(20):
        x, y = torch.cat([at.x[t], at.query_x[t]]).flatten(1), torch.cat([at.y[t], at.query_y[t]])
        places = [int(torch.where((rows.x == row).all(1))[0][0]) for row in x]
        assert len(set(places)) == 18
        classes = {
            int(label): {int(rows.y[p]) for p, at_label in zip(places, y, strict=True) if at_label == label} for label in y
        }
        assert all(len(each) == 1 for each in classes.values()) and len(set.union(*classes.values())) == 3
        assert torch.bincount(at.y[t]).tolist() == [2, 2, 2] and torch.bincount(at.query_y[t]).tolist() == [4, 4, 4]
        seen.add(tuple(places))
    assert len(seen) == 20


def test_all_classes_and_rows_are_drawn() -> None:
    task = made()
    of = task.classes["outer"]
    at = task.drawn("outer", 0, 500)
    shown = {tuple(row.tolist()) for row in torch.cat([at.x, at.query_x], 1).flatten(0, 1).flatten(1)}
    assert len(shown) == len({tuple(row.tolist()) for row in of.rows.x})
    assert of.counts.tolist() == torch.bincount(of.rows.y).tolist() and int(of.counts.min()) < int(of.counts.max())


def test_tasks_are_drawn_by_the_seed_and_their_number_alone() -> None:
    task, other = made(), made(seed=1)
    assert torch.equal(task.drawn("outer", 0, 5).x[3:], task.drawn("outer", 3, 2).x)
    assert not torch.equal(task.drawn("outer", 0, 5).x, other.drawn("outer", 0, 5).x)


def test_a_continued_run_is_the_same() -> None:
    task, other = made(), made()
    optimizer = torch.optim.Adam(task.groups()["initial"], lr=1e-2)
    for _ in range(2):
        task.step(optimizer, lambda grads: None)
    other.load_state_dict(task.state_dict())
    for g, wanted in zip(gradients(task)["initial"], gradients(other)["initial"], strict=True):
        assert torch.equal(g, wanted)


@pytest.mark.slow
def test_it_learns_to_tell_digits_apart() -> None:
    inner = GradientDescent(step_size=0.4, max_steps=1)
    task = made(tasks=6, shots=1, channels=(8, 8), val_tasks=30, eval_steps=(), inner=inner)
    optimizer = torch.optim.Adam(task.groups()["initial"], lr=1e-2)
    before = task.evaluate()["val/accuracy"]
    for _ in range(25):
        task.step(optimizer, lambda grads: None)
    assert task.evaluate()["val/accuracy"] > before + 0.1


FEW = np.arange(40) % 4
IMAGES = np.random.RandomState(0).rand(40, 1, 6, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 11}, r"^task\.ways=11 is more than the 10 classes of the train rows of dataset=digits; lower task\.ways"),
        (
            {"queries": 60},
            r"^2 shots and task\.queries=60 are more than the \d+ train rows that a class of dataset=digits has; lower",
        ),
        ({"shots": 40}, r"^40 shots and .*lower task\.shots"),
        ({"eval_shots": (1, 50)}, r"^50 shots and .* test rows .*task\.eval_shots"),
        ({"dataset": Digits(train=300, val=0, test=100)}, r"has no val rows; raise dataset\.val"),
        ({"dataset": Synthetic()}, r"has rows of shape \(20,\), not images; change dataset"),
        ({"dataset": Own((IMAGES, FEW), train=20, val=10, test=10), "ways": 5}, r"^task\.ways=5 is more than the 4 classes"),
    ],
)
def test_more_than_the_data_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        made(**settings)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 1}, "^FewShotTask: ways=1 must be a whole number >= 2; change ways"),
        ({"shots": 0}, "^FewShotTask: shots=0 must be"),
        ({"tasks": 0}, "^FewShotTask: tasks=0 must be"),
        ({"channels": (0,)}, r"^FewShotTask: channels=\(0,\) must list"),
        ({"adjoint": Implicit(CG())}, "adjoint=Implicit differentiates the minimum"),
        ({"dataset": Diabetes()}, "has numbers to predict, and this task classifies"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotTask(**settings)


@pytest.mark.parametrize("override", ["task.ways=1", "task.queries=0", "task.channels=[8,-1]", "dataset.val=0"])
def test_a_command_that_cannot_work_is_refused_before_any_work(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as told:
        build(composed("experiment=few_shot_omniglot", override))
    assert "\n" not in str(told.value)
