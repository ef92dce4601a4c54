"""Normalisations whose gain and shift respond.

    y = W * n(x) + b + (V delta) * H * n(x) + (C delta) * h,      n(x): x normalised

Batch statistics are those of the perturbed batch in training, as the layer's inputs are; running statistics move once a call.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hyperopt.stn.layer import HyperLayer


class HyperNorm(HyperLayer):
    """A normalisation with a gain for each channel; ``normalised`` is its own without gain and shift."""

    channels = 1
    response_weight: nn.Parameter

    def normalised(self, x: Tensor) -> Tensor:
        """``n(x)``, without any change of running statistics."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        y, draw = super().forward(input), self.draw
        if not draw.responds:
            return y
        product = self.normalised(self.primal(input)) * self.gain(self.response_weight, input)
        return self.respond(y, product, draw)

    def gain(self, weight: Tensor, like: Tensor) -> Tensor:
        """A vector over the channels, as ``like`` has them."""
        return weight.view(-1, *[1] * (like.dim() - 2))


class HyperBatchNorm(HyperNorm):
    """Batch normalisation."""

    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float

    def normalised(self, x: Tensor) -> Tensor:
        """With the statistics of the batch in training, else the running ones, if there are any."""
        if self.training or self.running_mean is None:
            return functional.batch_norm(x, None, None, training=True, eps=self.eps)
        return functional.batch_norm(x, self.running_mean, self.running_var, training=False, eps=self.eps)


class HyperBatchNorm1d(HyperBatchNorm, nn.BatchNorm1d):
    """Of vectors or sequences."""

    plain = nn.BatchNorm1d


class HyperBatchNorm2d(HyperBatchNorm, nn.BatchNorm2d):
    """Of images."""

    plain = nn.BatchNorm2d


class HyperBatchNorm3d(HyperBatchNorm, nn.BatchNorm3d):
    """Of volumes."""

    plain = nn.BatchNorm3d


class HyperGroupNorm(HyperNorm, nn.GroupNorm):
    """Group normalisation."""

    plain = nn.GroupNorm

    def normalised(self, x: Tensor) -> Tensor:
        """Group by group."""
        return functional.group_norm(x, self.num_groups, eps=self.eps)


class HyperLayerNorm(HyperNorm, nn.LayerNorm):
    """Layer normalisation over the last dimension, whose entries are the units."""

    plain = nn.LayerNorm
    channels = -1

    def normalised(self, x: Tensor) -> Tensor:
        """Row by row."""
        return functional.layer_norm(x, self.normalized_shape, eps=self.eps)

    def gain(self, weight: Tensor, like: Tensor) -> Tensor:
        """The last dimension."""
        return weight
