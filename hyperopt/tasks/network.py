"""Networks: a weight decay for each weight, and a learned augmentation of the training images.

    weight_decay    L = cross_entropy(f(w, x), y) + sum_j lam_j w_j^2 / 2        E = cross_entropy(f(w, x'), y')
    augmentation    L = cross_entropy(f(w, a(lam, x, noise)), y)                 E = cross_entropy(f(w, x'), y')

``f`` is a multilayer perceptron; ``a`` adds to an image what a small convolutional network makes of it and of noise. The batches
of both losses are drawn by the seed alone.

Reference: J. Lorraine, P. Vicol and D. Duvenaud, Optimizing millions of hyperparameters by implicit differentiation, AISTATS
2020, arXiv 1911.02590, sections 5.2 and 5.4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.functional import Functional
from hyperopt.bilevel.problem import BilevelProblem, Composite
from hyperopt.core.checks import check_count, check_counts, check_number, check_optional_count
from hyperopt.data.splits import Rows
from hyperopt.nn.equilibrium import draw
from hyperopt.spaces.hyperparameters import Hyperparameters
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import SPLIT_MEASURES, Environment
from hyperopt.tasks.bilevel import Parts, TunedTask, starting_at
from hyperopt.tasks.scores import loss_of


def perceptron(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between them, initialised as ``torch.nn.Linear`` does, from ``generator`` alone.

    Args:
        sizes: of the input, the hidden layers and the output.
        generator: a CPU generator.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    initialise(model, generator)
    return model


def classifier(shape: Sequence[int], hidden: Sequence[int], classes: int, generator: torch.Generator) -> nn.Sequential:
    """A perceptron from flattened inputs of this shape to logits, or to one number where there are no classes."""
    return perceptron((math.prod(shape), *hidden, max(classes, 1)), generator)


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Uniform in ``+- 1 / sqrt(fan in)``, weights and biases alike."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for tensor in module.parameters(recurse=False):
                tensor.copy_(draw(tuple(tensor.shape), module.weight[0].numel(), None, generator))


@dataclass(eq=False)
class NetworkTask(TunedTask):
    """A perceptron, trained on batches of the training rows, tuned on batches of the validation rows.

    Attributes:
        hidden: sizes of the hidden layers (none: a linear model).
        batch_size: training rows of one inner gradient (None: all).
        val_batch_size: validation rows of one outer step (None: all).
        model: the perceptron, after ``setup``.
    """

    hidden: tuple[int, ...] = (100,)
    batch_size: int | None = None
    val_batch_size: int | None = None

    model: Functional = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        check_counts(self, "hidden")
        check_optional_count(self, "batch_size")
        check_optional_count(self, "val_batch_size")

    def network(self, env: Environment) -> None:
        """Build the perceptron."""
        splits = self.splits
        model = classifier(splits.shape, self.hidden, splits.num_classes, env.generator)
        self.model = Functional(model.to(env.device, env.dtype))

    def outer(self, w: Any, lam: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss on a batch."""
        return loss_of(self.model(w, batch[0]), batch[1])

    def batches(self, rows: Rows, size: int | None, seed: int, key: str) -> Minibatches:
        """Batches of ``(x, y)``; ``key`` is the setting that gives their size."""
        return Minibatches((rows.x, rows.y), size, seed, key=key)

    def predict(self, w: Any, x: Tensor) -> Tensor:
        """The network's outputs."""
        return self.model(w, x)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Sequential:
        """Build the perceptron."""
        return classifier(shape, self.hidden, classes, torch.Generator())


@dataclass(eq=False)
class WeightDecayTask(NetworkTask):
    """A weight decay for each weight of a network, or (``per: tensor``) for each of its tensors.

    Attributes:
        decay: space of the decays.
    """

    name = "weight_decay"
    MEASURES: ClassVar[tuple[str, ...]] = (*SPLIT_MEASURES, "train/loss", "train/accuracy")
    spaces = ("decay",)

    decay: Space | None = None

    def build(self, env: Environment) -> Parts:
        """Build the network."""
        self.network(env)
        problem = BilevelProblem(
            Composite(lambda w, lam, batch: self.model(w, batch[0]), self.criterion),
            self.outer,
            inner_batches=self.batches(self.splits.train, self.batch_size, env.seed, "task.batch_size"),
            outer_batches=self.batches(self.fitted, self.val_batch_size, env.seed + 1, "task.val_batch_size"),
        )
        return Parts(problem, self.model.w, {"decay": self.model.w}, self.rows())

    def criterion(self, z: Tensor, w: dict[str, Tensor], lam: dict[str, Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss and the decay."""
        terms = [(lam["decay"][name] * w[name].square()).sum() for name in w]
        return loss_of(z, batch[1]) + torch.stack(terms).sum() / 2


class Augmenter(nn.Module):
    """Adds to an image what two convolutions make of it and of noise: ``x + scale * conv(relu(conv(x, noise)))``."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        """Draw nothing yet: see ``initialise``."""
        super().__init__()
        self.first = nn.Conv2d(2 * channels, width, 5, padding=2)
        self.second = nn.Conv2d(width, channels, 5, padding=2)
        self.scale = scale

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Images and noise of the same shape, (n, channels, height, width)."""
        return x + self.scale * self.second(functional.relu(self.first(torch.cat([x, noise], 1))))


class Noisy:
    """Batches of ``(x, y, noise)``: standard normal noise of the shape of ``x``, from a generator of its own."""

    def __init__(self, batches: Minibatches, seed: int) -> None:
        """Stand before the first batch."""
        self.batches, self.generator, self.shares = batches, torch.Generator().manual_seed(seed), batches.shares

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next batch."""
        x, y = self.batches.draw()
        return x, y, torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands."""
        return {"batches": self.batches.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.batches.load_state_dict(state["batches"])
        self.generator.set_state(state["generator"])


@dataclass(eq=False)
class AugmentationTask(NetworkTask):
    """The weights of an augmentation network are the hyperparameters of a classifier trained on what it makes of the images.

    Attributes:
        width: channels between the two convolutions of the augmentation network.
        scale: factor of what it adds to an image, above 0.
        augmenter: the augmentation network, after ``setup``.
    """

    name = "augmentation"
    MEASURES: ClassVar[tuple[str, ...]] = (*SPLIT_MEASURES, "train/loss", "train/accuracy")
    spaces = ()

    width: int = 8
    scale: float = 1.0

    augmenter: Functional = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "width")
        check_number(self, "scale", 0.0, open_low=True)

    def build(self, env: Environment) -> Parts:
        """Build both networks.

        Raises:
            ValueError: the rows of the dataset are no images.
        """
        if len(self.splits.shape) != 3:
            raise ValueError(f"dataset={self.splits.name} has rows of shape {self.splits.shape}, not images; change dataset")
        self.network(env)
        augmenter = Augmenter(self.splits.shape[0], self.width, self.scale)
        initialise(augmenter, env.generator)
        self.augmenter = Functional(augmenter.to(env.device, env.dtype))
        problem = BilevelProblem(
            Composite(
                lambda w, lam, batch: self.model(w, self.augmented(lam, batch)), lambda z, w, lam, batch: loss_of(z, batch[1])
            ),
            self.outer,
            inner_batches=Noisy(self.batches(self.splits.train, self.batch_size, env.seed, "task.batch_size"), env.seed + 2),
            outer_batches=self.batches(self.fitted, self.val_batch_size, env.seed + 1, "task.val_batch_size"),
        )
        return Parts(problem, self.model.w, {"augmenter": self.augmenter.w}, self.rows())

    def hyperparameters(self, env: Environment) -> Hyperparameters:
        """The weights of the augmentation network, where its initialisation has put them."""
        return starting_at({"augmenter": self.augmenter.w})

    def augmented(self, lam: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The images of a batch, changed; flat. shape: (n, features)."""
        x, _, noise = (part.unflatten(1, self.splits.shape) if part.dim() == 2 else part for part in batch)
        return self.augmenter(lam["augmenter"], x, noise).flatten(1)
