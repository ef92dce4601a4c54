"""Dataset distillation: a few learned training images, such that a model trained on them does well on real images.

    L = cross_entropy(f(w, images), 0 .. classes - 1) + decay / 2 |w|^2            the images are the hyperparameters
    E = cross_entropy(f(w, x), y)                                                  on the real training rows

References: D. Maclaurin, D. Duvenaud and R. P. Adams, ICML 2015, arXiv 1502.03492, section 3.3; T. Wang et al., Dataset
distillation, arXiv 1811.10959; J. Lorraine et al., AISTATS 2020, arXiv 1911.02590, section 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.problem import BilevelProblem, Composite
from hyperopt.core.checks import check_count, check_number, check_optional_count
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import SPLIT_MEASURES, Environment
from hyperopt.tasks.bilevel import BilevelSetup
from hyperopt.tasks.network import PerceptronTask
from hyperopt.tasks.scores import loss_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class DataDistillationTask(PerceptronTask):
    """Learned training images.

    Attributes:
        images: space of the images.
        images_per_class: number of images of each class, at least 1.
        decay: strength of the L2 penalty on the model, at least 0.
        batch_size: number of real rows of an outer step, at least 1 (None: all).
    """

    name = "data_distillation"
    MEASURES: ClassVar[tuple[str, ...]] = SPLIT_MEASURES
    classifies = True
    spaces = ("images",)

    images: Space | None = None
    images_per_class: int = 1
    decay: float = 1e-3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "images_per_class")
        check_number(self, "decay", 0.0)
        check_optional_count(self, "batch_size")

    def build(self, env: Environment) -> BilevelSetup:
        """Build the model."""
        splits = self.splits
        features = splits.train.x.shape[1]
        self.network(env)
        labels = torch.arange(splits.num_classes, device=env.device).repeat(self.images_per_class)

        def criterion(z: Tensor, w: Any, lam: dict[str, Tensor], batch: None) -> Tensor:
            squares = torch.stack([leaf.square().sum() for leaf in optree.tree_leaves(w)])
            return loss_of(z, labels) + self.decay / 2 * squares.sum()

        problem = BilevelProblem(
            Composite(lambda w, lam, batch: self.model(w, lam["images"]), criterion),
            self.outer,
            outer_batches=Minibatches((splits.train.x, splits.train.y), self.batch_size, env.seed, key="task.batch_size"),
        )
        rows = {"outer": splits.train, "val": splits.val, "test": splits.test}
        return BilevelSetup(problem, self.model.w, {"images": (len(labels), features)}, rows)

    def figures(self) -> dict[str, Figure]:
        """Return ``images``, the learned images, one line for each of ``images_per_class``; nothing if rows are not images."""
        from matplotlib.figure import Figure  # imported here because it takes half a second

        shape = self.splits.shape
        if len(shape) != 3:
            return {}
        images = self.hyper.read()["images"].unflatten(1, shape).mean(1).double().cpu()
        classes = self.splits.num_classes
        figure = Figure(figsize=(1.1 * classes, 1.3 * self.images_per_class), layout="constrained")
        for i, (axes, image) in enumerate(zip(figure.subplots(self.images_per_class, classes).flat, images, strict=True)):
            limit = float(image.abs().max()) or 1.0
            axes.imshow(image.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set_axis_off()
            axes.set_title(str(i % classes), fontsize=8)
        return {"images": figure}
