"""Composing, checking and running of a config, and short error messages: the command line except its help."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hyperopt.app import results, sweep
from hyperopt.app.errors import explain, keys_in
from hyperopt.app.experiment import counts
from hyperopt.app.launch import lead
from hyperopt.app.lock import release_all
from hyperopt.app.options import choices
from hyperopt.app.preflight import Ended, Preflight
from hyperopt.app.resolvers import config_path, register
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.workers import LAUNCHER, THREADS
from hyperopt.core.text import one_line, printable

register()


@hydra.main(version_base="1.3", config_path=config_path(), config_name="train")
def job(cfg: DictConfig) -> float:
    """Run one composed config in the directory that Hydra made for it, and return its metric for a sweeper."""
    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        return sweep.run_job(cfg, hydra_config, out)
    try:
        return lead(cfg, out)
    except Exception as error:
        raise Ended(error, out) from error


def with_those_of_the_run(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of ``mode=evaluate`` after those of the run that wrote the checkpoint, so that none is repeated.

    Args:
        overrides: overrides of this launch, which take precedence. Without ``mode=evaluate ckpt_path=RUN/checkpoints/...``
            they are returned as they are. Those from the run's file are checked as if given here, resolve nothing and allow no
            package.
    """
    given = {key: value for key, _, value in (each.lstrip("+~").partition("=") for each in overrides)}
    if given.get("mode") != "evaluate" or "ckpt_path" not in given:
        return list(overrides)
    kept = []
    for each in RunDirectory(Path(given["ckpt_path"]).parent.parent).read_overrides():
        key = each.lstrip("+~").partition("=")[0]
        if key not in given and counts(key, "overrides") and "${" not in each:
            kept.append(each)
    return [*kept, *overrides]


def conclude() -> None:
    """Print what came out of the sweep that this process has launched, if it has launched one and a job has ended."""
    if Preflight.launched is None or Preflight.goal is None:
        return
    where, _ = Preflight.launched
    index = sweep.index(where)
    if index["jobs"]:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after the line that was written again and again
        print(results.conclude(where, index, Preflight.goal))


def launch(overrides: Sequence[str], flags: Sequence[str]) -> None:
    """Run what the command line asks for; exit with status 1 after a refused launch or a failed job.

    A failure is printed in a few lines, with the path of ``FAILED``, which holds the traceback of a run. Only an unexpected
    error without such a file is printed with its traceback; ``HYDRA_FULL_ERROR=1`` asks for all tracebacks.
    """
    before = {name: os.environ.get(name) for name in ("HYDRA_FULL_ERROR", THREADS, LAUNCHER)}
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them in its own way
    Preflight.launched = Preflight.goal = None
    kept: Path | None = None
    try:
        sys.argv[1:] = [*with_those_of_the_run(overrides), *flags]
        job()
        conclude()
        return
    except Ended as ended:
        error, kept = ended.error, ended.traceback()
    except Exception as raised:
        error = raised
    finally:
        release_all()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    message = explain(error, choices())
    if kept is not None:
        what = f"{type(error).__name__}: {one_line(error)}" if message is None else message
        message = f"{what}\nhyperopt: the traceback is in {printable(str(kept))}"
    failed = Preflight.failures()
    conclude()
    if before["HYDRA_FULL_ERROR"] == "1" or (message is None and not failed):
        traceback.print_exception(error)
        if message is None and (told := keys_in(str(error), choices())):
            print(f"hyperopt: {told}", file=sys.stderr)
    if failed:
        message = f"{len(failed)} of this sweep's jobs failed: {', '.join(map(str, failed))}"
    if message is not None:
        print(f"hyperopt: {message}", file=sys.stderr)
    sys.exit(1)
