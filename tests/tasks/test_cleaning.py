"""Data cleaning: the labels that are replaced, the weights that are found, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from composing import composed

import hyperopt
from hyperopt import SOBA, Bounded, Positive
from hyperopt.app.building import build
from hyperopt.app.repro import seed_everything
from hyperopt.app.run import run
from hyperopt.data.digits import Digits
from hyperopt.tasks.base import Environment
from hyperopt.tasks.cleaning import CleaningTask, found_clean, replaced

DOUBLE = torch.float64


def made(seed: int = 0, **settings: Any) -> CleaningTask:
    given: dict[str, Any] = {"dataset": Digits(train=200, val=200, test=200, seed=seed), "weights": Bounded(per="element")}
    task = CleaningTask(**{**given, **settings})
    task.setup(Environment(torch.device("cpu"), DOUBLE, seed, False, seed_everything(seed)))
    return task


def test_labels_are_replaced_by_the_seed_alone():
    labels = torch.arange(1000) % 10
    one, which = replaced(labels, 10, 0.5, 3)
    again, same = replaced(labels, 10, 0.5, 3)
    other, _ = replaced(labels, 10, 0.5, 4)
    assert torch.equal(one, again) and torch.equal(which, same) and not torch.equal(one, other)
    assert int(which.sum()) == 500 and torch.equal(one != labels, which) and 0 <= int(one.min()) <= int(one.max()) < 10
    shifts = ((one - labels) % 10)[which].bincount(minlength=10)
    assert shifts[0] == 0 and (shifts[1:] > 25).all()  # each of the other classes


def test_the_found_set_is_scored():
    weights, corrupt = torch.tensor([0.9, 0.8, 0.7, 0.2, 0.1]), torch.tensor([False, False, True, False, True])
    assert found_clean(weights, corrupt) == pytest.approx({"clean/precision": 2 / 3, "clean/recall": 2 / 3, "clean/f1": 2 / 3})
    assert found_clean(torch.zeros(5), corrupt)["clean/f1"] == 0


@pytest.mark.slow
def test_the_weights_of_wrong_labels_fall():
    """A single loop on digits, from weights of one half; a set of all rows, or of rows at random, has an F1 of 2/3 at most."""
    task = made(adjoint=SOBA(step_size=0.5))
    optimizer = torch.optim.Adam([leaf for group in task.groups().values() for leaf in group], lr=0.1)
    for _ in range(150):
        task.step(optimizer, lambda gradients: None)
    metrics = task.evaluate()
    weights = task.hyper.read()["weights"]
    assert metrics["clean/f1"] > 0.8
    assert float(weights[~task.corrupt].mean()) > 2 * float(weights[task.corrupt].mean())
    assert set(metrics) >= {"train/loss", "outer/accuracy", "test/accuracy", "clean/precision", "clean/recall"}


def test_the_inner_loss_weighs_each_row_of_its_batch():
    task = made(batch_size=50, decay=0.3)
    batch = task.built.problem.inner_batches.draw()
    lam = {"weights": torch.rand(200, dtype=DOUBLE)}
    w = {name: torch.randn_like(leaf) for name, leaf in task.model.w.items()}
    z = batch[0] @ w["0.weight"].T + w["0.bias"]
    each = z.logsumexp(1) - z.gather(1, batch[1][:, None])[:, 0]
    decay = 0.15 * sum(float(x.square().sum()) for x in w.values())
    expected = (lam["weights"][batch[2]] * each).sum() / 50 + decay
    torch.testing.assert_close(task.built.problem.inner(w, lam, batch), expected)


@dataclass(frozen=True)
class OneClass(Digits):
    """Digits whose validation rows are all zeros."""

    def load(self, dtype, device):
        splits = super().load(dtype, device)
        return replace(splits, val=splits.val.take(splits.val.y == 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": OneClass(train=100, val=100, test=50)}, "validation labels of 1 class"),
        ({"batch_size": 201}, "task.batch_size=201: a batch cannot have 201 rows of a data set of 200; lower task.batch_size"),
        ({"val_batch_size": 500}, "task.val_batch_size=500: a batch cannot have 500 rows of a data set of 200"),
        ({"corrupted": 1.5}, "corrupted=1.5"),
        ({"decay": -1.0}, "decay=-1.0"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adjoint.end=0.5", "adjoint.end=0.5: the penalty does not grow, from start=1.0"),
        ("adjoint=f2sa adjoint.growth=0", "adjoint.growth=0: the penalty does not grow"),
    ],
)
def test_a_penalty_that_does_not_grow_is_refused_by_its_key(override, message):
    cfg = composed("experiment=data_cleaning_mnist", *override.split())
    with pytest.raises(ValueError, match=re.escape(message)):
        build(cfg)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("adjoint", ["cg", "neumann_rough", "unrolled", "soba", "saba", "stocbio", "f2sa", "v_pbgd"])
def test_the_experiment_takes_any_adjoint(adjoint):
    build(composed("experiment=data_cleaning_mnist", f"adjoint={adjoint}"))


SHORT = {"stocbio": ["adjoint.steps=1", "adjoint.terms=1"], "f2sa": ["adjoint.steps=1"]}  # else the first step diverges already


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("adjoint", ["soba", "saba", "stocbio", "f2sa", "v_pbgd"])
def test_a_run_in_which_a_method_diverges_keeps_its_last_good_checkpoint(adjoint, tmp_path):
    """The run says which step to lower and has failed; what it left is finite and from before."""
    rows = ["dataset=digits", "dataset.train=50", "dataset.val=50", "dataset.test=50", "inner.max_steps=1", "task.decay=1.0"]
    long = ["optimizer=adam", "device=cpu", "trainer.checkpoint_every=1", "trainer.max_steps=100", "trainer.progress=false"]
    cfg = composed("task=data_cleaning", *rows, *long, f"adjoint={adjoint}", "adjoint.step_size=3", *SHORT.get(adjoint, []))
    with pytest.raises(hyperopt.SolveError, match=r"ended as (diverged|nonfinite).*Lower step_size=3"):
        run(cfg, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "Lower step_size=3 of " in summary["reason"]
    assert f" is adjoint={adjoint} (its arguments are keys of adjoint)" in summary["reason"]
    kept = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    weights = kept["task"]["bilevel"]["w"]
    assert kept["task"]["steps"] == summary["steps"] > 0 and all(bool(leaf.isfinite().all()) for leaf in weights)


def test_a_method_that_diverges_is_named_by_the_task():
    task = made(adjoint=SOBA(step_size=1e4), weights=Positive(per="element"), decay=1.0)
    optimizer = torch.optim.Adam([leaf for group in task.groups().values() for leaf in group], lr=0.1)
    with pytest.raises(hyperopt.SolveError, match=r"SOBA ended as .*step_size=10000 of SOBA"):
        for _ in range(20):
            task.step(optimizer, lambda gradients: None)
    assert all(leaf.isfinite().all() for leaf in task.bilevel.w.values())
