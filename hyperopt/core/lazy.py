"""Public names that are loaded when they are first asked for, so that importing a package does not import torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(
    package: str, public: Mapping[str, str], names: Sequence[str], also: str = "", packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        public: the module of each name that is loaded on demand.
        names: all public names.
        also: what else it has, for the message about an unknown one.
        packages: its subpackages, which are loaded on demand too.
    """

    def load(name: str) -> Any:
        """Load a public name when it is first asked for."""
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join([*names, *packages])}{also}")
        value = getattr(importlib.import_module(public[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        """The public names, for tab completion."""
        return sorted([*names, *packages])

    return load, listed
