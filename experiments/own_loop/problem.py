"""The problem of this study: a convolutional network on few images of Fashion-MNIST, and seven hyperparameters of its training.

    train_loss = cross entropy of labels smoothed by ``smoothing``, on images moved by ``shift`` and blurred by ``noise``,
                 plus half of ``decay[k]`` times the squared weights of layer k
    val_loss   = cross entropy on other images, as they are

All of it is plain code that calls the module, and is differentiable in the hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import hyperopt
from hyperopt.data.mnist import FashionMNIST

LAYERS = 4
DEFAULTS = {"decay": 5e-4, "smoothing": 0.05, "shift": 0.5, "noise": 0.05}
Batch = Sequence[Tensor]
Values = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch, Values], Tensor]


@dataclass(frozen=True)
class Sizes:
    """How large the study is.

    Attributes:
        train, val: images to train on and to choose by.
        test: images that nothing is chosen by (None: all 10,000).
        channels: of the first layer; the second has twice as many.
        hidden: of the third layer.
        batch: images of a step.
        lr: of SGD with momentum 0.9.
        first: steps of training before the first step of a tuner.
    """

    train: int = 1000
    val: int = 1000
    test: int | None = None
    channels: int = 8
    hidden: int = 64
    batch: int = 100
    lr: float = 0.02
    first: int = 300


@dataclass(frozen=True)
class Rows:
    """Images of shape (n, 1, 28, 28) and labels, by their use."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


def images(sizes: Sizes, seed: int) -> Rows:
    """Fashion-MNIST from ``$HYPEROPT_DATA``; ``seed`` says which images are which."""
    splits = FashionMNIST(train=sizes.train, val=sizes.val, seed=seed).load()
    test = splits.test.take(slice(sizes.test))
    return Rows(*(dataset(rows.x, rows.y) for rows in (splits.train, splits.val, test)))


def dataset(x: Tensor, y: Tensor) -> TensorDataset:
    """Rows as images."""
    return TensorDataset(x.reshape(-1, 1, 28, 28), y)


def network(sizes: Sizes) -> nn.Sequential:
    """Two convolutions that halve the image and two linear layers, drawn from torch's own generator."""
    small = sizes.channels
    return nn.Sequential(
        *(nn.Conv2d(1, small, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(small, 2 * small, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(2 * small * 49, sizes.hidden), nn.ReLU(), nn.Linear(sizes.hidden, 10)),
    )


def hyperparameters() -> hyperopt.Hyperparameters:
    """At the defaults: a usual decay, and a little of the rest."""
    return hyperopt.Hyperparameters(
        {
            "decay": hyperopt.Positive(DEFAULTS["decay"], per="element"),
            "smoothing": hyperopt.Bounded(DEFAULTS["smoothing"], low=0.0, high=0.9),
            "shift": hyperopt.Positive(DEFAULTS["shift"]),
            "noise": hyperopt.Positive(DEFAULTS["noise"]),
        },
        {"decay": (LAYERS,)},
    )


def moved(x: Tensor, shift: Tensor) -> Tensor:
    """Each image moved up and left by two normal numbers of deviation ``shift`` pixels, interpolated linearly."""
    places = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    by = shift * torch.randn(2, len(x), 1, 1, dtype=x.dtype, device=x.device)
    rows, columns = (1 - (places[:, None] + by - places).abs()).clamp(min=0)  # shape of each: (n, 28, 28)
    return (rows @ x[:, 0] @ columns.mT)[:, None]


def train_loss(model: nn.Module, batch: Batch, lam: Values) -> Tensor:
    """See the head of this file."""
    x, y = batch
    x = moved(x, lam["shift"])
    x = x + lam["noise"] * torch.randn_like(x)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    decay = sum(lam["decay"][k] * w.square().sum() for k, w in enumerate(weights)) / 2
    return smoothed(model(x), y, lam["smoothing"]) + decay


def smoothed(logits: Tensor, y: Tensor, smoothing: Tensor) -> Tensor:
    """Cross entropy with ``smoothing`` of each label spread over all classes; torch's own takes no tensor for it."""
    scores = logits.log_softmax(1)
    return -((1 - smoothing) * scores.gather(1, y[:, None]).mean() + smoothing * scores.mean())


def val_loss(model: nn.Module, batch: Batch, lam: Values) -> Tensor:
    """Cross entropy."""
    return cross_entropy(model(batch[0]), batch[1])
