"""The content of Python objects that a function may change: containers, attributes, arrays, random number generators.

A ``Replay`` takes the content of every such object before the first evaluation of a function and compares it afterwards. What
has changed is put back for every further evaluation. Only references are copied, apart from small arrays and the states of
generators. Entries that are only appended to a list stay there for the caller, since the list may be a record of the calls; a
further evaluation does not see them.

    kept = content.take()
    ...                                      the function runs
    changed = not content.same(kept, content.take())
    content.put(kept)

``Contents`` does this for all objects that a function can be seen to use.
"""

from __future__ import annotations

import contextlib
import random
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSet
from dataclasses import dataclass
from typing import Any

import numpy

from hyperopt.core.policy import ImpureMapError

LONGEST = 20_000  # a container or array with more entries than this is taken for data that does not change


class Content(ABC):
    """How to take, compare and put back the content of one object."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @abstractmethod
    def take(self) -> Any:
        """Return the present content."""

    @abstractmethod
    def put(self, kept: Any) -> None:
        """Restore a content."""

    def added(self, before: Any, after: Any) -> Any:
        """Return what was appended if nothing else has changed, else None."""
        return None

    def mapped(self, kept: Any, function: Callable[[Any], Any]) -> Any:
        """Return a content whose entries are ``function(entry)``."""
        return [function(entry) for entry in kept]

    def same(self, a: Any, b: Any) -> bool:
        """Whether two contents consist of the same objects."""
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class Entries(Content):
    """A list or a deque."""

    def take(self) -> list[Any]:
        """Return the entries in order."""
        return list(self.owner)

    def put(self, kept: list[Any]) -> None:
        """Replace all of them."""
        if not self.same(kept, self.take()):
            self.owner.clear()
            self.owner.extend(kept)

    def added(self, before: list[Any], after: list[Any]) -> list[Any] | None:
        """Return the new entries at the end, or None if anything else has changed."""
        return after[len(before) :] if self.same(before, after[: len(before)]) else None


class Members(Entries):
    """A set."""

    def put(self, kept: list[Any]) -> None:
        """Replace all of them."""
        if not self.same(kept, self.take()):
            self.owner.clear()
            self.owner |= set(kept)


class Items(Content):
    """A dict or another mapping."""

    def take(self) -> dict[Any, Any]:
        """Return the items."""
        return dict(self.owner.items())

    def put(self, kept: dict[Any, Any]) -> None:
        """Set the items that differ, and remove new ones."""
        now = self.take()
        for key in now.keys() - kept.keys():
            self._remove(key)
        for key, value in kept.items():
            if key not in now or now[key] is not value:
                self._set(key, value)

    def mapped(self, kept: dict[Any, Any], function: Callable[[Any], Any]) -> dict[Any, Any]:
        """Keep the keys and map the values."""
        return {key: function(value) for key, value in kept.items()}

    def same(self, a: dict[Any, Any], b: dict[Any, Any]) -> bool:
        """Whether two contents have the same keys and values."""
        return a.keys() == b.keys() and all(value is b[key] for key, value in a.items())

    def _set(self, key: Any, value: Any) -> None:
        self.owner[key] = value

    def _remove(self, key: Any) -> None:
        del self.owner[key]


class Attributes(Items):
    """The attributes of an object or a class, except those that are ``hidden``."""

    def __init__(self, owner: Any, hidden: frozenset[str] = frozenset()) -> None:
        """Keep the object. Functions and names of Python itself (``__x__``) are never part of the content."""
        super().__init__(owner)
        self.hidden = hidden

    def take(self) -> dict[str, Any]:
        """Return the attributes by name."""
        found = {name: value for name, value in getattr(self.owner, "__dict__", {}).items() if self._kept(name, value)}
        if not isinstance(self.owner, type):
            names = (name for cls in type(self.owner).__mro__ for name in _slots(cls))
            found |= {name: getattr(self.owner, name) for name in names if hasattr(self.owner, name)}
        return found

    def _kept(self, name: str, value: Any) -> bool:
        if name in self.hidden or (name.startswith("__") and name.endswith("__")):
            return False
        return not (isinstance(self.owner, type) and hasattr(value, "__get__"))

    def _set(self, key: Any, value: Any) -> None:
        if isinstance(self.owner, type) or key not in getattr(self.owner, "__dict__", {}):
            (type if isinstance(self.owner, type) else object).__setattr__(self.owner, key, value)
        else:
            vars(self.owner)[key] = value  # not by setattr, which the class may have redefined

    def _remove(self, key: Any) -> None:
        (type if isinstance(self.owner, type) else object).__delattr__(self.owner, key)


def _slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ())
    own = cls.__name__.lstrip("_")
    given = (names,) if isinstance(names, str) else tuple(names)
    given = tuple(name for name in given if name not in ("__dict__", "__weakref__"))
    return tuple(f"_{own}{name}" if name.startswith("__") and not name.endswith("__") else name for name in given)


class Numbers(Content):
    """A numpy array."""

    def take(self) -> Any:
        """Return a copy."""
        return self.owner.copy()

    def put(self, kept: Any) -> None:
        """Write the copy back."""
        if not self.same(kept, self.owner):
            self.owner[...] = kept

    def mapped(self, kept: Any, function: Callable[[Any], Any]) -> Any:
        """Return the numbers unchanged; there are no entries to map."""
        return kept

    def same(self, a: Any, b: Any) -> bool:
        """Whether all bits are equal."""
        return a.tobytes() == b.tobytes()


class Generator(Content):
    """A random number generator of Python or numpy."""

    @property
    def shared(self) -> bool:
        """Whether it is one of the two generators that the whole process shares."""
        return any(self.owner is generator for generator in COMMON)

    def take(self) -> Any:
        """Return the state."""
        if isinstance(self.owner, random.Random):
            return self.owner.getstate()
        if isinstance(self.owner, numpy.random.RandomState):
            return self.owner.get_state(legacy=False)
        return getattr(self.owner, "bit_generator", self.owner).state

    def put(self, kept: Any) -> None:
        """Set the state."""
        if isinstance(self.owner, random.Random):
            self.owner.setstate(kept)
        elif isinstance(self.owner, numpy.random.RandomState):
            self.owner.set_state(kept)
        else:
            getattr(self.owner, "bit_generator", self.owner).state = kept

    def same(self, a: Any, b: Any) -> bool:
        """Whether the states are equal."""
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.same(value, b[key]) for key, value in a.items())
        return bool(numpy.array_equal(a, b)) if isinstance(a, numpy.ndarray) else a == b


GENERATORS = (random.Random, numpy.random.RandomState, numpy.random.Generator, numpy.random.BitGenerator)
# The two generators that the whole process shares: any thread and any library may draw from them.
COMMON: tuple[Any, ...] = (random.random.__self__, numpy.random.mtrand._rand)  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]


def content_of(value: Any) -> Content | None:
    """Return the content of a container, array or generator, or None for other objects and for large ones."""
    if isinstance(value, GENERATORS):
        return None if isinstance(value, random.SystemRandom) else Generator(value)
    if isinstance(value, numpy.ndarray):
        return Numbers(value) if value.dtype.kind in "biufc" and value.size <= LONGEST and value.flags.writeable else None
    for kind, content in ((MutableMapping, Items), (list, Entries), (deque, Entries), (MutableSet, Members)):
        if isinstance(value, kind):
            return content(value) if len(value) <= LONGEST else None
    return None


@dataclass
class Kept:
    """A content that the first evaluation has changed.

    Attributes:
        content: the content.
        before: its value before the first evaluation.
        left: its value after the latest evaluation.
        record: what the latest evaluation has appended, if it did nothing else.
    """

    content: Content
    before: Any
    left: Any = None
    record: Any = None


class Contents:
    """The contents of many objects during an evaluation and its replays.

    Args:
        contents: the contents of what the function uses.
        draws: whether the function can be seen to use the generators that all threads share.
    """

    def __init__(self, contents: Iterable[Content], *, draws: bool) -> None:
        self._contents, self._draws = list(contents), draws
        self.changed: list[Kept] = []  # what the first evaluation has changed
        self.committed = False

    @property
    def random(self) -> bool:
        """Whether the first evaluation drew from a generator of Python or numpy."""
        return any(isinstance(entry.content, Generator) for entry in self.changed)

    @contextlib.contextmanager
    def evaluation(self, first: bool, originals: Mapping[int, Any]) -> Iterator[Callable[[], None]]:
        """Run an evaluation in this block: it starts from the contents before the first one, and its changes are undone.

        Args:
            first: whether it is the first evaluation.
            originals: for copies that take part in the evaluation, their originals, by the identity of the copy.

        Yields:
            A function that ends the evaluation.
        """
        now: list[Any] = []
        if first:
            self.changed = [Kept(content, content.take()) for content in self._contents]
        else:
            now = [entry.content.take() for entry in self.changed]
            for entry in self.changed:
                entry.content.put(entry.before)

        def end() -> None:
            for entry in self.changed:
                self._end(entry, first, originals)
            if first:
                self.changed = [entry for entry in self.changed if self._moved(entry)]

        try:
            yield end
        finally:
            if not first:
                for entry, content in zip(self.changed, now, strict=True):
                    entry.content.put(content + entry.record if entry.record else content)

    def commit(self) -> None:
        """Put everything in the state that the latest evaluation has left. A generator is in that state already."""
        self.committed = True
        for entry in self.changed:
            if entry.record is None and not isinstance(entry.content, Generator):
                entry.content.put(entry.left)

    def rewind(self) -> None:
        """Put the generators back that the first evaluation has advanced."""
        for entry in self.changed:
            if isinstance(entry.content, Generator):
                entry.content.put(entry.before)

    def _end(self, entry: Kept, first: bool, originals: Mapping[int, Any]) -> None:
        content, left = entry.content, entry.content.take()
        if isinstance(content, Generator):  # it advances once, at the first evaluation
            alone = threading.active_count() == 1 or not content.shared
            if not first and alone and not content.same(left, entry.left):
                raise ImpureMapError(
                    "a second evaluation of the function drew another number of random numbers from the generator of Python or "
                    "of numpy than the first: what it draws must depend neither on how often it is called nor on the values "
                    "that are differentiated"
                )
            if first:
                entry.left = left
            return
        entry.record = content.added(entry.before, left)
        if not self.committed:
            entry.left = content.mapped(left, lambda x: originals.get(id(x), x))
        if entry.record is None and not content.same(left, entry.before):
            content.put(entry.before)

    def _moved(self, entry: Kept) -> bool:
        """Whether the first evaluation, and not another thread's draw from a shared generator, has changed a content."""
        content = entry.content
        if content.same(entry.before, entry.left):
            return False
        return not (isinstance(content, Generator) and content.shared and threading.active_count() > 1) or self._draws
