"""Checks of a launch before Hydra writes anything: values, packages, devices, run directories, launchers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from hyperopt.app import sweep
from hyperopt.app.config import ConfigError, check_targets, plain_values
from hyperopt.app.errors import explain
from hyperopt.app.options import choices
from hyperopt.app.results import Goal, show_job
from hyperopt.app.run_directory import RunDirectory, or_empty
from hyperopt.app.search.search import Search
from hyperopt.app.search.settings import Settings
from hyperopt.app.search.space import given
from hyperopt.app.workers import prepare
from hyperopt.core.text import why_no_component
from hyperopt.data.reading import read_json

GRID, SEARCH = (f"hydra_plugins.hyperopt_sweeper.{name}" for name in ("GridSweeper", "OptunaSweeper"))


class Ended(SystemExit):
    """A launch that is refused before any work, or a run that failed in the directory ``out``.

    Hydra turns a callback's exceptions into warnings and prints those of a job in its own way, but passes an exit on.
    """

    def __init__(self, error: Exception, out: Path | None = None) -> None:
        """Keep the error for ``command.launch``; the exit status is 1."""
        super().__init__(1)
        self.error, self.out = error, out

    def traceback(self) -> Path | None:
        """Return the file with the traceback, if a run has written one."""
        file = None if self.out is None else RunDirectory(self.out).failed
        named = file is not None and file.is_file() and type(self.error).__name__ in file.read_text(errors="replace")
        return file if named else None


class Preflight(Callback):
    """Refuses bad values and used run directories before Hydra writes anything, and shows a sweep's failures at once.

    Attributes:
        launched: directory of the sweep that this process has launched, and the number of its jobs, if it is known.
        goal: what the jobs of that sweep are compared by.
    """

    launched: tuple[Path, int | None] | None = None  # on the class, since Hydra builds the object
    goal: Goal | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a single run."""
        self._check(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check every job of a sweep before its first."""
        self._check(config, "hydra.sweep.dir")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Show at once that a job of a sweep failed; the other jobs continue.

        Hydra keeps the results of all jobs until the end of a sweep. Their configs, a third of a megabyte each, are dropped.
        """
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job_return.cfg = job_return.hydra_cfg = None
        if job_return.status != JobStatus.FAILED:
            index = or_empty(read_json, RunDirectory(Path(config.hydra.sweep.dir)).index)
            if index:
                show_job(index, sweep.job_number(config.hydra), Preflight.goal or _goal(config, None))
            return
        error = job_return._return_value  # the public property would print and raise, which Hydra does after the sweep
        number, overrides = sweep.job_number(config.hydra), " ".join(config.hydra.overrides.task)
        message = explain(error, choices())
        print(f"hyperopt: job {number} ({overrides}) failed: {message or repr(error)}", file=sys.stderr)
        print(f"hyperopt: see {config.hydra.runtime.output_dir}/{RunDirectory.failed}", file=sys.stderr)

    @classmethod
    def failures(cls) -> list[int]:
        """Return the numbers of the failed jobs of the sweep that this process has launched, in whatever processes they ran."""
        return [] if cls.launched is None else sweep.failures(*cls.launched)

    @staticmethod
    def _check(config: DictConfig, key: str) -> None:
        """Refuse the launch if one of its jobs, or the directory that ``key`` sets, is not usable; else lock that directory."""
        try:
            _check_places(config, key)
            where, known = Path(OmegaConf.select(config, key)), key == "hydra.run.dir" or _listed(config)
            if key == "hydra.sweep.dir":
                _check_sweep(where, known)
                _check_grid(config.hydra.sweeper)
            searched = key == "hydra.sweep.dir" and config.hydra.sweeper._target_ == SEARCH
            search = _search(config) if searched else None
            if search is not None:
                jobs = ((each, where) for each in map(sweep.Composer(config).compose, search.samples()))
            else:
                jobs = [(config, where)] if key == "hydra.run.dir" else _jobs(config, where)
            each, count = config, 0
            for each, out in jobs:
                _check_launch(config, each)
                _check_places(each, key, str(each.hydra.sweep.subdir) if out != where else None)
                _check_values(each)
                _check_directory(each, where, out, key)
                count += 1
            if search is not None:
                search.refuse(each, where, _measures(each))
            RunDirectory(where).acquire(key)
            _check_directory(each, where, out, key)  # again, since another launch may have used it in the meantime
            if key == "hydra.sweep.dir":
                prepare(config, count if known else sys.maxsize)
                Preflight.launched = where, count if known else None
                Preflight.goal = _goal(each, count if known else None if search is None else search.trials)
        except Exception as error:
            raise Ended(error) from error


def _listed(config: DictConfig) -> bool:
    """Whether the sweeper makes a grid, so that all of its jobs are known beforehand."""
    return config.hydra.sweeper._target_ in (GRID, f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}")


def _jobs(config: DictConfig, where: Path) -> Iterator[tuple[DictConfig, Path]]:
    """Yield config and directory of every job of a grid; for other sweepers, which choose as they go, only the base config."""
    if not _listed(config):
        yield config, where
        return
    composer = sweep.Composer(config)
    for number, job_overrides in enumerate(chain.from_iterable(BasicSweeper.split_arguments(given(config), None))):
        each = composer.compose(list(job_overrides))
        with open_dict(each):
            each.hydra.job.num = each.hydra.job.id = number
        yield each, where / str(each.hydra.sweep.subdir)


def _search(config: DictConfig) -> Search:
    """Return the search that a sweep describes, or refuse it."""
    where: Any = OmegaConf.to_container(config.hydra.sweep)
    if (subdir := where["subdir"]) != sweep.SUBDIR:
        raise ConfigError(f"hydra.sweep.subdir={subdir}: the jobs of a search lie in the directories of their numbers; drop it")
    return Search.of(config)


def _goal(config: DictConfig, jobs: int | None) -> Goal:
    """Return what the jobs of a sweep are compared by, from the config of one of them and their number, if it is known."""
    sweeper = config.hydra.sweeper
    settings = Settings.of(sweeper) if sweeper._target_ == SEARCH else Settings()
    options = [each for each in config.hydra.overrides.hydra if str(each).lstrip("+").startswith("hydra.searchpath=")]
    return Goal(*settings.objectives(config), jobs, options)


def _measures(config: DictConfig) -> tuple[str, ...]:
    """Return what an evaluation of a job measures; empty if this is not known."""
    if config.mode == "check":
        return ("hypergrad/error",)
    from hyperopt.app.building import build

    return tuple(build(config).task.MEASURES)


def _check_places(config: DictConfig, key: str, subdir: str | None = None) -> None:
    """Refuse names by which Hydra would write into the working directory, or outside of the directory of the run or sweep.

    Args:
        config: config of the job.
        key: the key of that directory.
        subdir: the job's directory in it (None: a single run, or not known yet).
    """
    if not str(OmegaConf.select(config, key) or "").strip():
        raise ConfigError(f"{key} is empty, which is the working directory; set {key} to a directory")
    names = {"hydra.job.name": str(config.hydra.job.name)}
    if config.hydra.output_subdir is not None:
        names["hydra.output_subdir"] = str(config.hydra.output_subdir)
    for name, value in names.items():
        if (why := why_no_component(value)) is not None:
            raise ConfigError(f"{name}={value!r:.120} {why}; change {name}")
    if subdir is not None and (not subdir.strip() or Path(subdir).is_absolute() or {"..", "."} & set(subdir.split("/"))):
        raise ConfigError(f"hydra.sweep.subdir={subdir!r:.120} is not a directory within {key}; change hydra.sweep.subdir")


def _check_sweep(where: Path, known: bool) -> None:
    """Refuse a sweep's directory in which something leads elsewhere; ``known``: the directories of its jobs are checked later."""
    RunDirectory(where).check_own(())
    for found, folders, _ in os.walk(where) if not known else ():
        folders[:] = [each for each in folders if each not in (*RunDirectory.FOLDERS, ".submitit")]
        RunDirectory(Path(found)).check_own()


def _check_grid(sweeper: DictConfig) -> None:
    """Refuse keys that the grid does not have, which are those of another sweeper."""
    other = [str(key) for key in sweeper if sweeper._target_ == GRID and key not in ("_target_", "max_batch_size", "params")]
    if other:
        raise ConfigError(
            f"hydra.sweeper.{other[0]} belongs to hydra/sweeper=optuna, but the sweeper is a grid; add hydra/sweeper=optuna to "
            f"the command line, or drop hydra.sweeper.{other[0]}"
        )


def _check_launch(config: DictConfig, job: DictConfig) -> None:
    """Refuse a job that chooses its own launcher or sweeper, since Hydra has chosen both before and would ignore this."""
    for group in ("launcher", "sweeper"):
        if job.hydra[group] == config.hydra[group]:
            continue
        overrides, target = " ".join(job.hydra.overrides.task), job.hydra[group].get("_target_")
        raise ConfigError(
            f"job {job.hydra.job.num} ({overrides}) sets hydra.{group} ({target}), which has no effect within a sweep; "
            f"set hydra/{group}=... on the command line, or choose one experiment and one sweep at a time"
        )


def _check_values(config: DictConfig) -> None:
    """Refuse values that cannot work, a package that the command line does not allow, and a GPU that does not exist."""
    given = {override.lstrip("+").partition("=")[0] for override in config.hydra.overrides.task}
    if config.allow_targets and "allow_targets" not in given:
        packages = list(config.allow_targets)
        raise ConfigError(f"allow_targets={packages} counts on the command line only; take it out of the file and give it there")
    check_targets(plain_values(config), tuple(config.allow_targets))  # a first check, without importing torch
    from hyperopt.app.building import build

    try:
        build(config).tracker.check()
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    if config.device.startswith("cuda"):
        from hyperopt.app.repro import resolve_device

        try:
            resolve_device(config.device)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _check_directory(config: DictConfig, where: Path, out: Path, key: str) -> None:
    """Refuse a directory ``out`` of a job that is not empty, unless the job continues from it; it is not changed.

    ``where`` is the directory that ``key`` sets, of the run itself or of the whole sweep.
    """
    given = {override.lstrip("+").partition("=")[0] for override in config.hydra.overrides.hydra}
    if config.resume == "auto" and key not in given:
        raise ConfigError(f"resume=auto has no run to look for, since every launch has a new directory; set {key} to the run's")
    if where.exists() and not where.is_dir():
        raise ConfigError(f"{key}={str(where)!r} is not a directory; change {key}")
    whole, run = RunDirectory(where), RunDirectory(out)
    resuming = config.resume == "auto" or (out == where and run.owns(config.ckpt_path))
    if not resuming and whole.used:
        raise ConfigError(f"{key}={str(where)!r} is not empty: nothing was done; change {key}, or continue with resume=auto")
    if resuming and where.resolve() == Path.cwd() and whole.used and not whole.left:
        raise ConfigError(f"{key}={str(where)!r} is the working directory, which holds files and no run; change {key}")
    for folder in list(out.relative_to(where).parents)[:-1]:  # folders between the directories of the sweep and the job
        RunDirectory(where / folder).check_own(())
    subdir = config.hydra.output_subdir
    run.check(config, {*run.FOLDERS, *([] if subdir is None else [str(subdir)])})
    if found := run.differences(config):
        job = "" if out == where else f"job {out.name} ({' '.join(config.hydra.overrides.task)}): "
        raise ConfigError(
            f"{job}{out} holds another experiment, and nothing was done: {found}; make these equal, or set {key} to a new "
            f"directory"
        )
    if config.init_from is not None and not (resuming and run.last.exists()):
        from hyperopt.app import starting

        starting.read(config, run)
    done = out != where and config.resume == "auto" and sweep.finished(config, run) is not None
    if resuming and not done and run.held:
        from hyperopt.app import checkpoint

        checkpoint.find(config, run, quiet=True)
