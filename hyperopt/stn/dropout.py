"""Dropout at a rate that is a hyperparameter of the draw, with one rate for each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperopt.stn.draw import Draw
from hyperopt.stn.layer import InContext


class Dropout(InContext, nn.Dropout):
    """``y = x * mask / (1 - p)`` with ``p = draw.h[name]`` for each row, without a gradient in p; the identity in eval mode.

    Args:
        name: name of the hyperparameter.
        inplace: as in ``torch.nn.Dropout``, for the plain network that ``collapse`` returns.

    Raises:
        KeyError: the draw has no hyperparameter of this name.

    Reference: Srivastava et al., JMLR 15, 2014; MacKay et al., ICLR 2019, arXiv 1903.03088.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"rate": stn.Bounded(0.5, 0.0, 0.9)})
        >>> net = stn.convert(torch.nn.Sequential(torch.nn.Linear(2, 100), stn.Dropout("rate")), space)
        >>> dropped = net(torch.ones(1, 2), space.draw(rows=1)) == 0
        >>> 0 < int(dropped.sum()) < 100
        True
    """

    plain = nn.Dropout

    def __init__(self, name: str, inplace: bool = False) -> None:
        """Keep the name."""
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
        # The factor is clamped, since a rate of 1 keeps nothing and has no finite factor.
        factor = keep.clamp(min=torch.finfo(input.dtype).tiny).reciprocal()
        return input * torch.where(torch.rand_like(input) < keep, factor, torch.zeros_like(factor))

    def collapse_(self, draw: Draw) -> None:
        """Become torch's dropout at the rate of the first row of ``draw``."""
        self.p = float(draw.h[self.name][0])
        del self.name
        super().collapse_(draw)

    def extra_repr(self) -> str:
        """Return the name of the rate."""
        return repr(self.name) if "name" in vars(self) else super().extra_repr()
