"""Settings of the fixed-point solvers: frozen, validated, and free of torch; see ``hyperopt.core.checks``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt.core.checks import IterativeSettings, check_count, check_flag, check_number


@dataclass(frozen=True)
class PicardSettings(IterativeSettings):
    """``w <- (1 - damping) w + damping phi(w)``; ``damping=1`` is the plain iteration."""

    damping: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "damping", 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class AndersonSettings(IterativeSettings):
    """Anderson acceleration over the last ``window`` steps.

    ridge is relative: ``ridge * trace(G) / window`` is added to the Gram matrix ``G`` of the residuals, so that the method does
    the same on a map scaled by any factor. With ``restart`` the whole history is forgotten when the window is full, instead of
    its oldest step. A window larger than ``max_steps`` is never filled, and no error.
    """

    window: int = 5
    damping: float = 1.0
    ridge: float = 1e-10
    restart: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "window")
        check_number(self, "damping", 0.0, 1.0, open_low=True)
        check_number(self, "ridge", 0.0)
        check_flag(self, "restart")


@dataclass(frozen=True)
class RRESettings(IterativeSettings):
    """Reduced rank extrapolation after every ``window`` plain steps (or as many as a row has entries, if these are fewer)."""

    window: int = 5

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_count(self, "window")


@dataclass(frozen=True)
class BroydenSettings(IterativeSettings):
    """Good Broyden with an inverse estimate of rank ``memory``, one a row.

    memory: most rank-one updates that are kept; when there are as many, they are reduced to half of them.
    line_search: shorten a step until the residual falls (each try is one evaluation).
    """

    memory: int = 20
    line_search: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "memory")
        check_flag(self, "line_search")


@dataclass(frozen=True)
class DenseSettings(IterativeSettings):
    """What the methods with a dense Jacobian share; ``max_gib`` is the largest that they make, for all rows, in GiB."""

    max_steps: int = 50
    max_gib: float = 2.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "max_gib", 0.0, open_low=True)


@dataclass(frozen=True)
class NewtonSettings(DenseSettings):
    """``w <- w + (I - J)^{-1} (phi(w) - w)``; ``line_search`` shortens a step until the residual falls."""

    line_search: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_flag(self, "line_search")


@dataclass(frozen=True)
class ChordSettings(DenseSettings):
    """Newton with the factors of an old Jacobian.

    refresh: a row gets new factors when its residual has not fallen below this fraction of the last one; in (0, 1].
    """

    max_steps: int = 100
    refresh: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "refresh", 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class NewtonKrylovSettings(IterativeSettings):
    """Newton with the step solved for by a linear solver on Jacobian-vector products.

    linear_solver: solves ``(I - J) d = phi(w) - w``; its ``max_steps`` is the most products a step, its tolerances are replaced.
    forcing: largest relative residual of that solve; it falls with the square of the outer one's decay.
    line_search: shorten a step until the residual falls.
    """

    max_steps: int = 50
    linear_solver: Any = None
    forcing: float = 0.1
    line_search: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "forcing", 0.0, 1.0, open_low=True)
        check_flag(self, "line_search")
