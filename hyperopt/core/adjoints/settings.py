"""Settings of the adjoints: frozen, validated, and free of torch; see ``hyperopt.core.checks``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hyperopt.core.checks import POLICIES, check_choice, check_count, check_number, check_optional_count


@dataclass(frozen=True)
class ImplicitSettings:
    """The implicit function theorem: solve ``(I - J^T) v = g``, then one closing vjp.

    linear_solver: how the adjoint system is solved (default Neumann to a tolerance).
    policy: what to do when it fails: ``raise``, ``warn`` (1st, 10th, 100th, ... time), ``fallback`` or ``ignore``.
    fallback: linear solvers tried in turn under ``policy=fallback``, each for the rows still unsolved (default GMRES, NormalCG).
    allow_inexact: let a fixed-K adjoint be differentiated again, although its second derivative is not exact.
    """

    linear_solver: Any = None
    policy: str = "warn"
    fallback: Any = field(default_factory=tuple)
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        check_choice(self, "policy", POLICIES)


@dataclass(frozen=True)
class ShineSettings:
    """The forward solver's estimate of ``(I - J)^{-1}`` in the place of the adjoint system.

    linear_solver: refines from there (None: no refinement).
    ratio: a row whose ``|v|`` is more than this many times ``|g|`` takes the one-step direction ``v = g`` instead.
    policy: what to do when the refinement fails: ``raise``, ``warn`` (1st, 10th, 100th, ... time) or ``ignore``.
    """

    linear_solver: Any = None
    ratio: float = 10.0
    policy: str = "warn"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number(self, "ratio", 0.0, open_low=True)
        check_choice(self, "policy", tuple(policy for policy in POLICIES if policy != "fallback"))


@dataclass(frozen=True)
class UnrolledSettings:
    """Differentiate through the solver's own steps; ``last=k`` keeps only the last ``k`` of them (None: all)."""

    last: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        check_optional_count(self, "last")


@dataclass(frozen=True)
class OneStepSettings:
    """Jacobian-free backpropagation: ``v = g``, no products at all; nothing to set."""


@dataclass(frozen=True)
class PhantomSettings:
    """Phantom gradient: ``steps`` damped steps of the adjoint iteration from ``v = 0``."""

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "steps")
        check_number(self, "damping", 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class CheckpointedSettings:
    """Unrolling in segments, recomputed in backward; ``segment`` steps are kept at a time (None: the root of ``max_steps``)."""

    segment: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        check_optional_count(self, "segment")
