"""What a report concludes: the best settings and how sure that is, command lines to copy, and what to run next. No torch."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperopt.app.report.groups import Group
from hyperopt.app.report.read import Run
from hyperopt.app.results import Goal
from hyperopt.core.text import one_line, printable

SEEDS = 3
"""A mean over fewer seeds says little of the spread."""
ELSEWHERE = ("hydra", "paths", "resume", "accept_lost_rows", "mode", "ckpt_path")
"""First parts of keys that say where or how a run was made; a command line that is suggested has none of them."""


@dataclass(frozen=True)
class Step:
    """What to do next: why, and a command line (empty if there is none)."""

    why: str
    command: str = ""


def command_of(run: Run, winners: Sequence[Mapping[str, Any]]) -> str:
    """Return the command line that makes a run again.

    It is that of ``best.json`` (see ``read.winners``), which knows options that all jobs shared, or else ``hyperopt`` with the
    overrides of the run. The words are quoted here, so that a text from elsewhere can start no other program.
    """
    for found in winners:
        for each in found["runs"]:
            if isinstance(each, dict) and str(each.get("directory")) == run.path.name and run.path.parent == found["sweep"]:
                try:
                    words = shlex.split(str(each.get("command")))
                except ValueError:
                    continue
                if words[:1] == ["hyperopt"] and set(run.given) <= set(words):
                    return printable(shlex.join(words))
    return Goal([], []).command({"overrides": [each for each in run.given if key_of(each) not in ("hydra", "resume")]})


def key_of(override: str) -> str:
    """Return the first part of an override's key."""
    return override.lstrip("+~").partition("=")[0].partition("/")[0].partition(".")[0]


def warning(command: str) -> str:
    """Return what to know before a command line is copied, or an empty text."""
    names = sorted({key_of(word) for word in shlex.split(command)[1:]} & {"allow_targets", "hydra"})
    what = "runs code of the packages that it names" if "allow_targets" in names else "reads configs from the place that it names"
    return f"This command line has {' and '.join(names)}, so it {what}: copy it only if these runs are yours." if names else ""


def conclusion(groups: Sequence[Group], metric: str, mode: str) -> str:
    """Return in a sentence or two which settings are best, and how sure that is; the best of ``groups`` is the first."""
    known = [each for each in groups if each.values(metric)]
    if not known:
        return f"No run ran to its end with a finite {metric}, so none is best."
    best, found = known[0], known[0].values(metric)
    label = best.label if best.settings else ("This run" if len(best.runs) == 1 else "The runs")
    said = f"{label}: {metric} {_number(found)}"
    winner = best.winner(metric, mode)
    held_out = {name: winner.best(name) for name in ("test/accuracy", "test/loss")} if winner is not None else {}
    shown = [f"{name} {value:.4g}" for name, value in held_out.items() if name != metric and math.isfinite(value)]
    if shown:
        said += f"; on rows held out from the choice, {' and '.join(shown)}" + (
            f" in run {winner.name}" if winner and len(best.runs) > 1 else ""
        )
    said += "."
    if len(known) > 1:
        second = known[1].values(metric)
        gap = abs(statistics.fmean(found) - statistics.fmean(second))
        said += f" The next best, {known[1].label}, has {_number(second)}."
        if min(len(found), len(second)) < 2:
            said += " One run does not say how far the seeds scatter."
        elif gap <= math.hypot(statistics.stdev(found), statistics.stdev(second)):
            said += " The two differ by less than their runs scatter: this is not decided."
    return said


def _number(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g} over {len(values)} runs"


def next_steps(runs: Sequence[Run], groups: Sequence[Group], metric: str, mode: str) -> list[Step]:
    """Return what to run next; the arguments are those of ``conclusion``, and all runs."""
    steps = []
    unfinished = [run for run in runs if run.status in ("killed", "interrupted")]
    if unfinished:
        steps.append(Step(f"{len(unfinished)} of the runs stopped before the end. Continue them:", continued(unfinished[0])))
    known = [each for each in groups if each.values(metric)]
    if not known:
        return steps
    best = known[0]
    run = best.winner(metric, mode)
    if run is None or run.status != "completed":
        return steps
    own = [each for each in run.given if key_of(each) not in (*ELSEWHERE, "seed") and not each.startswith("~")]
    options = [each for each in run.given if each.startswith("hydra.searchpath=")]
    last = run.rows[-1]["step"] if run.rows else math.nan
    length = run.config.get("trainer.max_steps")
    if (run.summary.get("best") or {}).get("step") == last and run.reason == "trainer.max_steps" and isinstance(length, int):
        longer = [*(each for each in own if not each.startswith("trainer.max_steps=")), f"trainer.max_steps={2 * length}"]
        steps.append(
            Step("The best run was still improving when trainer.max_steps ended it. Run it longer:", _command(options + longer))
        )
    seeds = len(best.values(metric))
    if seeds < SEEDS:
        why = f"The best settings have {seeds} seed{'' if seeds == 1 else 's'}. See how far seeds scatter:"
        steps.append(Step(why, f"{_command(options + own)} -m seed=0,1,2,3,4"))
    steps += [Step(each) for each in edges(known)]
    steps.append(
        Step("Is its hypergradient right? Compare it with references:", f"hyperopt check {_command(options + own)[9:]}".rstrip())
    )
    steps.append(
        Step("Take what the best run has learned with you:", shlex.join(["hyperopt", "export", printable(str(run.path))]))
    )
    return steps


def _command(words: Sequence[str]) -> str:
    return printable(shlex.join(["hyperopt", *words]))


def edges(known: Sequence[Group]) -> list[str]:
    """Say for which numeric settings the best value is the smallest or the largest of those that were tried."""
    found = []
    for key, value in known[0].settings.items():
        tried = {each.settings[key] for each in known}
        if len(tried) > 2 and all(isinstance(each, int | float) for each in tried) and value in (min(tried), max(tried)):
            kind, more = ("smallest", "smaller") if value == min(tried) else ("largest", "larger")
            found.append(f"{printable(key)}={value:g} is the {kind} value that ran to the end: try {more} ones.")
    return found


def continued(run: Run) -> str:
    """Return the command line that continues a run, or the sweep that it is a job of."""
    argv = run.facts.get("argv")
    if run.job is not None and isinstance(argv, list) and len(argv) > 1:
        words = [one_line(each, 2000) for each in argv[1:] if not str(each).startswith("resume=")]
        return shlex.join(["hyperopt", *words, "resume=auto"])
    own = [each for each in run.given if key_of(each) not in ("hydra", "resume")]
    return _command([*own, f"hydra.run.dir={run.path}", "resume=auto"])
