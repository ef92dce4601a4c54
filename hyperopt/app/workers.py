"""Jobs of a sweep that a launcher runs in separate processes: their cores, GPUs and ends. This module imports no torch.

- Cores: jobs on one machine share them, ``OMP_NUM_THREADS = cores // jobs at a time``, unless the variable or ``threads`` is
  set.
- GPUs: job k gets GPU ``k mod count`` of those that it sees, unless ``device`` names one.
- If a launcher dies, each of its jobs ends its step, writes its checkpoint and stops, as after SIGTERM.
- submitit's signal (SIGUSR2, or ``SUBMITIT_PREEMPT_SIGNAL``) has the same effect, and is then passed to submitit, which
  requeues the job. A job with the same id then continues from the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from omegaconf import DictConfig

THREADS, LAUNCHER = "OMP_NUM_THREADS", "HYPEROPT_LAUNCHER"
JOBLIB, LOCAL = "JoblibLauncher", "LocalLauncher"
"""Launchers that start all their processes on this machine and leave its cores to them."""
PATIENCE = 1.0  # seconds between two checks of the launcher


def in_process(launcher: DictConfig) -> bool:
    """Whether a launcher runs one job after another in its own process."""
    return launcher._target_ == f"{BasicLauncher.__module__}.{BasicLauncher.__qualname__}"


def at_a_time(hydra: DictConfig, jobs: int, cores: int) -> int:
    """Return how many jobs of a sweep this machine runs at a time; 1 if the launcher does not leave the cores to us."""
    launcher = hydra.launcher
    kind = launcher._target_.rpartition(".")[2]
    if kind not in (JOBLIB, LOCAL):
        return 1
    count = min(jobs, hydra.sweeper.get("max_batch_size") or hydra.sweeper.get("n_jobs") or jobs)
    if kind == JOBLIB:
        count = min(count, launcher.n_jobs if launcher.n_jobs > 0 else max(cores + 1 + launcher.n_jobs, 1))
    return count


def prepare(config: DictConfig, jobs: int) -> None:
    """Set the environment variables that the processes of this sweep inherit: their launcher, and their share of the cores."""
    if config.hydra.launcher._target_.endswith(JOBLIB):
        os.environ[LAUNCHER] = str(os.getpid())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = at_a_time(config.hydra, jobs, cores)
    if count > 1 and THREADS not in os.environ:
        os.environ[THREADS] = str(max(cores // count, 1))


def device_of(device: str, number: int, count: int) -> str:
    """Return the device of job ``number`` if ``count`` GPUs are visible."""
    return f"cuda:{number % count}" if device in ("auto", "cuda") and count > 1 else device


def queue_signal() -> int | None:
    """Return the signal by which submitit preempts a job, if submitit has set a handler in this process."""
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", None)
    return number if number is not None and callable(signal.getsignal(number)) else None


def put_back(code: Any) -> None:
    """Pass a job that ended with this exit code by the queue's signal on to submitit, which exits; ignore other codes."""
    number = queue_signal()
    if number is not None and code == 128 + number:
        signal.raise_signal(number)


def queue_id(hydra: Any) -> str | None:
    """Return the id that a job keeps when submitit or Slurm starts it again; None without these."""
    return str(hydra.job.id) if "SUBMITIT_EXECUTOR" in os.environ else None


@contextlib.contextmanager
def tied_to_parent() -> Iterator[None]:
    """Send this process a SIGTERM when its parent ends during the block, and exit before or after the block if it has ended.

    joblib's workers would otherwise run their remaining jobs and wait for more from a launcher that no longer exists.
    """
    parent, over = int(os.environ.get(LAUNCHER, os.getppid())), threading.Event()
    _end_unless(parent)

    def watch() -> None:
        while not over.wait(PATIENCE):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _end_unless(parent)


def _end_unless(parent: int) -> None:
    """Exit at once if this process has another parent now."""
    if os.getppid() != parent:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)
