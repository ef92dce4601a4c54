"""Settings of the cells and the networks: frozen, validated, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.settings import check_count, check_flag, check_number, check_open_unit


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
        if self.input_scale is not None:
            check_number(self, "input_scale", 0.0)
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
        if self.init_scale is not None:
            check_number(self, "init_scale", 0.0)
