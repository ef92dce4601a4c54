"""Ordinary rows as a dataset: torch datasets, pairs of arrays, and functions that return them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from hyperopt.data import DataError
from hyperopt.data.own import Own, as_dataset
from hyperopt.data.splits import Splits

X = torch.arange(60, dtype=torch.float64).reshape(20, 3)
Y = torch.arange(20) % 2


def arrays(classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return X, torch.arange(20) % classes


WAYS = [
    (X, Y),
    [X.numpy(), Y.numpy()],
    (X.tolist(), Y.tolist()),
    (X, Y[:, None]),
    TensorDataset(X, Y),
    Subset(TensorDataset(X, Y), range(20)),
    ConcatDataset([TensorDataset(X[:7], Y[:7]), TensorDataset(X[7:], Y[7:])]),
    arrays,
    functools.partial(arrays, classes=2),
    lambda: TensorDataset(X, Y),
]


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.val), len(splits.test)


@pytest.mark.parametrize("data", WAYS, ids=lambda data: type(data).__name__)
def test_every_way_gives_the_same_rows(data: Any) -> None:
    splits = Own(data, seed=3).load(torch.float64)
    order = np.random.RandomState(3).permutation(20)
    for rows, at in ((splits.train, order[:12]), (splits.val, order[12:16]), (splits.test, order[16:])):
        assert torch.equal(rows.x, X[at]) and torch.equal(rows.y, Y[at]) and rows.index.tolist() == at.tolist()
    assert splits.num_classes == 2 and splits.shape == (3,) and splits.checksums == Own((X, Y)).load().checksums


SIZES = [
    ({}, (12, 4, 4)),
    ({"train": 5}, (5, 4, 11)),
    ({"val": 0}, (16, 0, 4)),
    ({"test": 1}, (15, 4, 1)),
    ({"train": 5, "val": 5, "test": 5}, (5, 5, 5)),
    ({"train": 10, "order": "head_tail"}, (10, 4, 6)),
]


@pytest.mark.parametrize(("values", "expected"), SIZES, ids=str)
def test_sizes_that_are_not_given(values: dict[str, Any], expected: tuple[int, int, int]) -> None:
    splits = Own((X, Y), **values).load()
    assert sizes(splits) == expected
    rows = [*splits.train.index.tolist(), *splits.val.index.tolist(), *splits.test.index.tolist()]
    assert len({*rows}) == sum(expected)
    if "order" in values:
        assert rows == [*range(10), *range(16, 20), *range(10, 16)]


def test_targets_of_a_floating_type_are_numbers_and_images_keep_their_shape() -> None:
    splits = Own((torch.rand(10, 1, 4, 4), np.linspace(0, 1, 10)), order="head_tail").load(torch.float64)
    assert splits.num_classes == 0 and splits.train.y.dtype == torch.float64 and splits.shape == (1, 4, 4)
    assert splits.train.y.tolist() == np.linspace(0, 1, 10)[:6].tolist() and splits.train.x.shape == (6, 16)
    assert Own((torch.arange(10), torch.zeros(10, dtype=torch.bool))).load().shape == (1,)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ()


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Own((X, Y[:5])).load(), r"arrays: x has shape \(20, 3\) and y \(5,\), but each row needs"),
    (lambda: Own((X, torch.eye(20))).load(), r"arrays: x has shape \(20, 3\) and y \(20, 20\), but each row needs"),
    (lambda: Own((X, Y - 1)).load(), "arrays: labels go from -1 to 0, but 20 rows have labels 0, 1, ...; number the classes"),
    (lambda: Own((X, Y * 10**9)).load(), "arrays: labels go from 0 to 1000000000"),
    (lambda: Own((X.log(), Y)).load(), r"arrays: x of row 0 is not finite \(1 such rows\)"),
    (lambda: Own((X, Y / 0.0)).load(), "arrays: y of row 0 is not finite"),
    (lambda: Own((X + 1j, Y)).load(), "arrays: x is torch.complex128 and torch.strided; give real numbers, dense"),
    (lambda: Own((X.to_sparse(), Y)).load(), "arrays: x is torch.float64 and torch.sparse_coo; give real numbers, dense"),
    (lambda: Own(("here", Y)).load(), "arrays: x is a str, not numbers; give a tensor or an array"),
    (lambda: Own(([[1], [1, 2]], Y)).load(), "arrays: x is not an array of numbers: .*; give a tensor or an array"),
    (lambda: Own(TensorDataset(X)).load(), r"TensorDataset: item 0 is a tuple of 1, not a pair \(x, y\)"),
    (lambda: Own(Subset(TensorDataset(X, Y), [])).load(), "Subset has no items"),
    (lambda: Own(lambda: Stream()).load(), "returned .*Stream, which has no __len__ and no __getitem__"),
    (lambda: Own((X, Y), val=18, test=2).load(), "arrays has 20 rows, of which val=18 and test=2 leave none to train on"),
    (lambda: Own((X, Y), train=15, test=10).load(), "arrays has 20 rows: test=10 must be a whole number from 1 to 1"),
]


@pytest.mark.parametrize(("load", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_the_rows_lack_is_said(load: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


EARLY: list[tuple[Callable[[], Any], str]] = [
    (lambda: Own(Stream()), "Stream has no __len__ and no __getitem__"),
    (lambda: Own(TensorDataset), "TensorDataset is a class; give an object of it"),  # pyright: ignore[reportArgumentType]
    (lambda: Own(3), "^int is not a torch.utils.data.Dataset, a pair"),  # pyright: ignore[reportArgumentType]
    (lambda: Own(lambda path: path), "cannot be called: missing a required argument: 'path'"),  # pyright: ignore
    (lambda: Own((X, Y), train=0), "^Own: train=0 must be a whole number >= 1; change train$"),
    (lambda: Own((X, Y), order="random"), "^Own: order='random' is not one of shuffled, head_tail, tail_head; change order$"),
    (lambda: Own((X, Y), seed=-1), "^Own: seed=-1 must be a whole number from 0 to 4294967295; change seed$"),
]


@pytest.mark.parametrize(("make", "message"), EARLY, ids=[message[:40] for _, message in EARLY])
def test_what_can_be_known_before_is_said_before(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_what_is_a_dataset_already_stays_as_it_is() -> None:
    made = Own((X, Y))
    assert as_dataset(made) is made and as_dataset("digits") is None and as_dataset((X, Y, Y)) is None
    assert isinstance(as_dataset((X, Y)), Own)
