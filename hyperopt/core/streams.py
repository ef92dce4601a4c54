"""``Stream``: an iterator that remembers what was taken from it, since an iterator has no content that can be read.

A ``Replay`` puts a stream in the place of an iterator for the first evaluation of a function, and gives the same again in others.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from hyperopt.core.draws import ImpureMapError


class Stream(Iterator[Any]):
    """An iterator that begins with what was taken from another one, and remembers what it gives.

    Args:
        source: the other one.
        items: what comes first.
        closed: whether nothing else comes.
    """

    END = object()

    def __init__(self, source: Iterator[Any], items: list[Any], *, closed: bool = False) -> None:
        """Nothing is taken yet."""
        self.source, self.items, self.at, self.closed = source, list(items), 0, closed

    def __next__(self) -> Any:
        """The next item; one from the source is made outside of every mode: it is data, whatever it draws.

        Raises:
            ImpureMapError: it is closed, and more is taken than the first time.
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
        """Whatever else the source has."""
        if name == "source":  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.source, name)

    def rest(self) -> Iterator[Any]:
        """What is left: the source itself where none of its items is."""
        left = self.items[self.at :]
        if left:
            return Stream(self.source, left)
        return self.source.rest() if isinstance(self.source, Stream) else self.source


def streamed(value: Any) -> bool:
    """Whether a value is an iterator of a library's, which a ``Stream`` can stand for; the user's own keep attributes."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase) and library(type(value).__module__)


@functools.cache
def library(module: str) -> bool:
    """Whether a module is no code of the user's: an installed package, or a part of Python."""
    top = module.split(".")[0]
    if top == __name__.split(".")[0] or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    found = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in found or "dist-packages" in found
