"""``hyperopt report DIR...``: compares runs and sweeps in one HTML page, with its figures as PNGs. It imports no torch."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperopt.app.files import WriteError, write_bytes, write_text
from hyperopt.app.report import charts, curves, page, tables
from hyperopt.app.report.advice import Step, command_of, conclusion, next_steps, warning
from hyperopt.app.report.drawing import Draw, png, svgs
from hyperopt.app.report.groups import Group, group, ranked
from hyperopt.app.report.read import ReportError, Run, find, winners
from hyperopt.app.report.trust import Finding, findings
from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.text import aligned, one_line, printable

LINES = 20
"""Largest number of lines of the table on the terminal."""
NAMED = 12
"""Largest number of runs that a sentence names."""
LEVELS = {"good": "Good", "note": "Note", "bad": "Problem"}
CAPTION = (
    "Runs that differ only in their seed are one line. Each run that ended counts with its best evaluation by trainer.monitor; "
    "the columns are means over seeds, sd is the sample standard deviation, best is the {mode} over the seeds. A number in "
    "brackets is what runs had reached that were stopped: they are not ranked."
)
SINGLE = (
    "The best step is the best evaluation by trainer.monitor. outer/* are the fitted rows, val/* those selected on, test/* those "
    "held out."
)
TEXTS = {
    "curves": "Each line is a mean over seeds, with one standard deviation to either side. The pointer shows names and values.",
    "single": "What the run measured at its evaluations: val/* is what it is chosen by, test/* is held out.",
    "parallel": "One line for each line of the table of results, through its settings to {metric}. Red is the best, dark is "
    "good, and dashed lines are runs that were stopped. Lines with the same value lie side by side; runs without a number have "
    "no line.",
    "error_cost": "One point a run: the median of its error estimates against what a step cost. Filled: a bound; open: an "
    "estimate. Left and low is better.",
}
TITLES = {
    "best": "Best",
    "next": "What to run next",
    "results": "Results",
    "curves": "Curves",
    "parallel": "What was swept",
    "trust": "Can the numbers be trusted?",
    "error_cost": "Hypergradient error against cost",
    "runs": "Runs",
    "left-out": "Left out",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 1 and one line if there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="hyperopt report", description="Compare runs and sweeps in one HTML page that needs no network."
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="directory of a run, of a sweep, or of several")
    parser.add_argument("--out", type=Path, help="directory to write to (default: report/ in DIR; here, where several are given)")
    parser.add_argument("--metric", help="what to compare by (default: what the sweep was compared by, or trainer.monitor)")
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
    """Write ``index.html`` and the figures into ``out``, and return what to print: the table, the best command line, and notes.

    ``hyperopt report --help`` says what the arguments mean.

    Raises:
        ReportError: there is nothing to report on.
        WriteError: a file could not be written.
    """
    runs, left_out = find(directories)
    left_out = [one_line(each) for each in left_out]
    chosen = winners(runs)
    metric, mode = what_to_compare(runs, metric, chosen)
    groups = ranked(group(runs), metric, mode)
    found = findings(runs)
    winner = groups[0].winner(metric, mode)
    best = "" if winner is None else command_of(winner, chosen)
    said = conclusion(groups, metric, mode)

    series = curves.series_of(groups, metric)
    draws = {
        "curves": curves.curves(series, metric if len(groups) > 1 else metric.rpartition("/")[2]),
        "parallel": charts.parallel(groups, metric, mode),
        "error_cost": charts.error_and_cost(groups),
    }
    figures = {
        name: section(name, page.figure(svgs(draw, name, TITLES[name])), text_of(name, groups, metric))
        for name, draw in draws.items()
        if draw is not None
    }
    if "curves" in figures and (same := coincidences(series)):
        figures["curves"] += page.listing(same)
    sections = {
        "best": section("best", best_of(said, best, winner, found, out)),
        "next": section("next", steps_of(next_steps(runs, groups, metric, mode))),
        **results(groups, metric, mode),
        **{name: figures[name] for name in ("curves", "parallel") if name in figures},
        "trust": section("trust", trusted(found, runs, out)),
        **{name: figures[name] for name in ("error_cost",) if name in figures},
        "runs": section("runs", listed(runs, metric, out), "The names lead to the directories of the runs."),
    }
    if left_out:
        sections["left-out"] = section("left-out", page.listing(left_out), "These could not be read.")
    studies = list(dict.fromkeys(run.study for run in runs))
    title = "; ".join(studies[:3]) + (f"; and {len(studies) - 3} more" if len(studies) > 3 else "")
    short = {name: {**TITLES, "trust": "Trust"}[name] for name in sections}
    write(out, draws)
    write_text(
        out / "index.html",
        page.page(title, facts(directories, runs, groups, metric, mode), short, [*sections.values()]),
    )
    return "\n".join(
        [
            *terminal(groups, metric, mode, said, best, found),
            *(f"left out: {each}" for each in left_out),
            f"report: {out / 'index.html'}",
        ]
    )


def what_to_compare(runs: Sequence[Run], metric: str | None, chosen: Sequence[Mapping[str, Any]] = ()) -> tuple[str, str]:
    """Return the metric, and whether its ``min`` or its ``max`` is best.

    By default it is the one that the sweep was compared by, or else the one that most runs monitor.

    Raises:
        ReportError: no run measured it.
    """
    monitored = Counter(run.monitor for run in runs)
    modes = {name: mode for (name, mode), _ in reversed(monitored.most_common())}
    measured = {name for run in runs for row in run.rows for name in row}
    measured |= {name for run in runs for name in run.summary.get("metrics") or {}}
    goals = {(str(each["metric"][0]), str(each["direction"][0])) for each in chosen}
    if metric is None and len(goals) == 1:
        [(name, direction)] = goals
        if name in measured and direction in ("minimize", "maximize"):
            return name, direction[:3]
    metric = metric or monitored.most_common(1)[0][0][0]
    if metric not in measured:
        there = ", ".join(sorted(name for name in measured if name.endswith(("loss", "accuracy")))) or "nothing"
        raise ReportError(f"no run measured {metric!r:.100}; they have {there:.500}; set --metric to one of them")
    return metric, modes.get(metric) or ("max" if "accuracy" in metric else "min")


def section(name: str, content: str, note: str = "") -> str:
    """Return a section with its title."""
    return page.section(name, TITLES[name], content, note)


def text_of(name: str, groups: Sequence[Group], metric: str) -> str:
    """Return the text above a figure."""
    return TEXTS["single" if name == "curves" and len(groups) == 1 else name].format(metric=metric)


def coincidences(series: Sequence[curves.Series]) -> list[str]:
    """Say which curves cannot be told apart by eye."""
    said = []
    sets = curves.coinciding(series)
    for members, apart in sets[:6]:
        names = "; ".join(members[:6]) + (f"; and {len(members) - 6} more" if len(members) > 6 else "")
        how = "are equal to the last digit" if apart == 0 else f"differ by at most {apart:.1g}"
        said.append(f"These curves coincide ({how}): {names}.")
    if len(sets) > 6:
        said.append(f"So do those of {len(sets) - 6} more sets.")
    return said


def results(groups: Sequence[Group], metric: str, mode: str) -> dict[str, str]:
    """Return the section with the numbers: a line for each group, or for a single run a line for each metric."""
    if len(groups) == 1 and len(groups[0].runs) == 1:
        head, rows = tables.of_metrics(groups[0].runs[0])
        return {"results": section("results", page.table("metrics", head, rows, 1, None), SINGLE)} if rows else {}
    head, rows, best = tables.of_groups(groups, metric, mode)
    content = page.table("groups", head, rows, len(groups[0].settings) or 1, best)
    return {"results": section("results", content, CAPTION.format(mode=mode))}


def best_of(said: str, command: str, winner: Run | None, found: Sequence[Finding], out: Path) -> str:
    """Return the content of the first section: what is best, its command line, and whether it can be trusted."""
    first, _, rest = said.partition(": ") if winner is not None else ("", "", said)
    parts = [f"<p><strong>{page.escape(first)}{':' if first else ''}</strong> {page.escape(rest)}</p>"]
    if command:
        parts.append(page.command(command))
    if command and (text := warning(command)):
        parts.append(page.paragraph(text, "mark"))
    if winner is not None:
        parts.append(f"<p>Its directory: {page.link(one_line(str(winner.path), 300), page.address(winner.path, out))}</p>")
    parts.append(f"<p>{page.escape(verdict(found, winner))} {page.link('What the runs recorded about this', '#trust')}</p>")
    return f'<div class="card">{"".join(parts)}</div>'


def verdict(found: Sequence[Finding], winner: Run | None) -> str:
    """Return in a sentence whether something is wrong with the runs, and with the best one."""
    bad = [each for each in found if each.level == "bad"]
    notes = [each for each in found if each.level == "note"]
    if not bad:
        more = f", with {len(notes)} note{'s' if len(notes) > 1 else ''} on them." if notes else "."
        return f"No problem was found with these numbers{more}"
    subjects = ", ".join(dict.fromkeys(each.subject.lower() for each in bad))
    said = f"{len(bad)} problem{'s' if len(bad) > 1 else ''} with these numbers: {subjects}"
    if winner is None:
        return f"{said}."
    own = [each for each in bad if not each.runs or any(run is winner for run in each.runs)]
    return f"{said}. {'The best run is concerned too' if own else 'The best run is not concerned'}."


def steps_of(steps: Sequence[Step]) -> str:
    """Return the content of the section on what to run next."""
    items = [f"<li>{page.escape(each.why)}{page.command(each.command) if each.command else ''}</li>" for each in steps]
    return f'<ol class="next">{"".join(items)}</ol>' if items else page.paragraph("Nothing: no run has ended yet.")


def trusted(found: Sequence[Finding], runs: Sequence[Run], out: Path) -> str:
    """Return the content of the section on trust, the problems first."""
    items = []
    for each in sorted(found, key=lambda each: list(LEVELS).index(each.level), reverse=True):
        names = [page.link(run.name, page.address(run.path, out)) for run in each.runs[:NAMED]]
        more = f" and {len(each.runs) - NAMED} more" if len(each.runs) > NAMED else ""
        where = f" Run{'s' if len(each.runs) > 1 else ''} {', '.join(names)}{more}." if names and len(runs) > 1 else ""
        advice = f" <em>What to change: {page.escape(each.advice)}.</em>" if each.advice else ""
        items.append(
            f'<li class="{each.level}"><span class="mark">{LEVELS[each.level]}.</span> '
            f"<strong>{page.escape(each.subject)}:</strong> {page.escape(each.text)}{where}{advice}</li>"
        )
    return f'<ul class="trust">{"".join(items)}</ul>'


def listed(runs: Sequence[Run], metric: str, out: Path) -> str:
    """Return the table of runs; their names are the paths below the directory that holds them all."""
    common = os.path.commonpath([run.path.resolve() for run in runs])
    names = [os.path.relpath(run.path.resolve(), common) if len(runs) > 1 else run.path.name for run in runs]
    head, rows = tables.of_runs(runs, [one_line(name, 80) for name in names], metric, out)
    return page.table("all-runs", head, rows, head.index("status") + 1, None)


def facts(directories: Sequence[Path], runs: Sequence[Run], groups: Sequence[Group], metric: str, mode: str) -> str:
    """Return the line below the title."""
    statuses = ", ".join(f"{count} {printable(status)}" for status, count in sorted(Counter(run.status for run in runs).items()))
    better = "higher" if mode == "max" else "lower"
    many = f"{len(runs)} runs in {len(groups)} groups" if len(runs) > 1 else "one run"
    places = one_line(", ".join(map(str, directories)), 200)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{many} ({statuses}), compared by {printable(metric)} ({better} is better). From {places}, on {now}."


def terminal(groups: Sequence[Group], metric: str, mode: str, said: str, best: str, found: Sequence[Finding]) -> list[str]:
    """Return the lines for a terminal: the best groups, the command line, and what to know about the numbers."""
    head, rows, _ = tables.of_groups(groups, metric, mode)
    shown = rows if len(rows) < LINES else rows[: LINES - 2]
    lines = [aligned([head, *([cell.text for cell in row] for row in shown)])]
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} more lines, in the page")
    lines += [said, verdict(found, groups[0].winner(metric, mode))]
    several = sum(len(each.runs) for each in groups) > 1
    for each in found:
        if each.level != "good":
            names = ", ".join([*(run.name for run in each.runs[:NAMED]), *(["..."] if len(each.runs) > NAMED else [])])
            where = f" Run{'s' if len(each.runs) > 1 else ''} {names}." if names and several else ""
            advice = f" What to change: {each.advice}." if each.advice else ""
            lines.append(f"{LEVELS[each.level].lower()}: {each.subject}: {each.text}{where}{advice}")
    return [*map(printable_lines, lines), *([f"best: {best}"] if best else [])]


def printable_lines(text: str) -> str:
    """Return text with its line breaks, but without other characters that control a terminal."""
    return printable(text, keep="\n")


def write(out: Path, draws: Mapping[str, Draw | None]) -> None:
    """Write the figures as PNGs, and remove those of an earlier report."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make {out}: {error.strerror}; change --out") from error
    for name, draw in draws.items():
        (out / f"{name}.png").unlink(missing_ok=True)
        if draw is not None:
            write_bytes(out / f"{name}.png", png(draw))
