"""Datasets that are no images: drawn from a linear model, scikit-learn's diabetes study, and sparse word counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperopt.data import DataError
from hyperopt.data.diabetes import Diabetes
from hyperopt.data.newsgroups import Newsgroups
from hyperopt.data.synthetic import Synthetic


def test_rows_of_a_linear_model() -> None:
    settings: dict[str, Any] = {"train": 300, "val": 200, "test": 100, "features": 5, "noise": 0.0, "shift": 3.0, "seed": 7}
    splits = Synthetic(**settings, targets="numbers").load(torch.float64)
    weights = np.random.RandomState(7).randn(5) + 3
    for rows, count in ((splits.train, 300), (splits.val, 200), (splits.test, 100)):
        assert len(rows) == count
        torch.testing.assert_close(rows.x @ torch.from_numpy(weights), rows.y)
    assert not set(splits.train.index.tolist()) & set(splits.val.index.tolist())
    labels = Synthetic(**settings).load(torch.float64)
    assert torch.equal(labels.train.y, (splits.train.y > 0).long()) and labels.num_classes == 2


def test_diabetes_is_standardised_over_the_training_rows_alone() -> None:
    splits = Diabetes(seed=3).load(torch.float64)
    assert [len(rows) for rows in (splits.train, splits.val, splits.test)] == [200, 121, 121]
    for values in (splits.train.x, splits.train.y[:, None]):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1], dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1], dtype=torch.float64))
    assert len({*splits.train.index.tolist(), *splits.val.index.tolist(), *splits.test.index.tolist()}) == 442


BAD = [
    (lambda: Synthetic(features=0), "dataset.features=0"),
    (lambda: Synthetic(targets="words"), "dataset.targets='words' is none of classes, numbers"),
    (lambda: Synthetic(noise=float("nan")), "dataset.noise=nan"),
    (lambda: Diabetes(train=400, val=42), "leave none to test on"),
    (lambda: Newsgroups(normalize="standard"), "dataset.normalize='standard' is none of unit"),
    (lambda: Newsgroups(train=11_000), "need 16657 different rows"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_newsgroups_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*20news-bydate_py3.pkz, and dataset.download=false"):
        Newsgroups(root=str(tmp_path), download=False).load()


@pytest.mark.slow
def test_the_words_of_the_newsgroups(real_root: Any) -> None:
    splits = Newsgroups(root=real_root("20news-bydate_py3.pkz"), download=False).load(torch.float64)
    assert splits.train.x.shape == (5657, 101_631) and splits.train.x.layout == torch.sparse_csr
    assert len(splits.test) == 7532 and splits.num_classes == 20
    lengths = splits.val.x.to_sparse_coo().pow(2).sum(1).to_dense()  # 1, or 0 for a post of which nothing is left
    assert bool(((lengths - 1).abs() < 1e-12).logical_or(lengths == 0).all())
