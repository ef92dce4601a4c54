"""Runs on the disk: found below directories, and read completely or left out with a reason. This module imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperopt.app.run_directory import ENDED, RunDirectory, number, or_empty, overrides_in
from hyperopt.core.text import one_line
from hyperopt.data.reading import UnreadableError, read_json


class ReportError(ValueError):
    """There is nothing to report on, or the report cannot be written; the message says what to change."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its directory.
        config: the flat config, ``{dotted key: value}``, without the copies in the resolved file under ``task``.
        given: the overrides of the command line that started it, as text.
        rows: the rows of ``metrics.jsonl`` in order, with NaN for numbers that were not finite.
        summary: the content of ``summary.json``.
        status: ``completed``, ``failed``, ``interrupted``, ...; before its end ``running`` or, without a process, ``killed``.
        facts: the content of ``run.json``, empty if it cannot be read.
        verified: the content of ``check.json``, empty if there is none.
        job: its number in a sweep.
    """

    path: Path
    config: Mapping[str, Any]
    given: Sequence[str]
    rows: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any]
    status: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    verified: Mapping[str, Any] = field(default_factory=dict)
    job: int | None = None

    @property
    def overrides(self) -> dict[str, str]:
        """``given`` as ``{key: value}``."""
        parts = [each.lstrip("+").partition("=") for each in self.given]
        return {key: value for key, _, value in parts}

    @property
    def ended(self) -> bool:
        """Whether it ran to its end, so that it counts in a mean."""
        return self.status in ENDED.values()

    @property
    def name(self) -> str:
        """A short name for sentences: its number in the sweep, or the name of its directory."""
        return str(self.job) if self.job is not None and self.path.name == str(self.job) else one_line(self.path.name, 60)

    @property
    def study(self) -> str:
        """Name of the experiment, task and dataset."""
        described = self.facts.get("task")
        if isinstance(described, dict) and described.get("name"):
            task, dataset = described["name"], described.get("dataset")
        else:
            task, dataset = (str(self.config.get(f"{key}._target_", "")).rpartition(".")[2] for key in ("task", "dataset"))
        name = one_line(self.config.get("name") or self.path.name, 80)
        said = " on ".join(one_line(each, 60) for each in (task, dataset) if each)
        return f"{name}: {said}" if said not in ("", name) else name

    @property
    def reason(self) -> str:
        """Why it ended: a key, a signal or an error; empty if this is not known."""
        return str(self.summary.get("reason") or "")

    @property
    def monitor(self) -> tuple[str, str]:
        """The metric that it is compared by, and whether its ``min`` or its ``max`` is best."""
        if self.config.get("mode") == "check":
            return "hypergrad/error", "min"
        return str(self.config.get("trainer.monitor")), str(self.config.get("trainer.mode"))

    def best(self, metric: str) -> float:
        """Return ``metric`` at the best evaluation of the run, or at its only one; NaN if it was not measured."""
        best = self.summary.get("best") or {}
        return number(((best.get("metrics") or self.summary.get("metrics")) or {}).get(metric))


def find(directories: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run in or below ``directories``.

    Args:
        directories: directories of runs or sweeps, or directories that contain such.

    Returns:
        The runs, each once, in the order of their paths; and for each run that is left out, its path and the reason.

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
    """Return a key that sorts ``path`` with job 2 before job 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts]


def missing_jobs(directory: Path) -> Iterator[str]:
    """Yield the jobs in the index of a sweep whose directories are missing, and each index that cannot be read."""
    for index in sorted(directory.rglob(str(RunDirectory.index))):
        try:
            jobs = [(str(job["directory"]), overrides_in(job)) for job in read_json(index)["jobs"]]
        except (FileNotFoundError, UnreadableError) as error:
            yield str(error)
        except (KeyError, TypeError, AttributeError):
            yield f"{index} is not an index of a sweep"
        else:
            yield from (
                f"{index.parent / name} ({overrides}) is missing"
                for name, overrides in jobs
                if not os.path.isdir(index.parent / name)  # any text may be the name, even one that cannot be a path
            )


def read(directory: RunDirectory) -> Run:
    """Read one run.

    Raises:
        FileNotFoundError: a file that every run has is missing.
        UnreadableError: a file is not what it should be.
    """
    summary, job = directory.read_summary(), or_empty(read_json, directory.job).get("number")
    return Run(
        path=directory.path,
        config=directory.read_config(),
        given=directory.read_overrides(),
        rows=directory.read_rows(),
        summary=summary,
        status=directory.status(summary),
        facts=or_empty(read_json, directory.facts),
        verified=or_empty(read_json, directory.verified),
        job=job if isinstance(job, int) and not isinstance(job, bool) else None,
    )


def winners(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the content of ``best.json`` of each sweep that ``runs`` lie in, with ``sweep``, its directory."""
    found = []
    for sweep in dict.fromkeys(run.path.parent for run in runs):
        content = or_empty(read_json, RunDirectory(sweep).winners)
        lists = [content.get(key) for key in ("metric", "direction", "runs")]
        if all(isinstance(each, list) and each for each in lists):
            found.append({**content, "sweep": sweep})
    return found
