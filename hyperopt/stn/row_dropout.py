"""Dropout of a self-tuning network with masks that depend on each example's own number."""

from __future__ import annotations

from torch import Tensor, nn

from hyperopt.core.random import Stream, current_keys
from hyperopt.nn.regularise.dropout import dropout
from hyperopt.stn.draw import Draw
from hyperopt.stn.dropout import Dropout


class RowDropout(Dropout):
    """``Dropout`` at the rate ``draw.h[name]``, drawn with the keys of the present batch: see ``hyperopt.core.random``.

    Args:
        name: name of the hyperparameter.
        stream: the layer's own number in the network, from 0.
        channels: whether to drop whole channels.
    """

    def __init__(self, name: str, stream: int, channels: bool = False) -> None:
        """Keep the name and the stream."""
        super().__init__(name)
        self.stream, self.channels = stream, channels

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries, or channels."""
        if not self.training:
            return input
        draw = self.draw
        self.rows(input.shape[0], draw)
        keys = current_keys(f"RowDropout {self.place!r}")
        return dropout(input, draw.h[self.name], keys, Stream.LAYER + self.stream, channels=self.channels)

    def collapse_(self, draw: Draw) -> None:
        """Become torch's own dropout (of channels or entries) at the rate of the first row of ``draw``."""
        kind = nn.Dropout2d if self.channels else nn.Dropout
        super().collapse_(draw)
        del self.stream, self.channels
        self.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]
