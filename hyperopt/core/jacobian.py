"""``Jacobian``: products with the derivatives of a map at one point, by autograd, on a graph that is built once.

    matvec(s) = J s        rmatvec(v) = J^T v        arguments(v) = (d_x m)^T v,        J = d_z m(z, *x)

Newton's steps, the adjoints and the diagnosis use it. Unrolled steps use it too, with products that have graphs of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.overrides import has_torch_function

from hyperopt.core.captured import functorch_level
from hyperopt.core.graph_modes import twice_differentiable
from hyperopt.core.operator import Linearization, LinearOperator
from hyperopt.core.precision import graph_eps


class Jacobian(Linearization):
    """The Jacobian of a map at a point, by autograd. ``J s`` is the vjp of ``v -> J^T v``, so the map is not called again.

    Args:
        graph: ``m(z, *x)`` with its graph.
        state: the ``z`` of that graph, with the same number of entries.
        inputs: the ``x`` of that graph.
        differentiable: whether the products have a graph too.
    """

    def __init__(
        self,
        graph: Tensor,
        state: Tensor,
        inputs: Sequence[Tensor] = (),
        *,
        differentiable: bool = False,
    ) -> None:
        self.graph, self.state, self.inputs, self.differentiable = graph, state, inputs, differentiable
        self._pulled: tuple[Tensor, Tensor] | None = None  # a cotangent v, and J^T v with a graph back to it

    @property
    def rounding(self) -> float:
        """The largest eps of the half-precision tensors in the graph."""
        return graph_eps(self.graph, self.state)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self._pull(v, self.differentiable)

    def _matvec(self, v: Tensor) -> Tensor:
        if self._pulled is None:
            self._count(rmatvecs=1)
            with torch.enable_grad():
                cotangent = torch.zeros_like(v).requires_grad_()
                self._pulled = cotangent, self._pull(cotangent, True)
        cotangent, pulled = self._pulled
        return _vjp(pulled, cotangent, v, self.differentiable)

    def _pull(self, v: Tensor, create_graph: bool) -> Tensor:
        return _vjp(self.graph, self.state, v, create_graph)

    def arguments(self, v: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """Return ``(d_x m)^T v`` for each input that needs it."""
        wanted = [x for x, need in zip(self.inputs, needs, strict=True) if need]
        if not wanted or not self.graph.requires_grad:
            return [None] * len(needs)
        found = iter(pull([self.graph], wanted, [v.view_as(self.graph)]))
        return [next(found) if need else None for need in needs]


def _vjp(graph: Tensor, at: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """Return ``(d graph / d at)^T v``, in the shape of ``v``."""
    if not graph.requires_grad:
        return torch.zeros_like(v)
    (found,) = pull([graph], [at], [v.view_as(graph)], create_graph=create_graph)
    return torch.zeros_like(v) if found is None else found.view_as(v)


def pull(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    keep: bool = True,
    create_graph: bool = False,
) -> Sequence[Any]:
    """Return ``(d outputs / d inputs)^T cotangents``, one entry for each input, None for an input that no output depends on.

    This is ``torch.autograd.grad`` without its checks in Python, which cost as much as a small product. The autograd engine
    checks shapes and dtypes itself.

    Args:
        outputs: tensors with a graph.
        inputs: tensors in the graph of the outputs.
        cotangents: one for each output, of its shape.
        keep: whether the graph is kept.
        create_graph: whether the result has a graph of its own.
    """
    if torch.compiler.is_compiling() or has_torch_function((*outputs, *inputs)):  # a mode or the compiler must see the call
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=keep, create_graph=create_graph, allow_unused=True)
    engine = Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
    return engine.run_backward(tuple(outputs), tuple(cotangents), keep, create_graph, tuple(inputs), True, accumulate_grad=False)


class _Transformed(LinearOperator):
    """The Jacobian inside a transform of ``torch.func``, where ``torch.autograd.grad`` is not allowed."""

    def __init__(self, pull: Callable[[Tensor], tuple[Tensor]]) -> None:
        self.pull = pull
        self.push: Callable[[Tensor], tuple[Tensor]] | None = None

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.pull(v)[0]

    def _matvec(self, v: Tensor) -> Tensor:
        if self.push is None:
            self._count(rmatvecs=1)
            self.push = torch.func.vjp(self._rmatvec, torch.zeros_like(v))[1]
        return self.push(v)[0]


def evaluate(phi: Callable[[Tensor], Tensor], w: Tensor) -> tuple[Tensor, LinearOperator]:
    """Return ``phi(w)`` and the Jacobian there, from one evaluation.

    With gradients enabled, both are differentiable in everything, including ``w``; else the value is detached.
    """
    if functorch_level():
        with twice_differentiable():
            out, pull, *_ = torch.func.vjp(phi, w)
        return out, _Transformed(pull)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        state = w.view_as(w) if differentiable and w.requires_grad else w.detach().requires_grad_()
        with twice_differentiable():
            graph = phi(state)
    return graph if differentiable else graph.detach(), Jacobian(graph, state, differentiable=differentiable)
