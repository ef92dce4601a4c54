"""``OwnBatches``: what a user hands to ``Tuner.step`` as data, and the batches of one step that are taken from it.

One batch is a tensor, a tuple, a mapping, None, or a list with a tensor in it, such as the ``[x, y]`` that a ``DataLoader``
gives. Several batches are a list of tuples, lists or mappings. Batches are drawn from an iterator, a ``DataLoader``, a dataset or
a source with ``draw()``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperopt.bilevel.batches import BatchSource, source_of
from hyperopt.core.checks import plain
from hyperopt.data.sparse import SparseRows

ONE = (Tensor, np.ndarray, SparseRows)


class OwnBatches:
    """The data of one loss from one step to the next.

    Args:
        name: what the argument is called in messages.

    Attributes:
        kept: the place of a source that is yet to come, as ``state_dict`` returned it.
    """

    def __init__(self, name: str) -> None:
        """No source is known yet."""
        self.name = name
        self.given: Any = None
        self.source: BatchSource | None = None
        self.kept: dict[str, Any] | None = None

    def take(self, given: Any, count: int | None, drawn: int = 1) -> list[Any]:
        """The batches of a step.

        Args:
            given: the data, see the module.
            count: how many (None: ``drawn`` of what batches are drawn from, one batch ``drawn`` times, all of a list).
            drawn: see ``count``.

        Raises:
            TypeError: it is no data, or may be one batch or several.
            ValueError: it is empty, or has another number of batches.
        """
        if isinstance(given, Iterator):
            return self._next(given, count or drawn)
        if isinstance(given, DataLoader | Dataset) or (isinstance(given, BatchSource) and not isinstance(given, type)):
            source = self._source(given)
            return [source.draw() for _ in range(count or drawn)]
        found = self._listed(given)
        if count is not None and count != len(found):
            what = "one batch" if len(found) == 1 else f"a list of {len(found)} batches"
            raise ValueError(
                f"{self.name} is {what}, but batches={count}; give as many, or batches=(n of train, n of val), or leave batches "
                "out: then all of a list are taken, and one of a DataLoader"
            )
        return found * drawn if count is None and len(found) == 1 else found

    def _next(self, given: Iterator[Any], count: int) -> list[Any]:
        found = [batch for _, batch in zip(range(count), given, strict=False)]
        if len(found) < count:
            raise ValueError(
                f"{self.name} is an iterator that had {len(found)} more batches, but {count} are needed; give a new one, or a "
                "DataLoader, which goes on in its next epoch"
            )
        return found

    def _listed(self, given: Any) -> list[Any]:
        """One batch, or those of a list."""
        if not isinstance(given, list):
            if given is None or isinstance(given, (*ONE, tuple, Mapping)) or not hasattr(given, "__iter__"):
                return [given]
            raise TypeError(
                f"{self.name} is a {type(given).__name__}, which may be one batch or many; give (batch,), a tuple, for one, or "
                "iter(...) of it, which you keep, to have batches drawn from it"
            )
        if not given:
            raise ValueError(f"{self.name} is an empty list; give at least one batch")
        if any(isinstance(entry, ONE) for entry in given):
            return [given]
        if all(isinstance(entry, tuple | list | Mapping) for entry in given):
            return given
        raise TypeError(
            f"{self.name} is a list of {type(given[0]).__name__}, which may be one batch or many; give a tuple for one batch, or "
            "iter(...) of the list for many"
        )

    def _source(self, given: Any) -> BatchSource:
        """The source made of what is given, which stands where it stood after the step before."""
        if self.source is None or given is not self.given:
            source = source_of(given, self.name)
            if self.kept is not None:
                source.load_state_dict(self.kept)
            elif self.source is not None and self._same_data(given):
                with contextlib.suppress(ValueError):  # of other batches: it starts anew
                    source.load_state_dict(self.source.state_dict())
            self.given, self.source, self.kept = given, source, None
        return self.source

    def _same_data(self, given: Any) -> bool:
        """Whether a loader is made anew, of the dataset of the one before: its first batch would come at every step."""
        pair = given, self.given
        return all(isinstance(each, DataLoader) for each in pair) and len({id(each.dataset) for each in pair}) == 1

    def place(self) -> tuple[Any, ...]:
        """Where it stands, to be handed to ``back``."""
        return self.given, self.source, copy.deepcopy(self.state_dict())

    def back(self, place: tuple[Any, ...]) -> None:
        """Stand where it stood."""
        self.given, self.source, state = place
        if self.source is None:
            self.kept = state
        else:
            self.source.load_state_dict(state)

    def state_dict(self) -> dict[str, Any] | None:
        """Where the next batch stands; None where there is no source."""
        return self.kept if self.source is None else self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next source that is given stand there."""
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


def check_counts(batches: Any) -> tuple[int | None, int | None]:
    """How many batches of ``train`` and of ``val``.

    Raises:
        ValueError: ``batches`` is neither a whole number above 0 nor two of them.
    """
    pair = tuple(map(plain, batches)) if isinstance(batches, tuple | list) else (plain(batches), plain(batches))
    if len(pair) != 2 or any(n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1) for n in pair):
        raise ValueError(f"batches={batches!r} must be a whole number of at least 1, or two, of train and of val")
    return pair


class Moved:
    """The batches of a source, each handed to a function as it is drawn, such as one that moves it to a device.

    Args:
        source: the source.
        move: the function.
    """

    def __init__(self, source: BatchSource, move: Callable[[Any], Any]) -> None:
        """Its place is that of the source."""
        self.source, self.move = source, move
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict

    def draw(self) -> Any:
        """The next batch."""
        return self.move(self.source.draw())
