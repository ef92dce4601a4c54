"""Few-shot classification: a network that learns to classify images of new classes from a few examples of each.

A task consists of ``ways`` classes of a split, in random order, with ``shots`` images of each class to learn from and
``queries`` other images to test on. In a dataset whose splits share no class (``omniglot``), the classes of ``val/*`` and
``test/*`` were never trained on.

The network is that of the MAML paper: convolutions of 3 x 3 with stride 2, each followed by batch normalisation and a ReLU, and
a linear layer. As in the paper, batch statistics are always those of the present images: of a task's shots, or of its queries.

Reference: C. Finn, P. Abbeel and S. Levine, ICML 2017, arXiv 1703.03400, section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.core.checks import check_count, check_counts
from hyperopt.core.random import Keys
from hyperopt.data.splits import Rows
from hyperopt.tasks.base import Environment, load_splits
from hyperopt.tasks.meta import SPLITS, Episodes, MetaTask
from hyperopt.tasks.network import initialise

CLASSES, IMAGES = range(2)  # streams of random numbers


@dataclass(frozen=True)
class Classes:
    """The rows of a split by their class.

    Attributes:
        rows: the rows of the split.
        places: row numbers, one line for each class; short lines are padded with zeros. shape: (classes, largest count)
        counts: number of rows of each class. shape: (classes,)
    """

    rows: Rows
    places: Tensor
    counts: Tensor

    @staticmethod
    def of(rows: Rows) -> Classes:
        """Return the classes that have rows."""
        labels, counts = torch.unique(rows.y, return_counts=True)
        places = torch.zeros(len(labels), int(counts.max()), dtype=torch.int64, device=rows.y.device)
        for line, label, count in zip(places, labels, counts.tolist(), strict=True):
            line[:count] = torch.where(rows.y == label)[0]
        return Classes(rows, places, counts)


@dataclass(eq=False)
class FewShotTask(MetaTask):
    """Few-shot classification of images.

    Attributes:
        ways: number of classes of a task, at least 2.
        channels: number of channels of each convolution.
        classes: the classes of each split, after ``setup``.
    """

    name = "few_shot"
    classifies = True
    kinds: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    ways: int = 5
    shots: int = 1
    queries: int = 5
    tasks: int = 8
    channels: tuple[int, ...] = (32, 32, 32, 32)

    classes: dict[str, Classes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "ways", 2)
        check_counts(self, "channels")
        super().__post_init__()

    def load(self, env: Environment) -> None:
        """Load the images and sort them by class.

        Raises:
            ValueError: the rows are not images, a split has fewer than ``ways`` classes, or a class has fewer than ``shots``
                plus ``queries`` images.
        """
        self.splits = splits = load_splits(self, env)
        if len(splits.shape) != 3:
            raise ValueError(f"dataset={splits.name} has rows of shape {splits.shape}, not images; change dataset")
        self.classes = {}
        for name, split, rows in zip(SPLITS, ("train", "val", "test"), (splits.train, splits.val, splits.test), strict=True):
            if not len(rows):
                raise ValueError(f"dataset={splits.name} has no {split} rows; raise dataset.{split}")
            found = self.classes[name] = Classes.of(rows)
            if self.ways > len(found.counts):
                raise ValueError(
                    f"task.ways={self.ways} is more than the {len(found.counts)} classes of the {split} rows of "
                    f"dataset={splits.name}; lower task.ways or change dataset"
                )
            shots = max((self.shots, *(self.eval_shots if name == "test" else ())))
            least = int(found.counts.min())
            if shots + self.queries > least:
                raise ValueError(
                    f"{shots} shots and task.queries={self.queries} are more than the {least} {split} rows that a class of "
                    f"dataset={splits.name} has; lower task.shots, task.eval_shots or task.queries"
                )

    def network(self, env: Environment) -> nn.Module:
        """Build the convolutional network."""
        channels, height, width = self.splits.shape
        layers: list[nn.Module] = []
        for out in self.channels:
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out, track_running_stats=False), nn.ReLU()]
            channels, height, width = out, (height + 1) // 2, (width + 1) // 2
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, self.ways))
        initialise(model, env.generator)
        return model

    def draw(self, keys: Keys, split: str, shots: int) -> Episodes:
        """Return a task for each key. shape of ``x``: (tasks, ways * shots, channels, height, width)."""
        of = self.classes[split]
        chosen = keys.uniform(CLASSES, (len(of.counts),)).argsort(1)[:, : self.ways]  # shape: (tasks, ways)
        order = keys.uniform(IMAGES, (self.ways, of.places.shape[1]))
        beyond = torch.arange(of.places.shape[1], device=order.device) >= of.counts[chosen][..., None]
        numbers = order.masked_fill(beyond, 2.0).argsort(2)[..., : shots + self.queries]
        places = of.places[chosen[..., None], numbers]  # shape: (tasks, ways, shots + queries)
        labels = torch.arange(self.ways, device=places.device)

        def part(places: Tensor) -> tuple[Tensor, Tensor]:
            x = of.rows.x[places.flatten(1)].unflatten(2, self.splits.shape)
            return x, labels.repeat_interleave(places.shape[2]).expand(x.shape[:2])

        return Episodes(*part(places[..., :shots]), *part(places[..., shots:]))

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of each task."""
        each = functional.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none")
        return each.view(y.shape).mean(1)

    def measures(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """Return the loss, and the fraction of the queries that are classified correctly."""
        return {**super().measures(outputs, y), "accuracy": float((outputs.argmax(2) == y).double().mean())}

    def describe_data(self) -> dict[str, Any]:
        """Return the dataset, and the number of tasks and classes of each metric."""
        counts = {name: len(of.counts) for name, of in self.classes.items()}
        found = {**super().describe_data(), "dataset": self.splits.name, "checksums": self.splits.checksums}
        return {**found, "shape": list(self.splits.shape), "classes": counts}
