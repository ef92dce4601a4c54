"""Standard augmentation of a batch of images, on its device: a random crop of the padded image, and a random flip.

What happens to an example depends on the seed, the epoch and the example's own number alone: see ``hyperopt.core.random``.

    augment = Augment(padding=4, flip=0.5)
    images = rows.x[batch].unflatten(1, splits.shape)
    images = augment(images, rows.index[batch], seed=0, epoch=3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.checks import check_number, check_whole
from hyperopt.core.random import BITS, Keys, Stream


@dataclass(frozen=True)
class Augment:
    """A random crop of the padded image, then a random horizontal flip, each example by its own number.

    Attributes:
        padding: a crop of the image's own size is taken from the image padded by so many pixels on each side; 0 leaves it.
        flip: chance that an image is turned left to right, 0 to 1.
        fill: value of the padding, in the pixels' own units. 0 is black in a byte or under ``normalize=unit``, and the channel's
            mean under ``normalize=standard``.

    Raises:
        ValueError: a value out of range.
    """

    padding: int = 4
    flip: float = 0.5
    fill: float = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        check_whole(self, "padding", 0, 2**15)
        check_number(self, "flip", 0.0, 1.0)
        check_number(self, "fill", -math.inf)

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Return the images, changed.

        Pixels are moved, never mixed: any dtype keeps its values, and a gradient goes back to the pixels that were kept.

        Args:
            images: shape: (n, channels, height, width), floating or uint8.
            index: each example's number in its dataset, as ``Rows.index``. shape: (n,), int64, on the device of ``images``.
            seed: the run's seed, 0 to 2**64 - 1.
            epoch: which pass over the data this is, from 0; every epoch draws anew.

        Returns:
            A new tensor, of the same shape, dtype and device.

        Raises:
            ValueError: other shapes, an index that is not int64, a negative seed or epoch, or bytes and a ``fill`` that is none.
        """
        self._check(images, index)
        keys = Keys(index, seed, epoch)
        height, width = images.shape[2:]

        def pick(choices: int, stream: Stream) -> Tensor:
            return keys.whole(choices, stream)[:, None]

        side = 2 * self.padding + 1
        flipped = pick(2**BITS, Stream.FLIP) < round(self.flip * 2**BITS)  # shape: (n, 1)
        columns = torch.arange(width, device=images.device)  # of the result
        columns = torch.where(flipped, width - 1 - columns, columns)  # of the crop. shape: (n, width)
        columns = columns + pick(side, Stream.RIGHT) - self.padding  # of the image
        rows = torch.arange(height, device=images.device) + pick(side, Stream.DOWN) - self.padding  # shape: (n, height)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        pixels = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        taken = images.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)
        return torch.where(inside[:, None], taken, torch.full((), self.fill, dtype=images.dtype, device=images.device))

    def _check(self, images: Tensor, index: Tensor) -> None:
        """Refuse what would be augmented wrongly rather than not at all."""
        if images.dim() != 4:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (n, channels, height, width): unflatten them")
        if index.dtype != torch.int64 or index.shape != images.shape[:1]:
            raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape ({len(images)},)")
        if images.dtype == torch.uint8 and self.fill not in range(256):
            raise ValueError(f"fill={self.fill!r} is no byte, and the images are bytes; change fill")
