"""``OwnBatches``: the data that a user gives to ``Tuner.step``, and the batches that one step takes from them.

One batch is a tensor, a tuple, a mapping, None, or a list that contains a tensor, such as the ``[x, y]`` of a ``DataLoader``. A
list of tuples, lists or mappings is several batches. An iterator, a ``DataLoader``, a dataset or a source with ``draw()`` is
something from which batches are drawn.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperopt.bilevel.batches import BatchSource, is_source, source_of
from hyperopt.core.checks import plain
from hyperopt.data.sparse import SparseRows

BATCH_TYPES = (Tensor, np.ndarray, SparseRows)


class OwnBatches:
    """The data of one loss from one step to the next.

    Args:
        name: name of the argument, for messages.

    Attributes:
        kept: a restored position, which the next source takes over (None: there is none).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: Any = None
        self.source: BatchSource | None = None
        self.kept: dict[str, Any] | None = None

    def take(self, given: Any, count: int | None, drawn: int = 1) -> list[Any]:
        """Return the batches of a step.

        Args:
            given: the data; see the docstring of the module.
            count: number of batches, at least 1 (None: all of a list; ``drawn`` from anything that batches are drawn from; a
                single batch ``drawn`` times).
            drawn: see ``count``.

        Raises:
            TypeError: the data have the wrong type, or could be one batch or several.
            ValueError: the data are empty, or there are not ``count`` batches.
        """
        if isinstance(given, Iterator):
            return self._next(given, count or drawn)
        if isinstance(given, DataLoader | Dataset) or is_source(given):
            source = self._source(given)
            return [source.draw() for _ in range(count or drawn)]
        found = self._listed(given)
        if count is not None and count != len(found):
            what = "one batch" if len(found) == 1 else f"a list of {len(found)} batches"
            raise ValueError(
                f"{self.name} is {what}, but batches={count}; give that many, or batches=(number for train, number for val), "
                "or leave batches out: then a step takes all of a list, and one batch of a DataLoader"
            )
        return found * drawn if count is None and len(found) == 1 else found

    def _next(self, given: Iterator[Any], count: int) -> list[Any]:
        found = [batch for _, batch in zip(range(count), given, strict=False)]
        if len(found) < count:
            raise ValueError(
                f"{self.name} is an iterator with {len(found)} batches left, but {count} are needed; give a new iterator, or "
                "a DataLoader, which continues with its next epoch"
            )
        return found

    def _listed(self, given: Any) -> list[Any]:
        """Return one batch, or the batches of a list, as a list."""
        if not isinstance(given, list):
            if given is None or isinstance(given, (*BATCH_TYPES, tuple, Mapping)) or not hasattr(given, "__iter__"):
                return [given]
            raise TypeError(
                f"{self.name} is a {type(given).__name__}, which could be one batch or several; give the tuple (batch,) for one "
                "batch, or keep iter(...) of it and give that in every step to draw batches from it"
            )
        if not given:
            raise ValueError(f"{self.name} is an empty list; give at least one batch")
        if any(isinstance(entry, BATCH_TYPES) for entry in given):
            return [given]
        if all(isinstance(entry, tuple | list | Mapping) for entry in given):
            return given
        raise TypeError(
            f"{self.name} is a list of {type(given[0]).__name__}, which could be one batch or several; give a tuple for one "
            "batch, or iter(...) of the list for several"
        )

    def _source(self, given: Any) -> BatchSource:
        """Return the source for the given data, at its position after the last step."""
        if self.source is None or given is not self.given:
            source = source_of(given, self.name)
            if self.kept is not None:
                source.load_state_dict(self.kept)
            elif self.source is not None and self._same_data(given):
                with contextlib.suppress(ValueError):  # the batches differ: start at the first one
                    source.load_state_dict(self.source.state_dict())
            self.given, self.source, self.kept = given, source, None
        return self.source

    def _same_data(self, given: Any) -> bool:
        """Whether ``given`` is a new loader of the same dataset, which would otherwise give its first batch in every step."""
        pair = given, self.given
        return all(isinstance(each, DataLoader) for each in pair) and len({id(each.dataset) for each in pair}) == 1

    def place(self) -> tuple[Any, ...]:
        """Return the present position, for ``back``."""
        return self.given, self.source, copy.deepcopy(self.state_dict())

    def back(self, place: tuple[Any, ...]) -> None:
        """Return to a position of ``place``."""
        self.given, self.source, state = place
        if self.source is None:
            self.kept = state
        else:
            self.source.load_state_dict(state)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the position of the next batch (None: there is no source)."""
        return self.kept if self.source is None else self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Keep a position for the next source."""
        self.given = self.source = None
        self.kept = state


@contextlib.contextmanager
def taken(
    places: Sequence[OwnBatches], data: Sequence[Any], counts: Sequence[int | None], drawn: Sequence[int] = (1, 1)
) -> Iterator[list[list[Any]]]:
    """The batches of each loss for a step, which is the block; if the step fails, all sources stand where they stood.

    Args:
        places: one for each loss.
        data: what the user gives for each.
        counts: see ``OwnBatches.take``.
        drawn: see ``OwnBatches.take``.

    Raises:
        TypeError, ValueError: as ``OwnBatches.take``.
    """
    before = [mine.place() for mine in places]
    try:
        yield [mine.take(given, count, n) for mine, given, count, n in zip(places, data, counts, drawn, strict=True)]
    except Exception:
        for mine, place in zip(places, before, strict=True):
            mine.back(place)
        raise


def numbers_of_batches(batches: Any) -> tuple[int | None, int | None]:
    """Return the numbers of batches of ``train`` and ``val``.

    Raises:
        ValueError: ``batches`` is neither a whole number of at least 1 nor a pair of them.
    """
    pair = tuple(map(plain, batches)) if isinstance(batches, tuple | list) else (plain(batches), plain(batches))
    if len(pair) != 2 or any(n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1) for n in pair):
        raise ValueError(f"batches={batches!r} must be a whole number >= 1, or a pair of them for train and val; change batches")
    return pair


class Moved:
    """The batches of a source after a function, such as one that moves a batch to a device.

    Args:
        source: the source.
        move: the function of a batch.
    """

    def __init__(self, source: BatchSource, move: Callable[[Any], Any]) -> None:
        self.source, self.move = source, move
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict

    def draw(self) -> Any:
        """Return the next batch."""
        return self.move(self.source.draw())
