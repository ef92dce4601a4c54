"""May the numbers of the runs be trusted? This says what they recorded, and what to change where something failed. No torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hyperopt.app.report.read import Run
from hyperopt.app.rows import spans
from hyperopt.app.run_directory import ENDED, number
from hyperopt.core.statuses import Status
from hyperopt.core.text import one_line

ERROR, ESTIMATE, BOUND, NORM = "hypergrad/error", "hypergrad/error_estimate", "hypergrad/is_bound", "hypergrad/norm"
GOOD, BAD = 0.01, 0.1
"""Relative residuals, and errors of a hypergradient relative to its norm: good up to the first, bad above the second."""
SOLVES = {"inner": "solver", "adjoint": "adjoint"}
"""What is solved, and the group of keys that says how. A trained inner problem has ``inner`` in place of ``solver``."""
KEYS = {"inner": ("solver.* (inner.* where weights are trained)", "solver"), "adjoint": ("adjoint.linear_solver.*", "adjoint")}
STATUSES: dict[Status, tuple[str, str]] = {
    Status.converged: ("met their tolerance", ""),
    Status.fixed_steps: ("took a fixed number of steps, as asked for; their residuals were not compared with a tolerance", ""),
    Status.max_steps: ("did not meet their tolerance", "raise max_steps or loosen rtol of {keys}, or choose another {group}"),
    Status.stagnated: ("stopped improving above their tolerance", "set precision=float64, or loosen rtol of {keys}"),
    Status.coupled_rows: ("had rows that depend on each other", "solve them together: rows=joint, or drop_rows=false"),
    Status.breakdown: ("broke down (a division by zero or a singular system)", "choose another {group}"),
    Status.negative_curvature: (
        "met a direction of negative curvature",
        "set adjoint=minres, or add a quadratic penalty to the inner loss",
    ),
    Status.diverged: (
        "diverged: the map does not contract there",
        "set solver=anderson and adjoint=gmres, lower optimizer.lr, or bound the map's Jacobian (task/cell=projected)",
    ),
    Status.nonfinite: ("met a NaN or an infinity", "lower optimizer.lr, or check the data"),
}
"""What a solve that ended so did, and which keys to change."""

Level = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One sentence on the runs.

    Attributes:
        level: whether all is well, something should be known, or something is wrong.
        subject: what it is about.
        text: the sentence.
        advice: what to change, if something is wrong.
        runs: the runs that it is about; empty for all of them.
    """

    level: Level
    subject: str
    text: str
    advice: str = ""
    runs: Sequence[Run] = ()


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Return what is to be said of the runs, subject by subject."""
    about = (endings, failures, standing, solves, residuals, certificates, fallbacks, replays, checks, sources)
    return [finding for each in about for finding in each(runs)]


def count(many: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{many} {what}{'' if many == 1 else 's'}"


def values(run: Run, name: str) -> list[float]:
    """Return all values of a metric; NaN where it was not finite."""
    return [row[name] for row in run.rows if name in row]


def endings(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say how many runs ran to their end, and what became of those that did not; ``failures`` has those that failed."""
    well = sum(run.ended for run in runs)
    if well == len(runs):
        yield Finding("good", "Statuses", f"{'The run' if well == 1 else f'All {well} runs'} ran to the end.")
        return
    level = "good" if all(run.ended or run.status == "pruned" for run in runs) else "note"
    yield Finding(
        level, "Statuses", f"{well} of {count(len(runs), 'run')} ran to the end. Only these count in means and as best."
    )
    told = {
        "pruned": ("note", "stopped early by the search, because others were better at the same step; this is no error", ""),
        "running": ("note", "still running", "make the report again when they have ended"),
        "interrupted": ("note", "stopped by a signal after a checkpoint", "continue with resume=auto"),
        "killed": ("bad", "killed: their process is gone, and they could not say why", "continue with resume=auto"),
    }
    for status in dict.fromkeys(run.status for run in runs):
        found = [run for run in runs if run.status == status]
        if status in ENDED.values() or status == "failed":
            continue
        level, text, advice = told.get(status, ("note", f"{one_line(status, 60)}", ""))
        yield Finding(level, one_line(status, 60).capitalize(), f"{count(len(found), 'run')}: {text}.", advice, found)  # pyright: ignore[reportArgumentType]


def failures(runs: Sequence[Run]) -> Iterable[Finding]:
    """Name each error that runs failed with; the errors themselves name the key to change, except those of other packages."""
    failed = [run for run in runs if run.status == "failed"]
    for reason in dict.fromkeys(run.reason for run in failed):
        same = [run for run in failed if run.reason == reason]
        text = f"{count(len(same), 'run')} failed: {one_line(reason or 'the reason was not recorded', 400)}."
        advice = "see FAILED in the run's directory for the whole error; resume=auto runs only these again once it is mended"
        if swept := _only_of(same, runs):
            advice = f"all failed runs have {swept}, and no other run has: change that; {advice}"
        yield Finding("bad", "Failed", text, advice, same)


def _only_of(some: Sequence[Run], runs: Sequence[Run]) -> str:
    """Return an override that all of ``some`` have, and no other run; empty if there is none."""
    others = [run for run in runs if all(run is not each for each in some)]
    for key, value in some[0].overrides.items():
        if (
            others
            and all(run.overrides.get(key) == value for run in some)
            and all(run.overrides.get(key) != value for run in others)
        ):
            return one_line(f"{key}={value}", 120)
    return ""


def standing(runs: Sequence[Run]) -> Iterable[Finding]:
    """Name the runs whose hypergradient was zero at every step, so that nothing was tuned."""
    still = [run for run in runs if (found := values(run, NORM)) and not any(found)]
    warming = [run for run in still if values(run, "stn/warming")[-1:] == [1.0]]
    if warming:
        advice = "raise trainer.max_steps, or lower stn.warmup"
        yield Finding("bad", "Hyperparameters", "They never moved: the warm-up was not over when the run ended.", advice, warming)
    if others := [run for run in still if run not in warming]:
        advice = "check that the outer loss depends on the state or on the hyperparameters"
        yield Finding("bad", "Hyperparameters", "They never moved: the hypergradient was 0 at every step.", advice, others)


def solves(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say how the solves ended: one finding for each status, and one if no run solves anything."""
    codes = {int(status): status for status in Status}
    for part in SOLVES:
        ends = {id(run): [code for code in values(run, f"{part}/status") if math.isfinite(code)] for run in runs}
        total = sum(map(len, ends.values()))
        if not total:
            continue
        counts = Counter(int(code) for codes in ends.values() for code in codes)
        fine = counts.pop(0, 0)
        if not counts:
            yield Finding("good", f"The {part} solves", f"All {total} of them met their tolerance.")
        for code, many in sorted(counts.items()):
            status = codes.get(code)
            name = f"status {code}" if status is None else status.name
            what, change = ("ended in a way that this version does not know", "") if status is None else STATUSES[status]
            level: Level = "good" if status is Status.fixed_steps else "bad"
            share = f"All {total}" if many == total else f"{many} of {total}"
            keys, group = KEYS[part]
            yield Finding(
                level,
                f"The {part} solves",
                f"{share} {what} ({name}).",
                change.format(keys=keys, group=group),
                [run for run in runs if code in ends[id(run)]] if many < total else (),
            )
        if counts and fine and set(counts) == {1}:
            yield Finding("good", f"The {part} solves", f"The other {fine} met their tolerance.")
    if any(run.rows for run in runs) and not any(values(run, f"{part}/status") for run in runs for part in SOLVES):
        yield Finding(
            "note",
            "Solves",
            "These runs recorded no fixed point and no adjoint system, as self-tuning networks and single-loop methods do not "
            "solve them, so nothing below says how exact their hypergradients are.",
            "compare several seeds, and val/* with test/*",
        )


def residuals(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say how large the residuals were."""
    told, largest = [], 0.0
    for part in SOLVES:
        worst = [(max(found), run) for run in runs if (found := [r for r in values(run, f"{part}/residual") if math.isfinite(r)])]
        if worst:
            most, run = max(worst, key=lambda each: each[0])
            largest = max(largest, most)
            told.append(f"{part} {most:.1e}" + (f" in run {run.name}" if len(runs) > 1 else ""))
        if bad := [run for run in runs if any(math.isnan(r) for r in values(run, f"{part}/residual"))]:
            yield Finding(
                "bad", "Residuals", f"The {part} residual was not finite at some steps.", STATUSES[Status.nonfinite][1], bad
            )
    if told:
        level: Level = "good" if largest <= GOOD else "note" if largest <= BAD else "bad"
        yield Finding(level, "Residuals", f"The largest true relative residuals of all steps: {', '.join(told)}.")


def relative_errors(run: Run) -> list[tuple[float, bool]]:
    """Return the errors of a run's hypergradients as parts of their norms, NaN where unknown, and whether each is a bound."""
    rows = [row for row in run.rows if ESTIMATE in row and row.get(NORM, math.nan) > 0]
    return [(row[ESTIMATE] / row[NORM], row.get(BOUND) == 1.0) for row in rows]


def judged(errors: Sequence[tuple[float, bool]]) -> Level:
    """Return the level of relative errors. A large bound is no sign that something is wrong: it may only be loose."""
    if all(error <= GOOD for error, _ in errors):
        return "good"
    return "note" if all(error <= BAD for error, bound in errors if not bound) else "bad"


def certificates(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say how far the hypergradients may be from the exact ones."""
    errors = {id(run): relative_errors(run) for run in runs}
    known = [each for found in errors.values() for each in found if math.isfinite(each[0])]
    lost = [run for run in runs if any(math.isnan(error) for error, _ in errors[id(run)])]
    if known:
        sizes, bounds = [error for error, _ in known], [bound for _, bound in known]
        worst, middle = max(sizes), statistics.median(sizes)
        kind = "bounds" if all(bounds) else "estimates, not bounds" if not any(bounds) else "partly bounds, partly estimates"
        level = judged(known)
        loose = (
            " Bounds as large as this do not show an error; they only do not rule it out."
            if level == "note" and worst > BAD
            else ""
        )
        yield Finding(
            level,
            "Certificates",
            f"The error of the hypergradient is {_share(middle)} in the median and at most {_share(worst)}, "
            f"from {count(len(known), 'certificate')} ({kind}).{loose}",
            "" if level == "good" else "lower rtol or raise max_steps of solver and adjoint, and run hyperopt check",
            [] if level == "good" else [run for run in runs if any(error > GOOD for error, _ in errors[id(run)])],
        )
    if lost:
        yield Finding(
            "bad",
            "Certificates",
            "Some hypergradients have no error estimate, since the contraction factor was 1 or more there, or not known.",
            "choose a solver and an adjoint that do not need a contraction (anderson, gmres), or run hyperopt check",
            lost,
        )
    if not known and not lost and not any(run.verified for run in runs):
        yield Finding(
            "note",
            "Certificates",
            "No hypergradient of these runs has a certificate.",
            "hyperopt check compares one with references",
        )


def _share(value: float) -> str:
    return f"{100 * value:.2g} % of its norm" if value < 1 else f"{value:.2g} times its norm"


def fallbacks(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say whether a solve had to be repeated by another method."""
    measured = False
    for part, group in SOLVES.items():
        counts = {id(run): sum(value > 0 for value in values(run, f"{part}/fallbacks")) for run in runs}
        measured = measured or any(values(run, f"{part}/fallbacks") for run in runs)
        if total := sum(counts.values()):
            found = [run for run in runs if counts[id(run)]]
            text = f"In {count(total, 'step')} the first method of the {part} solve failed, and another one gave the result."
            yield Finding("note", "Fallbacks", text, f"choose another {group}, which saves the failed attempt", found)
            measured = False
    if measured:
        yield Finding("good", "Fallbacks", "Each solve was done by the method that was asked for.")


def replays(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say which runs were continued or have lost rows, and whether equal configs gave equal numbers."""
    again = [run for run in runs if isinstance(run.facts.get("resumed"), list) and run.facts["resumed"]]
    if again:
        text = (
            f"{count(len(again), 'run')} was stopped and continued."
            if len(again) == 1
            else f"{len(again)} runs were stopped and continued."
        )
        yield Finding("note", "Replays", f"{text} A continued run repeats the numbers of one that was never stopped.", "", again)
    for run in runs:
        lost = run.summary.get("lost_rows")
        if isinstance(lost, list) and lost:
            pairs = [each for each in lost if isinstance(each, list) and len(each) == 2]
            yield Finding(
                "bad", "Replays", f"The rows of {one_line(spans(pairs), 200)} are lost.", "run it again for a whole curve", [run]
            )
    twins: dict[str, list[Run]] = {}
    for run in runs:
        if run.ended and run.rows:
            twins.setdefault(
                repr(sorted((key, repr(value)) for key, value in run.config.items() if not key.startswith("paths."))), []
            ).append(run)
    pairs = [found for found in twins.values() if len(found) > 1]
    equal = [found for found in pairs if all(_numbers(run) == _numbers(found[0]) for run in found)]
    if equal:
        several = [run for found in equal for run in found]
        yield Finding(
            "good",
            "Replays",
            f"{len(several)} runs repeat the config and seed of another, and its numbers to the last bit.",
            "",
            several,
        )
    for found in pairs:
        if all(found is not each for each in equal):
            advice = "compare run.json of the two: versions, device, threads"
            yield Finding("note", "Replays", "Runs of the same config and seed gave different numbers.", advice, found)


def _numbers(run: Run) -> list[str]:
    """Return all that a run measured but times, as text, in which NaN equals NaN."""
    return [repr(sorted((key, value) for key, value in row.items() if not key.startswith("time/"))) for row in run.rows]


def checks(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say what ``hyperopt check`` found."""
    for run in runs:
        if run.verified:
            passed = run.verified.get("passed") is True
            error = number((run.summary.get("metrics") or {}).get(ERROR))
            text = f"The hypergradient {'agrees' if passed else 'does not agree'} with its references"
            text += "." if math.isnan(error) else f"; the largest relative error is {error:.2g}."
            yield Finding(
                "good" if passed else "bad", "Check", text, "" if passed else "see check.json, solver and adjoint", [run]
            )


def sources(runs: Sequence[Run]) -> Iterable[Finding]:
    """Say whether the runs were made by different code, versions, devices or precisions."""

    def of(read: Callable[[Run], object]) -> list[str]:
        return sorted({one_line(found, 60) for run in runs if (found := read(run)) is not None})

    def part(run: Run, name: str, key: str) -> object:
        found = run.facts.get(name)
        return found.get(key) if isinstance(found, dict) else None

    kinds = {
        "commits": of(lambda run: str(value)[:12] if (value := part(run, "git", "hash")) else None),
        "versions of torch": of(lambda run: part(run, "versions", "torch")),
        "devices": of(lambda run: part(run, "device", "model")),
        "precisions": of(lambda run: run.facts.get("precision")),
    }
    told = [
        f"{len(found)} {kind} ({', '.join(found[:4])}{', …' if len(found) > 4 else ''})"
        for kind, found in kinds.items()
        if len(found) > 1
    ]
    if told:
        yield Finding(
            "note", "Sources", f"The runs come from {'; '.join(told)}.", "repeat those to be compared under the same conditions"
        )
    if changed := [run for run in runs if part(run, "git", "dirty") is True]:
        yield Finding("note", "Sources", "The code had changes that were not committed when some runs started.", "", changed)
