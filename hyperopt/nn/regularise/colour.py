"""Jitter of brightness, contrast, saturation and hue, with a size for each example.

    brightness    clip(f x)                          contrast      clip(f x + (1 - f) mean(grey(x)))
    saturation    clip(f x + (1 - f) grey(x))        hue           the hue of x turned by f circles

Each of the four takes ``f`` itself, as torchvision's ``adjust_*`` do. ``jitter`` draws it uniformly from ``1 +- size``, or
from ``+- size`` for the hue. torchvision shuffles the four; here the order is fixed, so that each draw is one number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hyperopt.core.random import Keys, Stream
from hyperopt.nn.regularise.strength import column, images_only

_GREY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, in torchvision's digits


def grey(images: Tensor) -> Tensor:
    """Return the luma. shape: (n, 1, height, width), from (n, 3, height, width); a single channel is returned as it is."""
    if images.shape[1] == 1:
        return images
    images_only(images, "grey", 3)
    return sum(weight * images[:, k : k + 1] for k, weight in enumerate(_GREY))  # pyright: ignore[reportReturnType]


def adjust_brightness(images: Tensor, factor: Tensor | float) -> Tensor:
    """Scale the images: black at factor 0, unchanged at 1.

    Args:
        images: in [0, 1]. shape: (n, channels, height, width), floating.
        factor: at least 0. shape: (n,), or a number.
    """
    images_only(images, "brightness")
    return (images * column(factor, images, 0.0, math.inf, "brightness")).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor | float) -> Tensor:
    """Move the images away from their mean grey or, below 1, towards it. It takes what ``adjust_brightness`` takes."""
    images_only(images, "contrast")
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True), column(factor, images, 0.0, math.inf, "contrast"))


def adjust_saturation(images: Tensor, factor: Tensor | float) -> Tensor:
    """Move each pixel away from its grey or, below 1, towards it. It takes images of three channels."""
    images_only(images, "saturation", 3)
    return _blend(images, grey(images), column(factor, images, 0.0, math.inf, "saturation"))


def adjust_hue(images: Tensor, turn: Tensor | float) -> Tensor:
    """Turn each pixel's hue by -0.5 to 0.5 circles; images as for ``adjust_brightness``, with three channels.

    ``channel = v - v s max(0, min(k, 4 - k, 1))`` with ``k = (n + 6 h) mod 6`` and n = 5, 3, 1 for red, green, blue.
    """
    images_only(images, "hue", 3)
    turn = column(turn, images, -0.5, 0.5, "hue")
    value, largest = images.max(1, keepdim=True)
    chroma = value - images.min(1, keepdim=True).values
    coloured = chroma > 0
    # The hue in sixths of a circle, counted from the largest channel: the difference of the other two over the chroma.
    ahead, behind = (images.gather(1, (largest + k) % 3) for k in (1, 2))
    sixths = 2 * largest + torch.where(coloured, (ahead - behind) / torch.where(coloured, chroma, 1), 0) + 6 * turn
    offsets = torch.tensor([5, 3, 1], dtype=images.dtype, device=images.device).view(3, 1, 1)
    k = (offsets + sixths) % 6
    turned = value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
    return torch.where(coloured | turn.isnan(), turned, images)


ADJUST = {"brightness": adjust_brightness, "contrast": adjust_contrast, "saturation": adjust_saturation, "hue": adjust_hue}
LARGEST = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}


def jitter(images: Tensor, sizes: Mapping[str, Tensor | float], keys: Keys) -> Tensor:
    """Return the images, changed at random by up to the given sizes.

    Args:
        images: in [0, 1]. shape: (n, channels, height, width), floating; saturation and hue need three channels.
        sizes: any of ``brightness``, ``contrast`` and ``saturation``, 0 to 1, and ``hue``, 0 to 0.5; the gradient of each is
            that of the expected loss. shape: (n,), or a number.
        keys: keys of the examples.

    Raises:
        ValueError: a name is unknown, there are no images, the number of sizes or keys is wrong, or a number is out of range.
        TypeError: the images are not floating.
    """
    unknown = [name for name in sizes if name not in ADJUST]
    if unknown:
        raise ValueError(f"jitter: there is no {unknown[0]!r}; the names are {', '.join(ADJUST)}")
    keys.check(images)
    for name, adjust in ADJUST.items():
        if name in sizes:
            size = column(sizes[name], images, 0.0, LARGEST[name], name).flatten()
            centred = 2 * keys.uniform(Stream[name.upper()], dtype=images.dtype) - 1
            images = adjust(images, size * centred + (name != "hue"))
    return images


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor * images + (1 - factor) * other``, clamped to [0, 1]."""
    return (factor * images + (1 - factor) * other).clamp(0, 1)
