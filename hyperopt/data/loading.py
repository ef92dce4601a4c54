"""Batches of images, augmented, by worker processes or none; the number of workers does not change the images.

A batch depends only on the seed and on its place (epoch, number): ``hyperopt.data.batches`` draws its rows from them, and
``hyperopt.data.augment`` the change of every image. Workers only make batches ahead of time, so a resumed run has to restore
nothing but its place.
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
    """A dataset of whole batches of images and labels, indexed by their places.

    Args:
        rows: the fitted rows, flattened.
        shape: shape of one image, channels first.
        batches: the rows of each batch.
        seed: seed of the augmentation.
        augment: how the images are changed (None: not at all).
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], batches: Batches, seed: int, augment: Augment | None) -> None:
        """Keep the arguments."""
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
    """A sampler of the places from ``first`` on, without end."""

    def __init__(self, batches: Batches, first: Place) -> None:
        """Start before ``first``."""
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[Place]:
        """Yield the places."""
        place = self.first
        while True:
            yield place
            place = self.batches.following(place)


class Loader:
    """The batches of a run, one after another.

    Args:
        rows: the fitted rows, flattened, on any device.
        shape: shape of one image, channels first.
        batches: the rows of each batch; on the CPU if there are workers.
        seed: seed of the augmentation.
        augment: how the images are changed (None: not at all).
        workers: number of processes that make batches ahead of time (0: batches are made when taken, on the device of
            ``rows``).
        device: device of the batches.
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
        """Keep the arguments; processes start with the first batch."""
        self.batches, self.workers, self.device = batches, workers, torch.device(device)
        if workers:  # a forked process cannot use a GPU
            rows = Rows(*(tensor.cpu() for tensor in (rows.x, rows.y, rows.index)))
        self.images = Images(rows, shape, batches, seed, augment)
        self._made: Iterator[tuple[Tensor, Tensor]] | None = None
        self._next: Place | None = None  # the place that ``_made`` yields next

    def take(self) -> tuple[Batch, Tensor, Tensor]:
        """Return the next batch: its rows, their images and their labels."""
        place = self.batches.place
        batch = self.batches.take()
        if not self.workers:
            images, labels = self.images[place]
            return batch, images, labels
        if self._made is None or self._next != place:  # the first batch, or a restored place
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
            generator=torch.Generator().manual_seed(0),  # without it, torch's global one is used, and advances
        )
        return iter(loader)
