"""Building blocks of equilibrium models and implicit layers. Importing this package does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "DEQ": "hyperopt.nn.deq",
    "TanhFixedPoint": "hyperopt.nn.tanh_layer",
}
__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from hyperopt.nn.deq import DEQ as DEQ
    from hyperopt.nn.tanh_layer import TanhFixedPoint as TanhFixedPoint


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hyperopt.nn' has no attribute {name!r}; it has {', '.join(__all__)}, and its modules")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted(__all__)
