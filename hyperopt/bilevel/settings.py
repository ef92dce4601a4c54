"""Settings of trained inner problems: frozen, validated, and free of torch; see ``hyperopt.settings``."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.settings import IterativeSettings, check_count, check_number

CURVATURES = ("hessian", "gauss_newton")


def check_rate(owner: object, name: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Like ``check_number``, for a field that may be the name of a hyperparameter instead."""
    value = getattr(owner, name)
    if isinstance(value, str) and value and "${" not in value:
        return
    check_number(owner, name, low, high, open_low=open_low)


@dataclass(frozen=True)
class InnerSettings(IterativeSettings):
    """What every inner solver has.

    rtol: the solve stops at ``|grad L| <= atol + rtol |grad L(w_0)|``, ``w_0`` the very first start of the run; 0 with ``atol=0``
        means exactly ``max_steps``.
    max_steps: most steps, of one inner gradient each unless a method says otherwise.
    """

    rtol: float = 0.0
    max_steps: int = 100


@dataclass(frozen=True)
class GradientDescentSettings(InnerSettings):
    """``w <- w - step_size grad L(w)``.

    step_size: a number, or the name of the hyperparameter that holds it (an entry of a mapping ``lam``).
    """

    step_size: float | str = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_rate(self, "step_size", 0.0, open_low=True)


@dataclass(frozen=True)
class PowerSettings:
    """Power iteration for the largest curvature ``L`` of the inner loss.

    rtol: it stops when the estimate changes by less than this part.
    max_steps: most products.
    """

    rtol: float = 1e-2
    max_steps: int = 30

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number(self, "rtol", 0.0)
        check_count(self, "max_steps")
