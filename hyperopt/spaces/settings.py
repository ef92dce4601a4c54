"""Settings of the hyperparameter spaces: frozen, validated, and free of torch.

Names shared by all spaces:
    init: where the hyperparameter starts, in its own units: a number for all entries, or nested lists with one for each.
    by: how the space is kept: ``reparametrisation`` (the optimizer moves an unbounded variable, mapped into the space's
        interior) or ``projection`` (it moves the value itself, which is put back onto the space after every step).
    per: ``tensor``: one number for a whole tensor; ``element``: one for each entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt.core.checks import check_below, check_choice, check_number

WAYS = ("reparametrisation", "projection")


@dataclass(frozen=True)
class SpaceSettings:
    """What every space has."""

    init: Any = 0.0
    by: str = "reparametrisation"

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choice(self, "by", WAYS)


@dataclass(frozen=True)
class NumberSettings(SpaceSettings):
    """A space of numbers."""

    per: str = "tensor"

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        check_choice(self, "per", ("tensor", "element"))


@dataclass(frozen=True)
class RealSettings(NumberSettings):
    """Any number; both ways of keeping it are the same."""


@dataclass(frozen=True)
class PositiveSettings(NumberSettings):
    """A number above 0 (by projection: at least 0).

    map: ``exp``, whose steps are relative, or ``softplus``, whose steps are absolute for large values.
    """

    init: Any = 1.0
    map: str = "exp"

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        check_choice(self, "map", ("exp", "softplus"))


@dataclass(frozen=True)
class BoundedSettings(NumberSettings):
    """A number between ``low`` and ``high``, by a scaled sigmoid; ``init=None`` is the middle."""

    init: Any = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "low", float("-inf"))
        check_number(self, "high", float("-inf"))
        check_below(self, "low", "high")


@dataclass(frozen=True)
class SimplexSettings(SpaceSettings):
    """Vectors, along the last dimension, of positive entries that sum to 1; ``init=None`` has equal entries."""

    init: Any = None


@dataclass(frozen=True)
class SpectralBallSettings(SpaceSettings):
    """Matrices of spectral norm below ``radius`` (by projection: at most that)."""

    radius: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_number(self, "radius", 0.0, open_low=True)
