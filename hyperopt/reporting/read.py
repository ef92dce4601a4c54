"""Runs as they lie on the disk: found below directories, read whole, or left out with the reason. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

MARKS = ("summary.json", "job.json", "metrics.jsonl")
"""A directory with one of these holds a run."""


class ReportError(ValueError):
    """There is nothing to report on, or no way to write it; the message says what to change."""


class Broken(ValueError):
    """A file of a run cannot be read; the message names it."""


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
        """How it ended: ``completed``, ``failed``, ``interrupted``, ``running``, ..."""
        return "failed" if (self.path / "FAILED").exists() else str(self.summary.get("status", "started"))

    def best(self, metric: str) -> float:
        """``metric`` at the best evaluation of the run, or as it was evaluated; NaN where it was not measured."""
        best = self.summary.get("best") or {}
        return number(((best.get("metrics") or self.summary.get("metrics")) or {}).get(metric))


def number(value: Any) -> float:
    """Return ``value`` as a float; NaN for what is none, such as the null that JSON keeps for a number that is not finite."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


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
        except Broken as error:
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
            jobs = [(str(job["directory"]), job.get("overrides", [])) for job in json_object(index)["jobs"]]
        except Broken as error:
            yield str(error)
        except (KeyError, TypeError, AttributeError):
            yield f"{index} is no index of a sweep"
        else:
            yield from (
                f"{index.parent / name} ({overrides}) is missing"
                for name, overrides in jobs
                if not (index.parent / name).is_dir()
            )


def read(path: Path) -> Run:
    """Read one run.

    Raises:
        Broken: a file that every run has is missing, or cannot be read.
    """
    return Run(
        path,
        config_of(path / "config.yaml"),
        overrides_of(path),
        rows_of(path / "metrics.jsonl"),
        json_object(path / "summary.json"),
    )


def text(path: Path) -> str:
    """Return a text file; ``Broken`` where it is missing or none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Broken(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Broken(f"{path} is not text") from error


def json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        found = json.loads(text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Broken):
            raise
        raise Broken(f"{path} is not JSON") from error
    if not isinstance(found, dict):
        raise Broken(f"{path} holds no JSON object")
    return found


def rows_of(path: Path) -> list[dict[str, float]]:
    """Return the rows of ``metrics.jsonl``; none of a run without the file, and not a last line that is still being written."""
    if not path.exists():
        return []
    whole, _, _ = text(path).rpartition("\n")
    rows = []
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({str(key): number(value) for key, value in row.items()})
            int(rows[-1]["step"])
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise Broken(f"{path}, line {n}, is no row of metrics") from error
    return rows


def config_of(path: Path) -> dict[str, Any]:
    """Return the flat config of a run. Interpolations are not resolved: a file that was tampered with reads no environment."""
    content = text(path)
    try:
        tree = OmegaConf.to_container(OmegaConf.create(content), resolve=False)
    except Exception as error:  # the loader has a dozen kinds of its own
        raise Broken(f"{path} is not a config") from error
    if not isinstance(tree, dict) or not tree:
        raise Broken(f"{path} is not a config")
    flat = dict(leaves(tree))
    return {key: value for key, value in flat.items() if not copied(key, flat)}


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)``; a list is a value."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def copied(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether ``key`` repeats a part of the config, as ``task.solver.rtol`` repeats ``solver.rtol`` once resolved."""
    parts = key.split(".")
    shorter = (".".join(parts[k:]) for k in range(1, len(parts) - 1))
    return parts[0] == "task" and any(other in flat and flat[other] == flat[key] for other in shorter)


def overrides_of(path: Path) -> dict[str, str]:
    """Return the overrides that made a run, from ``job.json`` or else from what Hydra keeps; none where neither is there."""
    try:
        if (path / "job.json").exists():
            given = json_object(path / "job.json").get("overrides", [])
        else:
            given = OmegaConf.to_container(OmegaConf.load(path / ".hydra" / "overrides.yaml"), resolve=False)
    except Broken:
        raise
    except Exception:  # no such file, or a damaged one: the config tells the runs apart
        given = []
    parts = [str(each).lstrip("+").partition("=") for each in given] if isinstance(given, list) else []
    return {key: value for key, _, value in parts}
