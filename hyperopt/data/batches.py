"""Minibatches: the rows of each update, in an order that the seed alone decides.

Epoch ``e`` is a permutation of the rows drawn from ``(seed, e)``, cut into pieces of ``size``. Two numbers therefore say where
a run is: a run that resumes in the middle of an epoch draws that epoch again and takes the next piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperopt.core.checks import plain
from hyperopt.core.state import check_entries


@dataclass(frozen=True)
class Batch:
    """The rows of one update.

    Attributes:
        index: numbers of the rows, ascending, since a mean does not depend on their order; None: all. shape: (rows,), int64
        rows: number of rows.
        epoch: number of epochs before this one.
        number: number of batches of this epoch before this one.
    """

    index: Tensor | None
    rows: int
    epoch: int
    number: int


class Batches:
    """An endless sequence of batches, epoch after epoch; each row occurs at most once in an epoch.

    The permutations are those of numpy's ``RandomState``, whose stream never changes (NEP 19): a seed gives the same order on
    every machine, device and version.

    Args:
        rows: number of rows.
        size: number of rows in a batch; None: all, in their own order.
        seed: seed of the order, 0 to 2**32 - 1.
        last: what happens to the rows that remain if ``size`` does not divide ``rows``. ``keep`` makes a shorter batch of
            them, whose mean gives each of them more weight; ``drop`` leaves them out of this epoch.
        device: device of the indices.
        key: what the message calls ``size``.
        what: what the message says of the rows, and what to change.

    Attributes:
        per_epoch: number of batches in an epoch.

    Raises:
        ValueError: ``size`` is larger than the number of rows.
    """

    def __init__(
        self,
        rows: int,
        size: int | None,
        seed: int = 0,
        last: str = "keep",
        device: torch.device | str = "cpu",
        *,
        key: str = "task.batch_size",
        what: str = "fitted rows; lower task.batch_size, or set it to null for all of them",
    ) -> None:
        """Start before the first batch."""
        if size is not None and not 1 <= size <= rows:
            raise ValueError(f"{key}={size} is more than the {rows} {what}")
        self.rows, self.size, self.seed, self.last, self.device = rows, size, seed, last, device
        whole, left = divmod(rows, rows if size is None else size) if rows else (1, 0)
        self.per_epoch = whole + (1 if left and last == "keep" else 0)
        self._epoch, self._number = 0, 0
        self._order: tuple[int, np.ndarray] | None = None  # the latest epoch that was drawn, and its permutation

    def order(self, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch. shape: (rows,)."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.RandomState((self.seed, epoch)).permutation(self.rows)
        return self._order[1]

    @property
    def place(self) -> tuple[int, int]:
        """The epoch and number of the next batch."""
        return self._epoch, self._number

    def following(self, place: tuple[int, int]) -> tuple[int, int]:
        """Return the place after ``place``."""
        epoch, number = place
        return (epoch + 1, 0) if number + 1 == self.per_epoch else (epoch, number + 1)

    def at(self, place: tuple[int, int]) -> Batch:
        """Return the batch at a place, without moving to it."""
        epoch, number = place
        if self.size is None:
            return Batch(None, self.rows, epoch, number)
        rows = np.sort(self.order(epoch)[number * self.size : (number + 1) * self.size])
        return Batch(torch.from_numpy(rows).to(self.device, torch.int64), len(rows), epoch, number)

    def take(self) -> Batch:
        """Return the next batch."""
        batch = self.at(self.place)
        self._epoch, self._number = self.following(self.place)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the next batch."""
        return {"epoch": self._epoch, "number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: an entry is wrong, or these batches have no such place.
        """
        check_entries(state, ("epoch", "number"), "Batches")
        epoch, number = plain(state["epoch"]), plain(state["number"])
        if not (isinstance(epoch, int) and isinstance(number, int) and epoch >= 0 and 0 <= number < self.per_epoch):
            raise ValueError(
                f"the state for Batches: epoch={epoch!r}, number={number!r} is not a place in these batches, where an epoch has "
                f"{self.per_epoch} batches; give the state of the same rows in batches of the same size"
            )
        self._epoch, self._number = epoch, number
