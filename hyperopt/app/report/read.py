"""Runs as they lie on the disk: found below directories, read whole, or left out with the reason. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperopt.app.run_directory import RunDirectory, number, overrides_in
from hyperopt.data.reading import UnreadableError, read_json


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
        return RunDirectory(self.path).status(self.summary)

    def best(self, metric: str) -> float:
        """``metric`` at the best evaluation of the run, or as it was evaluated; NaN where it was not measured."""
        best = self.summary.get("best") or {}
        return number(((best.get("metrics") or self.summary.get("metrics")) or {}).get(metric))


def find(directories: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run in or below ``directories``.

    Args:
        directories: of runs, of sweeps, or of anything that holds such.

    Returns:
        The runs, each once, in the order of their paths; and for each that is left out where it lies and why.

    Raises:
        ReportError: a directory is missing or holds no run, or none of the runs can be read.
    """
    paths: dict[Path, RunDirectory] = {}
    left_out: list[str] = []
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"there is no directory {directory}; name the directory of a run or of a sweep")
        found = RunDirectory.below(directory)
        if not found:
            marks = ", ".join(str(each.path) for each in RunDirectory.FOUND_BY)
            raise ReportError(f"{directory} holds no run: no {marks} in it or below; name the directory of a run or sweep")
        paths.update((run.path.resolve(), run) for run in sorted(found, key=lambda run: natural(run.path)))
        left_out.extend(missing_jobs(directory))
    runs = []
    for run in paths.values():
        try:
            runs.append(read(run))
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
    for index in sorted(directory.rglob(str(RunDirectory.index))):
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


def read(directory: RunDirectory) -> Run:
    """Read one run.

    Raises:
        FileNotFoundError: a file that every run has is missing.
        UnreadableError: a file is not what it should be.
    """
    parts = [each.lstrip("+").partition("=") for each in directory.read_overrides()]
    overrides = {key: value for key, _, value in parts}
    return Run(directory.path, directory.read_config(), overrides, directory.read_rows(), directory.read_summary())
