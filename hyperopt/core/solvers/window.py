"""``Window``: the vectors that an accelerated method keeps, as one matrix for each row, so that they take one product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.captured import transformed
from hyperopt.core.rowwise import combine, dots, full_precision


@dataclass(frozen=True)
class Window:
    """At most ``size`` vectors of shape (rows, dim); a new one replaces the oldest.

    They lie in one buffer that is written in place, each in one piece. While gradients are recorded they are separate tensors
    instead, since autograd needs them unchanged.

    Attributes:
        size: largest number of vectors.
        count: how many have been added.
        buffer: shape (size, rows, dim); None before the first vector, and while gradients are recorded.
        kept: the vectors while gradients are recorded, in the order of their slots.
    """

    size: int
    count: int = 0
    buffer: Tensor | None = None
    kept: tuple[Tensor, ...] = ()

    @staticmethod
    def of(matrix: Tensor, size: int) -> Window:
        """Return a window of ``size`` with the vectors of a matrix of shape (rows, m, dim), m <= size."""
        rows, m, dim = matrix.shape
        buffer = matrix.new_empty((size, rows, dim))
        buffer[:m] = matrix.transpose(0, 1)
        return Window(size, m, buffer)

    @property
    def filled(self) -> int:
        """The number of vectors in the window."""
        return min(self.count, self.size)

    @property
    def slot(self) -> int:
        """The slot of the next vector."""
        return self.count % self.size

    @property
    def matrix(self) -> Tensor:
        """The vectors in the order of their slots, shape (rows, filled, dim)."""
        if self.kept:
            return torch.stack(self.kept, dim=1)
        assert self.buffer is not None
        return self.buffer[: self.filled].transpose(0, 1)

    def vector(self, slot: int) -> Tensor:
        """Return the vector in a slot, shape (rows, dim)."""
        if self.kept:
            return self.kept[slot]
        assert self.buffer is not None
        return self.buffer[slot]

    def add(self, write: Callable[[Tensor | None], Tensor], like: Tensor) -> Window:
        """Return a window with one more vector. The old window is invalid then, unless gradients are recorded.

        Args:
            write: a function that returns the vector, shape (rows, dim), written to its argument unless that is None.
            like: a tensor of this shape, dtype and device.
        """
        if torch.is_grad_enabled():
            kept = self.kept or (() if self.buffer is None else self.matrix.unbind(dim=1))
            return Window(self.size, self.count + 1, None, (*kept[: self.slot], write(None), *kept[self.slot + 1 :]))
        buffer = self.buffer
        if buffer is None:
            buffer = like.new_empty((self.size, *like.shape))
            for i, vector in enumerate(self.kept):
                buffer[i] = vector
        if transformed():  # PyTorch's transforms have no rules for ``out``
            buffer[self.slot] = write(None)
        else:
            write(buffer[self.slot])
        return Window(self.size, self.count + 1, buffer)

    def select(self, index: Tensor) -> Window:
        """Return the window of some rows."""
        buffer = None if self.buffer is None else self.buffer[:, index]
        return Window(self.size, self.count, buffer, tuple(x[index] for x in self.kept))

    def dot(self, x: Tensor) -> Tensor:
        """Return the inner products with ``x``, shape (rows, filled)."""
        with full_precision(x):
            return dots(self.matrix, x)[:, :, 0]

    def combine(self, start: Tensor, weights: Tensor, alpha: float = 1.0) -> Tensor:
        """Return ``start + alpha sum_i weights_i x_i``, shape (rows, dim); the weights have shape (rows, filled)."""
        with full_precision(start):
            return combine(start, weights[:, :, None], self.matrix, alpha)
