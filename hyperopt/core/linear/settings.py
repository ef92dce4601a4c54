"""Settings of every linear solver: frozen, validated, and free of torch. Shared names: see ``hyperopt.core.checks``."""

from __future__ import annotations

from dataclasses import dataclass, field

from hyperopt.core.checks import IterativeSettings, check_choice, check_count, check_number
from hyperopt.core.solvers.settings import AndersonSettings

RELATIVE_TO = ("row", "batch")


@dataclass(frozen=True)
class LinearSettings(IterativeSettings):
    """What every linear solver has.

    relative_to: what ``rtol`` is relative to. ``row``: each row's own ``||g_i||``. ``batch``: the larger of that and the root
        mean square over the rows: the residual of all rows together is at most ``sqrt(2) rtol ||g||``, and rows that hardly
        matter to the hypergradient, such as examples that are fitted already, are solved as little as they matter.
    """

    relative_to: str = field(default="row", kw_only=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        super().__post_init__()
        check_choice(self, "relative_to", RELATIVE_TO)


@dataclass(frozen=True)
class NeumannSettings(LinearSettings):
    """``v <- J^T v + g`` from ``v = g``: the truncated Neumann series."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class LinearAndersonSettings(LinearSettings, AndersonSettings):
    """Anderson acceleration of ``v <- J^T v + g``; same settings as the solver of that name."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class GMRESSettings(LinearSettings):
    """Generalized minimal residuals, one vjp a step; ``window`` vectors are kept, then the space is built anew."""

    rtol: float = 1e-6
    window: int = 20

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "window")


@dataclass(frozen=True)
class BiCGStabSettings(LinearSettings):
    """Stabilized biconjugate gradients: a fixed few vectors of memory, two vjps a step."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class CGSettings(LinearSettings):
    """Conjugate gradients, for maps with a symmetric Jacobian of eigenvalues below 1; one vjp a step."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class MINRESSettings(LinearSettings):
    """Minimal residuals, for maps with a symmetric Jacobian of any eigenvalues but 1; one vjp a step."""

    rtol: float = 1e-6


@dataclass(frozen=True)
class NormalCGSettings(LinearSettings):
    """Conjugate gradients on the normal equations, for any regular ``I - J``; one vjp and one jvp a step."""

    rtol: float = 1e-6
    max_steps: int = 200


@dataclass(frozen=True)
class NystromSettings(LinearSettings):
    """The inverse of a low-rank sketch, for maps with a symmetric Jacobian; ``rank`` vjps, and one a step.

    rank: columns of ``I - J`` in the sketch; at most as many are drawn as there are unknowns.
    rho: what is added to the sketch's diagonal, in the units of ``I - J`` (for a trained problem, of the Hessian).
    seed: draws the columns.
    max_steps: applications of the sketch's inverse; 1 is the method as published, with ``rtol=0, atol=0``.
    """

    rtol: float = 0.0
    max_steps: int = 1
    rank: int = 20
    rho: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "rank")
        check_number(self, "rho", 0.0, open_low=True)
        check_count(self, "seed", 0)


@dataclass(frozen=True)
class DenseSettings(LinearSettings):
    """LU of the dense ``I - J^T`` of each row, made by ``dim`` vjps.

    max_steps counts the solves with the factors: the first, and refinements of it where ``rtol`` asks for more.
    max_entries is the most numbers (rows x dim x dim) that the matrices may have; larger systems are refused.
    """

    rtol: float = 1e-10
    max_steps: int = 10
    max_entries: int = 2**26

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "max_entries")
