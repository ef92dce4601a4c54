"""The changes to a batch of training images under the hyperparameters of its examples.

    jitter (brightness, contrast, saturation, hue) -> standardise -> cutout -> input dropout -> scale -> noise

Each step is made only if its hyperparameter exists. Images for evaluation are only standardised.

Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 4.2; the order is that of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hyperopt.core.random import Keys, Stream
from hyperopt.nn.regularise.colour import LARGEST, jitter
from hyperopt.nn.regularise.cutout import cutout
from hyperopt.nn.regularise.dropout import dropout
from hyperopt.nn.regularise.noise import gaussian, scaled

RANGES: dict[str, tuple[float, float]] = {
    **{name: (0.0, largest) for name, largest in LARGEST.items()},
    "cut_holes": (0.0, 64.0),
    "cut_length": (0.0, math.inf),
    "input_dropout": (0.0, 1.0),
    "input_scale": (0.0, math.inf),
    "input_noise": (0.0, math.inf),
}
"""The hyperparameters that the pipeline knows, and the values that each may have."""


def check_range(name: str, low: float, high: float, allowed: tuple[float, float]) -> None:
    """Refuse a hyperparameter that may take values without a meaning.

    Raises:
        ValueError: it may leave its range; the message names it and both ranges.
    """
    if low < allowed[0] or high > allowed[1]:
        raise ValueError(
            f"{name} may be {low:g} to {high:g}, but has a meaning from {allowed[0]:g} to {allowed[1]:g} only; declare it "
            "bounded, with low and high inside of that"
        )


@dataclass(frozen=True)
class Pipeline:
    """Changes images at random, each example by its own hyperparameters and number.

    Attributes:
        names: the hyperparameters that exist, out of ``RANGES``.
        mean: mean of each channel over the training rows. shape: (channels, 1, 1)
        std: standard deviation of each channel over the training rows. shape: (channels, 1, 1)
        most: largest number of holes of any example.

    Raises:
        ValueError: a name is unknown, or there is a number of holes without a length.
    """

    names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    most: int = 1

    def __post_init__(self) -> None:
        """Check the names."""
        unknown = [name for name in self.names if name not in RANGES]
        if unknown:
            raise ValueError(f"nothing is done to images under {unknown[0]!r}; the names are {', '.join(RANGES)}")
        if "cut_holes" in self.names and "cut_length" not in self.names:
            raise ValueError("cut_holes is there without cut_length; declare cut_length too (alone, it means one hole)")

    @classmethod
    def of(cls, images: Tensor, names: tuple[str, ...], most: int = 1) -> Pipeline:
        """Return the pipeline that standardises by the channels of the given images.

        Args:
            images: the training images. shape: (n, channels, height, width)
            names: see the class.
            most: see the class.

        Raises:
            ValueError: a channel is constant over all images, or as for the class.
        """
        mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0)
        if not bool((std > 0).all()):
            raise ValueError(f"a channel is constant over the {len(images)} training images: there is nothing to standardise")
        return cls(names, mean[:, None, None], std[:, None, None], most)

    def plain(self, images: Tensor) -> Tensor:
        """Only standardise, for evaluation: ``(x - mean) / std`` for each channel."""
        return (images - self.mean) / self.std

    def __call__(self, images: Tensor, h: Mapping[str, Tensor], keys: Keys) -> Tensor:
        """Change images and standardise them, differentiably in the images and the continuous strengths.

        Args:
            images: in [0, 1]. shape: (n, channels, height, width), floating.
            h: values of at least ``names``. shape of each: (n,)
            keys: keys of the examples.
        """
        sizes = {name: h[name] for name in LARGEST if name in self.names}
        x = self.plain(jitter(images, sizes, keys) if sizes else images)
        if "cut_length" in self.names:
            x = cutout(x, h["cut_holes"] if "cut_holes" in self.names else 1.0, h["cut_length"], keys, most=self.most)
        if "input_dropout" in self.names:
            x = dropout(x, h["input_dropout"], keys, Stream.INPUT_DROPOUT)
        if "input_scale" in self.names:
            x = scaled(x, h["input_scale"], keys)
        if "input_noise" in self.names:
            x = gaussian(x, h["input_noise"], keys)
        return x
