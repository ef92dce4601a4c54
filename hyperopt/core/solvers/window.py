"""``Window``: the vectors that an accelerated method keeps, one matrix for each row, so that all of them make one product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.rowwise import combine, dots, full_precision


@dataclass(frozen=True)
class Window:
    """Vectors of shape (rows, dim), at most ``size`` of them, the oldest given up first.

    They lie in one buffer that is written in place; while gradients are recorded they are kept one by one instead, since autograd
    keeps them as they were.

    Attributes:
        size: most vectors.
        count: how many have been added.
        buffer: shape (rows, size, dim); None before the first, and while gradients are recorded.
        kept: the vectors while gradients are recorded, the slots in order.
    """

    size: int
    count: int = 0
    buffer: Tensor | None = None
    kept: tuple[Tensor, ...] = ()

    @staticmethod
    def of(matrix: Tensor, size: int) -> Window:
        """A window of ``size`` that holds the rows of a matrix of shape (rows, m, dim) with m <= size."""
        rows, m, dim = matrix.shape
        buffer = matrix.new_empty((rows, size, dim))
        buffer[:, :m] = matrix
        return Window(size, m, buffer)

    @property
    def filled(self) -> int:
        """How many vectors there are."""
        return min(self.count, self.size)

    @property
    def slot(self) -> int:
        """Where the next vector goes."""
        return self.count % self.size

    @property
    def matrix(self) -> Tensor:
        """The vectors, slot by slot, shape (rows, filled, dim)."""
        if self.kept:
            return torch.stack(self.kept, dim=1)
        assert self.buffer is not None
        return self.buffer[:, : self.filled]

    def add(self, x: Tensor) -> Window:
        """With one more vector; the window before it must not be used any more, unless gradients are recorded."""
        if torch.is_grad_enabled():
            kept = self.kept or (() if self.buffer is None else self.matrix.unbind(dim=1))
            at = self.slot
            return Window(self.size, self.count + 1, None, (*kept[:at], x, *kept[at + 1 :]))
        buffer = self.buffer
        if buffer is None:
            buffer = x.new_empty((x.shape[0], self.size, x.shape[1]))
            for i, vector in enumerate(self.kept):
                buffer[:, i] = vector
        buffer[:, self.slot] = x
        return Window(self.size, self.count + 1, buffer)

    def select(self, index: Tensor) -> Window:
        """The vectors of some rows."""
        buffer = None if self.buffer is None else self.buffer[index]
        return Window(self.size, self.count, buffer, tuple(x[index] for x in self.kept))

    def dot(self, x: Tensor) -> Tensor:
        """Inner products with ``x``, shape (rows, filled)."""
        with full_precision(x):
            return dots(self.matrix, x)[:, :, 0]

    def combine(self, start: Tensor, weights: Tensor, alpha: float = 1.0) -> Tensor:
        """``start + alpha sum_i weights_i x_i``, shape (rows, dim); weights of shape (rows, filled)."""
        with full_precision(start):
            return combine(start, weights[:, :, None], self.matrix, alpha)
