"""A classifier of images that tunes its own regularisation: dropout, weight decay, and what is done to its training images.

    lam = (dropout of each layer, input noise, weight decay, cutout, colour jitter, ...), each example of a training batch under
    its own perturbation of it

Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 4.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from hyperopt.core.checks import check_count, check_optional_count
from hyperopt.data.splits import Dataset, Splits
from hyperopt.stn.classifiers import Classifier
from hyperopt.stn.declare import Tuned
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN
from hyperopt.tasks.base import SPLIT_MEASURES, Environment, check_dataset, load_splits
from hyperopt.tasks.exports import Learned
from hyperopt.tasks.scores import scores
from hyperopt.tasks.stn import SelfTuningTask, StnParts
from hyperopt.tasks.stn_problem import Batch, ImageProblem, Standardise


@dataclass(eq=False)
class StnImagesTask(SelfTuningTask):
    """One outer step is one round on batches of images.

    Attributes:
        classifier: the network (None: two dense layers of 200).
        tuned: the hyperparameters by name: ``dropout0``, ``dropout1``, ... where the network has places for them, those of
            ``hyperopt.nn.regularise.pipeline.RANGES`` that change the images, and ``weight_decay``.
        batch_size: training rows of one update of the weights.
        val_batch_size: validation rows of one update of the hyperparameters.
        eval_rows: ``outer/*`` are measured on the first so many training rows (None: on all of them).
        eval_batch_size: rows of one forward of an evaluation.
        dataset: the rows (None: digits).
        splits: the dataset, after ``setup``.
        problem: its batches and losses, after ``setup``.
    """

    name = "stn_images"
    MEASURES: ClassVar[tuple[str, ...]] = (*SPLIT_MEASURES, "stn/response_norm")
    classifies = True

    classifier: Classifier | None = None
    tuned: dict[str, Tuned] = field(default_factory=dict)
    batch_size: int = 100
    val_batch_size: int = 100
    eval_rows: int | None = None
    eval_batch_size: int = 1000
    dataset: Dataset | None = None

    splits: Splits = field(init=False, repr=False)
    problem: ImageProblem = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "batch_size")
        check_count(self, "val_batch_size")
        check_optional_count(self, "eval_rows")
        check_count(self, "eval_batch_size")
        check_dataset(self)

    def build(self, env: Environment) -> StnParts:
        """Load the rows and build the network.

        Raises:
            ValueError: no images, no validation rows, or a hyperparameter that nothing reads or that has no meaning.
        """
        self.splits = load_splits(self, env)
        sizes = (self.batch_size, self.val_batch_size)
        self.problem = ImageProblem(self.splits, self.tuned, self._classifier.dropouts, *sizes, seed=env.seed)
        module, declared = self.plain(self.splits.shape, self.splits.num_classes)
        return StnParts(module, declared, self.problem.train, self.problem.valid)

    @property
    def _classifier(self) -> Classifier:
        return self.classifier or Classifier()

    def plain(self, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Mapping[str, Tuned]]:
        """The classifier, of standardised images."""
        return self._classifier.build(shape, classes, self.tuned), self.tuned

    def learned(self) -> Learned:
        """Return the plain network at the hyperparameters that were found, and these."""
        found, pipeline = super().learned(), self.problem.pipeline
        weights = {f"network.{name}": value for name, value in found.weights.items()}
        standard = {"standardise.mean": pipeline.mean, "standardise.std": pipeline.std}
        return Learned.on(self.splits, {**standard, **weights}, found.hyperparameters)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Module:
        """Build the plain network, behind layers that make rows into images and standardise them."""
        network = super().predictor(shape, classes, hyperparameters)
        return nn.Sequential(OrderedDict(images=nn.Unflatten(1, shape), standardise=Standardise(shape[0]), network=network))

    def train_loss(self, model: STN, batch: Batch, draw: Draw) -> Tensor:
        """Cross-entropy on changed images, and the decay."""
        return self.problem.train_loss(model, batch, draw)

    def valid_loss(self, model: STN, batch: Batch, draw: Draw | None) -> Tensor:
        """Cross-entropy on images as they are."""
        return self.problem.valid_loss(model, batch, draw)

    def measure(self, model: STN) -> dict[str, float]:
        """Return loss and accuracy: ``outer/*`` on training rows, ``val/*`` and ``test/*``, all on images as they are."""
        train = self.splits.train.take(None if self.eval_rows is None else slice(self.eval_rows))
        rows = {"outer": train, "val": self.splits.val, "test": self.splits.test}
        return scores(rows, lambda x: self.problem.logits(model, x), self.eval_batch_size)

    def describe(self) -> dict[str, Any]:
        """Return names, sizes, the dataset with its checksums, and the rows behind each metric."""
        splits = {"outer": ("train", self.splits.train), "val": ("val", self.splits.val), "test": ("test", self.splits.test)}
        return {
            **super().describe(),
            "dataset": self.splits.name,
            "checksums": self.splits.checksums,
            "rows": {name: {"split": split, "count": len(rows)} for name, (split, rows) in splits.items()},
            "batch_size": self.batch_size,
            "val_batch_size": self.val_batch_size,
        }
