"""Public names that are loaded when they are first used, so that importing a package does not import torch."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any


class Written(str):
    """An annotation as it stands in the source, which a signature prints without quotes: ``help`` and ``?`` read better.

    Under ``from __future__ import annotations`` annotations are strings. Evaluating them would give long names
    (``collections.abc.Callable[..., typing.Any]``), and would fail for names that only type checkers import.
    """

    __slots__ = ()
    __repr__ = str.__str__


def unquote(value: Any) -> None:
    """Make the signatures of a function, or of all methods that a class has from this package, print without quotes."""
    ours = [each for each in value.__mro__ if each.__module__.startswith("hyperopt.")] if isinstance(value, type) else []
    parts = [part for each in ours for part in vars(each).values()] if ours else [value]
    for part in parts:
        function = getattr(part, "__func__", getattr(part, "fget", part))  # of a class method, of a property
        if isinstance(function, FunctionType):
            function = inspect.unwrap(function)  # a signature is that of the function inside a decorator
            given = function.__annotations__
            given.update({name: Written(each) for name, each in given.items() if type(each) is str})


def lazily(
    package: str, public: Mapping[str, str], names: Sequence[str], also: str = "", packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: name of the package.
        public: the module of each name that is loaded on demand.
        names: all public names.
        also: text to add to the message about an unknown name.
        packages: subpackages, which are loaded on demand too.
    """

    def load(name: str) -> Any:
        """Load a public name when it is first used."""
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        if name not in public:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it has {', '.join(dict.fromkeys([*names, *packages]))}{also}"
            )
        value = getattr(importlib.import_module(public[name]), name)
        unquote(value)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        """Return the public names, for tab completion."""
        return sorted({*names, *packages})

    return load, listed
