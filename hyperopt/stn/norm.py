"""Normalisations whose gain and shift respond.

    y = W * n(x) + b + (V delta) * H * n(x) + (C delta) * h,      n(x): x normalised

Batch statistics are those of the perturbed batch in training, as the layer's inputs are; running statistics move once a call.

Under ``delta_linear`` n is made of elementary operations: torch's reverse derivative of the forward derivative of its own
batch and layer normalisation takes mean and variance for constants, and is wrong without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.stn.layer import HyperLayer


class HyperNorm(HyperLayer):
    """A normalisation with a gain for each channel."""

    channels = 1
    weight: Tensor
    bias: Tensor | None
    response_weight: nn.Parameter
    eps: float

    def normalised(self, x: Tensor) -> Tensor:
        """``n(x)``, without any change of running statistics."""
        raise NotImplementedError

    def elementary(self, x: Tensor) -> Tensor:
        """The same in elementary operations."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        draw = self.draw
        if not draw.responds:
            return super().forward(input)
        if self.context is not None and self.context.linear:
            if self.training:
                with torch.no_grad():
                    super().forward(self.primal(input))  # for the running statistics alone
            found = self.elementary(input)
            y = found * self.gain(self.weight, input)
            y = y if self.bias is None else y + self.gain(self.bias, input)
            return self.respond(y, self.primal(found) * self.gain(self.response_weight, input), draw)
        y = super().forward(input)
        return self.respond(y, self.normalised(input) * self.gain(self.response_weight, input), draw)

    def gain(self, weight: Tensor, like: Tensor) -> Tensor:
        """A vector over the channels, as ``like`` has them."""
        return weight.view(-1, *[1] * (like.dim() - 2))


class HyperBatchNorm(HyperNorm):
    """Batch normalisation."""

    running_mean: Tensor | None
    running_var: Tensor | None

    def _of_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.training or self.running_mean is None

    def normalised(self, x: Tensor) -> Tensor:
        """With the statistics of the batch in training, else the running ones, if there are any."""
        if self._of_batch():
            return functional.batch_norm(x, None, None, training=True, eps=self.eps)
        return functional.batch_norm(x, self.running_mean, self.running_var, training=False, eps=self.eps)

    def elementary(self, x: Tensor) -> Tensor:
        """The same."""
        if self._of_batch():
            return _normalised(x, [0, *range(2, x.dim())], self.eps)
        assert self.running_mean is not None and self.running_var is not None
        return (x - self.gain(self.running_mean, x)) * self.gain((self.running_var + self.eps).rsqrt(), x)


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

    def elementary(self, x: Tensor) -> Tensor:
        """The same."""
        grouped = x.reshape(x.shape[0], self.num_groups, -1)
        return _normalised(grouped, [2], self.eps).reshape(x.shape)


class HyperLayerNorm(HyperNorm, nn.LayerNorm):
    """Layer normalisation over the last dimension, whose entries are the units."""

    plain = nn.LayerNorm
    channels = -1

    def normalised(self, x: Tensor) -> Tensor:
        """Row by row."""
        return functional.layer_norm(x, self.normalized_shape, eps=self.eps)

    def elementary(self, x: Tensor) -> Tensor:
        """The same."""
        return _normalised(x, [-1], self.eps)

    def gain(self, weight: Tensor, like: Tensor) -> Tensor:
        """The last dimension."""
        return weight


def _normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """Mean 0 and variance 1 over some dimensions."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
