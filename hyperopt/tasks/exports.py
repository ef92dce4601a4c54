"""``LearnedModel``: the result of a run in the form in which ``hyperopt.app.export`` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor

from hyperopt.data.splits import Splits


@dataclass(frozen=True)
class LearnedModel:
    """A model and its hyperparameters.

    Attributes:
        weights: the state dict of ``Task.predictor``.
        hyperparameters: the hyperparameters by name, in the user's units; empty if they are the weights.
        shape: shape of one input, before flattening.
        classes: number of classes; 0 if the outputs are numbers.
        scaling: the map from raw inputs to those of the predictor, see ``Splits.scaling``.
    """

    weights: Mapping[str, Tensor]
    hyperparameters: Mapping[str, Tensor]
    shape: tuple[int, ...]
    classes: int
    scaling: dict[str, list[float]] | None

    @classmethod
    def on(cls, splits: Splits, weights: Mapping[str, Tensor], hyperparameters: Any = None) -> LearnedModel:
        """Return what was learned on a dataset; ``hyperparameters`` may be any tree."""
        return cls(weights, named(hyperparameters or {}), splits.shape, splits.num_classes, splits.scaling)


def named(tree: Any) -> dict[str, Tensor]:
    """Return the leaves of a tree by their paths, joined by dots."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    return {".".join(map(str, path)): leaf.detach() for path, leaf in zip(paths, leaves, strict=True)}
