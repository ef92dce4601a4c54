"""A classifier of images that tunes its own regularisation: dropout, weight decay and the augmentation of its training images.

    lam = (dropout of each layer, input noise, weight decay, cutout, colour jitter, ...)

Each example of a training batch has its own perturbation of ``lam``.

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
from hyperopt.tasks.exports import LearnedModel
from hyperopt.tasks.scores import scores
from hyperopt.tasks.stn import SelfTuningSetup, SelfTuningTask
from hyperopt.tasks.stn_problem import Batch, ImageProblem, Standardise, check_declared


@dataclass(eq=False)
class StnImagesTask(SelfTuningTask):
    """A self-tuning classifier of images; an outer step is one round on batches of images.

    Attributes:
        classifier: the network (None: two dense layers of 200 units).
        tuned: the hyperparameters by name: ``dropout0``, ``dropout1``, ... for the dropout layers of the network, the names of
            ``hyperopt.nn.regularise.pipeline.RANGES``, which change the images, and ``weight_decay`` of all weights or
            ``weight_decay_conv0``, ``weight_decay_dense1``, ..., ``weight_decay_last`` of a layer.
        batch_size: number of training rows for an update of the weights.
        val_batch_size: number of validation rows for an update of the hyperparameters.
        eval_rows: number of training rows, the first ones, on which ``outer/*`` is measured (None: all).
        eval_batch_size: number of rows of one forward pass in an evaluation.
        dataset: the rows (None: digits).
        splits: the dataset, after ``setup``.
        problem: the batches and losses, after ``setup``.
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
        """Check the ranges and the names of the hyperparameters."""
        check_count(self, "batch_size")
        check_count(self, "val_batch_size")
        check_optional_count(self, "eval_rows")
        check_count(self, "eval_batch_size")
        check_dataset(self)
        check_declared(self.tuned, self._classifier.dropouts, self._classifier.layers)

    def build(self, env: Environment) -> SelfTuningSetup:
        """Load the rows and build the network.

        Raises:
            ValueError: the rows are not images, there are no validation rows, or a hyperparameter is not used or may leave its
                valid range.
        """
        self.splits = load_splits(self, env)
        sizes = (self.batch_size, self.val_batch_size)
        classifier = self._classifier
        self.problem = ImageProblem(self.splits, self.tuned, classifier.dropouts, *sizes, env.seed, classifier.layers)
        module, declared = self.plain(self.splits.shape, self.splits.num_classes)
        return SelfTuningSetup(module, declared, self.problem.train, self.problem.valid)

    @property
    def _classifier(self) -> Classifier:
        return self.classifier or Classifier()

    def plain(self, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Mapping[str, Tuned]]:
        """Return the classifier of standardised images, and the hyperparameters."""
        return self._classifier.build(shape, classes, self.tuned), self.tuned

    def learned(self) -> LearnedModel:
        """Return the plain network at the present hyperparameters, and these."""
        found, pipeline = super().learned(), self.problem.pipeline
        weights = {f"network.{name}": value for name, value in found.weights.items()}
        standard = {"standardise.mean": pipeline.mean, "standardise.std": pipeline.std}
        return LearnedModel.on(self.splits, {**standard, **weights}, found.hyperparameters)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Module:
        """Build the plain network, after layers that reshape rows to images and standardise them."""
        network = super().predictor(shape, classes, hyperparameters)
        return nn.Sequential(OrderedDict(images=nn.Unflatten(1, shape), standardise=Standardise(shape[0]), network=network))

    def train_loss(self, model: STN, batch: Batch, draw: Draw) -> Tensor:
        """Return the cross-entropy on changed images plus the weight decay."""
        return self.problem.train_loss(model, batch, draw)

    def valid_loss(self, model: STN, batch: Batch, draw: Draw | None) -> Tensor:
        """Return the cross-entropy on unchanged images."""
        return self.problem.valid_loss(model, batch, draw)

    def measure(self, model: STN) -> dict[str, float]:
        """Return loss and accuracy on unchanged images: ``outer/*`` on training rows, ``val/*`` and ``test/*``."""
        train = self.splits.train.take(None if self.eval_rows is None else slice(self.eval_rows))
        rows = {"outer": train, "val": self.splits.val, "test": self.splits.test}
        return scores(rows, lambda x: self.problem.logits(model, x), self.eval_batch_size)

    def describe(self) -> dict[str, Any]:
        """Return names, sizes, the dataset with its checksums, and the number of rows of each metric."""
        splits = {"outer": ("train", self.splits.train), "val": ("val", self.splits.val), "test": ("test", self.splits.test)}
        return {
            **super().describe(),
            "dataset": self.splits.name,
            "checksums": self.splits.checksums,
            "rows": {name: {"split": split, "count": len(rows)} for name, (split, rows) in splits.items()},
            "batch_size": self.batch_size,
            "val_batch_size": self.val_batch_size,
        }
