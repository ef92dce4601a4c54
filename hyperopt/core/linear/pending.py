"""``Pending``: steps of a linear method that its value has not taken yet."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.rowwise import combine

ROOM = 16  # steps that are kept
LARGE = 2**20  # numbers that the directions kept may have in all


class Pending:
    """Steps ``x += sum_i weight_i direction_i``, kept until the value ``x`` is wanted, and then taken all at once.

    Neither the next direction nor the next residual of a Krylov method needs ``x``. Kept, a step needs no test of whether it may
    be taken: a row takes its steps up to the last one that held, which is told of all of them at once.

    Attributes:
        room: how many steps are kept at most; 1 where a state is large.
        told: whether there was no more room just now, so that the method has found which steps held.
    """

    def __init__(self, like: Tensor) -> None:
        """Nothing is kept yet; ``like``: a state, shape (rows, dim)."""
        self.room = max(1, min(ROOM, LARGE // like.numel()))
        self.told = False
        self._directions: list[Tensor] = []
        self._numbers: list[tuple[Tensor, ...]] = []

    def __len__(self) -> int:
        """How many steps are kept."""
        return len(self._numbers)

    @property
    def full(self) -> bool:
        """Whether they have to be taken now."""
        return len(self) == self.room

    def add(self, directions: tuple[Tensor, ...], *numbers: Tensor) -> None:
        """Keep one more step: its directions, each (rows, dim), and what is to be known of it, each (rows, 1)."""
        self.told = False
        self._directions += directions
        self._numbers.append(numbers)

    def take(self) -> tuple[Tensor, ...]:
        """All directions, shape (rows, k, dim), and the numbers of all steps, each of shape (rows, steps, 1); none are kept."""
        found = [torch.stack(self._directions, dim=1), *(torch.stack(each, dim=1) for each in zip(*self._numbers, strict=True))]
        self.told = self.full
        self._directions, self._numbers = [], []
        return tuple(found)


def advance(x: Tensor, directions: Tensor, weights: Tensor, dropped: Tensor) -> Tensor:
    """``x`` after the steps that are not dropped; a step that is dropped may hold anything, infinity and NaN among it.

    The directions that are dropped are overwritten.

    Shapes: ``x`` (rows, dim), ``directions`` (rows, k, dim), ``weights`` and ``dropped`` (rows, k, 1).
    """
    return combine(x, weights.masked_fill(dropped, 0.0), directions.masked_fill_(dropped, 0.0))
