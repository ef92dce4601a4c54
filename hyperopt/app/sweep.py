"""The jobs of a sweep: their index ``sweep.json``, and which of them a resumed sweep need not run again. Free of torch.

A job leaves ``job.json`` (its number and overrides) beside the run's own files, and the index is made from these directories
alone. So jobs may end in any order, in any number of processes: whoever ends writes the index anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyperopt.app.directory import FAILED, JOB, RunDirectoryError, status_of
from hyperopt.app.experiment import experiment_of, flatten
from hyperopt.app.files import open_own, write_json, write_text, writing
from hyperopt.app.launch import lead
from hyperopt.app.report.read import overrides_in, summary_in
from hyperopt.app.workers import device_of, in_process, put_back, queue_id, tied_to_parent
from hyperopt.data.reading import UnreadableError, read_json

log = logging.getLogger(__name__)

INDEX = "sweep.json"
INDEX_LOCK = ".sweep.lock"
# Of a job that is done, these may differ: they change neither its numbers nor its length.
INDIFFERENT = ("accept_lost_rows", "allow_targets", "compile", "device", "name", "paths", "resume", "threads")


def run_job(cfg: DictConfig, hydra: Any, out: Path) -> float:
    """Run one job of a sweep, unless it is done, and bring the index up to date.

    Args:
        cfg: the job's config.
        hydra: Hydra's own part of it.
        out: the job's directory.

    Returns:
        Its metric, for the sweeper.
    """
    overrides = [each for each in hydra.overrides.task if not each.startswith("resume=")]
    number, queue, alone = int(hydra.job.num), queue_id(hydra), in_process(hydra.launcher)
    if queue is not None and read(out / JOB).get("queue") == queue:
        cfg.resume = "auto"  # submitit or Slurm has started the same job again
    metric = finished(cfg, out) if cfg.resume == "auto" else None
    if metric is not None:
        log.info("job %s (%s) was done before: skipped", number, " ".join(overrides))
    if not alone and metric is None:
        cfg.device = device_of(cfg.device, number, gpus(cfg.device))
    with contextlib.nullcontext() if alone else tied_to_parent():
        try:
            write_json(out / JOB, {"number": number, "overrides": overrides, "queue": queue})
            return lead(cfg, out) if metric is None else metric
        except SystemExit as end:
            put_back(end.code)
            raise
        except RunDirectoryError:  # it is another process's, and stays as it is
            raise
        except Exception:
            with contextlib.suppress(OSError):
                if not (out / FAILED).exists():
                    write_text(out / FAILED, traceback.format_exc())
            raise
        finally:
            try:
                write_index(Path(hydra.sweep.dir))
            except OSError as error:
                log.warning("the sweep's index is not up to date: %s", error)


def gpus(device: str) -> int:
    """Return how many GPUs a job may choose from: none where it does not ask for one, without importing torch."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def failures(sweep: Path, jobs: int | None) -> list[int]:
    """Return the numbers of the failed jobs among the first ``jobs`` (None: all) in ``sweep``."""
    numbers = [job["number"] for job in index(sweep)["jobs"] if job["status"] == "failed" and job["number"] is not None]
    return [number for number in numbers if jobs is None or number < jobs]


def read(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing or damaged."""
    try:
        return read_json(path)
    except (FileNotFoundError, UnreadableError):
        return {}


def read_summary(out: Path) -> dict[str, Any]:
    """Return ``summary.json`` of a job; an empty one where it is missing or damaged."""
    try:
        return summary_in(out)
    except (FileNotFoundError, UnreadableError):
        return {}


def finished(cfg: DictConfig, out: Path) -> float | None:
    """Return the metric of a job that is done under this very config, else None.

    A job whose length or monitor changed since (``trainer.*``) is not done: it goes on from its last checkpoint.
    """
    summary = read_summary(out)
    if summary.get("status") != {"train": "completed", "evaluate": "evaluated", "check": "checked"}[cfg.mode]:
        return None
    config = flatten(cfg)
    saved = experiment_of(out, config)

    def relevant(flat: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in flat.items() if key.partition(".")[0] not in INDIFFERENT}

    if saved is None or relevant(saved) != relevant(config):
        return None
    metrics = summary.get("metrics") if cfg.mode != "train" else (summary.get("best") or {}).get("metrics")
    value = (metrics or {}).get("hypergrad/error" if cfg.mode == "check" else cfg.trainer.monitor)
    return math.nan if value is None else value


def index(sweep: Path) -> dict[str, Any]:
    """Return the index of the sweep in ``sweep``: its jobs in order of their numbers, and how many ended how."""
    jobs = []
    for path in sweep.rglob(JOB):
        job, summary = read(path), read_summary(path.parent)
        number = job.get("number")
        jobs.append(
            {
                "number": number if isinstance(number, int) else None,
                "directory": str(path.parent.relative_to(sweep)),
                "overrides": overrides_in(job),
                "status": status_of(path.parent, summary),
                **{key: summary.get(key) for key in ("reason", "steps", "seconds", "metrics", "best")},
            }
        )
    jobs.sort(key=lambda job: (job["number"] is None, job["number"], job["directory"]))
    return {"counts": dict(sorted(Counter(job["status"] for job in jobs).items())), "jobs": jobs}


def write_index(sweep: Path) -> None:
    """Write ``sweep.json``, one process at a time, so that an older view never replaces a newer one."""
    with writing(sweep / INDEX_LOCK):
        handle = open_own(sweep / INDEX_LOCK, os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(handle, fcntl.LOCK_EX)
        write_json(sweep / INDEX, index(sweep))
    finally:
        os.close(handle)
