"""Convolutions whose filters respond, each output channel with a gate."""

from __future__ import annotations

from torch import Tensor, nn

from hyperopt.stn.layer import HyperLayer


class HyperConv(HyperLayer):
    """``y = W * x + b + (V delta) (H * x) + (C delta) h``. shapes: (rows, in, ...) to (rows, out, ...)."""

    channels = 1
    response_weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        y, draw = super().forward(input), self.draw
        if not draw.responds:
            return y
        return self.respond(y, self._conv_forward(self.primal(input), self.response_weight, None), draw)  # type: ignore[operator]


class HyperConv1d(HyperConv, nn.Conv1d):
    """In one dimension."""

    plain = nn.Conv1d


class HyperConv2d(HyperConv, nn.Conv2d):
    """In two."""

    plain = nn.Conv2d


class HyperConv3d(HyperConv, nn.Conv3d):
    """In three."""

    plain = nn.Conv3d
