"""Data cleaning: one weight for each training image, some of whose labels are wrong; a clean validation set tunes the weights.

    L = mean_i lam_i cross_entropy(f(w, x_i), y_i) + decay |w|^2 / 2        E = cross_entropy(f(w, x'), y')

A share of the training labels, drawn by the seed, is replaced by another class, each of the others as likely. Which ones is kept
aside, for the measures alone: an image counts as found clean where its weight is above one half, and ``clean/f1`` is the harmonic
mean of the precision and the recall of that set.

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

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.problem import BilevelProblem, Composite
from hyperopt.core.checks import check_number
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import SPLIT_MEASURES, Environment
from hyperopt.tasks.bilevel import Parts
from hyperopt.tasks.network import NetworkTask

CLEAN = 0.5  # an image of a larger weight counts as clean


@dataclass(eq=False)
class CorruptedTask(NetworkTask):
    """A network trained on rows some of whose labels are replaced, and tuned on clean ones.

    Attributes:
        hidden: as for every network; none by default.
        corrupted: share of the training labels that are replaced by another class, in [0, 1].
        decay: strength of the L2 of the model.
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

    def training_batches(self, env: Environment) -> Minibatches:
        """Replace labels, and return batches ``(x, y, places)`` of the training rows.

        Raises:
            ValueError: validation rows of one class only.
        """
        seen = self.splits.val.y.unique()
        if len(seen) < 2:
            raise ValueError(
                f"dataset={self.splits.name} has validation labels of {len(seen)} class: "
                "they say nothing about which training labels are wrong; raise dataset.val or change dataset"
            )
        train = self.splits.train
        labels, self.corrupt = replaced(train.y, self.splits.num_classes, self.corrupted, env.seed)
        self.splits = replace(self.splits, train=replace(train, y=labels))
        places = torch.arange(len(labels), device=labels.device)
        return Minibatches((train.x, labels, places), self.batch_size, env.seed, key="task.batch_size")

    def validation_batches(self, env: Environment) -> Minibatches:
        """Batches ``(x, y)`` of the clean rows."""
        return self.batches(self.fitted, self.val_batch_size, env.seed + 1, "task.val_batch_size")

    def penalty(self, w: dict[str, Tensor]) -> Tensor:
        """The L2 of the model."""
        return self.decay / 2 * torch.stack([x.square().sum() for x in w.values()]).sum()


@dataclass(eq=False)
class CleaningTask(CorruptedTask):
    """A weight for each training row, some of whose labels are replaced.

    Attributes:
        weights: space of the weights.
    """

    name = "data_cleaning"
    MEASURES: ClassVar[tuple[str, ...]] = (
        *SPLIT_MEASURES,
        "train/loss",
        "train/accuracy",
        "clean/f1",
        "clean/precision",
        "clean/recall",
    )
    spaces = ("weights",)

    weights: Space | None = None

    def build(self, env: Environment) -> Parts:
        """Replace labels and build the network; see ``training_batches``."""
        batches = self.training_batches(env)
        self.network(env)
        problem = BilevelProblem(
            Composite(lambda w, lam, batch: self.model(w, batch[0]), self.criterion),
            self.outer,
            inner_batches=batches,
            outer_batches=self.validation_batches(env),
        )
        return Parts(problem, self.model.w, {"weights": (len(self.corrupt),)}, self.rows())

    def criterion(self, z: Tensor, w: dict[str, Tensor], lam: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        """The weighted loss and the decay."""
        _, y, places = batch
        loss = (lam["weights"][places] * functional.cross_entropy(z, y, reduction="none")).mean()
        return loss + self.penalty(w)

    def measure(self, w: Any) -> dict[str, float]:
        """As every trained problem, with how well the found set is clean."""
        return {**super().measure(w), **found_clean(self.hyper.read()["weights"], self.corrupt)}


def replaced(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which a share is replaced by another class, by the seed alone; and which ones were.

    Args:
        labels: shape: (n,), int64.
        classes: how many there are.
        share: of the labels, in [0, 1].
        seed: 0 to 2**32 - 1.
    """
    draw = np.random.RandomState((seed, 8))
    chosen = draw.permutation(len(labels))[: round(share * len(labels))]
    shift = np.zeros(len(labels), dtype=np.int64)
    shift[chosen] = draw.randint(1, classes, len(chosen))
    moved = torch.from_numpy(shift).to(labels.device)
    return (labels + moved) % classes, moved > 0


def found_clean(weights: Tensor, corrupt: Tensor) -> dict[str, float]:
    """``clean/precision``, ``clean/recall`` and ``clean/f1`` of the images whose weight is above one half."""
    found, clean = weights > CLEAN, ~corrupt
    right = float((found & clean).sum())
    precision, recall = (right / max(float(part.sum()), 1.0) for part in (found, clean))
    return {
        "clean/precision": precision,
        "clean/recall": recall,
        "clean/f1": 2 * precision * recall / (precision + recall) if right else 0.0,
    }
