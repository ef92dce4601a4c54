"""Backpropagation through training, with the graph of all steps or with the graph of one segment of steps at a time.

    forward    keep the state at the start of every segment, without a graph
    backward   from the last segment to the first: repeat its steps with a graph, then pull (a_w, a_lam) back through it

With segments of sqrt(T) steps the memory is that of sqrt(T) graphs and sqrt(T) states, for twice the gradients.
``torch.utils.checkpoint`` cannot be used: it repeats a segment for every gradient inside it, and each training step is a
gradient.

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
from hyperopt.bilevel.leaves import Leaves

Map = Callable[[int, Any, Any], Any]


@dataclass
class Backpropagated:
    """The end of a training, and the gradients through it.

    Attributes:
        final: the final state.
        loss: the outer loss there, detached.
        grads: the gradient of the outer loss in each hyperparameter; None if it does not depend on it.
    """

    final: Any
    loss: Tensor
    grads: Sequence[Tensor | None]


def unroll(phi: Map, start: Any, lam: Leaves, steps: int, last: int | None, outer: Callable[[Any], Tensor]) -> Backpropagated:
    """Apply ``phi`` ``steps`` times from ``start`` and backpropagate ``outer`` through the ``last`` steps (None: through all).

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
    return Backpropagated(optree.tree_map(torch.Tensor.detach, state), loss.detach(), grads)


def reverse(phi: Map, start: Any, lam: Leaves, steps: int, segment: int | None, outer: Callable[[Any], Tensor]) -> Backpropagated:
    """Apply ``phi`` ``steps`` times from ``start`` and backpropagate ``outer`` of the final state to the hyperparameters.

    Args:
        phi: the map of each step, ``phi(k, state, lam)``; it is called twice for each step and must return the same state.
        start: the initial state, a tree of tensors that may have been computed from ``lam.tree``. It may hold tensors that the
            map does not differentiate, such as counters.
        lam: the hyperparameters.
        steps: number of steps, at least 1.
        segment: number of steps whose graph is kept at a time (None: the square root of ``steps``, rounded up).
        outer: the loss of a final state, which may also depend on ``lam.tree``.
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
        """Pull ``back`` through ``outputs``: add to the hyperparameters' gradients and return those of ``inputs``."""
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
    return Backpropagated(optree.tree_unflatten(whole, [leaf.detach() for leaf in end]), loss.detach(), total)


def _leaves(state: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors of a state as leaves of a new graph, and the structure of the state."""
    leaves, spec = optree.tree_flatten(state)
    return [leaf.detach().requires_grad_() for leaf in leaves], spec


def add(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """Return the sum, where None means zero."""
    return two if one is None else one if two is None else one + two
