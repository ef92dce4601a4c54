"""Batches of a loss from tensors in memory: all rows, or minibatches in an order that the seed alone decides."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor

from hyperopt.data.batches import Batches
from hyperopt.nn.sparse import SparseRows


class Minibatches:
    """Rows of tensors, epoch after epoch; see ``hyperopt.data.batches.Batches`` for the order.

    Args:
        tensors: a tree of tensors (or ``SparseRows``) that share their first dimension, ``(x, y)`` for example.
        size: rows of a batch; None: all of them, the tensors themselves.
        seed: seed of the order.
        last: what becomes of the rows that are left at the end of an epoch: ``keep`` or ``drop``.
        key: what the caller's setting for ``size`` is called in messages.

    Raises:
        ValueError: tensors without rows, of different lengths, or fewer rows than ``size``.
    """

    def __init__(self, tensors: Any, size: int | None = None, seed: int = 0, last: str = "keep", key: str = "size") -> None:
        """Stand before the first batch."""
        lengths = {leaf.shape[0] if len(leaf.shape) else 0 for leaf in optree.tree_leaves(tensors)}
        if len(lengths) != 1 or not min(lengths):
            raise ValueError(
                f"the tensors of a data set have {sorted(lengths)} rows: they must share their first dimension, and have "
                "rows (is the validation set empty?)"
            )
        (rows,) = lengths
        if size is not None and not 1 <= size <= rows:
            raise ValueError(f"{key}={size}: a batch of {size} rows from a data set of {rows}; lower {key}, or None for all rows")
        self.tensors = tensors
        self.order = Batches(rows, size, seed, last)

    def draw(self) -> Any:
        """Return the next batch, in the structure of ``tensors``."""
        return self._batch(self.order.take().index)

    @property
    def shares(self) -> list[float]:
        """Of all rows, the part of each piece: the data set cut once, in the order of the first epoch, no row left out."""
        rows, size = self.order.rows, self.order.size or self.order.rows
        return [min(size, rows - start) / rows for start in range(0, rows, size)]

    def piece(self, number: int) -> Any:
        """Return a piece, the same rows every time; where the next batch stands is left as it is."""
        return self._batch(self.order.at((0, number)).index)

    def _batch(self, index: Tensor | None) -> Any:
        """The rows at these places; None: the tensors themselves."""
        return self.tensors if index is None else optree.tree_map(lambda leaf: _rows(leaf, index), self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch stands."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.order.load_state_dict(state)


def _rows(leaf: Tensor | SparseRows, index: Tensor) -> Tensor | SparseRows:
    """Rows of a leaf."""
    return leaf.take(index) if isinstance(leaf, SparseRows) else leaf.index_select(0, index.to(leaf.device))
