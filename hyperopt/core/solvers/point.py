"""``Point``: the map at one iterate, as a step of a solver sees it.

Most methods read ``w`` and ``fw = phi(w)`` and nothing else. Those that need more ask for it here, and everything that is asked
for is counted, in evaluations, vjps and jvps over the whole batch:

    at.vjp(v) = J^T v        at.jvp(v) = J v        at.jacobian() = J, one a row        at.probe(x): the map at another state

J is that of ``phi`` at ``w``, row by row. Where it comes from:
- a map that offers its products in closed form (``pullback``) gives them, at no evaluation; when unrolling, only if it says
  that they can be differentiated through (``differentiable``);
- else from a graph of ``phi`` at ``w``: built by the evaluation itself if the solver says ``linearizes``, else by one more;
- with gradients on (unrolling), all of it is differentiable in everything; under ``torch.func`` by its own vjp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hyperopt.core.captured import functorch_level

Map = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Any])


def differentiable(pullback: F) -> F:
    """Say of a map's ``pullback`` that its products are torch operations on ``w``, ``fw`` and the arguments, none in place.

    Unrolled Newton then takes the Jacobian from it too, in place of ``dim`` vjps with a graph each.
    """
    pullback.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]
    return pullback


@dataclass
class Cost:
    """What a solve has spent, over whole batches."""

    evaluations: int = 0
    vjps: int = 0
    jvps: int = 0


class Point:
    """The map at one iterate, for the rows in the batch.

    Args:
        phi: the map on (rows, dim) matrices; it may have ``pullback(w, fw)``, see ``hyperopt.core.adjoints.base.Bound``.
        w: the iterate, shape (rows, dim).
        cost: what the solve has spent, which this adds to.
        fw: ``phi(w)``, if the caller has evaluated it (and then counts it).
        graph: evaluate so that products with J cost no further evaluation.

    Attributes:
        w: the iterate.
        fw: ``phi(w)``, shape (rows, dim).
        cost: what the solve has spent up to here.
        active: rows that still move, shape (rows,); None: all. A method may spare work on the others: they will not move.
        broken: rows in which the method broke down, shape (rows,), set by the step; they end there.
        trial: the latest point that was probed; if the step leads there, it is the next iterate's and is not evaluated again.
    """

    __slots__ = ("_graph", "_linear", "_phi", "_residual", "active", "broken", "cost", "fw", "trial", "w")

    def __init__(self, phi: Map, w: Tensor, cost: Cost, fw: Tensor | None = None, *, graph: bool = False) -> None:
        """Evaluate, unless ``fw`` is given."""
        self._phi, self.cost, self._graph = phi, cost, graph
        self._linear: _Linear | None = None
        self._residual: Tensor | None = None
        self.w = w
        self.active: Tensor | None = None
        self.broken: Tensor | None = None
        self.trial: Point | None = None
        if fw is not None:
            self.fw = fw
        elif graph and self._closed() is None:
            self.fw = self._linearize().out
        else:
            cost.evaluations += 1
            self.fw = phi(w)

    @property
    def residual(self) -> Tensor:
        """``phi(w) - w``, shape (rows, dim); computed once."""
        if self._residual is None:
            self._residual = self.fw - self.w
        return self._residual

    def probe(self, w: Tensor) -> Point:
        """The map at another state, shape (rows, dim)."""
        self.trial = Point(self._phi, w, self.cost, graph=self._graph)
        return self.trial

    def vjp(self, v: Tensor) -> Tensor:
        """``J^T v``, shape (rows, dim)."""
        self.cost.vjps += 1
        return self._linearize().pull(v)

    def jvp(self, v: Tensor) -> Tensor:
        """``J v``, shape (rows, dim); by a graph it is the vjp of a vjp, which is one more the first time."""
        linear = self._linearize()
        self.cost.vjps += linear.prepare_push()
        self.cost.jvps += 1
        return linear.push(v)

    def jacobian(self) -> Tensor:
        """``J[i, j, k] = d phi(w)[i, j] / d w[i, k]``, shape (rows, dim, dim): ``dim`` vjps, or none in closed form."""
        linear = self._linearize()
        closed = linear.jacobian()
        if closed is not None:
            return closed
        rows, dim = self.w.shape
        self.cost.vjps += dim
        units = torch.eye(dim, dtype=self.w.dtype, device=self.w.device)
        return torch.stack([linear.pull(unit.expand(rows, dim)) for unit in units], dim=1)

    def _closed(self) -> Any:
        """The map's own ``pullback``; when unrolling, which differentiates through the products, only one that allows it."""
        own = getattr(self._phi, "pullback", None)
        return own if not torch.is_grad_enabled() or getattr(own, "differentiable", False) else None

    def _linearize(self) -> _Linear:
        if self._linear is None:
            pullback = self._closed()
            if pullback is not None:
                self._linear = _Closed(pullback(self.w, self.fw))
            else:
                self.cost.evaluations += 1
                self._linear = (_Functional if functorch_level() else _Graph)(self._phi, self.w)
        return self._linear


class _Linear(Protocol):
    """Products with J at one point. ``prepare_push`` says how many vjps the next ``push`` needs beforehand."""

    out: Tensor

    def pull(self, v: Tensor) -> Tensor: ...

    def prepare_push(self) -> int: ...

    def push(self, v: Tensor) -> Tensor: ...

    def jacobian(self) -> Tensor | None: ...


class _Graph:
    """By autograd; with gradients on, from an alias of the state, so that the products are differentiable in it."""

    def __init__(self, phi: Map, w: Tensor) -> None:
        self.differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            self.leaf = w.view_as(w) if self.differentiable and w.requires_grad else w.detach().requires_grad_()
            self.graph = phi(self.leaf)
        self.out = self.graph if self.differentiable else self.graph.detach()
        self.back: tuple[Tensor, Tensor] | None = None  # a cotangent, and J^T of it as a function of it

    def pull(self, v: Tensor) -> Tensor:
        return self._grad(self.graph, self.leaf, v, self.differentiable)

    def prepare_push(self) -> int:
        if self.back is not None:
            return 0
        with torch.enable_grad():
            v = torch.zeros_like(self.out).requires_grad_()
            self.back = v, self._grad(self.graph, self.leaf, v, True)
        return 1

    def push(self, v: Tensor) -> Tensor:
        assert self.back is not None
        cotangent, product = self.back
        return self._grad(product, cotangent, v, self.differentiable)

    def jacobian(self) -> None:
        return None

    @staticmethod
    def _grad(out: Tensor, leaf: Tensor, v: Tensor, create_graph: bool) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(v)
        (found,) = torch.autograd.grad(out, leaf, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
        return torch.zeros_like(v) if found is None else found


class _Functional:
    """By ``torch.func``, inside one of its transforms, where autograd's own ``grad`` is not allowed."""

    def __init__(self, phi: Map, w: Tensor) -> None:
        self.out, self.pullback, *_ = torch.func.vjp(phi, w)
        self.pushforward: Any = None

    def pull(self, v: Tensor) -> Tensor:
        return self.pullback(v)[0]

    def prepare_push(self) -> int:
        if self.pushforward is not None:
            return 0
        self.pushforward = torch.func.vjp(self.pull, torch.zeros_like(self.out))[1]
        return 1

    def push(self, v: Tensor) -> Tensor:
        return self.pushforward(v)[0]

    def jacobian(self) -> None:
        return None


class _Closed:
    """By the map's own formulas: ``state(v) = J^T v``, and where it has them ``tangent(v) = J v`` and ``jacobian() = J``."""

    out: Tensor

    def __init__(self, pullback: Any) -> None:
        self.pullback = pullback
        self.tangent = getattr(pullback, "tangent", None)

    def pull(self, v: Tensor) -> Tensor:
        return self.pullback.state(v)

    def prepare_push(self) -> int:
        return 0

    def push(self, v: Tensor) -> Tensor:
        if self.tangent is not None:
            return self.tangent(v)
        return torch.func.vjp(self.pullback.state, torch.zeros_like(v))[1](v)[0]  # state is linear: any point will do

    def jacobian(self) -> Tensor | None:
        closed = getattr(self.pullback, "jacobian", None)
        return None if closed is None else closed()
