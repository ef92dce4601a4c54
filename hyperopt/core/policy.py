"""What happens when a solve fails: raise, warn once a run and kind, fall back, or nothing."""

from __future__ import annotations

import logging
import warnings

from hyperopt.core.checks import IterativeSettings
from hyperopt.core.status import SolveStats

log = logging.getLogger("hyperopt")
_warned: set[tuple[str, ...]] = set()


class SolveError(RuntimeError):
    """A solve failed under ``policy="raise"``; the message names the status, the residual and what to change."""


class SolveWarning(UserWarning):
    """A solve failed under ``policy="warn"`` or with every fallback."""


def reset_warnings() -> None:
    """Start a new run: each kind of failure is warned of once more."""
    _warned.clear()


def first_time(*key: str) -> bool:
    """Whether this kind of thing, ``key``, is said for the first time in this run; it is from now on."""
    first = key not in _warned
    _warned.add(key)
    return first


def report(stats: SolveStats, policy: str, what: str) -> None:
    """Apply ``policy`` to the statistics of the solve named ``what`` (``"inner"`` or ``"adjoint"``)."""
    if policy == "ignore" or not stats.status.failed:
        return
    text = f"{what} solve: {stats.describe()}"
    if policy == "raise":
        raise SolveError(text)
    if first_time(what, stats.method, stats.status.name):
        warnings.warn(text, SolveWarning, stacklevel=4)


def report_floor(settings: IterativeSettings, floor: float, dtype: object, policy: str, what: str) -> None:
    """Warn, once a run and kind, of an ``rtol`` below ``floor``, what rounding leaves in ``dtype``: the floor is used instead.

    Not of a method's default, which nobody has asked for, nor where ``atol`` may be what is meant to stop the solve.
    """
    if policy == "ignore" or settings.atol or settings.rtol == type(settings).rtol or not 0 < settings.rtol < floor:
        return
    name = type(settings).__name__
    if first_time(what, name, f"floor of {dtype}"):
        text = (
            f"{what} solve: rtol={settings.rtol:.1e} of {name} is below the rounding floor of {dtype}, so {floor:.1e} is used; "
            "raise rtol or use precision=float64"
        )
        warnings.warn(text, SolveWarning, stacklevel=4)


def note_once(text: str, what: str) -> None:
    """Log ``text``, the first time in a run that something is noted about ``what``."""
    if first_time(what, "note"):
        log.warning(text)


def note_fallback(stats: SolveStats, following: str, what: str) -> None:
    """Log the switch to the method named ``following`` after a failed solve: the first of its kind in a run as a warning."""
    level = logging.WARNING if first_time(what, stats.method, following) else logging.DEBUG
    log.log(level, "%s solve: %s; falling back to %s", what, stats.describe(), following)
