"""Files in the LIBSVM format, made here in the layout of ijcnn1, and the problem of benchopt's bilevel suite on them."""

from __future__ import annotations

import bz2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from sklearn.datasets import dump_svmlight_file

from hyperopt.app.building import build
from hyperopt.app.repro import seed_everything
from hyperopt.data import DataError
from hyperopt.data.libsvm import Libsvm
from hyperopt.tasks.base import Environment
from hyperopt.tasks.linear import L2Task

FEATURES = 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files of labels -1 and 1; the last feature is zero in every row of the second."""
    random, weights = np.random.RandomState(0), np.linspace(-1, 1, FEATURES)
    for name, rows in (("ijcnn1", 120), ("ijcnn1.t", 90)):
        x = random.randn(rows, FEATURES)
        x[:, -1] *= name == "ijcnn1"
        y = np.sign(x @ weights + 0.3 * random.randn(rows))
        dump_svmlight_file(x, y, str(tmp_path / name), zero_based=False)
    return tmp_path


def test_two_files(root: Path) -> None:
    splits = Libsvm(root=str(root), test=20).load(torch.float64)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [120, 70, 20]
    assert splits.train.x.shape[1] == splits.val.x.shape[1] == FEATURES and splits.num_classes == 2
    first = (root / "ijcnn1").read_text().splitlines()[0].split()
    assert int(splits.train.y[0]) == (float(first[0]) > 0)
    assert splits.train.x[0].tolist() == [float(entry.partition(":")[2]) for entry in first[1:]]
    assert splits.test.index.tolist() == list(range(70, 90)) and set(splits.checksums) == {"ijcnn1", "ijcnn1.t"}


def test_packed_files_are_the_same(root: Path, tmp_path: Path) -> None:
    plain = Libsvm(root=str(root)).load()
    for name in ("ijcnn1", "ijcnn1.t"):
        (root / f"{name}.bz2").write_bytes(bz2.compress((root / name).read_bytes()))
        (root / name).unlink()
    packed = Libsvm(root=str(root)).load()
    assert torch.equal(plain.train.x, packed.train.x) and torch.equal(plain.val.y, packed.val.y)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"file": "covtype"}, DataError, r"there is no .*covtype \(nor covtype.bz2 or covtype.gz\)"),
        ({"train": 121}, DataError, "dataset.train=121, but .* has 120 rows"),
        ({"val": 80, "test": 20}, DataError, "dataset.val=80, but .* has 70 rows for it"),
        ({"test": 90}, DataError, "dataset.val=None, but .* has 0 rows for it"),
        ({"train": 0}, ValueError, "Libsvm: train=0"),
        ({"test": -1}, ValueError, "Libsvm: test=-1"),
        ({"file": " "}, ValueError, "Libsvm: file=' '"),
    ],
)
def test_what_is_refused(root: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Libsvm(**{"root": str(root), **settings}).load()


def test_other_formats_and_other_labels_are_refused(root: Path) -> None:
    (root / "ijcnn1.t").write_text("2 1:0.5\n1 1:0.25\n")
    with pytest.raises(DataError, match=r"has labels .* are they a pair"):
        Libsvm(root=str(root)).load()
    (root / "ijcnn1.t").write_text("label,feature\n1,2\n")
    with pytest.raises(DataError, match="is not in the LIBSVM format"):
        Libsvm(root=str(root)).load()


def task_of(*overrides: str) -> L2Task:
    made = build(composed("experiment=benchopt_ijcnn1", *overrides))
    assert isinstance(made.task, L2Task)
    made.task.setup(Environment(torch.device("cpu"), torch.float64, 0, False, seed_everything(0)))
    return made.task


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("adjoint", ["saba_ijcnn1", "stocbio_ijcnn1", "soba_ijcnn1", "f2sa", "v_pbgd", "cg"])
def test_the_problem_of_the_suite_takes_batches_and_is_measured_on_all_rows(root: Path, adjoint: str) -> None:
    task = task_of(f"paths.data={root}", f"adjoint={adjoint}", "task.batch_size=30", "task.val_batch_size=20")
    batch = task.built.problem.inner_batches.draw()
    assert batch[0].shape == (30, FEATURES) and task.built.problem.outer_batches.draw()[1].shape == (20,)
    optimizer = torch.optim.SGD([leaf for group in task.groups().values() for leaf in group], lr=0.1)
    task.step(optimizer, lambda gradients: None)
    found = task.evaluate()
    assert "test/loss" not in found
    # The model that is measured is the minimum on all training rows, whatever the batches.
    w = torch.zeros(FEATURES, 1, dtype=torch.float64, requires_grad=True)
    x, y, lam = task.splits.train.x, task.splits.train.y.double(), task.hyper.read()["l2"]
    newton = torch.optim.LBFGS([w], lr=1, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Any:
        newton.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits((x @ w)[:, 0], y) + (lam * w.square()).sum() / 2
        loss.backward()
        return loss

    newton.step(closure)
    z = (task.splits.val.x @ w.detach())[:, 0]
    exact = float(torch.nn.functional.binary_cross_entropy_with_logits(z, task.splits.val.y.double()))
    assert found["outer/loss"] == pytest.approx(exact, rel=1e-6)


def test_the_published_steps(root: Path) -> None:
    adjoints: Any = {
        name: task_of(f"paths.data={root}", f"adjoint={name}_ijcnn1").adjoint for name in ("saba", "stocbio", "soba")
    }
    found = {name: each.step_size for name, each in adjoints.items()}
    assert found == {"saba": 0.25, "stocbio": 0.25, "soba": 0.03125}


def test_a_batch_above_the_dataset(root: Path) -> None:
    with pytest.raises(ValueError, match="a batch cannot have 121 rows of a data set of 120"):
        task_of(f"paths.data={root}", "task.batch_size=121")
