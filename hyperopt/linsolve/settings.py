"""Settings of every linear solver: frozen, validated, and free of torch. Shared names are explained in ``hyperopt.settings``."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.settings import IterativeSettings, check_count
from hyperopt.solvers.settings import AndersonSettings


@dataclass(frozen=True)
class NeumannSettings(IterativeSettings):
    """``v <- J^T v + g`` from ``v = g``: the truncated Neumann series."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class LinearAndersonSettings(AndersonSettings):
    """Anderson acceleration of ``v <- J^T v + g``; same settings as the solver of that name."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class GMRESSettings(IterativeSettings):
    """Generalized minimal residuals, one vjp a step; ``restart`` vectors are kept, then the space is built anew."""

    rtol: float = 1e-6
    restart: int = 20

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "restart")
