"""Dropout at a rate that is a hyperparameter of the draw, a rate for each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperopt.stn.draw import Draw
from hyperopt.stn.layer import InContext


class Dropout(InContext, nn.Dropout):
    """``y = x * mask / (1 - p)`` with ``p = draw.h[name]`` row by row, outside of the gradient; the identity in eval mode.

    Args:
        name: the hyperparameter.
        inplace: as in ``torch.nn.Dropout``, for the network that ``collapse`` gives.
    """

    plain = nn.Dropout

    def __init__(self, name: str, inplace: bool = False) -> None:
        """Know the name."""
        super().__init__(0.0, inplace)
        self.name = name

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries."""
        if not self.training:
            return input
        draw = self.draw
        self.rows(input.shape[0], draw)
        p = draw.h[self.name].detach().to(input.dtype).view(-1, *[1] * (input.dim() - 1))
        keep = 1 - p
        # Clamped: a rate of 1 keeps nothing, and has no factor that would make up for it.
        factor = keep.clamp(min=torch.finfo(input.dtype).tiny).reciprocal()
        return input * torch.where(torch.rand_like(input) < keep, factor, torch.zeros_like(factor))

    def collapse_(self, draw: Draw) -> None:
        """Become dropout at the rate of the first row of ``draw``."""
        self.p = float(draw.h[self.name][0])
        del self.name
        super().collapse_(draw)

    def extra_repr(self) -> str:
        """Whose rate it is."""
        return repr(self.name) if "name" in vars(self) else super().extra_repr()
