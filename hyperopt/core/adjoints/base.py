"""``Adjoint``: turns a solved fixed point into a differentiable one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.core.captured import Swap
from hyperopt.core.draws import Unreplayed
from hyperopt.core.jacobian import Jacobian
from hyperopt.core.operator import ClosedForm
from hyperopt.core.purity import random_map
from hyperopt.core.replay import FrozenMap
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.point import ClosedMap
from hyperopt.core.status import Solution
from hyperopt.core.tree import Layout, leaves_of


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
        has_aux: whether the map returns ``(state, aux)``.
        aux: the aux of the latest evaluation, detached.
        watched: the mode that looked at the first evaluation; a ``FrozenMap`` looks itself.
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
    has_aux: bool = False
    aux: list[Any] = field(default_factory=list)
    watched: list[Unreplayed] = field(default_factory=list)

    @cached_property
    def pullback(self) -> Callable[..., Any] | None:
        """The map's own ``pullback(w, fw, *args)``, the one optional attribute of a map, where its state is a matrix."""
        return getattr(self.phi, "pullback", None) if self.layout.trivial else None

    def bind(self, args: tuple[Any, ...]) -> Bound:
        """The map on a matrix with its arguments given."""
        return Bound(self, args)

    @property
    def droppable(self) -> bool:
        """Whether a part of the rows may be evaluated without the others."""
        return bool(self.row_args) and not (self.layout.joint or self.keep_state or self.has_aux)

    def part(self, index: Tensor) -> Bound:
        """The map of the rows in ``index``, its arguments detached where they are cut."""
        rows = frozenset(self.row_args)
        return self.bind(tuple(a.detach()[index] if i in rows else a for i, a in enumerate(self.args)))

    def call(self, w: Tensor, args: tuple[Any, ...], swap: Swap | None = None) -> Tensor:
        """The map on a matrix (any number of rows); what it closes over is swapped by ``swap``."""
        state = self.layout.tree(w)
        if not self.watched and not isinstance(self.phi, FrozenMap) and not torch.compiler.is_compiling():
            given = [x for arg in args for x in leaves_of(arg) if isinstance(x, Tensor)]
            mode = Unreplayed([w, *leaves_of(state)], given)
            self.watched.append(mode)
            with mode:
                out = self.phi(state, *args) if swap is None else swap.call(self.phi, state, args)
            if mode.random:
                raise random_map(self.phi, self.args)
        elif swap is None:
            out = self.phi(state, *args)
        else:  # nothing but the map itself runs under the mode, which makes each operation slower
            out = swap.call(self.phi, state, args)
        if self.has_aux:
            out = self._without_aux(out)
        if self.layout.trivial and isinstance(out, Tensor) and out.shape == w.shape and out.dtype == w.dtype:
            return out
        return self.layout.matrix(out, w.shape[0])

    def _without_aux(self, out: Any) -> Any:
        """The state of ``(state, aux)``; the aux is kept, detached.

        Raises:
            TypeError: the map returned something else.
        """
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"has_aux=True, but the map returned a {type(out).__name__}; return (state, aux)")
        self.aux[:] = [optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out[1], none_is_leaf=True)]
        return out[0]


class Bound(ClosedMap):
    """The map of a problem on (rows, dim) matrices, with its arguments given: what a solver is run on."""

    def __init__(self, problem: Problem, args: tuple[Any, ...]) -> None:
        """Bind the arguments."""
        self.problem, self.args = problem, args

    def __call__(self, w: Tensor) -> Tensor:
        """``phi(w, *args)``."""
        return self.problem.call(w, self.args)

    @property
    def has_closed_form(self) -> bool:
        """Whether the map has a ``pullback`` and takes the state as the matrix that it is."""
        return self.problem.pullback is not None

    def closed_form(self, w: Tensor, fw: Tensor) -> ClosedForm:
        """What the map's ``pullback`` returns.

        Raises:
            TypeError: it is no ``ClosedForm``.
        """
        assert self.problem.pullback is not None
        found = self.problem.pullback(w, fw, *self.args)
        if not isinstance(found, ClosedForm):
            raise TypeError(
                f"the map's pullback(w, fw, *args) returned a {type(found).__name__}; return a subclass of "
                "hyperopt.core.operator.ClosedForm"
            )
        return found


def graph_part(problem: Problem, point: Tensor, out: Tensor) -> Callable[[Tensor], Jacobian | None]:
    """Return ``part(index)``: a new graph of some rows at ``point``, None where the map no longer gives ``out`` there.

    A linear solve then spends nothing on rows that are solved. A graph knows all of its rows or none, so the map is called once
    more, on the rows that are left, and only where the caller has said that it takes all that belongs to a row through
    ``row_args``. If that call does not give what the solve gave, the map is no longer the one that was solved, and the graph of
    all rows is used on.
    """

    def part(index: Tensor) -> Jacobian | None:
        with torch.enable_grad():
            leaf = point[index].detach().requires_grad_()
            graph = problem.part(index)(leaf)
        want = out[index]
        change, size = torch.linalg.vector_norm(graph.detach() - want), torch.linalg.vector_norm(want)
        if not bool(change <= math.sqrt(torch.finfo(want.dtype).eps) * size):
            return None
        found = Jacobian(graph, leaf)
        found.evaluations = 1
        return found

    return part


class Adjoint(ABC):
    """How a solution is made differentiable."""

    def reaches_start(self, solver: FixedPointSolver) -> bool:
        """Whether the value is differentiable in where the solve starts; a fixed point does not depend on it."""
        return False

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """Why it cannot differentiate a fixed point that this solver finds, as the end of a sentence; None if it can."""
        return None

    @abstractmethod
    def run(self, problem: Problem) -> Solution:
        """Solve ``problem`` and attach the derivative."""
