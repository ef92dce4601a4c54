"""``Leaves``: the weights or hyperparameters at which derivatives are taken, as leaves of a new graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hyperopt.bilevel.refusals import named
from hyperopt.core.captured import functorch_level
from hyperopt.core.tree import Layout, layout_of


@dataclass
class Leaves:
    """The tensors of a tree as leaves of a new graph, which share the memory of the given tensors.

    Attributes:
        tree: the tree of leaves.
        flat: its tensors in order.
        names: the name of each tensor, for messages.
    """

    tree: Any
    flat: list[Tensor]
    names: list[str]

    @staticmethod
    def of(tree: Any, what: str) -> Leaves:
        """Detach every tensor of ``tree``, called ``what`` in messages, and let it require grad.

        Raises:
            TypeError: a leaf is not a tensor, or its dtype is not floating-point.
            ValueError: the tree has no tensors, or a leaf is a parameter without a size yet, an inference tensor, or on the meta
                device.
            RuntimeError: the call is inside a transform of ``torch.func`` or in inference mode.
        """
        if functorch_level():
            raise RuntimeError(
                "a hypergradient reads numbers and writes into w, which the transforms of torch.func do not support. Transform "
                "the outer loss at fixed_point(GradientMap(problem, inner), w, (lam,), rows='joint').value instead, or use a loop"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a hypergradient needs gradients, which torch.inference_mode() disables: call it outside that mode"
            )
        pairs = named(tree, what)
        names = [name for name, _ in pairs]
        if not pairs:
            raise ValueError(f"{what} has no tensors; give a tensor, or a tuple, list or dict of tensors")
        for name, leaf in pairs:
            if not isinstance(leaf, Tensor):
                hint = "; for a module give hyperopt.Functional(module).w, for Hyperparameters their values()"
                raise TypeError(
                    f"{name} is a {type(leaf).__name__}; every leaf must be a tensor" + hint * isinstance(leaf, nn.Module)
                )
            if is_lazy(leaf):
                raise ValueError(f"{name} belongs to a lazy module and has no size yet: call the module once on a batch first")
            if leaf.is_meta:
                raise ValueError(f"{name} is on the meta device, where there are no numbers; move it to the CPU or a GPU")
            if leaf.is_inference():
                raise ValueError(f"{name} was made in torch.inference_mode() and cannot be differentiated; give a clone of it")
            if not leaf.is_floating_point():
                raise TypeError(
                    f"{name} has dtype {leaf.dtype}; it must be floating-point (keep integer buffers out of this tree)"
                )
        flat = [leaf.detach().requires_grad_() for _, leaf in pairs]
        return Leaves(optree.tree_unflatten(optree.tree_structure(tree), flat), flat, names)

    def like(self, values: Sequence[Tensor | None]) -> Any:
        """Return a tree of the same structure with other tensors, where None means zeros."""
        filled = [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(self.flat, values, strict=True)]
        return optree.tree_unflatten(optree.tree_structure(self.tree), filled)

    @cached_property
    def layout(self) -> Layout:
        """The place of each tensor in a (1, dim) matrix."""
        return layout_of(self.tree, "joint")

    def matrix(self, values: Sequence[Tensor | None]) -> Tensor:
        """Return one tensor for each leaf (None: zeros) as a matrix of shape (1, dim)."""
        return self.layout.matrix(self.like(values))

    def parts(self, matrix: Tensor) -> list[Tensor]:
        """Return a (1, dim) matrix as one tensor for each leaf."""
        return optree.tree_leaves(self.layout.tree(matrix))

    @property
    def point(self) -> Tensor:
        """The tensors themselves as a matrix of shape (1, dim), detached."""
        return self.matrix([leaf.detach() for leaf in self.flat])
