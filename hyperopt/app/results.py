"""What a sweep says: a line for each job that ends, and at the end the best jobs and what to do next. This imports no torch."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperopt.app.files import write_json
from hyperopt.app.run_directory import ENDED, RunDirectory, differing, measured, number
from hyperopt.core.text import aligned, printable

LINES = 20  # largest number of lines of the table
SHOWN = 60  # characters of an override in it


@dataclass(frozen=True)
class Goal:
    """What a sweep is compared by.

    Attributes:
        metrics: names of metrics.
        directions: ``minimize`` or ``maximize`` for each.
        jobs: the number of jobs, if it is known.
        options: overrides of Hydra's that every job needs, such as ``hydra.searchpath``.
    """

    metrics: Sequence[str]
    directions: Sequence[str]
    jobs: int | None = None
    options: Sequence[str] = field(default=())

    def values(self, job: Mapping[str, Any]) -> list[float]:
        """Return the metrics of a job so that less is better; infinite for one that it does not have."""
        found = measured(job, self.metrics).values() if job["status"] in ENDED.values() else [None] * len(self.metrics)
        signs = (1 if each == "minimize" else -1 for each in self.directions)
        known = (number(value) for value in found)
        return [math.inf if math.isnan(value) else sign * value for sign, value in zip(signs, known, strict=True)]

    def ranked(self, jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the jobs, the best first by the first metric; those without a value last."""
        return sorted(jobs, key=lambda job: (self.values(job), job["number"] is None, job["number"]))

    def best(self, jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the jobs than which no other is better in every metric: one if there is one metric."""
        known = [job for job in self.ranked(jobs) if all(map(math.isfinite, self.values(job)))]
        if len(self.metrics) == 1:
            return known[:1]

        def beaten(job: Mapping[str, Any]) -> bool:
            mine = self.values(job)
            others = (self.values(other) for other in known)
            return any(each != mine and all(a <= b for a, b in zip(each, mine, strict=True)) for each in others)

        return [job for job in known if not beaten(job)]

    def command(self, job: Mapping[str, Any]) -> str:
        """Return the command line that runs a job alone."""
        words = [*self.options, *job["overrides"]]
        if any(each.partition("=")[0] == "sweep" for each in words):  # it may set more than what is swept
            words.append("hydra.mode=RUN")
        return printable(shlex.join(["hyperopt", *words]))


def show_job(index: Mapping[str, Any], job: int, goal: Goal | None) -> None:
    """Say on stderr that a job has ended: a terminal shows one line that is written again, a file one line for each job.

    ``goal`` is None if what the sweep is compared by is not known in this process.
    """
    found = next((each for each in index["jobs"] if each["number"] == job), None)
    if found is None:
        return
    ended = sum(each["status"] not in ("running", "started") for each in index["jobs"])
    line = f"{ended}{f'/{goal.jobs}' if goal is not None and goal.jobs else ''} jobs"
    if goal is not None and len(goal.metrics) == 1 and (best := goal.best(index["jobs"])):
        line += f" (best: job {best[0]['number']}{_reached(best[0], goal)})"
    line += f": job {job} {found['status']}{'' if goal is None else _reached(found, goal)}"
    text = printable(f"hyperopt: {line} ({' '.join(found['overrides'])})")
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:110]}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr)


def conclude(sweep: Path, index: Mapping[str, Any], goal: Goal) -> str:
    """Write ``best.json``, and return the table of a sweep's jobs with the best command line and the next command."""
    jobs, best = goal.ranked(index["jobs"]), goal.best(index["jobs"])
    runs = [
        {
            "number": job["number"],
            "directory": job["directory"],
            "values": measured(job, goal.metrics),
            "overrides": job["overrides"],
            "command": goal.command(job),
        }
        for job in best
    ]
    write_json(RunDirectory(sweep).winners, {"metric": [*goal.metrics], "direction": [*goal.directions], "runs": runs})
    given = [dict(each.partition("=")[::2] for each in job["overrides"]) for job in jobs]
    varying = [key for key in differing(given) if key != "init_partial"]
    head = ["job", "status", *goal.metrics, "seconds", *varying]
    fits = len(jobs) + 1 <= LINES
    shown = jobs if fits else jobs[: LINES - 2]
    rows = [_row(job, goal, varying, "*" if len(best) > 1 and job in best else "") for job in shown]
    lines = [aligned([list(map(printable, each)) for each in (head, *rows)])]
    if not fits:
        lines.append(f"and {len(jobs) - len(rows)} more, in {RunDirectory(sweep).index}")
    for status in sorted({job["status"] for job in jobs} - {*ENDED.values()}):
        numbers = sorted(job["number"] for job in jobs if job["status"] == status and job["number"] is not None)
        more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
        lines.append(f"{status}: {', '.join(map(str, numbers[:10]))}{more}")
    if len(best) > 1:
        lines.append(f"* no other job is better in all of {', '.join(goal.metrics)}")
    lines += [f"best (job {job['number']}): {goal.command(job)}" for job in best[:1]]
    lines.append(f"next: {shlex.join(['hyperopt', 'report', str(sweep)])}")
    return "\n".join(lines)


def _row(job: Mapping[str, Any], goal: Goal, varying: Sequence[str], mark: str) -> list[str]:
    """Return the line of a job in the table."""
    values = dict(each.partition("=")[::2] for each in job["overrides"])
    numbers = map(_cell, measured(job, goal.metrics).values())
    seconds = number(job["seconds"])
    told = "" if math.isnan(seconds) else f"{seconds:.1f}"
    return [f"{job['number']}{mark}", job["status"], *numbers, told, *(values.get(key, "")[:SHOWN] for key in varying)]


def _reached(job: Mapping[str, Any], goal: Goal) -> str:
    """Return what a job has reached, for the middle of a sentence."""
    return "".join(f", {name} {_cell(value)}" for name, value in measured(job, goal.metrics).items() if value is not None)


def _cell(value: Any) -> str:
    found = number(value)
    return "" if math.isnan(found) else f"{found:.5g}"
