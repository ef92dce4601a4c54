"""``Pending``: steps of a linear method that are not applied to its value yet."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.rowwise import combine

ROOM = 16  # largest number of steps that are kept
LARGE = 2**20  # largest number of entries in the directions that are kept


class Pending:
    """Steps ``x += sum_i weight_i direction_i``, kept until the value ``x`` is needed, and then applied together.

    Neither the next direction nor the next residual of a Krylov method needs ``x``. A step therefore needs no test of whether
    it is valid: when the steps are applied, each row takes those up to its last valid one.

    Attributes:
        room: how many steps are kept at most; 1 for a large state.
        told: whether the steps have just been applied because there was no more room, so that invalid ones are known.
    """

    def __init__(self, like: Tensor) -> None:
        """Start without steps; ``like`` is a state, shape (rows, dim)."""
        self.room = max(1, min(ROOM, LARGE // like.numel()))
        self.told = False
        self._directions: list[Tensor] = []
        self._numbers: list[tuple[Tensor, ...]] = []

    def __len__(self) -> int:
        """Return how many steps are kept."""
        return len(self._numbers)

    @property
    def full(self) -> bool:
        """Whether the steps have to be applied now."""
        return len(self) == self.room

    def add(self, directions: tuple[Tensor, ...], *numbers: Tensor) -> None:
        """Keep one more step: its directions, each (rows, dim), and the numbers that belong to it, each (rows, 1)."""
        self.told = False
        self._directions += directions
        self._numbers.append(numbers)

    def take(self) -> tuple[Tensor, ...]:
        """Return all directions, shape (rows, k, dim), and the numbers, each (rows, steps, 1), and keep none of them."""
        found = [torch.stack(self._directions, dim=1), *(torch.stack(each, dim=1) for each in zip(*self._numbers, strict=True))]
        self.told = self.full
        self._directions, self._numbers = [], []
        return tuple(found)


def advance(x: Tensor, directions: Tensor, weights: Tensor, dropped: Tensor) -> Tensor:
    """Return ``x`` after the steps that are not dropped; a dropped step may hold infinity and NaN.

    The directions that are dropped are overwritten.

    Shapes: ``x`` (rows, dim), ``directions`` (rows, k, dim), ``weights`` and ``dropped`` (rows, k, 1).
    """
    return combine(x, weights.masked_fill(dropped, 0.0), directions.masked_fill_(dropped, 0.0))
