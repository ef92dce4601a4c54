"""The tables of a report: of groups, of runs, and of a single run. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hyperopt.app.report.groups import Group, shown, spread
from hyperopt.app.report.page import Cell, address
from hyperopt.app.report.read import Run
from hyperopt.app.report.trust import judged, relative_errors, values
from hyperopt.app.run_directory import differing, number
from hyperopt.core.text import one_line, printable

ALSO = ("val/accuracy", "test/loss", "test/accuracy")
"""Metrics that are shown beside the compared one, if they were measured."""
ENDS = ("failed", "killed")
"""Statuses that are shown as errors."""
UNKNOWN = Cell("", None)


def of_groups(groups: Sequence[Group], metric: str, mode: str) -> tuple[list[str], list[list[Cell]], int | None]:
    """Return the header, the rows and the number of the best row; the best of ``groups`` is the first."""
    also = [name for name in ALSO if name != metric and any(each.values(name) for each in groups)]
    keys = list(groups[0].settings)
    seeds = any(len(each.runs) > 1 for each in groups)
    head = [*([printable(key) for key in keys] or ["group"]), f"{printable(metric)}{' mean' if seeds else ''}"]
    head += [*(["sd", "best"] if seeds else []), "runs", *also, "seconds"]
    rows = []
    for each in groups:
        found = spread(each.values(metric), min if mode == "min" else max)
        mean = numeric(found.mean, ".5g") if found.count else reached(each, metric)
        others = [numeric(spread(each.values(name), max).mean, ".5g") for name in also]
        seconds = spread([number(run.summary.get("seconds")) for run in each.runs], max).mean
        settings = [setting(each.settings[key]) for key in keys] or [Cell(each.label)]
        spreads = [numeric(found.deviation, ".2g"), numeric(found.best, ".5g")] if seeds else []
        tone = "bad" if any(run.status in ENDS for run in each.runs) else "" if any(run.ended for run in each.runs) else "note"
        runs = Cell(each.statuses, len(each.runs), tone=tone)
        rows.append([*settings, mean, *spreads, runs, *others, numeric(seconds, ".1f")])
    known = sum(bool(each.values(metric)) for each in groups)
    return *filled(head, rows), 0 if known > 1 else None


def setting(value: object) -> Cell:
    """Return the cell of a setting."""
    text = shown(value)
    return Cell(text if len(text) <= 80 else f"{text[:79]}…", float(value) if isinstance(value, float) else None)


def reached(group: Group, metric: str) -> Cell:
    """Return, in brackets, the mean of what the runs of a group had reached of which none ended well, or how they ended."""
    value = group.reached(metric)
    if math.isnan(value):
        ends = sorted({run.status for run in group.runs if not run.ended})
        return Cell(printable(", ".join(ends)), tone="bad" if set(ends) & set(ENDS) else "soft")
    return Cell(f"({value:.5g})", value, tone="soft")


def numeric(value: float, form: str, tone: str = "") -> Cell:
    """Return the cell of a number, empty for NaN."""
    return UNKNOWN if math.isnan(value) else Cell(format(value, form), value, tone=tone)


def of_runs(runs: Sequence[Run], names: Sequence[str], metric: str, out: Path) -> tuple[list[str], list[list[Cell]]]:
    """Return the header and the rows of the table of runs, with links from the page in ``out``."""
    varying = differing([run.overrides for run in runs])
    head = ["run", *map(printable, varying), "status", printable(metric), "best step", "steps", "seconds", "solves"]
    head += ["largest residual", "hypergradient error", "ended by"]
    rows = []
    for run, name in zip(runs, names, strict=True):
        errors = [each for each in relative_errors(run) if math.isfinite(each[0])]
        worst = max((error for error, _ in errors), default=math.nan)
        best = number((run.summary.get("best") or {}).get("step"))
        tone = "bad" if run.status in ENDS else "" if run.ended else "note"
        rows.append(
            [
                Cell(name, link=address(run.path, out)),
                *(_override(run.overrides.get(key, "")) for key in varying),
                Cell(printable(run.status), tone=tone),
                numeric(run.best(metric), ".5g", "" if run.ended else "soft"),
                numeric(best, ".0f"),
                numeric(number(run.summary.get("steps")), ".0f"),
                numeric(number(run.summary.get("seconds")), ".1f"),
                _solves(run),
                numeric(_largest(run), ".1e"),
                Cell(
                    f"{100 * worst:.2g} %" if worst < 1 else f"{worst:.2g} times",
                    worst,
                    tone={"good": "", "note": "note", "bad": "bad"}[judged(errors)],
                )
                if errors
                else UNKNOWN,
                Cell(one_line(run.reason, 300), tone="long"),
            ]
        )
    return filled(head, rows)


def filled(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> tuple[list[str], list[list[Cell]]]:
    """Return a table without the columns in which no row has anything."""
    kept = [k for k in range(len(head)) if any(row[k].text for row in rows)]
    return [head[k] for k in kept], [[row[k] for k in kept] for row in rows]


def _override(text: str) -> Cell:
    try:
        order = float(text)
    except ValueError:
        order = None
    short = one_line(text, 80)
    return Cell(f"{order:g}" if order is not None and len(text) > 12 else short, order)


def _solves(run: Run) -> Cell:
    codes = [code for part in ("inner", "adjoint") for code in values(run, f"{part}/status") if math.isfinite(code)]
    failed = sum(code > 1 for code in codes)
    if not codes:
        return UNKNOWN
    return Cell(
        f"{failed} of {len(codes)} failed" if failed else f"{len(codes)} good", failed / len(codes), tone="bad" if failed else ""
    )


def _largest(run: Run) -> float:
    found = [value for part in ("inner", "adjoint") for value in values(run, f"{part}/residual")]
    return max(found, key=lambda value: math.inf if math.isnan(value) else value, default=math.nan)


def of_metrics(run: Run) -> tuple[list[str], list[list[Cell]]]:
    """Return the header and the rows of the table of a single run: what it measured at its last and at its best step."""
    last, best = run.summary.get("metrics") or {}, (run.summary.get("best") or {}).get("metrics") or {}
    names = [
        name for name in dict.fromkeys([*last, *best]) if name.startswith(("outer/", "val/", "test/", "hyper/", "hypergrad/err"))
    ]
    names = names or list(last)
    rows = [
        [Cell(printable(name)), *(numeric(number(found.get(name)), ".6g") for found in ([last, best] if best else [last]))]
        for name in names
    ]
    return ["metric", "last step", *(["best step"] if best else [])], rows
