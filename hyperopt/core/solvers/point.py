"""``Point``: the map at one iterate, as a step of a solver sees it.

Most methods read only ``w`` and ``fw = phi(w)``. Methods that need more get it from here, counted in evaluations, vjps and
jvps over the whole batch:

    at.vjp(v) = J^T v        at.jvp(v) = J v        at.jacobian() = J of each row        at.probe(x): the map at another state

J is the Jacobian of ``phi`` at ``w``, row by row:
- A ``ClosedMap`` gives it in closed form without an evaluation. When unrolling, this is used only if the formulas can be
  differentiated (``ClosedForm.differentiable``).
- Otherwise it comes from a graph of ``phi`` at ``w``, built by the evaluation itself if the solver has ``linearizes``, else by
  one more evaluation.
- With gradients on (unrolling), everything is differentiable in everything; under ``torch.func`` its own vjp is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.jacobian import evaluate
from hyperopt.core.operator import ClosedForm, LinearOperator

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClosedMap:
    """A map on (rows, dim) matrices that knows its Jacobian in closed form.

    Attributes:
        function: ``w -> phi(w)``.
        closed_form: ``(w, phi(w)) -> J``, the Jacobian at ``w``.
    """

    function: Map
    closed_form: Callable[[Tensor, Tensor], ClosedForm]

    def __call__(self, w: Tensor) -> Tensor:
        """Return ``phi(w)``."""
        return self.function(w)


@dataclass
class Cost:
    """The cost of a solve so far, over whole batches."""

    evaluations: int = 0
    vjps: int = 0
    jvps: int = 0


class Point:
    """The map at one iterate, for the rows in the batch.

    Args:
        phi: the map on (rows, dim) matrices.
        w: the iterate, shape (rows, dim).
        cost: the cost of the solve, which this point increases.
        fw: ``phi(w)``, if the caller has evaluated (and counted) it.
        graph: whether to evaluate with a graph, so that products with J need no further evaluation.

    Attributes:
        active: mask of the rows that still move, shape (rows,); None: all. A method may spare work on the others.
        broken: mask of the rows in which the method broke down, shape (rows,), set by the step; they end there.
        trial: the latest probed point; if the step leads there, it serves as the point of the next iterate.
    """

    __slots__ = ("_graph", "_linear", "_phi", "_residual", "active", "broken", "cost", "fw", "trial", "w")

    def __init__(self, phi: Map, w: Tensor, cost: Cost, fw: Tensor | None = None, *, graph: bool = False) -> None:
        self._phi, self.cost, self._graph = phi, cost, graph
        self._linear: LinearOperator | None = None
        self._residual: Tensor | None = None
        self.w = w
        self.active: Tensor | None = None
        self.broken: Tensor | None = None
        self.trial: Point | None = None
        if fw is not None:
            self.fw = fw
        else:
            cost.evaluations += 1
            if graph and not isinstance(phi, ClosedMap):
                self.fw, self._linear = evaluate(phi, w)
            else:
                self.fw = phi(w)

    @property
    def residual(self) -> Tensor:
        """``phi(w) - w``, shape (rows, dim); computed once."""
        if self._residual is None:
            self._residual = self.fw - self.w
        return self._residual

    def probe(self, w: Tensor) -> Point:
        """Return the map at another state, shape (rows, dim)."""
        self.trial = Point(self._phi, w, self.cost, graph=self._graph)
        return self.trial

    def vjp(self, v: Tensor) -> Tensor:
        """Return ``J^T v``, shape (rows, dim)."""
        return self._counted(lambda J: J.rmatvec(v))

    def jvp(self, v: Tensor) -> Tensor:
        """Return ``J v``, shape (rows, dim). On a graph it is the vjp of a vjp, and the first product costs one more."""
        return self._counted(lambda J: J.matvec(v))

    def jacobian(self) -> Tensor:
        """Return ``J[i, j, k] = d phi(w)[i, j] / d w[i, k]``, shape (rows, dim, dim): ``dim`` vjps, or none in closed form."""
        rows, dim = self.w.shape
        return self._counted(lambda J: J.T.dense(rows, dim, self.w).mT)

    def _counted(self, made: Callable[[LinearOperator], Tensor]) -> Tensor:
        """Return ``made(J)``, and count the products that it took."""
        if self._linear is None:
            self._linear = self._closed()
        if self._linear is None:
            self.cost.evaluations += 1
            _, self._linear = evaluate(self._phi, self.w)
        J = self._linear
        vjps, jvps = J.rmatvecs, J.matvecs
        found = made(J)
        self.cost.vjps += J.rmatvecs - vjps
        self.cost.jvps += J.matvecs - jvps
        return found

    def _closed(self) -> ClosedForm | None:
        """Return the map's closed form, if it has one; when unrolling, only if its products are differentiable."""
        if not isinstance(self._phi, ClosedMap):
            return None
        found = self._phi.closed_form(self.w, self.fw)
        return found if found.differentiable or not torch.is_grad_enabled() else None
