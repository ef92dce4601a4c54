"""``FixedPointSolver``: one step of a method. ``iterate.py`` does the stopping, the holding of rows and the statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from hyperopt.core.checks import IterativeMethod
from hyperopt.core.solvers.point import Point


class FixedPointSolver(IterativeMethod, ABC):
    """A method for ``w = phi(w)`` on a ``(rows, dim)`` matrix whose rows are independent.

    A method is a frozen dataclass of its arguments with a few pure functions. ``step`` must neither change a tensor in place
    nor mix rows: iterates are kept by reference, unrolling differentiates through ``step``, and one bad row must not spoil
    another.

    Attributes:
        linearizes: whether every step takes products with the Jacobian. The map is then evaluated with a graph, and the run
            ends without a step from its last iterate, since such a step is not free.
        rise: a row ends as diverged if its residual is this many times its best one, and above the first.
        takes_residual: whether a step uses ``residual`` of its point, which is then kept.
        holds: whether solved rows must not move while others do. An accelerated step from a solution may be worse; a plain
            iteration is not.
        differentiable: whether ``step`` can be differentiated through.
        keeps_inverse: whether the state holds an estimate of ``(I - J)^{-1}``; see ``inverse``.
    """

    linearizes: ClassVar[bool] = False
    rise: ClassVar[float] = 1e3
    takes_residual: ClassVar[bool] = True
    holds: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    keeps_inverse: ClassVar[bool] = False

    def init(self, w: Tensor) -> Any:
        """Return the state before the first step; ``w`` has shape (rows, dim)."""
        return None

    @abstractmethod
    def step(self, state: Any, at: Point) -> tuple[Tensor, Any]:
        """Return the next iterate, shape (rows, dim), from the map at the current one, and the new state."""

    def select(self, state: Any, index: Tensor) -> Any:
        """Return the state of the rows in ``index``, shape (k,), when converged rows are dropped."""
        return state

    def inverse(self, state: Any, v: Tensor, *, transpose: bool) -> Tensor:
        """Return the estimate of ``(I - J)^{-1} v`` or, with ``transpose``, ``(I - J^T)^{-1} v``, shape (rows, dim)."""
        raise NotImplementedError(f"{self.name} keeps no inverse")
