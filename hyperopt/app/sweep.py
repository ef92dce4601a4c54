"""The jobs of a sweep: how they are composed and run, and their index ``sweep.json``. This module imports no torch.

A job leaves ``job.json`` (its number and overrides) beside the run's own files, and the index is made from these directories
alone. Jobs may therefore end in any order and in any number of processes; each writes the index again when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from hyperopt.app.experiment import differences, flatten
from hyperopt.app.files import write_json, write_text
from hyperopt.app.launch import lead
from hyperopt.app.lock import RunDirectoryError, take
from hyperopt.app.run_directory import ENDED, RunDirectory, or_empty, overrides_in
from hyperopt.app.search.search import prune_of
from hyperopt.app.workers import device_of, in_process, put_back, queue_id, tied_to_parent
from hyperopt.data.reading import read_json

log = logging.getLogger(__name__)

SUBDIR = "${hydra.job.num}"  # the default of hydra.sweep.subdir


def run_job(cfg: DictConfig, hydra: Any, out: Path) -> float:
    """Run one job of a sweep, unless it is done, and update the index; return its metric, for the sweeper."""
    overrides = [each for each in hydra.overrides.task if not each.startswith("resume=")]
    run = RunDirectory(out)
    number, queue, alone = job_number(hydra), queue_id(hydra), in_process(hydra.launcher)
    if queue is not None and or_empty(read_json, run.job).get("queue") == queue:
        cfg.resume = "auto"  # submitit or Slurm has started the job again
    metric = finished(cfg, run) if cfg.resume == "auto" else None
    if metric is not None:
        log.info("job %s (%s) was done before: skipped", number, " ".join(overrides))
    if not alone and metric is None:
        cfg.device = device_of(cfg.device, int(hydra.job.num), gpus(cfg.device))
    with contextlib.nullcontext() if alone else tied_to_parent():
        try:
            write_json(run.job, {"number": number, "overrides": overrides, "queue": queue})
            return metric if metric is not None else lead(cfg, out, *filter(None, [prune_of(cfg, hydra)]))
        except SystemExit as end:
            put_back(end.code)
            raise
        except RunDirectoryError:  # another process writes there, so nothing is changed
            raise
        except Exception:
            with contextlib.suppress(OSError):
                if not run.failed.exists():
                    write_text(run.failed, traceback.format_exc())
            raise
        finally:
            try:
                write_index(Path(hydra.sweep.dir))
            except OSError as error:
                log.warning("the sweep's index is not up to date: %s", error)


def job_number(hydra: Any) -> int:
    """Return the number of a job, which is that of its trial if the sweep searches."""
    trial = hydra.sweeper.get("trial") if "sweeper" in hydra else None
    return int(hydra.job.num if trial is None else trial)


def gpus(device: str) -> int:
    """Return the number of GPUs that a job may choose from; 0, without importing torch, if it does not ask for one."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def failures(sweep: Path, jobs: int | None) -> list[int]:
    """Return the numbers of the failed jobs among the first ``jobs`` (None: all) in ``sweep``."""
    numbers = [job["number"] for job in index(sweep)["jobs"] if job["status"] == "failed" and job["number"] is not None]
    return [number for number in numbers if jobs is None or number < jobs]


def finished(cfg: DictConfig, run: RunDirectory) -> float | None:
    """Return the metric of a job that is done under this config, else None.

    A job whose length or monitor has changed since (``trainer.*``) is not done: it continues from its last checkpoint.
    """
    summary = or_empty(run.read_summary)
    if summary.get("status") != ENDED[cfg.mode]:
        return None
    config = flatten(cfg)
    try:
        if differences(run.read_config(config), config, "repeat"):
            return None
    except FileNotFoundError:
        return None
    metrics = summary.get("metrics") if cfg.mode != "train" else (summary.get("best") or {}).get("metrics")
    value = (metrics or {}).get("hypergrad/error" if cfg.mode == "check" else cfg.trainer.monitor)
    return math.nan if value is None else value


def index(sweep: Path) -> dict[str, Any]:
    """Return the index of the sweep in ``sweep``: its jobs in the order of their numbers, and the count of each status."""
    jobs = []
    for run in RunDirectory.below(sweep, RunDirectory.job):
        job, summary = or_empty(read_json, run.job), or_empty(run.read_summary)
        number = job.get("number")
        jobs.append(
            {
                "number": number if isinstance(number, int) else None,
                "directory": str(run.path.relative_to(sweep)),
                "overrides": overrides_in(job),
                "status": run.status(summary),
                **{key: summary.get(key) for key in ("reason", "steps", "seconds", "metrics", "best")},
            }
        )
    jobs.sort(key=lambda job: (job["number"] is None, job["number"], job["directory"]))
    return {"counts": dict(sorted(Counter(job["status"] for job in jobs).items())), "jobs": jobs}


def write_index(sweep: Path) -> None:
    """Write ``sweep.json``, one process at a time, so that an older index never replaces a newer one."""
    directory = RunDirectory(sweep)
    with take(directory.index_lock) or contextlib.nullcontext():
        write_json(directory.index, index(sweep))


class Composer:
    """Composes the jobs of a sweep, whose config it is given, one after another.

    Jobs that differ only in values share one config, whose values are set in turn. A config is valid until the next job is
    composed.
    """

    KEPT = 32  # number of configs that are kept, a third of a megabyte each

    def __init__(self, config: DictConfig) -> None:
        """Start with nothing composed."""
        self.config, self.parser = config, OverridesParser.create()
        self.made: dict[tuple[str, ...], DictConfig] = {}
        where: Any = OmegaConf.to_container(config.hydra.sweep)
        self.reuses = where["subdir"] == SUBDIR  # another subdir may depend on how the job was composed

    def compose(self, overrides: list[str]) -> DictConfig:
        """Return the config of the job with these overrides."""
        parsed = self.parser.parse_overrides(overrides)
        values = {each.key_or_group: each for each in parsed if self._is_value(each)}
        kind = tuple(each.key_or_group if each.key_or_group in values else str(each.input_line) for each in parsed)
        if self.reuses and kind in self.made:
            found = self.made[kind]
            for key, each in values.items():
                OmegaConf.update(found, key, each.value())
            found.hydra.overrides.task = overrides
            return found
        if len(self.made) == self.KEPT:
            self.made.clear()
        given = list(self.config.hydra.overrides.hydra)
        found = compose(self.config.hydra.job.config_name, [*given, *overrides], return_hydra_config=True)
        self.made[kind] = found
        return found

    def _is_value(self, override: Override) -> bool:
        """Whether the override sets one value of a config, and does not choose a config."""
        key = override.key_or_group
        if override.type is not OverrideType.CHANGE or override.package is not None or "/" in key or key.startswith("hydra"):
            return False
        here = OmegaConf.select(self.config, key, default=OmegaConf)  # OmegaConf stands for a missing key
        return here is not OmegaConf and not OmegaConf.is_config(here) and not isinstance(override.value(), dict)
