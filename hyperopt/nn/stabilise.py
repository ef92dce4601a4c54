"""Losses that keep a DEQ trainable: a penalty on its Jacobian, and a loss on intermediate states of the solve.

with Stabilise(network, jacobian=1, states=2) as extra:
    logits = network(images)
loss = task_loss(logits) + 0.5 * extra.jacobian + 0.1 * sum(task_loss(head(z)) for z in extra.states)

jacobian   |J|_F^2 / (rows dim) by Hutchinson's estimate |J^T e|^2 / (rows dim), E e e^T = I, at the (detached) solution
states     phi(z_k) at iterates z_k of the solve, differentiable through this one evaluation (fixed-point correction)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hyperopt.core.differentiate import pull_state
from hyperopt.core.replay import FrozenMap
from hyperopt.core.status import Solution
from hyperopt.core.text import described
from hyperopt.nn.deq import DEQ


class Stabilise:
    """Collects, inside a ``with`` block, additional outputs of the ``DEQ`` layers of a network.

    Args:
        network: the network with the layers.
        jacobian: number of samples of the estimate, each one evaluation and two products; 0: no penalty.
        states: number of states drawn without replacement from the iterates of each solve, except its last (at most all).
        steps: iterates that are always taken, counted from 0, the initial state; a solve with fewer iterates lacks some.

    Attributes:
        jacobian: the penalty, a scalar, summed over all forwards of all layers in the block; 0 without any.
        states: the corrected states in the order of the iterates, each in the structure of the layer's state.

    Raises:
        ValueError: the network has no ``DEQ``, or a number is out of range.

    Reference: Bai, Koltun & Kolter, ICML 2021, arXiv 2106.14342, section 4 (Jacobian regularisation); Bai, Geng, Savani &
    Kolter, CVPR 2022, arXiv 2204.08442, section 3.3 (sparse fixed-point correction).

    Example:
        >>> import torch, hyperopt
        >>> layer = hyperopt.nn.TanhFixedPoint(3, init_scale=0.1)
        >>> with hyperopt.nn.Stabilise(layer, jacobian=1) as extra:
        ...     z = layer(torch.ones(2, 3))
        >>> extra.jacobian.shape, bool(extra.jacobian > 0)
        (torch.Size([]), True)
    """

    def __init__(self, network: nn.Module, *, jacobian: int = 0, states: int = 0, steps: Sequence[int] = ()) -> None:
        """Find the layers."""
        self.layers = [module for module in network.modules() if isinstance(module, DEQ)]
        if not self.layers:
            raise ValueError(f"Stabilise: {type(network).__name__} has no DEQ layer; give a network that has one")
        for name, number in {"jacobian": jacobian, "states": states, **{f"steps[{i}]": k for i, k in enumerate(steps)}}.items():
            if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
                raise ValueError(f"Stabilise: {name}={number!r} must be a whole number >= 0; change it")
        self._samples, self._count, self._steps = int(jacobian), int(states), frozenset(map(int, steps))
        self._solves: list[_Iterates] = []
        self.jacobian: Tensor = torch.zeros(())
        self.states: list[Any] = []

    def __repr__(self) -> str:
        """Return the number of layers, and the shapes of what was collected."""
        return described(self, layers=len(self.layers), jacobian=self.jacobian, states=self.states)

    def __enter__(self) -> Stabilise:
        """Start to observe the layers.

        Raises:
            RuntimeError: another block observes one of them already.
        """
        if any(layer.observer is not None for layer in self.layers):
            raise RuntimeError("Stabilise: a block inside of another one for the same network; ask for everything in one")
        for layer in self.layers:
            layer.observer = self
        return self

    def __exit__(self, *_: object) -> None:
        """Stop observing the layers."""
        for layer in self.layers:
            layer.observer = None

    def before(self, layer: DEQ) -> Callable[[Any], None] | None:
        """Note the iterates of the solve that begins, if they are wanted."""
        self._solves.append(_Iterates(self._count, self._steps))
        return self._solves[-1] if self._count or self._steps else None

    def after(self, phi: FrozenMap, terms: tuple[Any, ...], solution: Solution) -> None:
        """Add the states and the penalty of a solve."""
        iterates = self._solves.pop()
        if not torch.is_grad_enabled():
            return
        self.states += [phi(z, *terms) for z in iterates.chosen()]
        if self._samples:
            self.jacobian = self.jacobian + self._penalty(phi, terms, solution)

    def _penalty(self, phi: FrozenMap, terms: tuple[Any, ...], solution: Solution) -> Tensor:
        """Return Hutchinson's estimate at the solution."""
        layout = solution.layout

        def matrix(w: Tensor) -> Tensor:
            return layout.matrix(phi(layout.tree(w), *terms))

        w = layout.matrix(optree.tree_map(lambda z: z.detach(), solution.value)).requires_grad_()
        total = w.new_zeros(())
        for _ in range(self._samples):
            # Random signs: among entries of mean 0 and variance 1 they give the estimate the least variance.
            signs = torch.randint(0, 2, w.shape, device=w.device).to(w.dtype) * 2 - 1
            total = total + pull_state(matrix, w, (), signs).square().sum()
        return total / max(1, self._samples * w.numel())


class _Iterates:
    """The iterates of one solve: the requested ones, and a uniform sample of the others, in one pass.

    Every iterate draws a number, and those with the least numbers are kept. The numbers come from a separate generator, since
    a solve must not advance the global ones.
    """

    def __init__(self, count: int, steps: frozenset[int]) -> None:
        self.count, self.steps = count, steps
        self.k = 0
        self.asked: list[tuple[int, Any]] = []
        self.drawn: list[tuple[float, int, Any]] = []
        self.generator = torch.Generator()
        if count:
            self.generator.manual_seed(int(torch.randint(2**62, ())))

    def __call__(self, z: Any) -> None:
        """Note a state at which the map is evaluated."""
        z = optree.tree_map(lambda leaf: leaf.detach(), z)
        if self.k in self.steps:
            self.asked.append((self.k, z))
        elif self.count:
            # Keep one more than requested, since the last iterate of the solve is left out and only known at its end.
            number = float(torch.rand((), generator=self.generator, dtype=torch.float64))
            push = heapq.heappush if len(self.drawn) <= self.count else heapq.heappushpop
            push(self.drawn, (-number, self.k, z))
        self.k += 1

    def chosen(self) -> list[Any]:
        """Return the states, in order."""
        kept = sorted((each for each in self.drawn if each[1] < self.k - 1), reverse=True)[: self.count]
        return [z for _, z in sorted([*self.asked, *(each[1:] for each in kept)], key=lambda pair: pair[0])]
