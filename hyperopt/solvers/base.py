"""``FixedPointSolver``: one step of a method; the driver in ``iterate.py`` owns stopping, freezing and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from hyperopt.settings import IterativeSettings


class FixedPointSolver(IterativeSettings, ABC):
    """A method for ``w = phi(w)`` on a ``(rows, dim)`` matrix whose rows are independent.

    A method is a frozen dataclass of settings with two pure functions. Nothing in ``step`` may change a tensor in place or mix
    rows: iterates are kept by reference, unrolling differentiates through ``step``, and one bad row must not spoil another.
    """

    def init(self, w: Tensor) -> Any:
        """State before the first step; ``w`` has shape (rows, dim)."""
        return None

    @abstractmethod
    def step(self, state: Any, w: Tensor, fw: Tensor) -> tuple[Tensor, Any]:
        """The next iterate from ``w`` and ``fw = phi(w)``, both (rows, dim), and the new state."""

    def select(self, state: Any, index: Tensor) -> Any:
        """The state of the rows in ``index`` (shape (k,)), when converged rows are dropped."""
        return state

    @property
    def name(self) -> str:
        """The method's name in statistics and messages."""
        return type(self).__name__
