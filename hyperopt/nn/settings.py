"""Settings of the cells and the networks: frozen, validated, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.core.checks import (
    check_choice,
    check_count,
    check_counts,
    check_flag,
    check_number,
    check_open_unit,
    check_optional,
)


@dataclass(frozen=True)
class CellSettings:
    """What every tanh-affine cell ``w -> tanh(w A + B x + c)`` has.

    Attributes:
        input_scale: standard deviation of the normal initial entries of B (None: ``torch.nn.Linear``'s uniform ones, of
            deviation ``1 / sqrt(3 features)``).
        bias: whether there is a c; it starts at zero.
    """

    input_scale: float | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_optional(self, "input_scale", 0.0)
        check_flag(self, "bias")


@dataclass(frozen=True)
class ProjectedCellSettings(CellSettings):
    """A free matrix A, projected onto ``||A|| <= max_norm`` after every outer step.

    Attributes:
        input_scale: as above; here large enough to bend the tanh, which raises the accuracy on digits.
        max_norm: largest spectral norm, in (0, 1).
        init_scale: standard deviation of the normal initial entries of A.
    """

    input_scale: float | None = 0.3
    max_norm: float = 0.99
    init_scale: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_open_unit(self, "max_norm")
        check_number(self, "init_scale", 0.0)


@dataclass(frozen=True)
class HouseholderCellSettings(CellSettings):
    """``A = P D P``, P a product of Householder reflections and ``D = diag((1 - margin) sigmoid(d))``: ``||A|| < 1 - margin``.

    Attributes:
        reflections: number of reflections, at least 1 and at most ``task.state_size`` (more reach no other P).
        margin: distance of the spectral norm from 1, in (0, 1).
    """

    reflections: int = 3
    margin: float = 0.8

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "reflections")
        check_open_unit(self, "margin")


@dataclass(frozen=True)
class TanhMLPSettings:
    """A multilayer perceptron around one layer ``z = tanh(W z + x)``.

    Attributes:
        width: entries of z.
        init_scale: standard deviation of the normal initial entries of W (None: ``torch.nn.Linear``'s uniform ones).
    """

    width: int = 100
    init_scale: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "width")
        check_optional(self, "init_scale", 0.0)


WEIGHT_NORMS = (None, "weight", "spectral")


@dataclass(frozen=True)
class DEQResNetSettings:
    """The residual cell of the implicit-layers tutorial between a convolution and a linear classifier.

    Attributes:
        channels: of the state.
        inner: channels between the cell's two convolutions.
        groups: of every GroupNorm; divides both.
        kernel_size: of the cell's convolutions, odd.
        dropout: part of the cell's inner activations that is set to zero, the same for a whole solve.
        norm: of the weights of the cell's convolutions: None, ``weight`` or ``spectral``.
        init_scale: standard deviation of their normal initial entries.
        pool: pixels on a side of the squares that are averaged before the classifier; divides the size of the images.
    """

    channels: int = 48
    inner: int = 64
    groups: int = 8
    kernel_size: int = 3
    dropout: float = 0.0
    norm: str | None = None
    init_scale: float = 0.01
    pool: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("channels", "inner", "groups", "kernel_size", "pool"):
            check_count(self, name)
        check_number(self, "dropout", 0.0, 1.0)
        check_choice(self, "norm", WEIGHT_NORMS)
        check_number(self, "init_scale", 0.0)


@dataclass(frozen=True)
class MDEQSettings:
    """A multiscale DEQ between two convolutions and a head (arXiv 2006.08656, the small model for CIFAR-10).

    Attributes:
        channels: of each scale, the finest first; each scale is half as high and wide as the one before.
        expansion: channels inside of a residual block, as a multiple of the scale's.
        groups: of the group norms; even, and divides all channels.
        dropout: part of the residual branches that is set to zero, the same for a whole solve.
        norm: of the weights of the cell: None, ``weight`` or ``spectral``.
        init_scale: standard deviation of the normal initial weights of the cell's convolutions.
        head: channels inside of the head's block of each scale.
        final: features of the last linear layer.
    """

    channels: tuple[int, ...] = (24, 24)
    expansion: int = 5
    groups: int = 8
    dropout: float = 0.25
    norm: str | None = "weight"
    init_scale: float = 0.01
    head: tuple[int, ...] = (8, 16)
    final: int = 200

    def __post_init__(self) -> None:
        """Check the ranges; lists become tuples."""
        for name in ("channels", "head"):
            check_counts(self, name)
        for name in ("expansion", "groups", "final"):
            check_count(self, name)
        check_number(self, "dropout", 0.0, 1.0)
        check_choice(self, "norm", WEIGHT_NORMS)
        check_number(self, "init_scale", 0.0)
