"""Runs as they lie on the disk: found below directories, read whole, or left out with the reason. Free of torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperopt.app.directory import status_of
from hyperopt.app.experiment import plain_leaves
from hyperopt.data.reading import UnreadableError, parse_yaml, read_json, read_json_lines, read_text, read_yaml

MARKS = ("summary.json", "job.json", "metrics.jsonl")
"""A directory with one of these holds a run."""


class ReportError(ValueError):
    """There is nothing to report on, or no way to write it; the message says what to change."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its directory.
        config: flat, ``{dotted key: value}``, without the copies that the resolved file holds under ``task``.
        overrides: ``{key: value}`` of the command line that made it, as text.
        rows: of ``metrics.jsonl``, in order; numbers that were not finite are NaN.
        summary: of ``summary.json``.
    """

    path: Path
    config: Mapping[str, Any]
    overrides: Mapping[str, str]
    rows: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any]

    @property
    def status(self) -> str:
        """How it ended: ``completed``, ``failed``, ``interrupted``, ...; else ``running`` or, if no process does, ``killed``."""
        return status_of(self.path, self.summary)

    def best(self, metric: str) -> float:
        """``metric`` at the best evaluation of the run, or as it was evaluated; NaN where it was not measured."""
        best = self.summary.get("best") or {}
        return number(((best.get("metrics") or self.summary.get("metrics")) or {}).get(metric))


def number(value: Any) -> float:
    """Return ``value`` as a float; NaN for what is none, such as the null that JSON keeps for a number that is not finite."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def find(directories: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run in or below ``directories``.

    Args:
        directories: of runs, of sweeps, or of anything that holds such.

    Returns:
        The runs, each once, in the order of their paths; and for each that is left out where it lies and why.

    Raises:
        ReportError: a directory is missing or holds no run, or none of the runs can be read.
    """
    paths: dict[Path, Path] = {}
    left_out: list[str] = []
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"there is no directory {directory}; name the directory of a run or of a sweep")
        found = {path.parent for mark in MARKS for path in directory.rglob(mark)}
        if not found:
            raise ReportError(
                f"{directory} holds no run: no {', '.join(MARKS)} in it or below; name the directory of a run or sweep"
            )
        paths.update((path.resolve(), path) for path in sorted(found, key=natural))
        left_out.extend(missing_jobs(directory))
    runs = []
    for path in paths.values():
        try:
            runs.append(read(path))
        except FileNotFoundError as error:
            left_out.append(f"{error.filename}: {error.strerror}")
        except UnreadableError as error:
            left_out.append(str(error))
    if not runs:
        raise ReportError("none of the runs can be read: " + "; ".join(left_out))
    return runs, left_out


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Return what sorts ``path`` with job 2 before job 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts]


def missing_jobs(directory: Path) -> Iterator[str]:
    """Yield the jobs that an index of a sweep lists though their directories are gone, and each index that cannot be read."""
    for index in sorted(directory.rglob("sweep.json")):
        try:
            jobs = [(str(job["directory"]), overrides_in(job)) for job in read_json(index)["jobs"]]
        except (FileNotFoundError, UnreadableError) as error:
            yield str(error)
        except (KeyError, TypeError, AttributeError):
            yield f"{index} is no index of a sweep"
        else:
            yield from (
                f"{index.parent / name} ({overrides}) is missing"
                for name, overrides in jobs
                if not os.path.isdir(index.parent / name)  # of any name: it may be none
            )


def read(path: Path) -> Run:
    """Read one run.

    Raises:
        FileNotFoundError: a file that every run has is missing.
        UnreadableError: a file is not what it should be.
    """
    return Run(path, config_of(path / "config.yaml"), overrides_of(path), rows_of(path / "metrics.jsonl"), summary_in(path))


def summary_in(path: Path) -> dict[str, Any]:
    """Return ``summary.json`` of the run in ``path``: its status and reason as text, its metrics as numbers.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is none.
    """
    found = read_json(path / "summary.json")
    best, metrics = found.get("best"), found.get("metrics")
    measured = best.get("metrics") if isinstance(best, dict) else None
    if not all(isinstance(each, dict | None) for each in (best, metrics, measured)):
        raise UnreadableError(f"{path / 'summary.json'} is no summary of a run")

    def finite(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if values is None else {name: each if math.isfinite(number(each)) else None for name, each in values.items()}

    text = {name: str(found[name])[:500] for name in ("status", "reason") if found.get(name) is not None}
    best = None if best is None else {**best, "metrics": finite(measured)}
    numbers = finite({name: found.get(name) for name in ("steps", "seconds")})
    return {**found, **text, **(numbers or {}), "metrics": finite(metrics), "best": best}


def rows_of(path: Path) -> list[dict[str, float]]:
    """Return the rows of ``metrics.jsonl``; none of a run without the file, and not a last line that is still being written."""
    rows = []
    try:
        for n, row in enumerate(read_json_lines(path), 1):
            rows.append({key: number(value) for key, value in row.items()})
            if not math.isfinite(rows[-1].get("step", math.nan)):
                raise UnreadableError(f"{path}, line {n}, is no row of metrics")
    except FileNotFoundError:
        return []
    return rows


def config_of(path: Path) -> dict[str, Any]:
    """Return the flat config of a run. Interpolations are not resolved: a file that was tampered with reads no environment."""
    flat = dict(plain_leaves(read_yaml(path)))
    if not flat:
        raise UnreadableError(f"{path} is not a config")
    return {key: value for key, value in flat.items() if not copied(key, flat)}


def copied(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether ``key`` repeats a part of the config, as ``task.solver.rtol`` repeats ``solver.rtol`` once resolved."""
    parts = key.split(".")
    shorter = (".".join(parts[k:]) for k in range(1, len(parts) - 1))
    return parts[0] == "task" and any(other in flat and flat[other] == flat[key] for other in shorter)


def overrides_of(path: Path) -> dict[str, str]:
    """Return the overrides that made a run by their keys; see ``given_overrides``."""
    parts = [each.lstrip("+").partition("=") for each in given_overrides(path)]
    return {key: value for key, _, value in parts}


def given_overrides(path: Path) -> list[str]:
    """Return the overrides that made a run, from ``job.json`` or else from what Hydra keeps; none where neither is there.

    Raises:
        UnreadableError: ``job.json`` is damaged. Of a run without it the config tells it apart.
    """
    try:
        return overrides_in(read_json(path / "job.json"))
    except FileNotFoundError:
        try:
            text = read_text(path / ".hydra" / "overrides.yaml")
            return overrides_in(parse_yaml(f"overrides:\n{text}", str(path)))
        except (FileNotFoundError, UnreadableError):
            return []


def overrides_in(job: Any) -> list[str]:
    """Return the overrides that a job's ``job.json`` or its line in the index of a sweep holds."""
    given = job.get("overrides")
    return [str(each) for each in given] if isinstance(given, list) else []
