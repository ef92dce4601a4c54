"""``Tied``: a tensor at several places of ``w`` (tied weights) is one variable, trained and differentiated once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree
from torch import Tensor

from hyperopt.bilevel.estimate import Estimate
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.bilevel.refusals import memory_of, share_entries


class Tied:
    """The distinct tensors of a tree, and the places where each occurs.

    Args:
        w: the tree.

    Attributes:
        distinct: each tensor of the tree once.
        any: whether a tensor occurs more than once.

    Raises:
        ValueError: two tensors share a part of their memory, or entries of one tensor share memory.
    """

    def __init__(self, w: Any) -> None:
        given = Leaves.of(w, "w")
        self.spec = optree.tree_structure(given.tree)
        self.distinct: list[Tensor] = []
        self.places: list[int] = []  # index in ``distinct`` of each leaf
        known: dict[Any, int] = {}
        for name, leaf in zip(given.names, given.flat, strict=True):
            _, start, end = memory_of(leaf) or ("", 0, 0)
            repeated = any(size > 1 and stride == 0 for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
            if repeated or end - start < leaf.numel() * leaf.element_size():
                raise ValueError(f"{name} is an expanded or unfolded tensor, whose entries share memory; give a clone of it")
            key = (leaf.device, leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype) if leaf.numel() else id(leaf)
            if key not in known:
                known[key] = len(self.distinct)
                self.distinct.append(leaf.detach())
            self.places.append(known[key])
        self.any = len(self.distinct) < len(self.places)
        self._refuse_overlaps(given)

    def _refuse_overlaps(self, given: Leaves) -> None:
        """Refuse two leaves that overlap in memory, since a step would change both.

        Raises:
            ValueError: the message names the two leaves.
        """
        spans = []
        for number, place in enumerate(self.places):
            if (memory := memory_of(self.distinct[place])) is not None:
                spans.append((*memory, place, number))
        open_spans: list[tuple[str, int, int, int, int]] = []  # those that reach beyond the start of the present one
        for span in sorted(spans):
            device, start, _, place, number = span
            open_spans = [each for each in open_spans if each[0] == device and start < each[2]]
            for *_, other, i in open_spans:
                if other != place and share_entries(self.distinct[other], self.distinct[place]):
                    first, second = (given.names[k] for k in sorted((i, number)))
                    raise ValueError(
                        f"{first} and {second} share a part of their memory, so a step of one would change the other; clone one"
                    )
            open_spans.append(span)

    def expand(self, distinct: Any) -> Any:
        """Return the tree made of distinct tensors."""
        return optree.tree_unflatten(self.spec, [distinct[place] for place in self.places])

    def collect(self, tree: Any) -> list[Any]:
        """Return the distinct tensors of a tree."""
        leaves = optree.tree_leaves(tree)
        return [leaves[self.places.index(i)] for i in range(len(self.distinct))]

    def apart(self, problem: BilevelProblem, w: Any) -> tuple[BilevelProblem, Any]:
        """Return the problem and the weights in terms of the distinct tensors; unchanged if no tensor occurs twice."""
        return (problem.of(self.expand, self.collect), self.distinct) if self.any else (problem, w)

    def whole(self, estimate: Estimate) -> Estimate:
        """Return an estimate with its weights in the structure of the original tree."""
        return replace(estimate, w=self.expand(estimate.w)) if self.any else estimate
