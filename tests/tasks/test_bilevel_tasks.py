"""Trained problems as tasks: resumed bit for bit, refused where they cannot work, and what their words mean."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed

from hyperopt.app.building import build
from hyperopt.app.run import run
from hyperopt.bilevel.functional import Functional
from hyperopt.bilevel.inner.gradient_descent import GradientDescent
from hyperopt.bilevel.t1t2 import T1T2
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.linear.cg import CG
from hyperopt.core.verify import check_hypergradient
from hyperopt.data.digits import Digits
from hyperopt.data.sparse import SparseRows
from hyperopt.data.splits import Rows, Splits
from hyperopt.data.synthetic import Synthetic
from hyperopt.spaces.space import Positive
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelSetup, BilevelTask
from hyperopt.tasks.linear import L2Task
from hyperopt.tasks.network import WeightDecayTask
from hyperopt.tasks.scores import loss_of

L2 = ("experiment=l2_logistic", "dataset.train=60", "dataset.val=60", "dataset.test=60")
DIGITS = ("dataset=digits", "dataset.train=60", "dataset.val=60", "dataset.test=60", "inner.max_steps=3")
BATCHES = (*DIGITS, "task.hidden=[8]", "task.batch_size=25", "task.val_batch_size=25", "inner=torch_optimizer")
SMALL = {  # an experiment on data of the tests' own, small
    "l2": L2,
    "l2 by unrolling": (*L2, "inner=heavy_ball", "inner.max_steps=10", "adjoint=unrolled", "task.warm_start=false"),
    "l2 by Neumann": (*L2, "inner=torch_optimizer", "inner.lr=0.01", "inner.max_steps=10", "adjoint=neumann"),
    "l2 outer L-BFGS": (*L2, "optimizer=lbfgs", "optimizer.max_iter=2"),
    "bias_regularization": ("experiment=bias_regularization", "precision=float64"),
    "weight_decay": ("task=weight_decay", *BATCHES, "adjoint=cg_rough"),
    "augmentation": ("task=augmentation", *BATCHES, "adjoint=t1t2"),
    "data_distillation": ("task=data_distillation", *DIGITS, "task.batch_size=25", "inner=heavy_ball", "adjoint=checkpointed"),
}


def made(*overrides: str, dtype: torch.dtype = torch.float64) -> BilevelTask:
    task = build(composed("device=cpu", *overrides)).task
    assert isinstance(task, BilevelTask)
    task.setup(environment(dtype))
    return task


def environment(dtype: torch.dtype = torch.float64) -> Environment:
    return Environment(torch.device("cpu"), dtype, 0, False, torch.Generator().manual_seed(0))


@pytest.mark.cases(quick=0, slow=3)
@pytest.mark.parametrize("name", SMALL)
def test_a_run_resumed_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    rows = {}
    overrides = (*SMALL[name], "trainer.eval_every=2", "trainer.checkpoint_every=1", "resume=auto")
    for where, stops in {"whole": (5,), "stopped": (2, 5)}.items():
        out = tmp_path / where
        for stop in stops:
            run(composed(*overrides, "trainer.progress=false", f"trainer.max_steps={stop}", f"hydra.run.dir={out}"), out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rows[where] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]
    assert len(rows["whole"]) == 5
    # The last step of the shorter run was evaluated because it was the last; a run that goes on has no evaluation there.
    assert rows["stopped"] == rows["whole"]


def test_an_evaluation_changes_nothing() -> None:
    task = made(*SMALL["l2 by Neumann"])
    optimizer = torch.optim.Adam([tensor for group in task.groups().values() for tensor in group])
    task.step(optimizer, lambda gradients: None)
    before = copy.deepcopy(task.state_dict())
    first, again = task.evaluate(), task.evaluate()
    assert first == again
    after = task.state_dict()
    assert torch.equal(before["bilevel"]["w"][0], after["bilevel"]["w"][0])
    assert str(before["bilevel"]["memory"]) == str(after["bilevel"]["memory"])


def test_a_line_search_sees_one_function() -> None:
    task = made(*SMALL["l2 by Neumann"])
    seen = []

    class Twice(torch.optim.SGD):
        def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
            assert closure is not None
            seen.extend([closure(), closure()])
            return super().step(closure)

    task.step(Twice([tensor for group in task.groups().values() for tensor in group], lr=0.1), lambda gradients: None)
    assert seen[0] == seen[1]


def test_ridge_has_the_hypergradient_and_a_bound_of_its_closed_form() -> None:
    task = made("experiment=l2_ridge", "inner.rtol=1e-12", "adjoint.linear_solver.rtol=1e-12")
    lam = task.hyper.values()
    estimate = task.bilevel.step(lam)
    train, val = task.splits.train, task.splits.val
    strengths = lam["l2"].detach().requires_grad_()
    hessian = train.x.T @ train.x / len(train) + torch.diag(strengths[:, 0])
    solution = torch.linalg.solve(hessian, train.x.T @ train.y / len(train))
    (exact,) = torch.autograd.grad(loss_of((val.x @ solution)[:, None], val.y), strengths)
    error = float((estimate.grad["l2"] - exact).norm())
    assert error < 1e-10 * float(exact.norm())
    assert estimate.certificate.is_bound
    rough = made("experiment=l2_ridge", "inner.rtol=1e-2", "adjoint.linear_solver.rtol=1e-2").bilevel.step(lam)
    error = float((rough.grad["l2"] - exact).norm())
    assert 1e-6 < error <= rough.certificate.error < 1000 * error


def test_the_rows_of_the_published_example_give_its_first_validation_loss() -> None:
    task = made("experiment=l2_logistic", "inner=gradient_descent", "inner.max_steps=100", "inner.step_size=0.1")
    assert abs(task.bilevel.step(task.hyper.values()).loss - 0.5744) < 5e-5


@pytest.mark.parametrize("outputs", [1, 3])
def test_sparse_rows_are_the_same_as_dense_ones(outputs: int) -> None:
    splits = Synthetic(train=40, val=30, test=20, features=6, seed=3).load(torch.float64)

    def thinned(rows: Rows, sparse: bool) -> Rows:
        x = torch.where(rows.x.abs() > 1, rows.x, 0)
        y = (rows.x[:, 0] > 0).long() + (rows.x[:, 1] > 0).long() if outputs > 1 else rows.y
        return Rows(SparseRows(x).x if sparse else x, y, rows.index)

    found = []
    for sparse in (False, True):
        parts = [thinned(rows, sparse) for rows in (splits.train, splits.val, splits.test)]
        given = Given(Splits(*parts, num_classes=max(outputs, 2), shape=(6,), name="thin", checksums={}))
        task = L2Task(inner=GradientDescent(max_steps=50, step_size=0.5), l2=Positive(0.1, per="element"), dataset=given)
        task.setup(environment())
        estimate = task.bilevel.step(task.hyper.values())
        found.append((estimate.grad["l2"], torch.tensor([*task.evaluate().values(), *task.retrained().values()])))
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Given:
    """A dataset that is there already."""

    splits: Splits

    def load(self, dtype: torch.dtype, device: torch.device) -> Splits:
        return self.splits


def splits_of(train: int = 8, val: int = 8, labels: tuple[int, int] = (0, 1), classes: int = 2) -> Splits:
    def rows(count: int) -> Rows:
        return Rows(torch.randn(count, 3, dtype=torch.float64), torch.tensor(labels * count)[:count], torch.arange(count))

    return Splits(rows(train), rows(val), rows(8), classes, (3,), "given", {})


BAD = [
    (Given(splits_of(val=0)), Positive(0.1), "no validation rows (dataset.val=0)"),
    (Given(splits_of(labels=(0, 5))), Positive(0.1), "labels from 0 to 5, but there are 2 classes"),
    (Given(splits_of(classes=0)), Positive(0.1), "there are 0 classes, but the targets have dtype torch.int64"),
    (None, Positive(-1.0), "task.l2.init=-1.0 is not inside (0, inf)"),
    (None, Positive(0.0), "change task.l2.init"),
]


NOT_ITS_DATA = [
    ("task=augmentation", "dataset=synthetic", "dataset=synthetic has rows of shape (20,), not images"),
]


@pytest.mark.parametrize(("task", "dataset", "message"), NOT_ITS_DATA, ids=[task for task, _, _ in NOT_ITS_DATA])
def test_a_dataset_of_another_kind_is_refused(task: str, dataset: str, message: str) -> None:
    made = build(composed("device=cpu", task, dataset)).task
    with pytest.raises(ValueError, match=re.escape(message)):
        made.setup(environment())


def test_every_digit_has_its_learned_image_in_the_figure() -> None:
    task = made(*SMALL["data_distillation"])
    figure = task.figures()["images"]
    assert not isinstance(figure, bytes) and len(figure.axes) == 10


class Normalised(WeightDecayTask):
    """A network with batch normalisation."""

    def build(self, env: Environment) -> BilevelSetup:
        parts = super().build(env)
        self.norm = torch.nn.BatchNorm1d(6)
        module = torch.nn.Sequential(torch.nn.Linear(64, 6), self.norm, torch.nn.Linear(6, 10)).to(env.dtype)
        self.model = Functional(module)
        problem = dataclasses.replace(parts.problem, refresh=lambda w, lam, batch: self.model.refresh(w, batch[0]))
        return dataclasses.replace(parts, problem=problem, w=self.model.w, shapes={"decay": self.model.w}, module=module)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("inner", ["lbfgs", "adam", "torch_optimizer"])
def test_a_check_is_about_the_gradient_step_whatever_trains_the_model(inner: str) -> None:
    task = made(*L2, f"inner={inner}", "task.l2.init=0.1")
    before = copy.deepcopy(task.state_dict())
    adjoint = Implicit(CG(rtol=1e-10))
    found = check_hypergradient(task.objective, task.groups(), solver=task.solver, adjoint=adjoint)
    assert found.passed and all(row.error < 1e-5 for row in found.rows)
    assert str(task.state_dict()) == str(before)


def test_rows_to_select_on_are_kept_from_the_hyperparameters() -> None:
    whole, part = made(*L2), made(*L2, "task.selection_rows=20")
    assert {name: len(rows) for name, rows in part.built.rows.items()} == {"train": 60, "outer": 40, "val": 20, "test": 60}
    assert torch.equal(torch.cat([part.built.rows[name].x for name in ("outer", "val")]), whole.built.rows["outer"].x)
    assert whole.built.rows["outer"] is whole.built.rows["val"] is whole.splits.val
    grads = []
    for task in (part, made(*L2, "task.selection_rows=20")):
        if grads:
            task.built.rows["val"].y[:] = 1 - task.built.rows["val"].y
        else:
            changed = part.evaluate()["val/loss"]
        grads.append(task.bilevel.step(task.hyper.values()).grad["l2"])
    assert torch.equal(*grads) and task.evaluate()["val/loss"] != changed
    assert not torch.equal(grads[0], whole.bilevel.step(whole.hyper.values()).grad["l2"])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_is_retrained_on_the_selection_rows_too(sparse: bool) -> None:
    splits = splits_of(train=30, val=30)
    if sparse:
        parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
        splits = dataclasses.replace(splits, **{k: dataclasses.replace(r, x=SparseRows(r.x).x) for k, r in parts.items()})
    found = []
    for kept in (0, 10):
        task = L2Task(l2=Positive(0.1), dataset=Given(splits), retrain=True, selection_rows=kept)
        task.setup(environment())
        found.append(task.evaluate())
        assert set(found[-1]) <= set(task.MEASURES)
    assert "retrained/loss" not in L2Task().MEASURES  # nothing is retrained there
    assert found[0]["retrained/loss"] == found[1]["retrained/loss"]
    assert found[0]["val/loss"] == found[0]["outer/loss"] != found[1]["val/loss"] != found[1]["outer/loss"]


def test_no_rows_are_left_to_fit_to() -> None:
    for task in (L2, (*SMALL["weight_decay"], "task.val_batch_size=null")):
        with pytest.raises(ValueError, match=r"task\.selection_rows=60 leaves none of the 60 validation rows"):
            made(*task, "task.selection_rows=60")


def test_running_statistics_are_part_of_the_state() -> None:
    settings: dict[str, Any] = {"inner": GradientDescent(max_steps=2), "adjoint": T1T2(), "decay": Positive(1e-3)}
    settings["dataset"] = Digits(train=60, val=60, test=60)
    task, again = Normalised(**settings), Normalised(**settings)
    task.setup(environment())
    optimizer = torch.optim.Adam([tensor for group in task.groups().values() for tensor in group])
    task.step(optimizer, lambda gradients: None)
    assert task.norm.running_mean is not None
    moved, state = task.norm.running_mean.clone(), copy.deepcopy(task.state_dict())
    assert float(moved.abs().max()) > 0
    task.evaluate()
    assert torch.equal(task.norm.running_mean, moved)
    again.setup(environment())
    again.load_state_dict(state)
    assert again.norm.running_mean is not None and torch.equal(again.norm.running_mean, moved)


def test_retrained_on_all_rows_it_is_tested_as_the_model_of_all_rows() -> None:
    task = made("experiment=l2_ridge", "task.retrain=true", "inner.rtol=1e-12")
    x, y = (torch.cat([getattr(rows, name) for rows in (task.splits.train, task.splits.val)]) for name in "xy")
    strengths = task.hyper.read()["l2"][:, 0]
    w = torch.linalg.solve(x.T @ x / len(y) + torch.diag(strengths), x.T @ y / len(y))
    test = task.splits.test
    expected = float((test.x @ w - test.y).square().mean() / 2)
    assert task.evaluate()["retrained/loss"] == pytest.approx(expected, rel=1e-9)


def test_words_of_a_user_who_starts_outside_of_a_space() -> None:
    with pytest.raises(ValueError, match=re.escape("change task.decay.init")):
        made(*SMALL["weight_decay"], "task.decay.init=-1")


@pytest.mark.parametrize(("dataset", "space", "message"), BAD, ids=[message for _, _, message in BAD])
def test_what_cannot_work_is_refused_by_name(dataset: Given | None, space: Positive, message: str) -> None:
    task = L2Task(l2=space, dataset=dataset or Given(splits_of()))
    with pytest.raises(ValueError, match=re.escape(message)):
        task.setup(environment())
