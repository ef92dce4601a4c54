"""``Adjoint``: turns a solved fixed point into a differentiable one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.captured import functorch_level
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import differentiable
from hyperopt.core.status import Solution
from hyperopt.core.tree import Layout


@dataclass(frozen=True)
class Problem:
    """A fixed point to solve.

    Attributes:
        phi: the user's map, called ``phi(w, *args)``.
        args: its arguments; trees of anything, whose tensors the solution is differentiable in.
        row_args: which of ``args`` are tensors with one leading row for each row of the state.
        layout: how the state lies in a matrix.
        start: initial state, (rows, dim), detached.
        solver: how to solve.
        policy: what to do when that fails.
        fallback: solvers tried in turn under ``policy="fallback"``.
        adjoint_start: where a linear solver starts, up to a factor for each row, (rows, dim); None: at its right-hand side.
        trace: measure the residual at every iteration.
        keep_state: keep the solver's state at the solution, of all rows, which are then not dropped.
    """

    phi: Callable[..., Any]
    args: tuple[Any, ...]
    row_args: Sequence[int]
    layout: Layout
    start: Tensor
    solver: FixedPointSolver
    policy: str = "warn"
    fallback: tuple[FixedPointSolver, ...] = ()
    adjoint_start: Tensor | None = None
    trace: bool = False
    keep_state: bool = False

    def bind(self, args: tuple[Any, ...]) -> Bound:
        """The map on a matrix with its arguments given."""
        return Bound(self, args)

    @property
    def droppable(self) -> bool:
        """Whether a part of the rows may be evaluated without the others."""
        return bool(self.row_args) and not self.layout.joint and not self.keep_state

    def part(self, index: Tensor) -> Bound:
        """The map of the rows in ``index``, its arguments detached where they are cut."""
        rows = frozenset(self.row_args)
        return self.bind(tuple(a.detach()[index] if i in rows else a for i, a in enumerate(self.args)))

    def call(self, w: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The map on a matrix (any number of rows)."""
        blind = torch.compiler.is_compiling() or w.is_inference() or functorch_level() > 0
        version = None if blind else w._version
        out = self.phi(self.layout.tree(w), *args)
        if version is not None and w._version != version:
            raise ValueError("the map changed the state that it was given, in place; return a new tensor")
        if self.layout.trivial and isinstance(out, Tensor) and out.shape == w.shape and out.dtype == w.dtype:
            return out
        return self.layout.matrix(out, w.shape[0])


class Bound:
    """The map of a problem on (rows, dim) matrices, with its arguments given: what a solver is run on.

    Attributes:
        pullback: ``pullback(w, fw)``: the map's own vector-Jacobian products, where it has a ``pullback`` and takes the state as
            the matrix that it is; else None. See ``hyperopt.nn.equilibrium.TanhAffine``.
    """

    def __init__(self, problem: Problem, args: tuple[Any, ...]) -> None:
        """Bind the arguments."""
        self.problem, self.args = problem, args
        own = getattr(problem.phi, "pullback", None) if problem.layout.trivial else None
        self.pullback = None if own is None else self._bound(own)

    def _bound(self, own: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
        def pullback(w: Tensor, fw: Tensor) -> Any:
            return own(w, fw, *self.args)

        return differentiable(pullback) if getattr(own, "differentiable", False) else pullback

    def __call__(self, w: Tensor) -> Tensor:
        """``phi(w, *args)``."""
        return self.problem.call(w, self.args)


class Adjoint(ABC):
    """How a solution is made differentiable."""

    @abstractmethod
    def run(self, problem: Problem) -> Solution:
        """Solve ``problem`` and attach the derivative."""
