"""Sources of batches for a loss: tensors in memory, a loader or dataset of ``torch.utils.data``, or one batch."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import optree
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from hyperopt.bilevel.loaders import LoaderBatches
from hyperopt.core.state import check_entries
from hyperopt.core.text import described
from hyperopt.data.batches import Batches
from hyperopt.data.sparse import SparseRows


@runtime_checkable
class BatchSource(Protocol):
    """Where the batches of a loss come from. What ``draw`` returns is handed to the loss unchanged."""

    def draw(self) -> Any:
        """Return the next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, as plain containers and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


class NoBatches:
    """The source for losses that bring their own data: the batch is None."""

    shares: ClassVar[list[float]] = [1.0]  # as those of ``Minibatches``

    def __repr__(self) -> str:
        return described(self)

    def draw(self) -> Any:
        """Return None."""

    def piece(self, number: int) -> Any:
        """Return the batch, which is always the same."""
        return self.draw()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the state of another source; there is nothing to restore."""
        check_entries(state, (), type(self).__name__)


class SameBatch(NoBatches):
    """A source that always returns the same batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def draw(self) -> Any:
        """Return the batch."""
        return self.batch


class Minibatches:
    """Batches of the rows of tensors, epoch after epoch; ``hyperopt.data.batches.Batches`` defines the order.

    Args:
        tensors: a tree of tensors (or ``SparseRows``, or numpy arrays) that share their first dimension, ``(x, y)`` for
            example.
        size: number of rows of a batch, at least 1; None: each batch is the tensors themselves.
        seed: seed of the order.
        last: whether the rows that do not fill a batch at the end of an epoch are a smaller batch (``keep``) or are left out
            (``drop``).
        key: name of the caller's setting for ``size``, for messages.

    Raises:
        ValueError: the tensors have no rows or different numbers of rows, or there are fewer rows than ``size``.

    Example:
        >>> import torch, hyperopt
        >>> batches = hyperopt.Minibatches((torch.eye(5), torch.arange(5)), size=2)
        >>> x, y = batches.draw()
        >>> x.shape, torch.equal(x.argmax(1), y), batches
        (torch.Size([2, 5]), True, Minibatches(tensors=(float32[5, 5], int64[5]), size=2))
    """

    def __init__(self, tensors: Any, size: int | None = None, seed: int = 0, last: str = "keep", key: str = "size") -> None:
        tensors = _as_tensors(tensors)
        lengths = {leaf.shape[0] if len(leaf.shape) else 0 for leaf in optree.tree_leaves(tensors)}
        if len(lengths) != 1 or not min(lengths):
            raise ValueError(
                f"the tensors of a data set have {sorted(lengths)} rows: they must share their first dimension, and have "
                "rows (is the validation set empty?)"
            )
        (rows,) = lengths
        if size is not None and not 1 <= size <= rows:
            raise ValueError(
                f"{key}={size}: a batch cannot have {size} rows of a data set of {rows}; lower {key}, or give None for all rows"
            )
        self.tensors = tensors
        self.order = Batches(rows, size, seed, last)

    def __repr__(self) -> str:
        return described(self, tensors=self.tensors, size=self.order.size)

    def draw(self) -> Any:
        """Return the next batch, in the structure of ``tensors``."""
        return self._batch(self.order.take().index)

    @property
    def shares(self) -> list[float]:
        """The fraction of all rows in each piece; the pieces are the data set cut once, in the order of the first epoch."""
        rows, size = self.order.rows, self.order.size or self.order.rows
        return [min(size, rows - start) / rows for start in range(0, rows, size)]

    def piece(self, number: int) -> Any:
        """Return a piece, the same rows every time; the position of the next batch does not change."""
        return self._batch(self.order.at((0, number)).index)

    def _batch(self, index: Tensor | None) -> Any:
        """Return the rows at these indices, or the tensors themselves for None."""
        return self.tensors if index is None else optree.tree_map(lambda leaf: _rows(leaf, index), self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.order.load_state_dict(state)


def _rows(leaf: Tensor | SparseRows, index: Tensor) -> Tensor | SparseRows:
    """Return the rows of a leaf at these indices."""
    return leaf.take(index) if isinstance(leaf, SparseRows) else leaf.index_select(0, index.to(leaf.device))


def _as_tensors(batch: Any) -> Any:
    """Return the batch with numpy arrays as tensors of the same memory and dtype."""
    return optree.tree_map(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)


def source_of(given: Any, name: str) -> BatchSource:
    """Return a source of batches for the data that a user gives.

    Args:
        given: one of
            a source, that is anything with ``draw``, ``state_dict`` and ``load_state_dict``: it is returned;
            a ``torch.utils.data.DataLoader``: its batches, epoch after epoch, see ``LoaderBatches``;
            a ``torch.utils.data.Dataset`` with a length: one batch of all its rows, which are read once, here;
            one batch, that is a tensor or numpy array, or a (nested) tuple or dict of them;
            None: the batch is None.
        name: name of the argument, for messages.

    Raises:
        TypeError: ``given`` is not one of these.
        ValueError: it is empty.
    """
    if given is None:
        return NoBatches()
    if is_source(given):
        return given
    if isinstance(given, DataLoader):
        return LoaderBatches(given, name)
    if isinstance(given, Dataset):
        return SameBatch(_whole(given, name))
    leaves: list[Any] = optree.tree_leaves(given)
    if leaves and all(isinstance(leaf, Tensor | SparseRows | np.ndarray) for leaf in leaves) and not _has_list(given):
        if any(len(leaf.shape) and not leaf.shape[0] for leaf in leaves):
            raise ValueError(f"{name}: the batch has no rows (shapes {[tuple(leaf.shape) for leaf in leaves]})")
        return SameBatch(_as_tensors(given))
    listed = ". A list could be one batch or several: give a tuple for one batch" if isinstance(given, list) else ""
    raise TypeError(
        f"{name} is a {type(given).__name__}, which is not a source of batches{listed}. Give a torch.utils.data.DataLoader, "
        "hyperopt.Minibatches(tensors, size), one batch (a tensor, or a tuple or dict of tensors), or an object with draw(), "
        "state_dict() and load_state_dict(state)"
    )


def is_source(given: Any) -> bool:
    """Whether ``given`` is a source, and not the class of one."""
    return isinstance(given, BatchSource) and not isinstance(given, type)


def _has_list(tree: Any) -> bool:
    """Whether one of the containers in a tree is a list."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else ()
    return isinstance(tree, list) or any(_has_list(child) for child in children)


def _whole(dataset: Dataset[Any], name: str) -> Any:
    """Return all rows of a dataset as one batch.

    Raises:
        TypeError: the dataset has no length, or its rows cannot be collated into a batch.
        ValueError: the dataset is empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"{name} is a dataset without a length ({type(dataset).__name__}): give DataLoader(dataset, batch_size)")
    rows = len(dataset)  # pyright: ignore[reportArgumentType]
    if not rows:
        raise ValueError(f"{name} is a dataset without rows ({type(dataset).__name__})")
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    try:
        return default_collate([dataset[i] for i in range(rows)])
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name}: the rows of {type(dataset).__name__} cannot be collated into a batch: {error}; give a "
            "DataLoader with a collate_fn"
        ) from error
