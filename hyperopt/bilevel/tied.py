"""One tensor at several places in ``w`` is one variable: tied weights are trained, and differentiated, once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import optree
from torch import Tensor

from hyperopt.bilevel.estimate import Estimate
from hyperopt.bilevel.problem import BilevelProblem, Leaves


class Tied:
    """Which places of a tree share their tensors.

    Args:
        w: the tree.

    Attributes:
        distinct: its tensors, each once.
        any: whether a tensor has more than one place.

    Raises:
        ValueError: two tensors share a part of their memory, or the numbers of one do.
    """

    def __init__(self, w: Any) -> None:
        """Compare the memory of all leaves."""
        given = Leaves.of(w, "w")
        self.spec = optree.tree_structure(given.tree)
        self.distinct: list[Tensor] = []
        self.places: list[int] = []  # of each leaf, in ``distinct``
        known: dict[Any, int] = {}
        for name, leaf in zip(given.names, given.flat, strict=True):
            if any(size > 1 and stride == 0 for size, stride in zip(leaf.shape, leaf.stride(), strict=True)):
                raise ValueError(f"{name} is an expanded tensor, whose numbers share their memory; give a clone of it")
            key = (leaf.device, leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype) if leaf.numel() else id(leaf)
            if key not in known:
                known[key] = len(self.distinct)
                self.distinct.append(leaf.detach())
            self.places.append(known[key])
        self.any = len(self.distinct) < len(self.places)
        self._refuse_overlaps(given)

    def _refuse_overlaps(self, given: Leaves) -> None:
        """Refuse leaves of which one is a part of another: a step would change both.

        Raises:
            ValueError: names them.
        """
        spans = []
        for number, place in enumerate(self.places):
            leaf = self.distinct[place]
            if leaf.numel() and leaf.is_contiguous():
                start = leaf.data_ptr()
                spans.append((str(leaf.device), start, start + leaf.numel() * leaf.element_size(), place, number))
        for (device, _, end, one, i), (other, start, _, two, j) in itertools.pairwise(sorted(spans)):
            if device == other and start < end and one != two:
                first, second = (given.names[k] for k in sorted((i, j)))
                raise ValueError(
                    f"{first} and {second} share a part of their memory: a step of one would move the other; clone one"
                )

    def expand(self, distinct: Any) -> Any:
        """The tree from its distinct tensors."""
        return optree.tree_unflatten(self.spec, [distinct[place] for place in self.places])

    def collect(self, tree: Any) -> list[Any]:
        """The distinct tensors from a tree."""
        leaves = optree.tree_leaves(tree)
        return [leaves[self.places.index(i)] for i in range(len(self.distinct))]

    def apart(self, problem: BilevelProblem, w: Any) -> tuple[BilevelProblem, Any]:
        """The problem and the weights in distinct tensors; as they are, if no tensor has more than one place."""
        return (problem.of(self.expand, self.collect), self.distinct) if self.any else (problem, w)

    def whole(self, estimate: Estimate) -> Estimate:
        """An estimate of the problem in distinct tensors, with the weights as they were given."""
        return replace(estimate, w=self.expand(estimate.w)) if self.any else estimate
