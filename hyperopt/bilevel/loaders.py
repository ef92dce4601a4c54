"""``LoaderBatches``: a ``DataLoader`` of ``torch.utils.data`` as a source of batches whose position can be saved and restored.

The loader itself is not changed. A copy of it, with its own random generators, is iterated epoch after epoch. A generator that
was given (``DataLoader(..., generator=g)``) is copied, so the order is the one that the loader would give; without one, the
order comes from PyTorch's seed (``torch.manual_seed``). The copy never draws from the process-wide generator, though the
dataset may.

A position is the state of these generators at the start of the epoch and the number of batches drawn since. To restore it, the
epoch is started again, or continued if the position lies ahead. The rows of a map-style dataset are skipped without being read.
The batches of an iterable dataset or of worker processes, whose random numbers belong to the epoch, are read and discarded. A
checksum of the rows' indices, or of the last batch, verifies that the skipped rows are the same as before.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler


@dataclass(frozen=True)
class Place:
    """The position of the next batch.

    Attributes:
        epoch: number of the epoch, from 0.
        drawn: number of batches drawn in this epoch.
        generators: states of the generators at the start of the epoch.
        mark: checksum of the indices of the drawn batches; 0 if the loader does not show them.
        batch: the last batch that was drawn (None: there is none).
    """

    epoch: int
    drawn: int
    generators: tuple[Tensor, ...]
    mark: int = 0
    batch: Any = None

    def same(self, other: Place) -> bool:
        """Whether two positions are the same."""
        pairs = zip(self.generators, other.generators, strict=True)
        return (self.epoch, self.drawn) == (other.epoch, other.drawn) and all(torch.equal(a, b) for a, b in pairs)


class LoaderBatches:
    """The batches of a ``DataLoader``, epoch after epoch.

    Random numbers that the dataset draws from the process-wide generator in this process (an augmentation without workers) are
    not part of the position: to resume exactly, save and restore the state of that generator too.

    Args:
        loader: the loader.
        name: name of the argument, for messages; sources with different names draw different orders.

    Raises:
        ValueError: the loader has no batches.
    """

    def __init__(self, loader: DataLoader[Any], name: str) -> None:
        self.name, self.length = name, _length(loader)
        self.rows = None if isinstance(loader.dataset, IterableDataset) else _length(loader.dataset)
        if self.length == 0:
            raise ValueError(
                f"{name} is a DataLoader without batches: its dataset has {self.rows} rows, batch_size={loader.batch_size}, "
                f"drop_last={loader.drop_last}; is the dataset empty, or smaller than one batch?"
            )
        seed = (torch.initial_seed() + zlib.crc32(name.encode())) % 2**63
        self.loader, self._samplers, self._generators = _copied(loader, seed)
        self._index: _Marked | None = None
        if self.rows is not None and loader.num_workers == 0:
            place = "batch_sampler" if loader.batch_sampler is not None else "sampler"
            self._index = vars(self.loader)[place] = _Marked(getattr(self.loader, place))
        self._iterator: Iterator[Any] | None = None
        self._place = Place(0, 0, self._states())
        self._before: Place | None = None  # the position before the latest draw
        self._kept: Place | None = None  # the position after a batch that was drawn and put back
        if self.length is None:
            start = self.state_dict()
            self.draw()
            self.load_state_dict(start)

    def draw(self) -> Any:
        """Return the next batch; after the last one of an epoch, the first of the next epoch.

        Raises:
            ValueError: the next epoch has no batches.
        """
        after, self._kept = self._kept, None
        if after is None:
            after = self._next()
        self._before, self._place = self._place, after
        return after.batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""
        place = self._place
        return {
            "epoch": place.epoch,
            "drawn": place.drawn,
            "generators": list(place.generators),
            "mark": place.mark if self._index is not None else checksum(place.batch),
            "length": self.length,
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: the state is that of another loader, or this loader does not give the same batches again.
        """
        self._refuse_another(state)
        place = Place(state["epoch"], state["drawn"], tuple(state["generators"]))
        if place.same(self._place):
            return
        if self._before is not None and place.same(self._before):  # only the latest draw is undone: keep its batch
            self._kept, self._place, self._before = self._place, self._before, None
            return
        at = self._place if self._kept is None else self._kept  # the position of the iterator
        self._before = self._kept = None
        ahead = self._iterator is not None and place.drawn >= at.drawn
        if not (ahead and place.same(replace(at, drawn=place.drawn))):
            for generator, kept in zip(self._generators, place.generators, strict=True):
                generator.set_state(kept.cpu())
            self._begin(place.epoch)
            at = replace(place, drawn=0)
        if place.epoch and self.loader.num_workers and self.loader.persistent_workers:
            warnings.warn(
                f"{self.name}: the random numbers of persistent workers, if their dataset draws any, go on from epoch to epoch "
                "and are not restored; set persistent_workers=False for an exact resume",
                stacklevel=2,
            )
        self._place = self._skipped(at, place, state["mark"])

    def _refuse_another(self, state: dict[str, Any]) -> None:
        if missing := {"epoch", "drawn", "generators", "mark", "length", "rows"} - set(state):
            raise ValueError(
                f"{self.name}: the state of a DataLoader's batches has no {sorted(missing)[0]!r}: it belongs to another source"
            )
        for what, now in (("length", self.length), ("rows", self.rows)):
            if state[what] != now:
                unit = "batches an epoch" if what == "length" else "rows"
                raise ValueError(
                    f"{self.name} has {now} {unit}, but its state was saved with {state[what]}, so its position cannot be "
                    "restored; give the same dataset and batch_size, or start anew"
                )
        if len(state["generators"]) != len(self._generators):
            raise ValueError(f"{self.name} has other samplers than those of its state; give the same DataLoader")

    def _states(self) -> tuple[Tensor, ...]:
        return tuple(generator.get_state() for generator in self._generators)

    def _begin(self, epoch: int) -> None:
        """Start an epoch."""
        for sampler in self._samplers:
            set_epoch = getattr(sampler, "set_epoch", None)  # the order of a DistributedSampler depends on the epoch
            if callable(set_epoch):
                set_epoch(epoch)
        self._iterator = iter(self.loader)

    def _next(self) -> Place:
        """Draw the next batch and return the position after it."""
        place = self._place
        if self._iterator is None:
            self._begin(place.epoch)
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            if not place.drawn:
                raise self._empty(place.epoch) from None
            place = Place(place.epoch + 1, 0, self._states())
            self._begin(place.epoch)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise self._empty(place.epoch) from None
        mark = 0 if self._index is None else self._index.mark
        return Place(place.epoch, place.drawn + 1, place.generators, mark, batch)

    def _empty(self, epoch: int) -> ValueError:
        if not epoch:
            return ValueError(f"{self.name} is a DataLoader without batches; is its dataset empty, or smaller than one batch?")
        return ValueError(
            f"{self.name}: the DataLoader gave no batch in epoch {epoch}: its dataset or its sampler can be iterated only once; "
            "let its __iter__ return a new iterator every time"
        )

    def _skipped(self, at: Place, place: Place, mark: int) -> Place:
        """Skip the batches from ``at`` to ``place``, whose checksum must be ``mark``, and return the position reached."""
        batch, given = at.batch, at.drawn
        try:
            for given in range(at.drawn, place.drawn):  # noqa: B007
                if self._index is None:
                    batch = next(self._iterator)  # pyright: ignore[reportArgumentType]
                else:
                    next(self._index)
            found = checksum(batch) if self._index is None else self._index.mark
        except StopIteration:
            raise ValueError(
                f"{self.name}: {place.drawn} batches of this epoch were drawn, but the DataLoader gives only {given} now"
            ) from None
        if place.drawn and found != mark:
            raise ValueError(
                f"{self.name}: the batches before the saved position are not those of the saved run, so the position cannot be "
                "restored: the data have changed, or their order comes from random numbers that the DataLoader does not own. "
                "Give a custom sampler a `generator` attribute or a set_epoch method; seed an iterable dataset's random numbers"
            )
        return Place(place.epoch, place.drawn, place.generators, 0 if self._index is None else found, batch)


class _Marked:
    """A sampler that keeps a checksum of the indices it has given."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.mark = sampler, 0

    def __iter__(self) -> _Marked:
        self.indices, self.mark = iter(self.sampler), 0
        return self

    def __next__(self) -> Any:
        index = next(self.indices)
        self.mark = zlib.crc32(repr(index).encode(), self.mark)
        return index


def _copied(loader: DataLoader[Any], seed: int) -> tuple[DataLoader[Any], list[Any], list[torch.Generator]]:
    """Return a copy of a loader with its own samplers and generators, those samplers, and those generators."""
    copies: dict[int, Any] = {}
    generators: list[torch.Generator] = []

    def generator(given: torch.Generator | None) -> torch.Generator:
        if id(given) not in copies:
            made = torch.Generator() if given is None else torch.Generator(given.device)
            if given is None:
                made.manual_seed(seed)
            else:
                made.set_state(given.get_state())
            copies[id(given)] = made
            generators.append(made)
        return copies[id(given)]

    def sampler(given: Any) -> Any:
        if id(given) not in copies:
            copies[id(given)] = fill(copy.copy(given))
        return copies[id(given)]

    def fill(made: Any) -> Any:
        for name, value in list(getattr(made, "__dict__", {}).items()):
            if isinstance(value, torch.Generator) or (name == "generator" and value is None):
                vars(made)[name] = generator(value)
            elif isinstance(value, Sampler):
                vars(made)[name] = sampler(value)
        return made

    made = copy.copy(loader)
    vars(made)["_iterator"] = None  # the iterator of persistent workers belongs to the user's loader
    samplers = [value for value in (loader.sampler, loader.batch_sampler) if isinstance(value, Sampler)]
    fill(made)
    return made, [sampler(value) for value in samplers], generators


def _length(thing: Any) -> int | None:
    """Return the length, or None without one."""
    try:
        return len(thing)
    except TypeError:
        return None


def checksum(batch: Any) -> int:
    """Return a checksum of the numbers and texts in a batch."""
    mark = 0
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            mark = zlib.crc32(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), mark)
        elif isinstance(leaf, int | float | str | bytes):
            mark = zlib.crc32(repr(leaf).encode(), mark)
    return mark
