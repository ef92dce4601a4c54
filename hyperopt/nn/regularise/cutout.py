"""Cutout: squares of an image are blanked, with a number and length for each example.

Reference: T. DeVries and G. W. Taylor, arXiv 1708.04552.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hyperopt.core.random import Keys, Stream
from hyperopt.nn.regularise.strength import column, images_only


def cutout(images: Tensor, holes: Tensor | float, length: Tensor | float, keys: Keys, *, most: int) -> Tensor:
    """Return the images with holes, where a pixel is 0.

    The centre (r, c) of a hole of length L is uniform over the pixels. The hole covers rows ``r - ceil(L/2)`` up to, but
    without, ``r + floor(L/2)``, and columns likewise, as far as they are inside the image. Holes may overlap. Number and
    length are floored and get no gradient.

    Args:
        images: shape: (n, channels, height, width), floating. Their mean should be 0: standardise before, not after.
        holes: number of holes, 0 to ``most``. shape: (n,), or a number.
        length: side of a hole in pixels, at least 0. shape: (n,), or a number.
        keys: keys of the examples.
        most: largest number of holes of any example; the draws of an example do not depend on it.

    Raises:
        ValueError: there are no images, the number of strengths or keys is wrong, or a number is out of range.
        TypeError: the images are not floating.
    """
    images_only(images, "cutout")
    keys.check(images)
    counts = column(_floor(holes), images, 0.0, most, "holes")
    sides = column(_floor(length), images, 0.0, math.inf, "length")
    valid = counts + sides  # NaN where either is
    counts, sides = (each.flatten(1).nan_to_num().long()[..., None] for each in (counts, sides))  # shape: (n, 1, 1)
    height, width = images.shape[2:]

    def covered(size: int, stream: Stream) -> Tensor:
        """Whether a hole covers a row (or column). shape: (n, most, size)."""
        first = keys.whole(size, stream, most)[:, :, None] - (sides + 1) // 2
        places = torch.arange(size, device=images.device)
        return (places >= first) & (places < first + sides)

    there = torch.arange(most, device=images.device)[:, None] < counts  # shape: (n, most, 1)
    rows, columns = covered(height, Stream.HOLE_DOWN) & there, covered(width, Stream.HOLE_RIGHT)
    blank = (rows[:, :, :, None] & columns[:, :, None, :]).any(1, keepdim=True)  # shape: (n, 1, height, width)
    return torch.where(valid.isnan(), torch.nan, torch.where(blank, 0, images))


def _floor(strength: Tensor | float) -> Tensor | float:
    """Return the largest whole number below, without a gradient; NaN stays NaN."""
    return strength.detach().floor() if isinstance(strength, Tensor) else float(np.floor(strength))
