"""Networks with a weight decay for each weight, or with a learned augmentation of the training images.

    weight_decay    L = cross_entropy(f(w, x), y) + sum_j lam_j w_j^2 / 2        E = cross_entropy(f(w, x'), y')
    augmentation    L = cross_entropy(f(w, a(lam, x, noise)), y)                 E = cross_entropy(f(w, x'), y')

``f`` is a multilayer perceptron. ``a`` adds to an image the output of a small convolutional network, whose inputs are the image
and noise. The batches of both losses depend only on the seed.

Reference: J. Lorraine, P. Vicol and D. Duvenaud, Optimizing millions of hyperparameters by implicit differentiation, AISTATS
2020, arXiv 1911.02590, sections 5.2 and 5.4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.functional import Functional
from hyperopt.bilevel.problem import Composite
from hyperopt.core.checks import check_count, check_counts, check_number
from hyperopt.nn.equilibrium import draw
from hyperopt.spaces.hyperparameters import Hyperparameters
from hyperopt.spaces.space import Space
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelSetup, BilevelTask, starting_at
from hyperopt.tasks.scores import loss_of
from hyperopt.tasks.tuned import TunedTask


def perceptron(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Return linear layers with ReLU between them, initialised from a CPU generator as ``torch.nn.Linear`` initialises them.

    ``sizes`` are those of the input, the hidden layers and the output.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    initialise(model, generator)
    return model


def classifier(shape: Sequence[int], hidden: Sequence[int], classes: int, generator: torch.Generator) -> nn.Sequential:
    """Return a perceptron from flattened inputs of this shape to logits, or to one number if there are no classes."""
    return perceptron((math.prod(shape), *hidden, max(classes, 1)), generator)


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights and biases uniformly in ``+- 1 / sqrt(fan in)``."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for tensor in module.parameters(recurse=False):
                tensor.copy_(draw(tuple(tensor.shape), module.weight[0].numel(), None, generator))


@dataclass(eq=False)
class PerceptronTask(BilevelTask):
    """A task whose model is a perceptron.

    Attributes:
        hidden: sizes of the hidden layers (none: a linear model).
        model: the perceptron, after ``setup``.
    """

    hidden: tuple[int, ...] = ()

    model: Functional = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        check_counts(self, "hidden")

    def network(self, env: Environment) -> None:
        """Build the perceptron."""
        splits = self.splits
        model = classifier(splits.shape, self.hidden, splits.num_classes, env.generator)
        self.model = Functional(model.to(env.device, env.dtype))

    def predict(self, w: Any, x: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.model(w, x)

    def predictor(self, shape: tuple[int, ...], classes: int, hyperparameters: Mapping[str, Tensor]) -> nn.Sequential:
        """Build the perceptron."""
        return classifier(shape, self.hidden, classes, torch.Generator())


@dataclass(eq=False)
class NetworkTask(PerceptronTask, TunedTask):
    """A perceptron, trained on batches of the training rows and tuned on batches of the validation rows."""

    hidden: tuple[int, ...] = (100,)


@dataclass(eq=False)
class WeightDecayTask(NetworkTask):
    """A network with a weight decay for each weight, or (``per: tensor``) for each parameter tensor.

    Attributes:
        decay: space of the decays.
    """

    name = "weight_decay"
    spaces = ("decay",)

    decay: Space | None = None

    def build(self, env: Environment) -> BilevelSetup:
        """Build the network."""
        self.network(env)
        problem = self.problem(self.composite(self.criterion), env, (self.splits.train.x, self.splits.train.y))
        return BilevelSetup(problem, self.model.w, {"decay": self.model.w}, self.rows())

    def criterion(self, z: Tensor, w: dict[str, Tensor], lam: dict[str, Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss plus the weight decay."""
        terms = [(lam["decay"][name] * w[name].square()).sum() for name in w]
        return loss_of(z, batch[1]) + torch.stack(terms).sum() / 2


class Augmenter(nn.Module):
    """Adds to an image two convolutions of it and of noise: ``x + scale * conv(relu(conv(x, noise)))``."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        """Build the layers; ``initialise`` draws their weights."""
        super().__init__()
        self.first = nn.Conv2d(2 * channels, width, 5, padding=2)
        self.second = nn.Conv2d(width, channels, 5, padding=2)
        self.scale = scale

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return changed images, given images and noise of the same shape, (n, channels, height, width)."""
        return x + self.scale * self.second(functional.relu(self.first(torch.cat([x, noise], 1))))


class Noisy:
    """Batches ``(x, y, noise)`` with standard normal noise of the shape of ``x``, from a generator of its own."""

    def __init__(self, batches: Minibatches, seed: int) -> None:
        """Start at the first batch."""
        self.batches, self.generator, self.shares = batches, torch.Generator().manual_seed(seed), batches.shares

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next batch."""
        x, y = self.batches.draw()
        return x, y, torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, and the generator's state."""
        return {"batches": self.batches.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.batches.load_state_dict(state["batches"])
        self.generator.set_state(state["generator"])


@dataclass(eq=False)
class AugmentationTask(NetworkTask):
    """A classifier trained on augmented images; the hyperparameters are the weights of the augmentation network.

    Attributes:
        width: number of channels between the two convolutions of the augmentation network.
        scale: factor of what the network adds to an image, above 0.
        augmenter: the augmentation network, after ``setup``.
    """

    name = "augmentation"
    spaces = ()

    width: int = 8
    scale: float = 1.0

    augmenter: Functional = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "width")
        check_number(self, "scale", 0.0, open_low=True)

    def build(self, env: Environment) -> BilevelSetup:
        """Build both networks.

        Raises:
            ValueError: the rows of the dataset are not images.
        """
        if len(self.splits.shape) != 3:
            raise ValueError(f"dataset={self.splits.name} has rows of shape {self.splits.shape}, not images; change dataset")
        self.network(env)
        augmenter = Augmenter(self.splits.shape[0], self.width, self.scale)
        initialise(augmenter, env.generator)
        self.augmenter = Functional(augmenter.to(env.device, env.dtype))
        inner = Composite(
            lambda w, lam, batch: self.model(w, self.augmented(lam, batch)), lambda z, w, lam, batch: loss_of(z, batch[1])
        )
        problem = self.problem(inner, env, (self.splits.train.x, self.splits.train.y))
        assert isinstance(problem.inner_batches, Minibatches)
        problem = replace(problem, inner_batches=Noisy(problem.inner_batches, env.seed + 2))
        return BilevelSetup(problem, self.model.w, {"augmenter": self.augmenter.w}, self.rows())

    def hyperparameters(self, env: Environment) -> Hyperparameters:
        """Return the initial weights of the augmentation network."""
        return starting_at({"augmenter": self.augmenter.w})

    def augmented(self, lam: dict[str, Any], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the augmented images of a batch, flattened. shape: (n, features)."""
        x, _, noise = (part.unflatten(1, self.splits.shape) if part.dim() == 2 else part for part in batch)
        return self.augmenter(lam["augmenter"], x, noise).flatten(1)
