"""The curves of a report: of groups of runs or, for a single group, of the splits. This module imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hyperopt.app.report.charts import GREY, NAMED, label, legend, style
from hyperopt.app.report.drawing import SPAN, Draw, Drawing, mark
from hyperopt.app.report.groups import Group
from hyperopt.app.report.read import Run

SPLITS = ("outer", "val", "test")
CUT = 100.0
"""A logarithmic axis ends at this factor times the best curve if others are above that by this factor again."""


@dataclass(frozen=True)
class Band:
    """The curve of a group.

    Attributes:
        steps: outer steps at which every run has a finite value.
        means: means over the runs.
        widths: sample standard deviations, 0 for one run.
    """

    steps: Sequence[int]
    means: Sequence[float]
    widths: Sequence[float]


def band(runs: Sequence[Run], metric: str) -> Band:
    """Return the curve of ``metric`` for some runs; those that measured nothing are left out."""
    columns = [{int(row["step"]): row[metric] for row in run.rows if math.isfinite(row.get(metric, math.nan))} for run in runs]
    columns = [column for column in columns if column]
    steps = sorted(set.intersection(*(set(column) for column in columns))) if columns else []
    values = [[column[step] for column in columns] for step in steps]
    widths = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    return Band(steps, [statistics.fmean(each) for each in values], widths)


def band_of(group: Group, metric: str) -> Band:
    """Return the curve of a group: of its runs that ended well or, if there are none, of all."""
    return band([run for run in group.runs if run.ended] or group.runs, metric)


@dataclass(frozen=True)
class Series:
    """A curve with its name, and the curves of runs that did not end well."""

    label: str
    band: Band
    stopped: Sequence[Band] = ()


def series_of(groups: Sequence[Group], metric: str) -> list[Series]:
    """Return a curve for each group that measured ``metric``; for a single group one for each split, such as ``test/loss``."""
    if len(groups) == 1:
        kind = metric.rpartition("/")[2]
        names = dict.fromkeys([metric, *(f"{split}/{kind}" for split in SPLITS)])
        found = [Series(name, band_of(groups[0], name), ends(groups[0], name)) for name in names]
    else:
        found = [Series(label(each), band_of(each, metric), ends(each, metric)) for each in groups]
    return [each for each in found if each.band.steps]


def ends(group: Group, metric: str) -> list[Band]:
    """Return the curves of the runs of a group that stopped before their end."""
    found = [band([run], metric) for run in group.runs if not run.ended and run.status != "running"]
    return [each for each in found if each.steps]


def coinciding(series: Sequence[Series]) -> list[tuple[list[str], float]]:
    """Return the names of curves that cannot be told apart by eye, with the largest difference between those of each set."""
    values = [mean for each in series for mean in each.band.means]
    place = math.log if logarithmic(values) else float
    eye = 2e-3 * (place(min(max(values), ceiling(series))) - place(min(values))) if values else 0.0
    sets: list[tuple[list[str], Band, float]] = []
    for each in series:
        for k, (members, other, most) in enumerate(sets):
            if each.band.steps == other.steps:
                pairs = list(zip(each.band.means, other.means, strict=True))
                if all(abs(place(a) - place(b)) <= eye for a, b in pairs):
                    sets[k] = ([*members, each.label], other, max(most, *(abs(a - b) for a, b in pairs)))
                    break
        else:
            sets.append(([each.label], each.band, 0.0))
    return [(members, most) for members, _, most in sets if len(members) > 1]


def logarithmic(values: Sequence[float]) -> bool:
    """Return whether curves through these values are drawn on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > SPAN


def ceiling(series: Sequence[Series]) -> float:
    """Return where a logarithmic axis ends, so that curves that diverged do not press the others together; infinity: nowhere."""
    values = [mean for each in series for mean in each.band.means]
    top = CUT * max(map(abs, series[0].band.means)) if series else math.inf
    return top if logarithmic(values) and max(values) > CUT * top else math.inf


def curves(series: Sequence[Series], metric: str) -> Draw | None:
    """Draw curves over the outer steps, the best first, each with its band; None if there are none."""
    if not series:
        return None
    named = series if len(series) <= NAMED else series[: NAMED - 1]
    others = series[len(named) :]
    values = [mean for each in series for mean in each.band.means]

    def draw(drawing: Drawing) -> None:
        axes = drawing.figure.add_subplot()
        for k, each in enumerate(named):
            steps, means, widths = each.band.steps, each.band.means, each.band.widths
            form, every = style(k), max(1, math.ceil(len(steps) / (6 if drawing.layout.narrow else 12)))
            at = list(range(k % every, len(steps), every))  # not the same steps for all, so that markers are seen
            width = 2.8 if k == 0 else 1.8
            [line] = axes.plot(steps, means, linewidth=width, markersize=6, markevery=at, zorder=3, label=each.label, **form)
            drawing.name(line, said(each, metric))
            low = [mean - width for mean, width in zip(means, widths, strict=True)]
            high = [mean + width for mean, width in zip(means, widths, strict=True)]
            axes.fill_between(steps, low, high, color=form["color"], alpha=0.14, linewidth=0)
            for end in each.stopped:
                axes.plot(end.steps, end.means, color=form["color"], linewidth=0.8, zorder=2)
                axes.plot(end.steps[-1:], end.means[-1:], "x", color=form["color"], markersize=10, markeredgewidth=2, zorder=4)
        for k, each in enumerate(others):
            rest = f"the other {len(others)}" if k == 0 else None
            [line] = axes.plot(
                each.band.steps,
                each.band.means,
                color=GREY,
                linewidth=1,
                alpha=0.5 if len(others) < 40 else 0.25,
                zorder=1,
                label=rest,
            )
            drawing.name(line, said(each, metric))
        log = logarithmic(values)
        axes.set(xlabel="outer step", ylabel=metric, yscale="log" if log else "linear")
        if math.isfinite(top := ceiling(series)):
            axes.set_ylim(min(values) / 1.5, top)
            axes.plot([], [], " ", label=f"values above {top:.1g} are cut off; the largest is {max(values):.1g}")
        mark(axes.yaxis, log, 9)
        mark(axes.xaxis, False, 6 if drawing.layout.narrow else 12, whole=True)
        axes.grid(alpha=0.25)
        if any(each.stopped for each in named):
            axes.plot([], [], "x", color="black", markersize=9, markeredgewidth=2, label="stopped before its end")
        legend(drawing, axes)

    return draw


def said(series: Series, metric: str) -> str:
    """Return what is shown under the pointer."""
    return f"{series.label}: {metric} {series.band.means[-1]:.5g} at step {series.band.steps[-1]}"
