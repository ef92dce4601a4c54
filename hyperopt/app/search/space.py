"""The search space: what the overrides of a sweep say about each key, in Hydra's syntax. This module imports no Optuna.

    solver=choice(picard, anderson)               one of these; solver=picard,anderson is the same
    optimizer.lr=tag(log, interval(1e-3, 1))      a number, uniform in its logarithm
    task.state_size=int(interval(10, 200))        a whole number
    trainer.max_steps=range(5, 50, 5)             5, 10, ..., 45, as in a grid; whole numbers or not

All other overrides are the same for all jobs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig

from hyperopt.app.config import ConfigError

MOST = 10_000  # largest number of values that a grid or a choice may have


@dataclass(frozen=True)
class Choice:
    """A key that has one of a few values, as text for the command line."""

    key: str
    values: tuple[str, ...]

    def text(self, value: Any) -> str:
        """Return a value as text for the command line."""
        return str(value)

    def listed(self) -> tuple[str, ...]:
        """Return all values."""
        return self.values

    @property
    def bounds(self) -> tuple[str, ...]:
        """The values that are checked before the sweep."""
        return self.values


@dataclass(frozen=True)
class Numbers:
    """A key that has a number from ``low`` to ``high``.

    Attributes:
        key: the key.
        low: smallest value; whole, as is ``high``, if all values are whole.
        high: largest value.
        step: distance of two values; None if every number between is allowed.
        log: whether numbers are uniform in their logarithm.
    """

    key: str
    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers."""
        return isinstance(self.low, int)

    def text(self, value: Any) -> str:
        """Return a value as text for the command line."""
        if self.whole:
            return str(int(value))
        if self.step is None:
            return repr(float(value))
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        return repr(float(low + step * round((Decimal(value) - low) / step)))  # 0.3, and not 0.1 + 0.1 + 0.1

    def listed(self) -> tuple[float, ...] | None:
        """Return all values, at most ``MOST + 1``; None if they cannot be listed."""
        if self.step is None:
            return None
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        count = min(int((Decimal(str(self.high)) - low) / step) + 1, MOST + 1)
        return tuple(int(low + k * step) if self.whole else float(low + k * step) for k in range(count))

    @property
    def bounds(self) -> tuple[str, ...]:
        """The values that are checked before the sweep."""
        return self.text(self.low), self.text(self.high)


Space = Sequence[Choice | Numbers]


def given(config: DictConfig) -> list[Override]:
    """Return the overrides of a sweep: those of ``hydra.sweeper.params`` before those of the command line.

    Raises:
        ConfigError: a key is in both.
    """
    swept = {str(key): f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()}
    overrides = OverridesParser.create().parse_overrides([*swept.values(), *config.hydra.overrides.task])
    twice = [each.input_line for each in overrides[len(swept) :] if each.key_or_group in swept]
    if twice:  # Hydra would run the same job once for each value of the file
        key = str(twice[0]).partition("=")[0]
        raise ConfigError(
            f"{twice[0]} and hydra.sweeper.params.{key}={config.hydra.sweeper.params[key]} are both given; drop one"
        )
    return overrides


def split(overrides: Sequence[Override]) -> tuple[Space, list[str]]:
    """Return the search space in these overrides, and the overrides that are the same for all jobs.

    Raises:
        ConfigError: an interval, range or choice is empty, reversed or cannot be searched; or there is nothing to search.
    """
    space: list[Choice | Numbers] = []
    fixed: list[str] = []
    for override in overrides:
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
            continue
        key, written = override.get_key_element(), str(override.input_line)
        if override.is_hydra_override():
            raise ConfigError(f"{written}: a key of hydra is the same for all jobs; drop it from the search space")
        if any(key == each.key for each in space):
            raise ConfigError(f"{key} is twice in the search space; drop one")
        space.append(_read(override, key, written))
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search; give a search space on the command line or in hydra.sweeper.params, "
            "such as 'optimizer.lr=tag(log, interval(1e-3, 1))' or 'solver=choice(picard, anderson)'"
        )
    return space, fixed


def _read(override: Override, key: str, written: str) -> Choice | Numbers:
    """Return what one override says."""
    value: Any = override.value()
    tags = set(getattr(value, "tags", ()))
    log = "log" in tags
    if tags - {"log"} or (log and not isinstance(value, IntervalSweep | RangeSweep)):
        raise ConfigError(f"{written}: the only tag is log, for an interval or a range of numbers; drop the others")
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None and high is not None
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(f"{written}: the ends of an interval must be finite; change {key}")
        if low >= high:
            which = "empty" if low == high else "reversed"
            raise ConfigError(f"{written}: the interval from {low} to {high} is {which}; change {key}")
        found = Numbers(key, low, high, 1 if isinstance(low, int) else None, log)
    elif isinstance(value, RangeSweep):
        found = _range(value, key, written, log)
        if value.shuffle:
            found = Choice(key, tuple(map(found.text, found.listed() or ())))
    else:
        if hasattr(value, "shuffle"):  # the order means nothing here, and must be the same in all processes
            override = replace(override, _value=replace(value, shuffle=False))
        found = Choice(key, tuple(dict.fromkeys(islice(override.sweep_string_iterator(), MOST + 1))))
        if not found.values:
            raise ConfigError(f"{written}: there is nothing to choose from; change {key}")
    if isinstance(found, Numbers) and log and found.low <= 0:
        raise ConfigError(f"{written}: {found.low} has no logarithm; raise the lower end above 0, or drop tag(log, ...)")
    return found


def _range(value: RangeSweep, key: str, written: str, log: bool) -> Numbers:
    """Return the numbers of a range. Like in a grid, the end itself is not among them."""
    ends = value.start, value.stop, value.step
    assert value.start is not None and value.stop is not None
    start, stop, step = (Decimal(str(each)) for each in ends)
    if not all(each.is_finite() for each in (start, stop, step)) or step == 0:
        raise ConfigError(f"{written}: a range has finite ends and a step that is not 0; change {key}")
    count = math.ceil((stop - start) / step)
    if count <= 0:
        raise ConfigError(f"{written}: the range from {start} to {stop} by {step} is empty; change {key}")
    kind = int if all(isinstance(each, int) for each in ends) else float
    low, high = sorted((start, start + (count - 1) * step))
    if log and not (kind is int and abs(step) == 1):
        raise ConfigError(f"{written}: tag(log, ...) has no steps; write tag(log, interval(...)) or drop the tag")
    return Numbers(key, kind(low), kind(high), kind(abs(step)), log)


def quoted(text: str) -> str:
    """Return a text as the value of an override."""
    plain = "/" in text and re.fullmatch(r"[\w./-]+", text)  # without a slash it may be a number
    return text if plain else "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def points(space: Space) -> list[list[str]]:
    """Return overrides of the jobs to check before a sweep: every choice occurs, as do all lower and all upper ends together."""
    count = max(len(each.bounds) for each in space)
    return [
        [f"{each.key}={each.bounds[k % len(each.bounds) if isinstance(each, Choice) else min(k, 1)]}" for each in space]
        for k in range(count)
    ]
