"""The figures of a report. This module imports no torch, and matplotlib only for the first figure."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hyperopt.app.report.groups import Group, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 12
"""Largest number of groups in a legend; with more, only the table tells them apart."""
SPAN = 30.0
"""A positive setting whose values differ by more than this factor has a logarithmic axis."""


def png(draw: Callable[[Figure], None], width: float = 8.0, height: float = 4.5) -> bytes:
    """Return a figure, ``width`` by ``height`` inches, as PNG. A ``$`` in its texts does not start a formula."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"text.parse_math": False, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def colour(k: int, count: int) -> Any:
    """Return the colour of group ``k`` of ``count``."""
    from matplotlib import colormaps

    return colormaps["tab10"](k) if count <= 10 else colormaps["turbo"](0.05 + 0.9 * k / (count - 1))


def legend(figure: Figure, axes: Axes, groups: Sequence[Group]) -> None:
    """Name the drawn groups below the axes, unless there are too many."""
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(groups) <= NAMED and handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) < 50 else 1, fontsize=8, frameon=False
        )


def band(group: Group, metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return steps, means, and mean -/+ one sample standard deviation, at the steps where every run has a finite ``metric``."""
    columns = [
        {int(row["step"]): row[metric] for row in run.rows if math.isfinite(row.get(metric, math.nan))} for run in group.runs
    ]
    columns = [column for column in columns if column]  # leave out runs that failed before their first evaluation
    steps = sorted(set.intersection(*(set(column) for column in columns))) if columns else []
    values = [[column[step] for column in columns] for step in steps]
    means = [statistics.fmean(each) for each in values]
    widths = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    return (
        steps,
        means,
        [mean - width for mean, width in zip(means, widths, strict=True)],
        [mean + width for mean, width in zip(means, widths, strict=True)],
    )


def curves(groups: Sequence[Group], metric: str) -> bytes | None:
    """Draw ``metric`` over the outer steps, a line and a band for each group; None if no run measured it."""
    bands = [band(each, metric) for each in groups]
    if not any(steps for steps, *_ in bands):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, (each, (steps, means, low, high)) in enumerate(zip(groups, bands, strict=True)):
            if not steps:
                continue
            style: dict[str, Any] = {"color": colour(k, len(groups)), "marker": "o" if len(steps) < 3 else None}
            axes.plot(steps, means, linewidth=1.6, label=each.label.lstrip("_"), **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set(xlabel="outer step", ylabel=metric)
        axes.grid(alpha=0.25)
        legend(figure, axes, groups)

    return png(draw)


def heights(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Place the values of one setting on an axis from 0 to 1.

    Numbers are placed to scale, which is logarithmic if they are positive and far apart; other values at equal distances.

    Returns:
        The height of each value, and the ticks ``(height, text)``.
    """
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in distinct):
        low, high = min(distinct), max(distinct)
        scale = math.log if low > 0 and high / low > SPAN else float
        width = scale(high) - scale(low)
        place = {value: (scale(value) - scale(low)) / width if width else 0.5 for value in distinct}
    else:
        place = {value: k / (len(distinct) - 1) if len(distinct) > 1 else 0.5 for k, value in enumerate(distinct)}
    marked = distinct if len(distinct) <= 8 else sorted(distinct, key=place.__getitem__)[:: math.ceil(len(distinct) / 8)]
    return [place[value] for value in values], [(place[value], shown(value)) for value in marked]


def parallel(groups: Sequence[Group], metric: str, best: Callable[[Sequence[float]], float]) -> bytes | None:
    """Draw the settings and the mean of ``metric`` as parallel coordinates; None for fewer than two groups with a mean."""
    rows = [(each.settings, statistics.fmean(values)) for each in groups if (values := each.values(metric))]
    if len(rows) < 2:
        return None
    keys = list(rows[0][0])
    results = [result for _, result in rows]
    columns = [heights([settings[key] for settings, _ in rows]) for key in keys]
    low, high = min(results), max(results)
    last = [(result - low) / (high - low) if high > low else 0.5 for result in results]
    digits = 3 + max(0, math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))) if high > low else 4  # neighbours differ
    ticks = [(k / 4, f"{low + k / 4 * (high - low):.{digits}g}") for k in range(5)] if high > low else [(0.5, f"{low:.4g}")]
    columns.append((last, ticks))

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps

        axes = figure.add_subplot()
        good = best([0.0, 1.0])  # the height of the best result
        order = sorted(range(len(rows)), key=lambda k: -abs(last[k] - good))  # the best on top
        for k in order:
            shade = colormaps["viridis"](0.9 * abs(last[k] - good))
            axes.plot(range(len(columns)), [places[k] for places, _ in columns], color=shade, linewidth=2.2, alpha=0.85)
        for x, (_, marks) in enumerate(columns):
            axes.axvline(x, color="0.35", linewidth=1, zorder=0)
            for y, label in marks:
                label = label if len(label) <= 24 else f"{label[:23]}…"
                axes.annotate(
                    label,
                    (x, y),
                    xytext=(4, 2),
                    textcoords="offset points",
                    fontsize=8,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6},
                )
        names = [key if len(key) <= 28 else f"…{key[-27:]}" for key in [*keys, f"{metric} (mean)"]]
        axes.set_xticks(range(len(columns)), names, rotation=0 if len(columns) <= 5 else 25)
        axes.set(xlim=(-0.15, len(columns) - 0.6), ylim=(-0.06, 1.08), yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)

    return png(draw, max(7.0, 2.0 * len(columns)))


def error_and_cost(groups: Sequence[Group]) -> bytes | None:
    """Draw each run's hypergradient error against the cost of a step; None if no run has an estimate above 0.

    The x axis is vjps and evaluations, averaged over the steps; the y axis is the median of ``hypergrad/error_estimate``. A
    marker is filled if the error is a bound.
    """
    points = [(k, point) for k, each in enumerate(groups) for run in each.runs if (point := error_point(run.rows)) is not None]
    if not points:
        return None

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = figure.add_subplot()
        named = set()
        for k, (cost, error, bound) in points:
            tone = colour(k, len(groups))
            label = None if k in named else groups[k].label.lstrip("_")
            named.add(k)
            axes.plot([cost], [error], "o", color=tone, markerfacecolor=tone if bound else "none", label=label)
        axes.set(xscale="log", yscale="log", xlabel="vjps + evaluations, a step", ylabel="hypergrad/error_estimate (median)")
        for axis in (axes.xaxis, axes.yaxis):  # the default labels of a logarithmic axis are formulas, which are off here
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if axis is axes.xaxis else (1.0,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.margins(0.1)
        axes.grid(alpha=0.25)
        legend(figure, axes, groups)

    return png(draw)


def error_point(rows: Sequence[Any]) -> tuple[float, float, bool] | None:
    """Return cost of a step, median error and whether all estimates are bounds; None if a run has none of these."""
    estimates = [row["hypergrad/error_estimate"] for row in rows if row.get("hypergrad/error_estimate", math.nan) > 0]
    estimates = [value for value in estimates if math.isfinite(value)]
    cost = rows[-1].get("cost/vjps", math.nan) + rows[-1].get("cost/evaluations", math.nan) if rows else math.nan
    if not estimates or not cost > 0:
        return None
    bound = all(row.get("hypergrad/is_bound", 0.0) == 1.0 for row in rows if "hypergrad/error_estimate" in row)
    return cost / (rows[-1]["step"] + 1), statistics.median(estimates), bound
