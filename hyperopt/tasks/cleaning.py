"""Data cleaning: some training labels are wrong; one weight for each training image is tuned on a clean validation set.

    L = mean_i lam_i cross_entropy(f(w, x_i), y_i) + decay |w|^2 / 2        E = cross_entropy(f(w, x'), y')

A fraction of the training labels, drawn by the seed, is replaced by one of the other classes with equal probability. Which
labels were replaced is used only for metrics: images with a weight above one half count as clean, and ``clean/f1`` is the
harmonic mean of precision and recall of that set.

Reference: L. Franceschi, M. Donini, P. Frasconi and M. Pontil, Forward and reverse gradient-based hyperparameter optimization,
ICML 2017, arXiv 1703.01785, section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.core.checks import check_number
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelSetup
from hyperopt.tasks.network import NetworkTask
from hyperopt.tasks.tuned import TunedTask

CLEAN = 0.5  # images with a larger weight count as clean


@dataclass(eq=False)
class CorruptedTask(NetworkTask):
    """A network that is trained on rows with some replaced labels, and tuned on clean rows.

    Attributes:
        hidden: sizes of the hidden layers (none: a linear model).
        corrupted: fraction of the training labels that are replaced by another class, in [0, 1].
        decay: strength of the L2 penalty on the model, at least 0.
        corrupt: which training labels were replaced, after ``setup``. shape: (n,), bool.
    """

    classifies = True

    hidden: tuple[int, ...] = ()
    corrupted: float = 0.5
    decay: float = 0.0

    corrupt: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "corrupted", 0.0, 1.0)
        check_number(self, "decay", 0.0)

    def replace_labels(self, env: Environment) -> tuple[Tensor, Tensor, Tensor]:
        """Replace labels, and return ``(x, y, places)`` of the training rows, where ``places`` are their indices.

        Raises:
            ValueError: the validation rows have only one class.
        """
        seen = self.splits.val.y.unique()
        if len(seen) < 2:
            raise ValueError(
                f"dataset={self.splits.name} has validation labels of {len(seen)} class only, "
                "which cannot tell which training labels are wrong; raise dataset.val or change dataset"
            )
        train = self.splits.train
        labels, self.corrupt = replaced(train.y, self.splits.num_classes, self.corrupted, env.seed)
        self.splits = replace(self.splits, train=replace(train, y=labels))
        return train.x, labels, torch.arange(len(labels), device=labels.device)

    def penalty(self, w: dict[str, Tensor]) -> Tensor:
        """Return the L2 penalty on the model."""
        return self.decay / 2 * torch.stack([x.square().sum() for x in w.values()]).sum()


@dataclass(eq=False)
class CleaningTask(CorruptedTask):
    """A network with a tuned weight for each training row.

    Attributes:
        weights: space of the weights.
    """

    name = "data_cleaning"
    MEASURES: ClassVar[tuple[str, ...]] = (*TunedTask.MEASURES, "clean/f1", "clean/precision", "clean/recall")
    spaces = ("weights",)

    weights: Space | None = None

    def build(self, env: Environment) -> BilevelSetup:
        """Replace labels and build the network; see ``replace_labels``."""
        train = self.replace_labels(env)
        self.network(env)
        problem = self.problem(self.composite(self.criterion), env, train)
        return BilevelSetup(problem, self.model.w, {"weights": (len(self.corrupt),)}, self.rows())

    def criterion(self, z: Tensor, w: dict[str, Tensor], lam: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted loss plus the penalty."""
        _, y, places = batch
        loss = (lam["weights"][places] * functional.cross_entropy(z, y, reduction="none")).mean()
        return loss + self.penalty(w)

    def measure(self, w: Any) -> dict[str, float]:
        """Return the metrics of every trained problem, and ``clean/*``."""
        return {**super().measure(w), **found_clean(self.hyper.read()["weights"], self.corrupt)}


def replaced(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return labels of which a fraction is replaced by another class, and a mask of the replaced ones.

    Args:
        labels: the labels, int64. shape: (n,)
        classes: number of classes.
        share: fraction of the labels to replace, in [0, 1].
        seed: seed of the draw, 0 to 2**32 - 1.
    """
    draw = np.random.RandomState((seed, 8))
    chosen = draw.permutation(len(labels))[: round(share * len(labels))]
    shift = np.zeros(len(labels), dtype=np.int64)
    shift[chosen] = draw.randint(1, classes, len(chosen))
    moved = torch.from_numpy(shift).to(labels.device)
    return (labels + moved) % classes, moved > 0


def found_clean(weights: Tensor, corrupt: Tensor) -> dict[str, float]:
    """Return ``clean/precision``, ``clean/recall`` and ``clean/f1`` of the images with a weight above one half."""
    found, clean = weights > CLEAN, ~corrupt
    right = float((found & clean).sum())
    precision, recall = (right / max(float(part.sum()), 1.0) for part in (found, clean))
    return {
        "clean/precision": precision,
        "clean/recall": recall,
        "clean/f1": 2 * precision * recall / (precision + recall) if right else 0.0,
    }
