"""The image classifier of the STN experiments, with dropout at tuned rates where a rate is declared."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from hyperopt.core.checks import check_choice, check_count, check_counts
from hyperopt.stn.row_dropout import RowDropout

DENSE_DROPOUT = ("after", "before")


@dataclass(frozen=True)
class Classifier:
    """Convolutions with ReLU, dense layers with ReLU, a linear layer; dropout ``dropout0``, ``dropout1``, ... between them.

    Attributes:
        channels: channels of the convolutions (none: only dense layers).
        strides: stride of each convolution.
        pooled: indices of the convolutions that are followed by 2 x 2 max-pooling.
        kernel_size: size of the convolutions, odd; they are padded, so that stride 1 keeps the size.
        dense: sizes of the dense layers before the last.
        dense_dropout: whether a dense layer's dropout comes ``after`` or ``before`` it. The dropout of a convolution drops
            whole channels and always comes after it and its pooling.
    """

    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pooled: tuple[int, ...] = ()
    kernel_size: int = 3
    dense: tuple[int, ...] = (200, 200)
    dense_dropout: str = "after"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_counts(self, "channels")
        check_counts(self, "strides")
        check_counts(self, "pooled", 0)
        check_counts(self, "dense")
        check_count(self, "kernel_size")
        check_choice(self, "dense_dropout", DENSE_DROPOUT)
        name, layers = type(self).__name__, len(self.channels)
        if len(self.strides) != layers:
            raise ValueError(f"{name}: strides={self.strides!r} for {layers} convolutions; change strides: one for each")
        if any(place >= layers for place in self.pooled):
            raise ValueError(f"{name}: pooled={self.pooled!r} names convolutions 0 to {layers - 1}; change pooled")
        if not self.kernel_size % 2:
            raise ValueError(f"{name}: kernel_size={self.kernel_size} is even; change kernel_size to an odd number")

    @property
    def dropouts(self) -> tuple[str, ...]:
        """The names of the rates that it can have, in the order of its layers."""
        return tuple(f"dropout{k}" for k in range(len(self.channels) + len(self.dense)))

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of its layers with weights, in order."""
        dense = range(len(self.channels), len(self.channels) + len(self.dense))
        return (*(f"conv{k}" for k in range(len(self.channels))), *(f"dense{k}" for k in dense), "last")

    def build(self, shape: tuple[int, ...], classes: int, rates: Collection[str]) -> nn.Sequential:
        """Return the network from images to logits, with initial values from torch's global generator.

        Args:
            shape: shape of one image, channels first.
            classes: number of logits.
            rates: the dropout rates that are hyperparameters, out of ``dropouts``; other layers have no dropout.

        Raises:
            ValueError: the network does not take images of this shape.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()

        def drop(place: int, channels: bool = False) -> None:
            if (name := f"dropout{place}") in rates:
                layers[name] = RowDropout(name, place, channels)

        features, *size = shape
        for k, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            layers[f"conv{k}"] = nn.Conv2d(features, channels, self.kernel_size, stride, padding=self.kernel_size // 2)
            layers[f"relu{k}"] = nn.ReLU()
            features, size = channels, [-(-side // stride) for side in size]
            if k in self.pooled:
                layers[f"pool{k}"] = nn.MaxPool2d(2)
                size = [side // 2 for side in size]
            if min(size) < 1:
                raise ValueError(f"images of shape {shape} shrink to nothing at convolution {k}; change strides or pooled")
            drop(k, channels=True)
        layers["flatten"] = nn.Flatten()
        for side in size:
            features *= side
        for k, width in enumerate(self.dense, start=len(self.channels)):
            if self.dense_dropout == "before":
                drop(k)
            layers[f"dense{k}"] = nn.Linear(features, width)
            layers[f"relu{k}"] = nn.ReLU()
            if self.dense_dropout == "after":
                drop(k)
            features = width
        layers["last"] = nn.Linear(features, classes)
        return nn.Sequential(layers)
