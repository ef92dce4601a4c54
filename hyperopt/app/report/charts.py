"""The figures of a report: what each draws; ``drawing`` makes images of them. This module imports no torch."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyperopt.app.report.drawing import SPAN, Draw, Drawing, drop_overlapping, mark, round_numbers
from hyperopt.app.report.groups import Group, shown
from hyperopt.core.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 12
"""Largest number of groups with a line of their own in a legend; others are drawn in grey."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#3aa5dc", "#5b4a9c", "#444444")  # after Okabe and Ito
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
GREY = "#9aa3b0"


def style(k: int) -> dict[str, Any]:
    """Return colour, dashes and marker of the ``k``-th named group; any two of ``NAMED`` differ in at least two of them."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k % len(DASHES)] if k < len(COLOURS) else DASHES[(k + 1) % len(DASHES)],
        "marker": MARKERS[k % len(MARKERS)],
    }


def label(group: Group) -> str:
    """Return the name of a group in a legend, which says so if none of its runs ended well."""
    stopped = "" if any(run.ended for run in group.runs) else f" ({', '.join(sorted({run.status for run in group.runs}))})"
    return f"{group.label}{printable(stopped)}"


def legend(drawing: Drawing, axes: Axes) -> None:
    """Name what is drawn: beside the axes on a wide screen, otherwise below them."""
    handles, labels = axes.get_legend_handles_labels()
    layout = drawing.layout
    if not handles:
        return
    labels = [textwrap.fill(each, layout.characters, break_on_hyphens=False, max_lines=4, placeholder=" …") for each in labels]
    where = "outside right upper" if layout.wide else "outside lower left"
    lines = sum(each.count("\n") + 1 for each in labels)
    height = layout.font * 1.45 * (lines + 1)
    drawing.grow(max(0.0, height - layout.height) if layout.wide else height)
    drawing.figure.legend(handles, labels, loc=where, fontsize=layout.font, frameon=False, handlelength=3.2, labelspacing=0.4)


def heights(values: Sequence[Any], own: int = 8) -> tuple[list[float], list[tuple[float, str]]]:
    """Place the values of one setting on an axis from 0 to 1.

    Numbers are placed to scale, which is logarithmic if they are positive and far apart; other values at equal distances.

    Args:
        values: the values.
        own: the ticks are at the values themselves, unless there are more numbers than this; then they are at round ones.

    Returns:
        The height of each value, and the ticks ``(height, text)``.
    """
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in distinct):
        low, high = min(distinct), max(distinct)
        logarithmic = low > 0 and high / low > SPAN
        scale = math.log if logarithmic else float
        width = scale(high) - scale(low)

        def place(value: Any) -> float:
            return (scale(value) - scale(low)) / width if width else 0.5

        marked = distinct if len(distinct) <= own or not width else round_numbers(low, high, logarithmic)
        return [place(value) for value in values], [(place(value), shown(value)) for value in sorted(marked)]
    order = {value: k / (len(distinct) - 1) if len(distinct) > 1 else 0.5 for k, value in enumerate(distinct)}
    return [order[value] for value in values], [(order[value], shown(value)) for value in distinct]


def fanned(places: Sequence[float], results: Sequence[float]) -> list[float]:
    """Return places on one axis, where those of equal values lie side by side, in the order of their results."""
    distinct = sorted(set(places))
    gaps = [b - a for a, b in itertools.pairwise(distinct)]
    spread = min(0.16, 0.4 * min(gaps, default=0.4))
    found = list(places)
    for value in distinct:
        members = sorted((k for k, place in enumerate(places) if place == value), key=lambda k: results[k])
        for position, k in enumerate(members):
            found[k] += spread * (position / (len(members) - 1) - 0.5) if len(members) > 1 else 0.0
    return found


@dataclass(frozen=True)
class Line:
    """A line of the parallel coordinates: where it passes and ends, whether it is a mean of runs that ended well, and a name."""

    settings: Mapping[str, Any]
    result: float
    ended: bool
    label: str


def lines_of(groups: Sequence[Group], metric: str) -> list[Line]:
    """Return a line for each group with a result: the mean of ``metric``, or else what its stopped runs had reached."""
    found = []
    for each in groups:
        mean = each.mean(metric)
        result = each.reached(metric) if math.isnan(mean) else mean
        if not math.isnan(result):
            found.append(Line(each.settings, result, not math.isnan(mean), f"{label(each)}: {metric} {result:.5g}"))
    return found


def parallel(groups: Sequence[Group], metric: str, mode: str) -> Draw | None:
    """Draw the settings and the mean of ``metric`` as parallel coordinates; None for fewer than two groups with a result.

    Lines with the same value are drawn side by side. On a narrow screen the axes lie below each other.
    """
    lines = lines_of(groups, metric)
    if len(lines) < 2 or not lines[0].settings:
        return None
    keys = list(lines[0].settings)
    results = [line.result for line in lines]
    columns = [heights([line.settings[key] for line in lines]) for key in keys]
    columns = [(fanned(places, results), ticks) for places, ticks in columns]
    scaled, ticks = heights(results, own=0)
    columns.append((scaled, ticks))
    names = [*keys, f"{metric} (mean)"]
    good = 1.0 if mode == "max" else 0.0
    many = len(lines) > 40

    def draw(drawing: Drawing) -> None:
        from matplotlib import colormaps

        layout, flat = drawing.layout, drawing.layout.narrow
        if flat:
            drawing.grow(max(0.0, 74 * len(columns) - layout.height))
        axes = drawing.figure.add_subplot()
        across = [-k if flat else k for k in range(len(columns))]
        best = next((k for k, line in enumerate(lines) if line.ended), None)
        for k in sorted(range(len(lines)), key=lambda k: (lines[k].ended, k == best, -abs(scaled[k] - good))):
            along = [places[k] for places, _ in columns]
            form: dict[str, Any] = {"color": GREY, "linestyle": (0, (3, 2)), "linewidth": 1.0, "alpha": 0.8}
            if k == best:
                form = {"color": "#c1121f", "linewidth": 3.2}
            elif lines[k].ended:
                shade = colormaps["viridis"](0.92 * abs(scaled[k] - good))
                form = {"color": shade, "linewidth": 1.0 if many else 1.8, "alpha": 0.55 if many else 0.9}
            [line] = axes.plot(*((along, across) if flat else (across, along)), **form)
            drawing.name(line, printable(lines[k].label))
        texts = []
        box = {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.8}
        for x, (_, marks) in zip(across, columns, strict=True):
            (axes.axhline if flat else axes.axvline)(x, color="0.35", linewidth=1, zorder=0.5)
            for place, text in sorted(marks, key=lambda each: (each[0] not in (0.0, 1.0), each[0])):  # the ends first
                short = text if len(text) <= 20 else f"{text[:19]}…"
                at, offset = ((place, x), (0, -4)) if flat else ((x, place), (5, 0))
                aligned: dict[str, Any] = {"ha": "center", "va": "top"} if flat else {"va": "center"}
                axes.plot(*at, "_" if not flat else "|", color="0.35", markersize=7, zorder=4)
                made = axes.annotate(short, at, xytext=offset, textcoords="offset points", bbox=box, zorder=5, **aligned)
                texts.append(made)
        if flat:
            for x, name in zip(across, names, strict=True):
                name = name if len(name) <= 44 else f"…{name[-43:]}"
                texts.append(
                    axes.annotate(name, (-0.08, x), xytext=(0, 6), textcoords="offset points", weight="bold", bbox=box, zorder=5)
                )
            axes.set(ylim=(across[-1] - 0.45, 0.5), xlim=(-0.1, 1.12), xticks=[], yticks=[])
        else:
            room = max(8, int(layout.width / len(columns) / (0.62 * layout.font)))
            axes.set_xticks(
                across,
                [
                    textwrap.fill(name.replace(".", ". ").replace("/", "/ "), room, max_lines=3, placeholder="…")
                    .replace(". ", ".")
                    .replace("/ ", "/")
                    for name in names
                ],
            )
            axes.set(xlim=(-0.05 * len(columns), len(columns) - 1 + 0.07 * len(columns)), ylim=(-0.1, 1.1), yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        drop_overlapping(drawing, texts)

    return draw


def error_and_cost(groups: Sequence[Group]) -> Draw | None:
    """Draw each run's hypergradient error against the cost of a step; None if fewer than two runs have an estimate above 0.

    The x axis is vjps and evaluations, averaged over the steps; the y axis is the median of ``hypergrad/error_estimate``. A
    marker is filled if the error is a bound.
    """
    points = [(k, point, run) for k, each in enumerate(groups) for run in each.runs if (point := error_point(run.rows))]
    if len(points) < 2:
        return None
    drawn = list(dict.fromkeys(k for k, *_ in points))
    named = {k: place for place, k in enumerate(drawn if len(drawn) <= NAMED else drawn[: NAMED - 1])}

    def draw(drawing: Drawing) -> None:
        axes = drawing.figure.add_subplot()
        labelled: set[Any] = set()
        for k, (cost, error, bound), run in points:
            form = style(named[k]) if k in named else {"color": GREY, "marker": "."}
            text = label(groups[k]) if k in named else f"the other {len(drawn) - len(named)}"
            [line] = axes.plot(
                [cost],
                [error],
                color=form["color"],
                marker=form["marker"],
                linestyle="none",
                markersize=13 - 0.6 * named.get(k, NAMED),  # smaller ones lie on larger ones, so that equal points are seen
                markerfacecolor=form["color"] if bound else "none",
                label=None if text in labelled else text,
            )
            labelled.add(text)
            kind = "a bound" if bound else "an estimate"
            drawing.name(line, f"run {run.name}, {label(groups[k])}: {error:.3g} ({kind}) at {cost:.3g} a step")
        axes.set(xscale="log", yscale="log", xlabel="vjps + evaluations, a step", ylabel="hypergrad/error_estimate (median)")
        axes.margins(0.15)
        widen(axes)
        mark(axes.xaxis, True, 6 if drawing.layout.narrow else 12)
        mark(axes.yaxis, True, 9)
        axes.grid(alpha=0.25)
        legend(drawing, axes)

    return draw


def widen(axes: Axes) -> None:
    """Let both logarithmic axes span a factor of at least 10, so that each has several ticks."""
    for axis, limits in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        low, high = axis.get_view_interval()
        factor = math.sqrt(max(1.0, 10 / (high / low)))
        limits(low / factor, high * factor)


def error_point(rows: Sequence[Any]) -> tuple[float, float, bool] | None:
    """Return cost of a step, median error and whether all estimates are bounds; None if a run has none of these."""
    estimates = [row["hypergrad/error_estimate"] for row in rows if row.get("hypergrad/error_estimate", math.nan) > 0]
    estimates = [value for value in estimates if math.isfinite(value)]
    cost = rows[-1].get("cost/vjps", math.nan) + rows[-1].get("cost/evaluations", math.nan) if rows else math.nan
    if not estimates or not cost > 0 or not math.isfinite(cost):
        return None
    bound = all(row.get("hypergrad/is_bound", 0.0) == 1.0 for row in rows if "hypergrad/error_estimate" in row)
    return cost / (rows[-1]["step"] + 1), statistics.median(estimates), bound
