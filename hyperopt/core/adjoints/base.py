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
from hyperopt.core.solvers.point import ClosedMap, Map
from hyperopt.core.status import Solution
from hyperopt.core.tree import Layout


@dataclass(frozen=True)
class Problem:
    """A fixed point to solve.

    Attributes:
        phi: the user's map, called ``phi(w, *args)``.
        args: its arguments, trees; the solution is differentiable in their tensors.
        row_args: which of ``args`` are tensors with one leading entry for each row of the state.
        layout: how the state lies in a matrix.
        start: initial state, (rows, dim), detached.
        solver: how to solve.
        policy: what to do if the solve fails.
        fallback: solvers tried in turn under ``policy="fallback"``.
        adjoint_start: where a linear solver starts, up to a factor for each row, (rows, dim); None: at its right-hand side.
        trace: whether to measure the residual at every iteration.
        keep_state: whether to keep the solver's state of all rows at the solution; no rows are dropped then.
        has_aux: whether the map returns ``(state, aux)``.
        aux: the aux of the latest evaluation, detached.
        watched: the mode that watched the first evaluation; empty for a ``FrozenMap``, which does this itself.
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
        """The map's own ``pullback(w, fw, *args)``, an optional attribute of the map, if the state is a matrix."""
        return getattr(self.phi, "pullback", None) if self.layout.trivial else None

    def bind(self, args: tuple[Any, ...]) -> Map:
        """Return the map on (rows, dim) matrices with its arguments given, as a solver needs it.

        Its closed form raises a TypeError if the map's ``pullback`` returns anything else than a ``ClosedForm``.
        """

        def phi(w: Tensor) -> Tensor:
            return self.call(w, args)

        def closed_form(w: Tensor, fw: Tensor) -> ClosedForm:
            assert self.pullback is not None
            found = self.pullback(w, fw, *args)
            if not isinstance(found, ClosedForm):
                raise TypeError(
                    f"the map's pullback(w, fw, *args) returned a {type(found).__name__}; return a subclass of "
                    "hyperopt.core.operator.ClosedForm"
                )
            return found

        return phi if self.pullback is None else ClosedMap(phi, closed_form)

    @property
    def droppable(self) -> bool:
        """Whether some rows can be evaluated without the others."""
        return bool(self.row_args) and not (self.layout.joint or self.keep_state or self.has_aux)

    def part(self, index: Tensor) -> Map:
        """Return the map on the rows in ``index``; arguments that are indexed are detached."""
        rows = frozenset(self.row_args)
        return self.bind(tuple(a.detach()[index] if i in rows else a for i, a in enumerate(self.args)))

    def call(self, w: Tensor, args: tuple[Any, ...], swap: Swap | None = None) -> Tensor:
        """Call the map on a matrix (of any number of rows), with its captured tensors replaced by ``swap``."""
        state = self.layout.tree(w)
        if not self.watched and not isinstance(self.phi, FrozenMap) and not torch.compiler.is_compiling():
            given = [x for arg in args for x in optree.tree_leaves(arg) if isinstance(x, Tensor)]
            mode = Unreplayed([w, *optree.tree_leaves(state)], given)
            self.watched.append(mode)
            with mode:
                out = self.phi(state, *args) if swap is None else swap.call(self.phi, state, args)
            if mode.random:
                raise random_map(self.phi, self.args)
        elif swap is None:
            out = self.phi(state, *args)
        else:  # only the map itself runs under the mode, which makes each operation slower
            out = swap.call(self.phi, state, args)
        if self.has_aux:
            out = self._without_aux(out)
        if self.layout.trivial and isinstance(out, Tensor) and out.shape == w.shape and out.dtype == w.dtype:
            return out
        return self.layout.matrix(out, w.shape[0])

    def _without_aux(self, out: Any) -> Any:
        """Return the state of ``(state, aux)``, and keep the detached aux."""
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"has_aux=True, but the map returned a {type(out).__name__}; return (state, aux)")
        self.aux[:] = [optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out[1], none_is_leaf=True)]
        return out[0]


def graph_part(problem: Problem, point: Tensor, out: Tensor) -> Callable[[Tensor], Jacobian | None]:
    """Return ``part(index)``: it builds a new graph of some rows at ``point``, or returns None if the map has changed.

    A linear solve then spends nothing on solved rows. A graph covers all of its rows, so the map is called again on the
    remaining ones. This is done only if the caller has said, by ``row_args``, that the map takes everything that belongs to a
    row through them. If the new call does not reproduce ``out``, the map is no longer the one that was solved, and the graph
    of all rows is used.
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
        """Whether the value is differentiable in the start of the solve; a fixed point does not depend on it."""
        return False

    def unfit(self, solver: FixedPointSolver) -> str | None:
        """Return why it cannot differentiate a fixed point of this solver, as the end of a sentence, or None if it can."""
        return None

    @abstractmethod
    def run(self, problem: Problem) -> Solution:
        """Solve ``problem`` and attach the derivative."""
