"""The batches and losses of an image dataset on which a self-tuning network is trained and tuned.

    train    mean cross_entropy(f(w(lam'), a(x, lam')), y) + mean sum_layers decay_l' |w_l(lam')|^2 / 2
    valid    mean cross_entropy(f(w(lam'), x), y)

``a`` is the pipeline of ``hyperopt.nn.regularise`` and the dropout inside ``f``. Each example has its own hyperparameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.core.random import Keys, keyed
from hyperopt.data.batches import Batches
from hyperopt.data.splits import Rows, Splits
from hyperopt.nn.regularise.pipeline import RANGES, Pipeline, check_range
from hyperopt.stn.declare import Bounded, Discrete, Tuned
from hyperopt.stn.draw import Draw
from hyperopt.stn.network import STN

DECAY = "weight_decay"
Batch = tuple[Tensor, Tensor, Keys]
"""Images, labels and random keys of some rows."""


class ImageBatches:
    """Batches of images, labels and keys.

    Args:
        rows: flattened images.
        shape: shape of one image, channels first.
        size: number of rows of a batch.
        seed: seed of the order of rows and of the random changes of images.
        kind: of the rows, ``train`` or ``val``, for the message if there are fewer than ``size``.
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], size: int, seed: int, kind: str = "train") -> None:
        """Start at the first batch."""
        self.rows, self.shape, self.seed = rows, shape, seed
        key = "task.batch_size" if kind == "train" else "task.val_batch_size"
        what = f"rows of dataset.{kind}; lower {key}, or raise dataset.{kind}"
        self.order = Batches(len(rows), size, seed, device=rows.index.device, key=key, what=what)

    def draw(self) -> Batch:
        """Return the next batch."""
        batch = self.order.take()
        found = self.rows.take(batch.index)
        return found.x.unflatten(1, self.shape), found.y, Keys(found.index, self.seed, batch.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.order.load_state_dict(state)


class Standardise(nn.Module):
    """``(x - mean) / std`` for each channel, as ``Pipeline.plain``, with the numbers in buffers, for an exported network.

    Args:
        channels: number of channels of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        """Start as the identity, until the numbers are loaded."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return standardised images. shape: (n, channels, height, width)."""
        return (images - self.mean) / self.std


class ImageProblem:
    """The rows of a dataset, as a self-tuning network or a plain one trains on them.

    Args:
        splits: the dataset, with pixels in [0, 1] (``normalize=unit``); images are standardised after the other changes.
        declared: the hyperparameters by name.
        dropouts: names of the dropout rates that the network uses.
        batch_size: number of training rows for an update of the weights.
        val_batch_size: number of validation rows for an update of the hyperparameters.
        seed: seed of the order of rows and of the random changes of training images.
        layers: names of the layers of the network that may have a weight decay of their own, ``weight_decay_<layer>``.

    Attributes:
        train: batches of the training rows.
        valid: batches of the validation rows.
        pipeline: the changes of the images.

    Raises:
        ValueError: the rows are not images, there are no validation rows, a hyperparameter is not used or may leave its valid
            range, or a batch is larger than its rows.
    """

    def __init__(
        self,
        splits: Splits,
        declared: Mapping[str, Tuned],
        dropouts: Sequence[str],
        batch_size: int,
        val_batch_size: int,
        seed: int,
        layers: Sequence[str] = (),
    ) -> None:
        """Check the hyperparameters, and start at the first batches."""
        if len(splits.shape) != 3 or not splits.num_classes:
            raise ValueError(f"dataset={splits.name} has rows of shape {splits.shape}, not images of classes; change dataset")
        if not len(splits.val):
            raise ValueError("dataset.val=0: there are no validation rows to tune the hyperparameters on; raise dataset.val")
        check_declared(declared, dropouts, layers)
        for name in {"saturation", "hue"} & set(declared):
            if splits.shape[0] != 3:
                raise ValueError(f"{name} is declared, but the images have {splits.shape[0]} channels, not 3; drop it")
        own = {_decay_of(layer): f"{layer}.weight" for layer in layers}
        self.shape, self.decays = splits.shape, DECAY in declared
        self.own_decays = {name: weight for name, weight in own.items() if name in declared}
        holes = declared.get("cut_holes")
        names = tuple(name for name in RANGES if name in declared)
        images = splits.train.x.unflatten(1, splits.shape)
        if float(images.min()) < 0 or float(images.max()) > 1:
            raise ValueError(
                "the pixels are not in [0, 1]; set dataset.normalize=unit (images are standardised after the jitter)"
            )
        self.pipeline = Pipeline.of(images, names, 1 if holes is None else int(_bounds(holes)[1]))
        self.train = ImageBatches(splits.train, splits.shape, batch_size, seed)
        self.valid = ImageBatches(splits.val, splits.shape, val_batch_size, seed + 1, "val")

    def train_loss(self, model: STN, batch: Batch, draw: Draw) -> Tensor:
        """Return the training loss under a draw; see ``hyperopt.stn.step``."""
        images, labels, keys = batch
        with keyed(keys):
            logits = model(self.pipeline(images, draw.h, keys), draw)
        loss = functional.cross_entropy(logits, labels)
        if self.decays:
            loss = loss + (draw.h[DECAY] * model.squared_norm(draw)).mean() / 2
        norms = model.squared_norms(draw) if self.own_decays else {}
        for name, weight in self.own_decays.items():
            loss = loss + (draw.h[name] * norms[weight]).mean() / 2
        return loss

    def valid_loss(self, model: nn.Module, batch: Batch, draw: Draw | None = None) -> Tensor:
        """Return the validation loss on unchanged images, at the draw of the model's context."""
        return functional.cross_entropy(model(self.pipeline.plain(batch[0])), batch[1])

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of flattened rows, at the present hyperparameters. shape: (n, classes)."""
        return model(self.pipeline.plain(x.unflatten(1, self.shape)))


def _bounds(each: Tuned) -> tuple[float, float]:
    """Return the range that a hyperparameter may reach."""
    return (each.low, each.high) if isinstance(each, Bounded | Discrete) else (0.0, math.inf)


def _decay_of(layer: str) -> str:
    """The name of the weight decay of a layer."""
    return f"{DECAY}_{layer}"


def check_declared(declared: Mapping[str, Tuned], dropouts: Sequence[str], layers: Sequence[str]) -> None:
    """Refuse hyperparameters that are not used, and those that may leave their valid range; see ``ImageProblem``."""
    decays = (DECAY, *map(_decay_of, layers))
    known = {**RANGES, **dict.fromkeys(dropouts, (0.0, 1.0)), **dict.fromkeys(decays, (0.0, math.inf))}
    for name, each in declared.items():
        if name not in known:
            raise ValueError(f"the hyperparameter {name!r} is not used; the names are {', '.join(known)}")
        check_range(name, *_bounds(each), known[name])
