"""What a run has learned, in the form in which it leaves the run: see ``hyperopt.app.export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor

from hyperopt.data.splits import Splits


@dataclass(frozen=True)
class Learned:
    """A model and its hyperparameters.

    Attributes:
        weights: the state of ``Task.predictor``.
        hyperparameters: in the user's units, by name; none where they are the weights themselves.
        shape: of one input, before flattening.
        classes: of the outputs; 0: they are numbers.
        scaling: from raw inputs to the predictor's, see ``Splits.scaling``.
    """

    weights: Mapping[str, Tensor]
    hyperparameters: Mapping[str, Tensor]
    shape: tuple[int, ...]
    classes: int
    scaling: dict[str, list[float]] | None

    @classmethod
    def on(cls, splits: Splits, weights: Mapping[str, Tensor], hyperparameters: Any = None) -> Learned:
        """What was learned on a dataset; ``hyperparameters`` may be any tree."""
        return cls(weights, named(hyperparameters or {}), splits.shape, splits.num_classes, splits.scaling)


def named(tree: Any) -> dict[str, Tensor]:
    """The leaves of a tree by their paths, joined by dots."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    return {".".join(map(str, path)): leaf.detach() for path, leaf in zip(paths, leaves, strict=True)}
