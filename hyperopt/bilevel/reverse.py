"""Backpropagation through training: with the graph of all steps, or of a few, which are taken again on the way back.

    forward    the state is kept at the start of every segment, no graph
    backward   from the last segment to the first: its steps once more with their graph, then (a_w, a_lam) through it

In segments of sqrt(T) steps the memory is that of sqrt(T) graphs and as many states, for twice the gradients. What serves a
general map, ``torch.utils.checkpoint``, cannot be used here: it takes a segment again for every gradient inside of it, and each
step of training is one.

References: Griewank & Walther, ACM TOMS 26, 2000; Chen, Xu, Zhang & Guestrin, arXiv 1604.06174, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.curvature import second_derivatives
from hyperopt.bilevel.problem import Leaves

Map = Callable[[int, Any, Any], Any]


@dataclass
class Passed:
    """A training and the way back through it.

    Attributes:
        final: the state at the end.
        loss: the outer loss there, detached.
        grads: its gradient in each hyperparameter; None: it does not depend on it.
    """

    final: Any
    loss: Tensor
    grads: Sequence[Tensor | None]


def unroll(phi: Map, start: Any, lam: Leaves, steps: int, last: int | None, outer: Callable[[Any], Tensor]) -> Passed:
    """Take ``phi`` ``steps`` times from ``start`` and backpropagate ``outer`` through the ``last`` steps (None: through all).

    The arguments are those of ``reverse``.
    """
    first, state = max(0, steps - (last or steps)), start
    with torch.no_grad():
        for k in range(first):
            state = phi(k, state, lam.tree)
    with torch.enable_grad():
        for k in range(first, steps):
            state = phi(k, state, lam.tree)
        loss = outer(state)
        with second_derivatives():
            grads = torch.autograd.grad(loss, lam.flat, allow_unused=True)
    return Passed(optree.tree_map(torch.Tensor.detach, state), loss.detach(), grads)


def reverse(phi: Map, start: Any, lam: Leaves, steps: int, segment: int | None, outer: Callable[[Any], Tensor]) -> Passed:
    """Take ``phi`` ``steps`` times from ``start`` and backpropagate ``outer`` of the final state to the hyperparameters.

    Args:
        phi: the map of each step, ``phi(k, state, lam)``; called twice for each, which must give the same.
        start: a tree of tensors, which may have been computed from ``lam.tree``; leaves that the map does not differentiate, such
            as counters, are carried along.
        lam: the hyperparameters.
        steps: how many.
        segment: steps whose graph is kept at a time (None: the root of ``steps``, rounded up).
        outer: the loss of a final state; it may depend on ``lam.tree`` too.
    """
    size = segment or math.isqrt(steps - 1) + 1
    firsts = range(0, steps, size)
    kept, state = [], start
    with torch.no_grad():
        for first in firsts:
            kept.append(state)
            for k in range(first, min(first + size, steps)):
                state = phi(k, state, lam.tree)
    end, whole = _leaves(state)
    with torch.enable_grad():
        loss = outer(optree.tree_unflatten(whole, end))
        slopes = torch.autograd.grad(loss, [*end, *lam.flat], allow_unused=True)
    back: Sequence[Tensor | None] = slopes[: len(end)]
    total = list(slopes[len(end) :])

    def pull(outputs: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Add what ``outputs`` give to the hyperparameters, and return what they give to ``inputs``."""
        nonlocal total
        pairs = [(x, g) for x, g in zip(optree.tree_leaves(outputs), back, strict=True) if g is not None and x.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        some, given = zip(*pairs, strict=True)
        with second_derivatives():
            slopes = torch.autograd.grad(some, [*inputs, *lam.flat], given, allow_unused=True)
        total = [add(a, b) for a, b in zip(total, slopes[len(inputs) :], strict=True)]
        return slopes[: len(inputs)]

    for first, state in zip(reversed(firsts), reversed(kept), strict=True):
        begin, spec = _leaves(state)
        with torch.enable_grad():
            now = optree.tree_unflatten(spec, begin)
            for k in range(first, min(first + size, steps)):
                now = phi(k, now, lam.tree)
        back = pull(now, begin)
    pull(start, [])
    return Passed(optree.tree_unflatten(whole, [leaf.detach() for leaf in end]), loss.detach(), total)


def _leaves(state: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a state as leaves of a new graph, and its structure."""
    leaves, spec = optree.tree_flatten(state)
    return [leaf.detach().requires_grad_() for leaf in leaves], spec


def add(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """The sum, None standing for zero."""
    return two if one is None else one if two is None else one + two
