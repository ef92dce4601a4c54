"""Public names that are loaded when they are first used, so that importing a package does not import torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


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
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join([*names, *packages])}{also}")
        value = getattr(importlib.import_module(public[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        """Return the public names, for tab completion."""
        return sorted([*names, *packages])

    return load, listed
