"""Images on which a self-tuning network is trained and tuned: batches, what the draw does to them, and both losses.

    train    mean cross_entropy(f(w(lam'), a(x, lam')), y) + mean decay' |w(lam')|^2 / 2
    valid    mean cross_entropy(f(w(lam'), x), y)

``a`` is the pipeline of ``hyperopt.nn.regularise`` and the dropout inside of ``f``, each example under its own hyperparameters.
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
"""Images, labels and keys of some rows."""


class ImageBatches:
    """Batches of images, labels and keys.

    Args:
        rows: flattened.
        shape: of one image, channels first.
        size: rows of a batch.
        seed: of their order, and of what happens to the images.
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], size: int, seed: int) -> None:
        """Stand before the first batch."""
        self.rows, self.shape, self.seed = rows, shape, seed
        self.order = Batches(len(rows), size, seed, device=rows.index.device)

    def draw(self) -> Batch:
        """The next batch."""
        batch = self.order.take()
        found = self.rows.take(batch.index)
        return found.x.unflatten(1, self.shape), found.y, Keys(found.index, self.seed, batch.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch stands."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.order.load_state_dict(state)


class Standardise(nn.Module):
    """``(x - mean) / std`` channel by channel, as ``Pipeline.plain``; its numbers are buffers, for a network that leaves its run.

    Args:
        channels: of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        """Change nothing, until the numbers are loaded."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Standardise. shape: (n, channels, height, width)."""
        return (images - self.mean) / self.std


class ImageProblem:
    """The rows of a dataset, as a self-tuning network or a plain one trains on them.

    Args:
        splits: the dataset; pixels in [0, 1] (``normalize=unit``): the training rows' mean and deviation are taken off later.
        declared: the hyperparameters by name.
        dropouts: names of dropout rates that the network has a place for.
        batch_size: training rows of one update.
        val_batch_size: validation rows of one update of the hyperparameters.
        seed: of the order of both, and of what happens to the training images.

    Attributes:
        train: batches of the training rows.
        valid: batches of the validation rows.
        pipeline: what is done to the images.

    Raises:
        ValueError: no images or no validation rows, a hyperparameter that nothing here reads, one that may come to have a value
            without a meaning, or batches larger than the rows.
    """

    def __init__(
        self,
        splits: Splits,
        declared: Mapping[str, Tuned],
        dropouts: Sequence[str],
        batch_size: int,
        val_batch_size: int,
        seed: int,
    ) -> None:
        """Check what is declared, and stand before the first batches."""
        if len(splits.shape) != 3 or not splits.num_classes:
            raise ValueError(f"dataset={splits.name} has rows of shape {splits.shape}, not images of classes; change dataset")
        if not len(splits.val):
            raise ValueError("dataset.val=0: there is nothing to tune the hyperparameters on; raise dataset.val")
        _check_declared(declared, dropouts, splits.shape[0])
        self.shape, self.decays = splits.shape, DECAY in declared
        holes = declared.get("cut_holes")
        names = tuple(name for name in RANGES if name in declared)
        images = splits.train.x.unflatten(1, splits.shape)
        if float(images.min()) < 0 or float(images.max()) > 1:
            raise ValueError(
                "the pixels are not in [0, 1]; set dataset.normalize=unit (images are standardised after the jitter)"
            )
        self.pipeline = Pipeline.of(images, names, 1 if holes is None else int(_bounds(holes)[1]))
        self.train = ImageBatches(splits.train, splits.shape, batch_size, seed)
        self.valid = ImageBatches(splits.val, splits.shape, val_batch_size, seed + 1)

    def train_loss(self, model: STN, batch: Batch, draw: Draw) -> Tensor:
        """The training loss under a draw; see ``hyperopt.stn.step``."""
        images, labels, keys = batch
        with keyed(keys):
            logits = model(self.pipeline(images, draw.h, keys), draw)
        loss = functional.cross_entropy(logits, labels)
        if self.decays:
            loss = loss + (draw.h[DECAY] * model.squared_norm(draw)).mean() / 2
        return loss

    def valid_loss(self, model: nn.Module, batch: Batch, draw: Draw | None = None) -> Tensor:
        """The validation loss at the draw that is in place; nothing is done to the images."""
        return functional.cross_entropy(model(self.pipeline.plain(batch[0])), batch[1])

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of flattened rows, at the hyperparameters themselves. shape: (n, classes)."""
        return model(self.pipeline.plain(x.unflatten(1, self.shape)))


def _bounds(each: Tuned) -> tuple[float, float]:
    """Where a hyperparameter may come to."""
    return (each.low, each.high) if isinstance(each, Bounded | Discrete) else (0.0, math.inf)


def _check_declared(declared: Mapping[str, Tuned], dropouts: Sequence[str], channels: int) -> None:
    """Refuse what nothing reads, and what may come to have a value without a meaning."""
    known = {**RANGES, **dict.fromkeys(dropouts, (0.0, 1.0)), DECAY: (0.0, math.inf)}
    for name, each in declared.items():
        if name not in known:
            raise ValueError(f"nothing reads the hyperparameter {name!r}; the names are {', '.join(known)}")
        check_range(name, *_bounds(each), known[name])
        if name in ("saturation", "hue") and channels != 3:
            raise ValueError(f"{name} is declared, and the images have {channels} channels, not 3; drop it")
