"""Dropout with a probability for each example: ``y = x m / (1 - p)``, where ``m`` is 0 with probability ``p`` and else 1.

Reference: N. Srivastava et al., Dropout, JMLR 15, 2014; whole channels: J. Tompson et al., arXiv 1411.4280.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.random import Keys
from hyperopt.nn.regularise.strength import column


def dropout(x: Tensor, p: Tensor | float, keys: Keys, stream: int, *, channels: bool = False) -> Tensor:
    """Return the batch with some entries 0 and the others scaled up.

    ``p`` gets no gradient, since with a fixed mask the gradient through ``1 / (1 - p)`` is not that of the expected loss.

    Args:
        x: shape: (n, ...), floating.
        p: probability that an entry is dropped, in [0, 1]. shape: (n,), or a number.
        keys: keys of the examples.
        stream: the layer's own number; see ``Stream.LAYER``.
        channels: whether to drop whole channels of images. shape of ``x``: (n, channels, ...).

    Returns:
        A batch of the same shape and dtype.

    Raises:
        ValueError: the number of strengths or keys is wrong, or a number is outside of [0, 1].
        TypeError: the batch is not floating.
    """
    keys.check(x)
    chance = column(p.detach() if isinstance(p, Tensor) else p, x, 0.0, 1.0, "p")
    shape = (x.shape[1], *[1] * (x.dim() - 2)) if channels else tuple(x.shape[1:])
    kept = keys.uniform(stream, shape, x.dtype) >= chance
    scale = torch.where(chance < 1, 1 / (1 - chance), 0 * chance)  # 0 at p = 1, where all is dropped; NaN stays NaN
    return x * torch.where(kept | chance.isnan(), scale, 0)
