"""Noise with a strength for each example, added to every entry or as one factor of the whole example."""

from __future__ import annotations

import math

from torch import Tensor

from hyperopt.core.random import Keys, Stream
from hyperopt.nn.regularise.strength import column


def gaussian(x: Tensor, deviation: Tensor | float, keys: Keys) -> Tensor:
    """Return ``x + deviation * e`` with standard normal ``e`` for each entry.

    Args:
        x: shape: (n, ...), floating.
        deviation: at least 0, in the units of ``x``; its gradient is that of the expected loss. shape: (n,), or a number.
        keys: keys of the examples.

    Raises:
        ValueError: the number of strengths or keys is wrong, or a number is below 0.
        TypeError: the batch is not floating.
    """
    keys.check(x)
    return x + column(deviation, x, 0.0, math.inf, "deviation") * keys.normal(Stream.NOISE, tuple(x.shape[1:]), x.dtype)


def scaled(x: Tensor, spread: Tensor | float, keys: Keys) -> Tensor:
    """Return ``x t`` with one ``t`` for each example, uniform between ``1 / (1 + spread)`` and ``1 + spread``.

    Args:
        x: shape: (n, ...), floating.
        spread: at least 0; its gradient is that of the expected loss. shape: (n,), or a number.
        keys: keys of the examples.

    Raises:
        ValueError: the number of strengths or keys is wrong, or a number is below 0.
        TypeError: the batch is not floating.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 4.2 and the authors' code.
    """
    keys.check(x)
    high = 1 + column(spread, x, 0.0, math.inf, "spread")
    low = 1 / high
    return x * (low + (high - low) * keys.uniform(Stream.INPUT_SCALE, (1,) * (x.dim() - 1), x.dtype))
