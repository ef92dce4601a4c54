"""Batches of images, augmented, by worker processes or none; the images are the same however many there are.

What a batch holds depends on the seed and on its place (epoch, number) alone: ``hyperopt.data.batches`` draws its rows from them,
and ``hyperopt.data.augment`` the change of every image. Workers only make the batches ahead of time, so a run that goes on after
a stop has nothing to restore but its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hyperopt.data.augment import Augment
from hyperopt.data.batches import Batch, Batches
from hyperopt.data.splits import Rows

Place = tuple[int, int]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """The images and labels of a batch, by its place.

    Args:
        rows: the fitted rows, flattened.
        shape: of one image, channels first.
        batches: which rows a batch has.
        seed: of the augmentation.
        augment: how the images are changed (None: not).
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], batches: Batches, seed: int, augment: Augment | None) -> None:
        """Keep what every batch is made from."""
        self.rows, self.shape, self.batches, self.seed, self.augment = rows, shape, batches, seed, augment

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        """Return the images, shape (rows, *shape), and the labels, shape (rows,)."""
        batch = self.batches.at(place)
        rows = self.rows.take(batch.index)
        images = rows.x.unflatten(1, self.shape)
        if self.augment is not None:
            images = self.augment(images, rows.index, seed=self.seed, epoch=batch.epoch)
        return images, rows.y


class Onwards(Sampler[Place]):
    """The places from ``first`` on, without end."""

    def __init__(self, batches: Batches, first: Place) -> None:
        """Stand before ``first``."""
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[Place]:
        """Yield them."""
        place = self.first
        while True:
            yield place
            place = self.batches.following(place)


class Loader:
    """The batches of a run, one after another.

    Args:
        rows: the fitted rows, flattened, on any device.
        shape: of one image, channels first.
        batches: their order, on the CPU where there are workers.
        seed: of the augmentation.
        augment: how the images are changed (None: not).
        workers: processes that make batches ahead of time (0: none, each is made when it is taken, on the device of ``rows``).
        device: where the batches go.
    """

    def __init__(
        self,
        rows: Rows,
        shape: tuple[int, ...],
        batches: Batches,
        *,
        seed: int = 0,
        augment: Augment | None = None,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start no process yet."""
        self.batches, self.workers, self.device = batches, workers, torch.device(device)
        if workers:  # a forked process cannot use a GPU
            rows = Rows(*(tensor.cpu() for tensor in (rows.x, rows.y, rows.index)))
        self.images = Images(rows, shape, batches, seed, augment)
        self._made: Iterator[tuple[Tensor, Tensor]] | None = None
        self._next: Place | None = None  # what ``_made`` gives next

    def take(self) -> tuple[Batch, Tensor, Tensor]:
        """Return the next batch: which rows, their images and their labels."""
        place = self.batches.place
        batch = self.batches.take()
        if not self.workers:
            images, labels = self.images[place]
            return batch, images, labels
        if self._made is None or self._next != place:  # the first batch, or a place that was put back
            self._made = self._start(place)
        images, labels = next(self._made)
        self._next = self.batches.place
        return batch, images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _start(self, place: Place) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            self.images,
            sampler=Onwards(self.batches, place),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one, which a network may use
        )
        return iter(loader)
