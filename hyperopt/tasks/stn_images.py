"""A classifier of images that tunes its own regularisation: dropout, weight decay, and what is done to its training images.

    lam = (dropout of each layer, input noise, weight decay, cutout, colour jitter, ...), each example of a training batch under
    its own perturbation of it

Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 4.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hyperopt.data.digits import Digits
from hyperopt.data.splits import Splits
from hyperopt.stn.classifiers import Classifier
from hyperopt.stn.declare import Tuned
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN
from hyperopt.tasks.base import Environment
from hyperopt.tasks.exports import Learned
from hyperopt.tasks.scores import scores
from hyperopt.tasks.stn import SelfTuningTask, StnParts
from hyperopt.tasks.stn_problem import Batch, ImageProblem, Standardise
from hyperopt.tasks.stn_settings import StnImagesSettings


class StnImagesTask(StnImagesSettings, SelfTuningTask):
    """One outer step is one round on batches of images; settings in ``StnImagesSettings``.

    Attributes:
        splits: the dataset, after ``setup``.
        problem: its batches and losses, after ``setup``.
    """

    name = "stn_images"

    splits: Splits
    problem: ImageProblem

    def build(self, env: Environment) -> StnParts:
        """Load the rows and build the network.

        Raises:
            ValueError: no images, no validation rows, or a hyperparameter that nothing reads or that has no meaning.
        """
        self.splits = (self.dataset or Digits(seed=env.seed)).load(env.dtype, env.device)
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
