"""The order of minibatches: every row once an epoch, by the seed alone, and the same after a stop anywhere."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from hyperopt.data.batches import Batch, Batches


def places(batch: Batch) -> list[int]:
    assert batch.index is not None and batch.index.dtype == torch.int64 and len(batch.index) == batch.rows
    return batch.index.tolist()


def epoch(batches: Batches) -> list[list[int]]:
    return [places(batches.take()) for _ in range(batches.per_epoch)]


@pytest.mark.parametrize(("rows", "size", "sizes"), [(10, 3, [3, 3, 3, 1]), (10, 5, [5, 5]), (7, 7, [7]), (3, 1, [1, 1, 1])])
def test_every_row_is_taken_once_an_epoch(rows: int, size: int, sizes: list[int]) -> None:
    batches = Batches(rows, size)
    for _ in range(3):
        parts = epoch(batches)
        assert [len(part) for part in parts] == sizes
        assert sorted(chain(*parts)) == list(range(rows))
        assert all(part == sorted(part) for part in parts)


def test_dropping_the_short_batch_leaves_out_other_rows_each_epoch() -> None:
    batches = Batches(10, 3, last="drop")
    left = []
    for _ in range(40):
        parts = epoch(batches)
        assert [len(part) for part in parts] == [3, 3, 3]
        left.append(*set(range(10)) - set(chain(*parts)))
    assert set(left) == set(range(10))


def test_where_a_batch_stands() -> None:
    batches = Batches(5, 2)
    found = [batches.take() for _ in range(5)]
    assert [(batch.epoch, batch.number, batch.rows) for batch in found] == [(0, 0, 2), (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 1, 2)]


def test_without_a_size_all_rows_come_uncopied() -> None:
    batches = Batches(5, None)
    assert batches.per_epoch == 1
    assert [batches.take() for _ in range(2)] == [Batch(None, 5, 0, 0), Batch(None, 5, 1, 0)]


def test_the_order_is_that_of_the_seed_and_of_the_epoch() -> None:
    first = [epoch(Batches(20, 6, seed=3)) for _ in range(2)]
    assert first[0] == first[1]
    batches = Batches(20, 6, seed=3)
    epochs = [epoch(batches) for _ in range(4)] + [epoch(Batches(20, 6, seed=seed)) for seed in (0, 4, 2**32 - 1)]
    assert len({str(parts) for parts in epochs}) == 7


def test_the_order_is_pinned() -> None:
    """The order behind every published number: a change of generator must not pass unseen."""
    assert Batches(8, 3, seed=1).order(2).tolist() == np.random.RandomState([1, 2]).permutation(8).tolist()
    assert Batches(8, 3, seed=1).order(2).tolist() == [2, 4, 1, 5, 6, 3, 0, 7]


@pytest.mark.parametrize("taken", range(9))
def test_it_goes_on_where_it_stood(taken: int) -> None:
    through = Batches(10, 3, seed=5)
    for _ in range(taken):
        through.take()
    state = through.state_dict()
    again = Batches(10, 3, seed=5)
    again.take()
    again.load_state_dict(state)
    np.random.seed(0)  # the global generator is not used
    for _ in range(9):
        a, b = through.take(), again.take()
        assert places(a) == places(b) and (a.epoch, a.number) == (b.epoch, b.number)


def test_a_batch_of_more_rows_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"task\.batch_size=11 is more than the 10 fitted rows; lower task\.batch_size"):
        Batches(10, 11)
