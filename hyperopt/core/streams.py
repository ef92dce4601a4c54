"""``Stream``: an iterator that remembers what was taken from it, since the content of an iterator cannot be read.

A ``Replay`` puts a stream in the place of an iterator for the first evaluation of a function, and gives its items again in
replays.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from hyperopt.core.policy import ImpureMapError


class Stream(Iterator[Any]):
    """An iterator that gives known items before those of its source, and remembers what it gives.

    Args:
        source: the iterator that it stands for.
        items: the items that come first.
        closed: whether nothing may be taken from ``source``.
    """

    END = object()

    def __init__(self, source: Iterator[Any], items: list[Any], *, closed: bool = False) -> None:
        self.source, self.items, self.at, self.closed = source, list(items), 0, closed

    def __next__(self) -> Any:
        """Return the next item. The source makes its items outside of every mode: they are data, even if random.

        Raises:
            ImpureMapError: the stream is closed, and more is taken than the first time.
        """
        if self.at == len(self.items):
            if self.closed:
                raise ImpureMapError(
                    "a second evaluation of the function takes more from an iterator than the first did; let it take the same"
                )
            with _disable_current_modes():
                self.items.append(next(self.source, Stream.END))
        item = self.items[self.at]
        self.at += 1
        if item is Stream.END:
            raise StopIteration
        return item

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the source."""
        if name == "source":  # copy and pickle ask for attributes before there is a source
            raise AttributeError(name)
        return getattr(self.source, name)

    def rest(self) -> Iterator[Any]:
        """Return an iterator over the rest; it is the source itself if none of the known items is left."""
        left = self.items[self.at :]
        if left:
            return Stream(self.source, left)
        return self.source.rest() if isinstance(self.source, Stream) else self.source


def streamed(value: Any) -> bool:
    """Whether a value is a library's iterator, which a ``Stream`` can replace; the user's own have attributes instead."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase) and library(type(value).__module__)


@functools.cache
def library(module: str) -> bool:
    """Whether a module belongs to an installed package or to Python, and not to the user."""
    top = module.split(".")[0]
    if top == __name__.split(".")[0] or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    found = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in found or "dist-packages" in found
