"""Standard augmentation of a batch of images, on its device: a random crop of the padded image, and a random flip.

    word(stream, i) = mix(mix(mix(mix(seed) + epoch) + stream) + gamma * i)      64 bits for each example i

What happens to an example depends on the seed, the epoch and the example's own number alone: not on the batch that it is in, its
place there, the device, the dtype, the number of workers, or any generator's state. So a run that goes on after a stop, or on
other hardware, sees the same images, and nothing has to be kept in a checkpoint.

    augment = Augment(padding=4, flip=0.5)
    images = rows.x[batch].unflatten(1, splits.shape)
    images = augment(images, rows.index[batch], seed=0, epoch=3)

Reference: G. L. Steele, D. Lea and C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014: SplitMix64, with
``mix(word)`` the generator's output after the state ``word``.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from hyperopt.data.settings import AugmentSettings

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_BITS = 31  # of a draw that are used: their product with any number of choices up to 2**32 fits into 63


class Stream(IntEnum):
    """What a draw is for. A later augmentation takes the next number, and changes no draw of those before it."""

    DOWN = 0
    RIGHT = 1
    FLIP = 2


def _mix(word: int) -> int:
    """Return what SplitMix64 gives out after the state ``word``: 64 bits, each of which depends on all of its."""
    word = (word + _GAMMA) & _MASK
    for shift, multiplier in _MULTIPLIERS:
        word = ((word ^ (word >> shift)) * multiplier) & _MASK
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """Return 64 bits as the signed number that torch holds them in."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """Return 64-bit words shifted right, zeros coming in; torch's own shift repeats the sign."""
    return (words >> by) & (2 ** (64 - by) - 1)


def draw(index: Tensor, choices: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """Return a whole number in ``[0, choices)`` for each example, all equally likely up to ``choices / 2**31``.

    Args:
        index: each example's number. shape: (n,), int64.
        choices: 1 to 2**31.
        seed: the run's seed, 0 to 2**64 - 1.
        epoch: 0 to 2**64 - 1.
        stream: what the draw is for; draws of different streams are independent.

    Returns:
        shape: (n,), int64, on the device of ``index``.
    """
    start = _mix(_mix(_mix(seed) + epoch) + stream)
    words = (index + 1) * _signed(_GAMMA) + _signed(start)  # wraps around, as it should; + 1 as in `_mix`
    for shift, multiplier in _MULTIPLIERS:
        words = (words ^ _shifted(words, shift)) * _signed(multiplier)
    words = words ^ _shifted(words, 31)
    return (_shifted(words, 64 - _BITS) * choices) >> _BITS


class Augment(AugmentSettings):
    """A random crop of the padded image, then a random horizontal flip, each example by its own number."""

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
        self._check(images, index, seed, epoch)
        height, width = images.shape[2:]

        def pick(choices: int, stream: Stream) -> Tensor:
            return draw(index, choices, seed=seed, epoch=epoch, stream=stream)[:, None]

        side = 2 * self.padding + 1
        flipped = pick(2**_BITS, Stream.FLIP) < round(self.flip * 2**_BITS)  # shape: (n, 1)
        columns = torch.arange(width, device=images.device)  # of the result
        columns = torch.where(flipped, width - 1 - columns, columns)  # of the crop. shape: (n, width)
        columns = columns + pick(side, Stream.RIGHT) - self.padding  # of the image
        rows = torch.arange(height, device=images.device) + pick(side, Stream.DOWN) - self.padding  # shape: (n, height)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        pixels = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        taken = images.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)
        return torch.where(inside[:, None], taken, torch.full((), self.fill, dtype=images.dtype, device=images.device))

    def _check(self, images: Tensor, index: Tensor, seed: int, epoch: int) -> None:
        """Refuse what would be augmented wrongly rather than not at all."""
        if images.dim() != 4:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (n, channels, height, width): unflatten them")
        if index.dtype != torch.int64 or index.shape != images.shape[:1]:
            raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape ({len(images)},)")
        for name, value in (("seed", seed), ("epoch", epoch)):
            if not isinstance(value, int) or not 0 <= value <= _MASK:
                raise ValueError(f"{name}={value!r} must be a whole number from 0 to 2**64 - 1")
        if images.dtype == torch.uint8 and self.fill not in range(256):
            raise ValueError(f"fill={self.fill!r} is no byte, and the images are bytes; change fill")
