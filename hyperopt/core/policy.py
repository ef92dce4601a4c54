"""What happens when a solve fails (raise, warn, fall back, or nothing), and the errors that a solve raises.

A kind of failure that repeats is reported the 1st, 10th, 100th, ... time in a run.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter

from hyperopt.core.checks import IterativeMethod
from hyperopt.core.status import SolveStats

log = logging.getLogger("hyperopt")
LOW = 1e-4  # larger than any rounding floor of float32 or float64 in full precision
_counts: Counter[tuple[str, ...]] = Counter()


class SolveError(RuntimeError):
    """A solve failed under ``policy="raise"``; the message names the status, the residual and what to change.

    Example:
        >>> import torch, hyperopt
        >>> try:
        ...     hyperopt.fixed_point(lambda w: 2 * w + 1, torch.zeros(1, 1), policy="raise")
        ... except hyperopt.SolveError as error:
        ...     print("diverged" in str(error) or "residual grew" in str(error))
        True
    """


class SolveWarning(UserWarning):
    """A solve failed under ``policy="warn"``, or all of its fallbacks failed.

    Example:
        >>> import torch, hyperopt, warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     solution = hyperopt.fixed_point(lambda w: 3 * w + 1, torch.zeros(1, 1), policy="warn")
        >>> issubclass(hyperopt.SolveWarning, UserWarning), solution.status.name
        (True, 'diverged')
    """


class ImpureMapError(RuntimeError):
    """The map is random or changes state of its own; the message names the module if it can be seen.

    Example:
        >>> import torch, hyperopt
        >>> try:
        ...     hyperopt.fixed_point(lambda w: 0.5 * w + torch.rand_like(w), torch.zeros(1, 2))
        ... except hyperopt.ImpureMapError as error:
        ...     print("random" in str(error))
        True
    """


def reset_warnings() -> None:
    """Start a new run: all counts of failures return to 0."""
    _counts.clear()


def count(*key: str) -> int:
    """Count one more event of the kind ``key`` in this run, and return the count."""
    _counts[key] += 1
    return _counts[key]


def repeated(*key: str) -> str | None:
    """Count a failure of the kind ``key``; return a suffix for its message, or None if it is not to be reported again."""
    times = count(*key)
    if times == 1:
        return ""
    return f" (the {times}th time in this run)" if str(times).strip("0") == "1" else None


def warn(text: str) -> None:
    """Warn at the line of the user's code: the innermost frame that is neither in this package nor in torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("hyperopt", "torch"):
        frame = frame.f_back
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, SolveWarning, frame.f_code.co_filename, frame.f_lineno, names.get("__name__"), registry)


def report(stats: SolveStats, policy: str, what: str) -> None:
    """Apply ``policy`` to the statistics of the solve named ``what``: ``"inner"`` or ``"adjoint"``; a failed fallback warns."""
    if policy == "ignore" or not stats.status.failed:
        return
    text = f"{what} solve: {stats.describe()}"
    if policy == "raise":
        raise SolveError(text)
    again = repeated(what, stats.method, stats.status.name)
    if again is not None:
        warn(text + again)


def report_floor(method: IterativeMethod, floor: float, dtype: object, policy: str, what: str) -> None:
    """Warn, once a run and kind, that ``rtol`` is below ``floor``, the least that rounding allows, which is used instead.

    There is no warning for a method's default ``rtol``, nor with an ``atol`` above 0, which may be what stops the solve.
    """
    if policy == "ignore" or method.atol or method.rtol == type(method).rtol or not 0 < method.rtol < floor:
        return
    if count(what, method.name, f"floor of {dtype}") == 1:
        warn(
            f"{what} solve: rtol={method.rtol:.1e} of {method.name} is below the rounding floor of {dtype}"
            f"{' with its products in lower precision' if floor > LOW else ''}, so {floor:.1e} is used; "
            "raise rtol or compute in float64"
        )


def note_once(text: str, what: str) -> None:
    """Log ``text``, but only one note about ``what`` in a run."""
    if count(what, "note") == 1:
        log.warning(text)


def note_fallback(stats: SolveStats, following: str, what: str) -> None:
    """Log the switch to the method named ``following`` after a failed solve, as a warning or, if repeated, for debugging."""
    again = repeated(what, stats.method, following)
    level = logging.DEBUG if again is None else logging.WARNING
    log.log(level, "%s solve: %s; falling back to %s%s", what, stats.describe(), following, again or "")
