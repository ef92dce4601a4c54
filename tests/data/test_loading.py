"""Batches of images: the same whatever makes them, and from wherever a run goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyperopt.data.augment import Augment
from hyperopt.data.batches import Batches
from hyperopt.data.loading import Loader
from hyperopt.data.splits import Rows

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores

SHAPE = (2, 5, 4)


def rows(n: int = 13) -> Rows:
    x = torch.rand(n, 40, generator=torch.Generator().manual_seed(0))
    return Rows(x, torch.arange(n) % 3, torch.arange(n) + 100)


def loader(workers: int = 0, augment: Augment | None = None, seed: int = 1) -> Loader:
    return Loader(rows(), SHAPE, Batches(13, 4, seed), seed=seed, augment=augment, workers=workers)


def taken(made: Loader, count: int) -> list[tuple[list[int], Tensor, Tensor]]:
    found = []
    for _ in range(count):
        batch, images, labels = made.take()
        assert batch.index is not None
        found.append((batch.index.tolist(), images, labels))
    return found


def same(a: list[tuple[list[int], Tensor, Tensor]], b: list[tuple[list[int], Tensor, Tensor]]) -> bool:
    return all(p == q and torch.equal(x, y) and torch.equal(s, t) for (p, x, s), (q, y, t) in zip(a, b, strict=True))


def test_a_batch_is_its_rows() -> None:
    data = rows()
    for places, images, labels in taken(loader(), 5):
        assert torch.equal(images, data.x[places].view(-1, *SHAPE)) and torch.equal(labels, data.y[places])


def test_images_are_augmented_by_their_own_number_and_epoch() -> None:
    augment, data = Augment(padding=2), rows()
    for k, (places, images, _) in enumerate(taken(loader(augment=augment), 9)):
        want = augment(data.x[places].view(-1, *SHAPE), data.index[places], seed=1, epoch=k // 4)
        assert torch.equal(images, want)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_and_draw_nothing(workers: int) -> None:
    augment = Augment(padding=1)
    want = taken(loader(augment=augment), 10)
    before = torch.get_rng_state()
    assert same(taken(loader(workers, augment), 10), want)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_where_it_stood_and_goes_back(workers: int) -> None:
    made, want = loader(workers, Augment()), taken(loader(0, Augment()), 9)
    assert same(taken(made, 3), want[:3])
    state = made.batches.state_dict()
    assert same(taken(made, 6), want[3:])
    made.batches.load_state_dict(state)  # the batches that were made ahead are of another place
    assert same(taken(made, 6), want[3:])
    again = loader(workers, Augment())
    again.batches.load_state_dict(state)
    assert same(taken(again, 6), want[3:])


def test_all_rows_at_once() -> None:
    made = Loader(rows(), SHAPE, Batches(13, None))
    batch, images, labels = made.take()
    assert batch.index is None and images.shape == (13, *SHAPE) and len(labels) == 13
