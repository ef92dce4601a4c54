"""The files of one run: all their names, who may write them, and how each small file is written and read back.

A directory may come from someone else. One with a link, a pipe or a device where a run writes is therefore refused before
anything is written, and only plain data is read. The directory itself may be reached through links. This module imports no
torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hyperopt.app.experiment import differences, flatten, plain_leaves
from hyperopt.app.files import foreign, make_directory, remove_leftovers, why_foreign, write_bytes, write_text, writing
from hyperopt.app.lock import LOCK, LockedDirectory, RunDirectoryError
from hyperopt.data.reading import UnreadableError, parse_yaml, read_json, read_json_lines, read_text, read_yaml

ENDED = {"train": "completed", "evaluate": "evaluated", "check": "checked"}
"""The status of a run that has ended well, by its mode."""


class _Name:
    """A name in a run directory: the full path as an attribute of an instance, the relative path for the class."""

    def __init__(self, name: str) -> None:
        self.path = Path(name)

    def __get__(self, run: RunDirectory | None, owner: type[RunDirectory]) -> Path:
        return self.path if run is None else run.path / self.path


class RunDirectory(LockedDirectory):
    """The directory of one run, or of a sweep, each of whose jobs has its own run directory; see ``LockedDirectory``."""

    metrics = _Name("metrics.jsonl")  # one row for each step
    config = _Name("config.yaml")  # resolved, without Hydra's part
    facts = _Name("run.json")  # where, when and with what the run was started
    summary = _Name("summary.json")  # how the run stands or ended
    job = _Name("job.json")  # the number and overrides of a job of a sweep
    failed = _Name("FAILED")  # the traceback of a run that failed
    verified = _Name("check.json")  # the result of mode=check
    checkpoints = _Name("checkpoints")
    last = _Name("checkpoints/last.pt")
    previous = _Name("checkpoints/last.prev.pt")  # the one before, in case the disk damages the last
    best = _Name("checkpoints/best.pt")
    figures = _Name("figures")
    tb = _Name("tb")  # TensorBoard's events, in a folder with the name that it shows
    tracked = _Name("tracker.json")  # the run of MLflow or Weights & Biases
    hydra = _Name(".hydra")
    overrides = _Name(".hydra/overrides.yaml")
    export = _Name("export")
    report = _Name("report")
    index = _Name("sweep.json")  # the jobs of a sweep
    winners = _Name("best.json")  # the best jobs of a sweep
    index_lock = _Name(".sweep.lock")
    journal = _Name("search.journal")  # Optuna's study of a search, and its lock
    journal_lock = _Name("search.journal.lock")

    RUN = (metrics, summary, checkpoints)  # a directory with one of these holds a run, present or past
    FOUND_BY = (summary, job, metrics)  # a report takes a directory with one of these for a run
    LEFT = (*RUN, config, hydra, index, _Name("multirun.yaml"))  # what a run or a sweep leaves
    LOCKS = (LOCK, str(index_lock.path), str(journal_lock.path))
    IN_PLACE = (*LOCKS, str(metrics.path), str(journal.path), "*.log")  # changed in place, as all in tb/ and .hydra/ are
    FILES = (*IN_PLACE, *(str(each.path) for each in (config, facts, summary, job, failed, verified, tracked, index, winners)))
    FOLDERS = tuple(str(each.path) for each in (checkpoints, figures, tb, hydra))

    @classmethod
    def below(cls, directory: Path, *names: Path) -> list[RunDirectory]:
        """Return the run directories in and below ``directory``, which hold one of ``names`` (default: ``FOUND_BY``)."""
        found = {path.parent for name in names or [each.path for each in cls.FOUND_BY] for path in directory.rglob(str(name))}
        return [cls(path) for path in found]

    # What is there, and may it be written to?

    @property
    def held(self) -> list[str]:
        """The names of ``RUN`` that exist; empty for a directory without a run."""
        return [str(each.path) for each in self.RUN if (self.path / each.path).exists()]

    @property
    def used(self) -> bool:
        """Whether the directory exists and holds more than a lock."""
        return self.path.is_dir() and any(entry.name != self.lock.name for entry in self.path.iterdir())

    @property
    def left(self) -> bool:
        """Whether a run or a sweep has left something here."""
        return any((self.path / each.path).exists() for each in self.LEFT)

    def owns(self, checkpoint: str | Path | None) -> bool:
        """Whether ``checkpoint`` is a checkpoint of this run."""
        return checkpoint is not None and Path(checkpoint).resolve().parent == self.checkpoints.resolve()

    def goes_on(self, cfg: DictConfig) -> bool:
        """Whether the job may write here: it continues training, or repeats an evaluation, which leaves only a summary."""
        if cfg.mode != "train":
            return cfg.resume == "auto" and self.held == [self.summary.name]
        return cfg.resume == "auto" or self.owns(cfg.ckpt_path)

    def check_own(self, folders: Collection[str] = FOLDERS) -> None:
        """Refuse a directory with something in it that a run would write through: a link, a pipe, a device, a second name.

        Args:
            folders: the folders in it that a run writes to.

        Raises:
            RunDirectoryError: the message names what was found; nothing was changed.
        """
        nested = [f"{self.tb.name}/{each.name}" for each in sorted(self.tb.glob("*")) if each.is_dir() and not each.is_symlink()]
        for folder in ("", *folders, *(nested if self.tb.name in folders and not self.tb.is_symlink() else ())):
            where = self.path / folder
            if not where.is_dir():
                continue
            with writing(where):
                names = os.listdir(where)
            for name in names:
                try:
                    facts = os.lstat(where / name)
                except FileNotFoundError:  # a temporary file of the process that writes there
                    continue
                if stat.S_ISDIR(facts.st_mode):
                    wrong = not folder and any(fnmatch(name, each) for each in self.FILES)
                    what = "a directory where a file belongs" if wrong else None
                else:
                    replaced = folder in ("", self.checkpoints.name, self.figures.name)
                    what = why_foreign(facts, not replaced or any(fnmatch(name, each) for each in self.IN_PLACE))
                    what = what or ("a file where a directory belongs" if not folder and name in folders else None)
                if what is not None:
                    raise RunDirectoryError(foreign(where / name, what))

    def check(self, cfg: DictConfig, folders: Collection[str] = FOLDERS) -> None:
        """Refuse a directory that holds a run, unless the job continues it, and one that leads elsewhere (``check_own``)."""
        self.check_own(folders)
        if (held := self.held) and not self.goes_on(cfg):
            raise RunDirectoryError(
                f"{self.path} holds a run ({', '.join(held)}) and was left untouched; set hydra.run.dir to another directory, or "
                f"continue that run with resume=auto"
            )

    def status(self, summary: Mapping[str, Any]) -> str:
        """Return the status in the run's summary, or ``failed`` or ``killed`` if the run could not write that itself."""
        if self.failed.exists():
            return "failed"
        status = str(summary.get("status", "started"))
        return "killed" if status == "running" and self.running is False else status

    # Writing

    def begin(self, cfg: DictConfig) -> None:
        """Remove what an earlier attempt has left, and write ``config.yaml``; the caller must hold the lock."""
        self.failed.unlink(missing_ok=True)
        remove_leftovers(self.path, self.checkpoints, self.figures)
        own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        write_text(self.config, OmegaConf.to_yaml(own, resolve=True))

    def write_figure(self, name: str, image: bytes) -> None:
        """Write an image to ``figures/``."""
        make_directory(self.figures)
        write_bytes(self.figures / name, image)

    # Reading back

    def read_config(self, known: Collection[str] = ()) -> dict[str, Any]:
        """Return the flat config. Nothing is resolved, so that a manipulated file cannot read the environment.

        Args:
            known: keys of a config to compare it with. Other keys that repeat a part of the config are left out, as
                ``task.solver.rtol`` repeats ``solver.rtol`` once resolved.

        Raises:
            FileNotFoundError: there is no config.
            UnreadableError: the file is not a config.
        """
        flat = dict(plain_leaves(read_yaml(self.config)))
        if not flat:
            raise UnreadableError(f"{self.config} is not a config")

        def repeats(key: str) -> bool:
            parts = key.split(".")
            shorter = (".".join(parts[k:]) for k in range(1, len(parts) - 1))
            return parts[0] == "task" and any(other in flat and flat[other] == flat[key] for other in shorter)

        return {key: value for key, value in flat.items() if key in known or not repeats(key)}

    def differences(self, cfg: DictConfig) -> str:
        """Return what makes ``cfg`` another experiment than the run here; empty if it is the same, or there is no run."""
        config = flatten(cfg) if self.path.exists() else {}
        try:
            return differences(self.read_config(config), config)
        except FileNotFoundError:
            return ""

    def read_summary(self) -> dict[str, Any]:
        """Return ``summary.json``, with status and reason as text and metrics as numbers.

        Raises:
            FileNotFoundError: there is no summary.
            UnreadableError: the file is not a summary.
        """
        found = read_json(self.summary)
        best, metrics = found.get("best"), found.get("metrics")
        measured = best.get("metrics") if isinstance(best, dict) else None
        if not all(isinstance(each, dict | None) for each in (best, metrics, measured)):
            raise UnreadableError(f"{self.summary} is not the summary of a run")

        def finite(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
            if values is None:
                return None
            return {name: each if math.isfinite(number(each)) else None for name, each in values.items()}

        text = {name: str(found[name])[:500] for name in ("status", "reason") if found.get(name) is not None}
        best = None if best is None else {**best, "metrics": finite(measured)}
        numbers = finite({name: found.get(name) for name in ("steps", "seconds")})
        return {**found, **text, **(numbers or {}), "metrics": finite(metrics), "best": best}

    def read_rows(self) -> list[dict[str, float]]:
        """Return the rows of metrics, empty without the file; a last line that is still being written is left out.

        Raises:
            UnreadableError: a line is not a row; the message names it.
        """
        rows = []
        with contextlib.suppress(FileNotFoundError):
            for n, row in enumerate(read_json_lines(self.metrics), 1):
                rows.append({key: number(value) for key, value in row.items()})
                if not math.isfinite(rows[-1].get("step", math.nan)):
                    raise UnreadableError(f"{self.metrics}, line {n}, is not a row of metrics")
        return rows

    def read_overrides(self) -> list[str]:
        """Return the overrides that started the run, from ``job.json`` or else from Hydra's file; empty without either."""
        try:
            return overrides_in(read_json(self.job))
        except FileNotFoundError:
            with contextlib.suppress(FileNotFoundError, UnreadableError):
                return overrides_in(parse_yaml(f"overrides:\n{read_text(self.overrides)}", str(self.path)))
            return []


def overrides_in(job: Any) -> list[str]:
    """Return the overrides in a job's ``job.json`` or in its entry in the index of a sweep."""
    given = job.get("overrides")
    return [str(each) for each in given] if isinstance(given, list) else []


def number(value: Any) -> float:
    """Return ``value`` as a float, and NaN for anything else, such as the null that stands for NaN in JSON."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def measured(summary: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, float | None]:
    """Return the metrics at the best evaluation of a run, or at its only one; None for one that it does not have."""
    best = summary.get("best") or {}
    found = {**(summary.get("metrics") or {}), **(best.get("metrics") or {})}
    return {name: found.get(name, summary.get(name) if name in ("seconds", "steps") else None) for name in metrics}


def differing(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all mappings, in the order in which they occur."""
    keys = dict.fromkeys(key for each in mappings for key in each)
    return [key for key in keys if len({repr(each.get(key)) for each in mappings}) > 1]


def or_empty(read: Callable[..., dict[str, Any]], *paths: Path) -> dict[str, Any]:
    """Return the result of ``read(*paths)``, or an empty mapping if its file is missing or damaged."""
    try:
        return read(*paths)
    except (FileNotFoundError, UnreadableError):
        return {}
