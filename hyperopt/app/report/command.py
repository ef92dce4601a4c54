"""``hyperopt report DIR...``: compares runs and sweeps in one HTML page, with its figures as PNGs. It imports no torch."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hyperopt.app.files import WriteError, write_bytes, write_text
from hyperopt.app.report import charts
from hyperopt.app.report.groups import Group, group, shown, spread
from hyperopt.app.report.page import figure, listing, page, section, table
from hyperopt.app.report.read import ReportError, Run, find
from hyperopt.app.run_directory import RunDirectory, number
from hyperopt.core.text import aligned, printable

ALSO = ("val/accuracy", "test/loss", "test/accuracy")
"""Metrics that are shown beside the compared one, if they were measured."""
CAPTION = (
    "Runs that differ only in their seed are one group. Each run that ended counts with its best evaluation by trainer.monitor; "
    "all columns but best are means over seeds, sd the sample standard deviation, and the {mode} of {metric} is best."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 1 and one line if there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="hyperopt report", description="Compare runs and sweeps in one HTML page that needs no network."
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="directory of a run, of a sweep, or of several")
    parser.add_argument("--out", type=Path, help="directory to write to (default: report/ in DIR; here, where several are given)")
    parser.add_argument("--metric", help="what to compare by (default: trainer.monitor of the runs)")
    given = parser.parse_intermixed_args(argv)
    out = given.out or RunDirectory(given.directories[0] if len(given.directories) == 1 else Path()).report
    try:
        if given.out is None and out.is_symlink():
            raise ReportError(f"{out} is a link, and was left untouched; remove it, or set --out to a directory")
        print(report(given.directories, out, given.metric))
    except (ReportError, WriteError) as error:
        print(f"hyperopt report: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)


def report(directories: Sequence[Path], out: Path, metric: str | None = None) -> str:
    """Write ``index.html`` and the figures into ``out``.

    Args:
        directories: directories of runs or sweeps, or directories that contain such.
        out: the output directory, which is created if it is missing.
        metric: the metric to compare by (None: ``trainer.monitor``).

    Returns:
        The table and the path of the page, as text.

    Raises:
        ReportError: there is nothing to report on.
        WriteError: a file could not be written.
    """
    runs, left_out = find(directories)
    left_out = [printable(each) for each in left_out]
    groups = group(runs)
    metric, mode = what_to_compare(runs, metric)
    head, rows, best = statistics_of(groups, metric, mode)
    better = min if mode == "min" else max
    figures = {
        "curves": ("Curves", f"{metric} at every evaluation: mean over the seeds, and one standard deviation to either side."),
        "parallel": ("What was swept", f"One line a group, through its settings to the mean of {metric}; dark is good."),
        "error_cost": (
            "Hypergradient error against cost",
            "One point a run: the median error estimate against what a step cost. Filled: a bound; open: an estimate.",
        ),
    }
    images = {
        "curves": charts.curves(groups, metric),
        "parallel": charts.parallel(groups, metric, better),
        "error_cost": charts.error_and_cost(groups),
    }
    sections = [
        section("Results", CAPTION.format(metric=metric, mode=mode), table(head, rows, len(groups[0].settings) or 1, best))
    ]
    sections += [figure(*figures[name], image) for name, image in images.items() if image is not None]
    absent = [title for name, (title, _) in figures.items() if images[name] is None]
    if absent:
        sections.append(listing("Not drawn", "The runs hold no numbers for these, or too few.", absent))
    if left_out:
        sections.append(listing("Left out", "These could not be read.", left_out))
    sections.append(listing("Runs", "How each ended.", [ended(run) for run in runs]))
    statuses = ", ".join(f"{count} {printable(status)}" for status, count in sorted(Counter(run.status for run in runs).items()))
    facts = {"directories": ", ".join(map(str, directories)), "runs": f"{len(runs)} in {len(groups)} groups ({statuses})"}
    title = "Report: " + (", ".join(dict.fromkeys(printable(str(run.config.get("name", run.path.name))) for run in runs)))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make {out}: {error.strerror}; change --out") from error
    for name, image in images.items():
        (out / f"{name}.png").unlink(missing_ok=True)  # a file of an earlier report
        if image is not None:
            write_bytes(out / f"{name}.png", image)
    write_text(out / "index.html", page(title, facts, sections))
    said = [aligned([head, *rows]), *(f"left out: {each}" for each in left_out), f"report: {out / 'index.html'}"]
    return "\n".join(said)


def what_to_compare(runs: Sequence[Run], metric: str | None) -> tuple[str, str]:
    """Return the metric, by default the one that most runs monitor, and whether its ``min`` or its ``max`` is best.

    Raises:
        ReportError: no run measured it.
    """
    monitored = Counter((str(run.config.get("trainer.monitor")), str(run.config.get("trainer.mode"))) for run in runs)
    modes = {name: mode for (name, mode), _ in reversed(monitored.most_common())}
    metric = metric or monitored.most_common(1)[0][0][0]
    measured = {name for run in runs for row in run.rows for name in row} | {
        name for run in runs for name in run.summary.get("metrics") or {}
    }
    if metric not in measured:
        there = ", ".join(sorted(name for name in measured if name.endswith(("loss", "accuracy")))) or "nothing"
        raise ReportError(f"no run measured {metric!r:.100}; they have {there:.500}; set --metric to one of them")
    return metric, modes.get(metric) or ("max" if "accuracy" in metric else "min")


def statistics_of(groups: Sequence[Group], metric: str, mode: str) -> tuple[list[str], list[list[str]], int | None]:
    """Return the table as text: its head, a row for each group, and the index of the best mean (None: there is none)."""
    also = [name for name in ALSO if name != metric and any(each.values(name) for each in groups)]
    keys = list(groups[0].settings)
    head = [*([printable(key) for key in keys] or ["group"]), "runs", f"{printable(metric)} mean", "sd", "best", *also, "seconds"]
    means, rows = [], []
    for each in groups:
        found = spread(each.values(metric), min if mode == "min" else max)
        means.append(found.mean)
        others = [spread(each.values(name), max).mean for name in also]
        seconds = spread([number(run.summary.get("seconds")) for run in each.runs], max).mean
        numbers = [found.mean, found.deviation, found.best, *others]
        settings = [shown(each.settings[key]) for key in keys] or [each.label]
        rows.append([*settings, each.statuses, *(cell(value, ".5g") for value in numbers), cell(seconds, ".1f")])
    known = [k for k, mean in enumerate(means) if not math.isnan(mean)]
    ordered = sorted(known, key=lambda k: means[k], reverse=mode == "max")
    best = ordered[0] if len(known) > 1 else None
    return head, rows, best


def cell(value: float, form: str) -> str:
    """Return a number as text, empty for NaN."""
    return "" if math.isnan(value) else format(value, form)


def ended(run: Run) -> str:
    """Return how a run ended, in one line."""
    overrides = " ".join(f"{key}={value}" for key, value in run.overrides.items())
    reason = f" by {run.summary['reason']}" if run.summary.get("reason") else ""
    return printable(f"{run.path}: {run.status}{reason}" + (f" ({overrides})" if overrides else ""))
