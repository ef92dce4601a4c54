"""Bilevel hyperparameter optimization by implicit hypergradients. Importing this package does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "fixed_point": "hyperopt.primitive",
    "Solution": "hyperopt.status",
    "SolveStats": "hyperopt.status",
    "Status": "hyperopt.status",
    "SolveError": "hyperopt.policy",
    "SolveWarning": "hyperopt.policy",
    "ClosureError": "hyperopt.closure",
    "InexactError": "hyperopt.adjoints.attach",
    "Picard": "hyperopt.solvers.picard",
    "Anderson": "hyperopt.solvers.anderson",
    "Neumann": "hyperopt.linsolve.neumann",
    "LinearAnderson": "hyperopt.linsolve.anderson",
    "Implicit": "hyperopt.adjoints.implicit",
    "Unrolled": "hyperopt.adjoints.unrolled",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from hyperopt.adjoints.attach import InexactError
    from hyperopt.adjoints.implicit import Implicit
    from hyperopt.adjoints.unrolled import Unrolled
    from hyperopt.closure import ClosureError
    from hyperopt.primitive import fixed_point
    from hyperopt.linsolve.anderson import LinearAnderson
    from hyperopt.linsolve.neumann import Neumann
    from hyperopt.policy import SolveError, SolveWarning
    from hyperopt.solvers.anderson import Anderson
    from hyperopt.solvers.picard import Picard
    from hyperopt.status import Solution, SolveStats, Status


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hyperopt' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted(__all__)
