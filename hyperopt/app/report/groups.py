"""Groups of runs that differ only in their seed: their settings and statistics. This module imports no torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from hyperopt.app.experiment import counts
from hyperopt.app.report.read import Run
from hyperopt.app.run_directory import differing
from hyperopt.core.text import printable

UNSET = "-"


@dataclass(frozen=True)
class Group:
    """Runs of one config and several seeds.

    Attributes:
        settings: the keys whose values differ between groups, ``{key: value}``; all groups have the same keys.
        runs: all runs, including failed ones.
    """

    settings: Mapping[str, Any]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """The settings in one line."""
        return ", ".join(f"{printable(key)}={shown(value)}" for key, value in self.settings.items()) or "all runs"

    @property
    def statuses(self) -> str:
        """How many runs have each status."""
        return ", ".join(
            f"{count} {printable(status)}" for status, count in sorted(Counter(run.status for run in self.runs).items())
        )

    def values(self, metric: str) -> list[float]:
        """Return ``metric`` at the best evaluation of each run that ended well with a finite value."""
        found = [run.best(metric) for run in self.runs if run.ended]
        return [value for value in found if math.isfinite(value)]

    def mean(self, metric: str) -> float:
        """Return the mean of ``values``, NaN if there are none."""
        return statistics.fmean(values) if (values := self.values(metric)) else math.nan

    def reached(self, metric: str) -> float:
        """Return the mean of ``metric`` over all runs, those that were stopped included, NaN if none has it."""
        found = [value for run in self.runs if math.isfinite(value := run.best(metric))]
        return statistics.fmean(found) if found else math.nan

    def winner(self, metric: str, mode: str) -> Run | None:
        """Return the run with the best value of those that ended well."""
        known = [run for run in self.runs if run.ended and math.isfinite(run.best(metric))]
        return (min if mode == "min" else max)(known, key=lambda run: run.best(metric), default=None)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (NaN for one value) and best of ``count`` values; NaN if there are none."""

    count: int
    mean: float
    deviation: float
    best: float


def spread(values: Sequence[float], better: Callable[[Sequence[float]], float]) -> Spread:
    """Return the statistics of ``values``; ``better`` is ``min`` or ``max``."""
    if not values:
        return Spread(0, math.nan, math.nan, math.nan)
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(len(values), statistics.fmean(values), deviation, better(values))


def shown(value: Any) -> str:
    """Return a setting as text."""
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def ranked(groups: Sequence[Group], metric: str, mode: str) -> list[Group]:
    """Return the groups, the best mean first; then those in which no run ended well, by what they had reached."""
    sign = -1.0 if mode == "max" else 1.0

    def key(each: Group) -> tuple[bool, bool, float]:
        mean = each.mean(metric)
        value = each.reached(metric) if math.isnan(mean) else mean
        return math.isnan(mean), math.isnan(value), 0.0 if math.isnan(value) else sign * value

    return sorted(groups, key=key)


def group(runs: Sequence[Run]) -> list[Group]:
    """Return the groups, in the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(repr(sorted(relevant(run).items(), key=itemgetter(0))), []).append(run)
    groups = list(members.values())
    settings = by_overrides(groups) or by_config(groups)
    return [Group(each, found) for each, found in zip(settings, groups, strict=True)]


def relevant(run: Run) -> dict[str, Any]:
    """Return the part of a run's config that is equal within a group.

    The seed is not part of it, nor is another seed that follows it (``dataset.seed: ${seed}``) and was not set itself.
    """

    def follows(key: str, value: Any) -> bool:
        return key.endswith(".seed") and value == run.config.get("seed") and key.removeprefix("task.") not in run.overrides

    config = run.config.items()
    return {key: value for key, value in config if counts(key, "group") and not follows(key, value)}


def by_overrides(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]] | None:
    """Return the settings that were swept on the command line, or None if they do not distinguish the groups.

    They are shorter than the config: ``solver=anderson`` stands for the dozen keys that come with it.
    """
    first = [found[0].overrides for found in groups]
    swept = [key for key in differing(first) if counts(key, "group")]
    settings = [{key: value_of(each.get(key)) for key in swept} for each in first]
    same = all(
        run.overrides.get(key) == each.get(key)
        for key in swept
        for found, each in zip(groups, first, strict=True)
        for run in found
    )
    return settings if same and len({tuple(each.items()) for each in settings}) == len(groups) else None


def value_of(text: str | None) -> Any:
    """Return an override's value, as a number if it is one."""
    if text is None:
        return UNSET
    try:
        return float(text)
    except ValueError:
        return text


def by_config(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """Return the keys of the configs that differ; for a ``_target_``, its class is the value of the key of its part."""
    configs = [relevant(found[0]) for found in groups]
    swept = differing(configs)

    def value(config: Mapping[str, Any], key: str) -> Any:
        found = config.get(key, UNSET)
        if key.endswith("_target_"):
            return str(found).rpartition(".")[2]
        return found if isinstance(found, int | float) and not isinstance(found, bool) else str(found)

    return [{key.removesuffix("._target_"): value(config, key) for key in swept} for config in configs]
