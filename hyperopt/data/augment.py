"""Standard augmentation of a batch of images, on its device: a random crop of the padded image, and a random flip.

The change of an example depends only on the seed, the epoch and the example's own number; see ``hyperopt.core.random``.

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
        padding: number of pixels added on each side before a crop of the original size is taken; 0 leaves the image.
        flip: probability that an image is flipped left to right, 0 to 1.
        fill: value of the padding, in the unit of the pixels. 0 is black for bytes or under ``normalize=unit``, and the
            channel's mean under ``normalize=standard``.

    Raises:
        ValueError: a value is out of range.
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
        """Return the changed images.

        Pixels are moved, never mixed: any dtype keeps its values, and a gradient reaches the pixels that were kept.

        Args:
            images: shape: (n, channels, height, width), floating or uint8.
            index: each example's number in its dataset, as ``Rows.index``. shape: (n,), int64, on the device of ``images``.
            seed: the run's seed, 0 to 2**64 - 1.
            epoch: number of the pass over the data, from 0; every epoch has new draws.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            ValueError: a shape is wrong, the index is not int64, the seed or epoch is negative, or ``fill`` is not a byte for
                bytes.
        """
        self._check(images, index)
        keys = Keys(index, seed, epoch)
        height, width = images.shape[2:]

        def pick(choices: int, stream: Stream) -> Tensor:
            return keys.whole(choices, stream)[:, None]

        side = 2 * self.padding + 1
        flipped = pick(2**BITS, Stream.FLIP) < round(self.flip * 2**BITS)  # shape: (n, 1)
        columns = torch.arange(width, device=images.device)  # columns of the result
        columns = torch.where(flipped, width - 1 - columns, columns)  # columns of the crop. shape: (n, width)
        columns = columns + pick(side, Stream.RIGHT) - self.padding  # columns of the image
        rows = torch.arange(height, device=images.device) + pick(side, Stream.DOWN) - self.padding  # shape: (n, height)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        pixels = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        taken = images.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)
        return torch.where(inside[:, None], taken, torch.full((), self.fill, dtype=images.dtype, device=images.device))

    def _check(self, images: Tensor, index: Tensor) -> None:
        """Refuse arguments that would be augmented wrongly."""
        if images.dim() != 4:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (n, channels, height, width): unflatten them")
        if index.dtype != torch.int64 or index.shape != images.shape[:1]:
            raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape ({len(images)},)")
        if images.dtype == torch.uint8 and self.fill not in range(256):
            raise ValueError(f"fill={self.fill!r} is not a whole number from 0 to 255, but the images are bytes; change fill")
