"""Settings of the classifiers of images that can tune themselves: frozen, validated, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.core.checks import check_choice, check_count, check_counts

DENSE_DROPOUT = ("after", "before")


@dataclass(frozen=True)
class ClassifierSettings:
    """Convolutions with ReLU, dense layers with ReLU, a linear layer; dropout ``dropout0``, ``dropout1``, ... between them.

    Attributes:
        channels: of the convolutions (none: dense layers alone).
        strides: of each convolution.
        pooled: places, from 0, of the convolutions that a 2 x 2 max-pooling follows.
        kernel_size: of the convolutions, odd; padded, so that at stride 1 the size stays.
        dense: sizes of the dense layers before the last.
        dense_dropout: whether a dense layer's dropout comes ``after`` it or ``before`` it. That of a convolution, of whole
            channels, always comes after it and its pooling.
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
