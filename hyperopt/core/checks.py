"""Checks of the values of a class's fields, and the settings that all iterative methods share. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hyperopt.core.text import with_article

POLICIES = ("raise", "warn", "fallback", "ignore")


def plain(value: Any) -> Any:
    """Return a numpy number (or a 0-d array) as a Python number, and anything else unchanged."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def taken(owner: Any, name: str) -> Any:
    """Return a field of ``owner``; a numpy number in it is replaced by a Python number first."""
    value = getattr(owner, name)
    number = plain(value)
    if number is not value:
        object.__setattr__(owner, name, number)
    return number


def require_choice(where: str, name: str, value: Any, choices: Iterable[str | None]) -> None:
    """Refuse the value of an argument that is not one of ``choices``; ``where`` opens the message, such as ``"DEQ: "``."""
    if value not in (known := tuple(choices)):
        raise ValueError(f"{where}{name}={value!r} is not one of {', '.join(map(str, known))}; change {name}")


def require_kind(where: str, name: str, value: Any, kind: type, advice: str = "") -> None:
    """Refuse the value of an argument that is not a ``kind``; ``advice`` ends the message (empty: change the argument)."""
    if not isinstance(value, kind):
        raise TypeError(f"{where}{name}={value!r} is not {with_article(kind.__name__)}; {advice or f'change {name}'}")


def check_number(owner: Any, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuse a field of ``owner`` that is not a finite number in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    value: Any = taken(owner, name)
    if isinstance(value, str) and "${" in value:  # an interpolation that Hydra has yet to resolve
        return
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        bracket = "(" if open_low or low == -math.inf else "["
        end = "inf)" if high == math.inf else f"{high}]"
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} is not in {bracket}{low}, {end}; change {name}")


def check_count(owner: Any, name: str, low: int = 1) -> None:
    """Refuse a field of ``owner`` that is not a whole number of at least ``low``."""
    value = taken(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} must be a whole number >= {low}; change {name}")


def check_whole(owner: Any, name: str, low: int, high: int, why: str = "") -> None:
    """Refuse a field of ``owner`` that is not a whole number in ``[low, high]``; ``why`` says where ``high`` comes from."""
    value = taken(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"{type(owner).__name__}: {name}={value!r} must be a whole number from {low} to {high}{why}; change {name}"
        )


def check_counts(owner: Any, name: str, low: int = 1) -> None:
    """Refuse a field of ``owner`` that does not list whole numbers >= ``low``. A list from a config becomes a tuple."""
    given = getattr(owner, name)
    numbers = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(map(plain, given))
    if isinstance(given, str) or not isinstance(given, Iterable) or any(type(n) is not int or n < low for n in numbers):
        raise ValueError(f"{type(owner).__name__}: {name}={given!r} must list whole numbers >= {low}, as [8, 16]; change {name}")
    object.__setattr__(owner, name, numbers)


def check_optional(owner: Any, name: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Like ``check_number``, for a field that may be None."""
    if getattr(owner, name) is not None:
        check_number(owner, name, low, high, open_low=open_low)


def check_optional_count(owner: Any, name: str, low: int = 1) -> None:
    """Like ``check_count``, for a field that may be None."""
    if getattr(owner, name) is not None:
        check_count(owner, name, low)


def check_below(owner: Any, low: str, high: str) -> None:
    """Refuse a field ``low`` of ``owner`` that is not below its field ``high``."""
    least, most = taken(owner, low), taken(owner, high)
    if isinstance(least, int | float) and isinstance(most, int | float) and not least < most:
        raise ValueError(f"{type(owner).__name__}: {low}={least} is not below {high}={most}; change {low} or {high}")


def check_choice(owner: Any, name: str, choices: tuple[str | None, ...]) -> None:
    """Refuse a field of ``owner`` that is not one of ``choices``."""
    require_choice(f"{type(owner).__name__}: ", name, getattr(owner, name), choices)


def check_flag(owner: Any, name: str) -> None:
    """Refuse a field of ``owner`` that is not true or false."""
    if not isinstance(taken(owner, name), bool):
        raise ValueError(f"{type(owner).__name__}: {name}={getattr(owner, name)!r} must be true or false; change {name}")


def check_kind(owner: Any, name: str, kind: type, *, optional: bool = False) -> None:
    """Refuse a field of ``owner`` that is not a ``kind`` (or None, with ``optional``)."""
    value = getattr(owner, name)
    if not (optional and value is None):
        require_kind(f"{type(owner).__name__}: ", name, value, kind)


def check_kinds(owner: Any, name: str, kind: type) -> None:
    """Refuse a field of ``owner`` that is not a list of ``kind``. A list from a config becomes a tuple."""
    given = getattr(owner, name)
    if not isinstance(given, list | tuple) or not all(isinstance(each, kind) for each in given):
        raise TypeError(f"{type(owner).__name__}: {name}={given!r} is not a list of {kind.__name__}; change {name}")
    object.__setattr__(owner, name, tuple(given))


def check_open_unit(owner: Any, name: str) -> None:
    """Refuse a field of ``owner`` that is not in (0, 1)."""
    value = taken(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} is not in (0, 1); change {name}")


def check_betas(owner: Any) -> None:
    """Refuse ``betas`` that are not Adam's two coefficients. A list from a config becomes a tuple."""
    object.__setattr__(owner, "betas", tuple(map(plain, owner.betas)))
    if len(owner.betas) != 2:
        raise ValueError(f"{type(owner).__name__}: betas={owner.betas!r} is not a pair of numbers; change betas")
    if any(isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 1 for beta in owner.betas):
        raise ValueError(f"{type(owner).__name__}: betas={owner.betas!r} is not in [0, 1); change betas")


@dataclass(frozen=True)
class IterativeMethod:
    """The settings that every iterative method has: tolerances and a budget.

    Args:
        rtol: relative tolerance on the true residual of each row, at least 0. With ``rtol=0`` and ``atol=0`` a solve takes
            exactly ``max_steps`` steps.
        atol: absolute tolerance, at least 0; a row stops at ``residual <= atol + rtol * scale``.
        max_steps: largest number of evaluations of the map (forward solver) or of steps (linear solver), at least 1. A step of
            a linear solver is one vjp, unless the method says otherwise.
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_number(self, "rtol", 0.0)
        check_number(self, "atol", 0.0)
        check_count(self, "max_steps")

    @property
    def fixed(self) -> bool:
        """Whether the method takes exactly ``max_steps`` steps, without a tolerance."""
        return self.rtol == 0 and self.atol == 0

    @property
    def name(self) -> str:
        """The method's name in statistics and messages."""
        return type(self).__name__
