"""Who may write into a run directory: one process at a time, and only a run that is new there or goes on there.

The lock is a POSIX record lock on ``DIR/.lock``. It ends with its process, however that ends, and unlike ``flock`` it is not
shared with forked children, which may outlive a killed parent. Free of torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from hyperopt.files import write_whole, writing

log = logging.getLogger(__name__)

LOCK = ".lock"
RUN_FILES = ("metrics.jsonl", "summary.json", "checkpoints")
CHECKPOINTS = "checkpoints"
JOB = "job.json"  # a sweep's job has one: its number and overrides
_held: dict[Path, tuple[int, int]] = {}
"""Locks of this process: resolved directory -> (process id, open lock file). Each is opened once, since a record lock ends when
its process closes *any* handle of the file."""


class RunDirectoryError(FileExistsError):
    """The run directory holds another run, or another process is writing into it."""


def goes_on_here(cfg: DictConfig, out: Path) -> bool:
    """Whether the job may write to what ``out`` holds: it trains on, or does again an evaluation, which holds a summary only."""
    if cfg.mode != "train":
        return cfg.resume == "auto" and [name for name in RUN_FILES if (out / name).exists()] == ["summary.json"]
    return cfg.resume == "auto" or from_own_checkpoint(cfg, out)


def from_own_checkpoint(cfg: DictConfig, out: Path) -> bool:
    """Whether ``ckpt_path`` names one of the checkpoints under ``out``."""
    return cfg.ckpt_path is not None and Path(cfg.ckpt_path).resolve().parent == (out / CHECKPOINTS).resolve()


def check_directory(cfg: DictConfig, out: Path) -> None:
    """Refuse a directory that holds a run, unless this one goes on with it.

    Raises:
        RunDirectoryError: it does.
    """
    held = [name for name in RUN_FILES if (out / name).exists()]
    if held and not goes_on_here(cfg, out):
        raise RunDirectoryError(
            f"{out} holds a run ({', '.join(held)}) and was left untouched; set hydra.run.dir to another directory, or continue "
            f"that run with resume=auto"
        )


def used(directory: Path) -> bool:
    """Whether a directory is there and holds more than a lock."""
    return directory.is_dir() and any(entry.name != LOCK for entry in directory.iterdir())


def _own(directory: Path) -> bool:
    """Whether this process holds the lock of what ``directory`` is now (a forked child holds none of its parent's)."""
    process, handle = _held.get(directory, (0, -1))
    if process != os.getpid():
        return False
    try:
        return os.path.samestat(os.fstat(handle), os.stat(directory / LOCK))
    except FileNotFoundError:
        return False


def acquire(directory: Path, key: str = "hydra.run.dir") -> bool:
    """Take the lock of ``directory``, which is made if it is missing.

    Args:
        directory: a run's or a sweep's.
        key: the key that sets it, for the message.

    Returns:
        Whether it was taken now (False: this process has it already).

    Raises:
        RunDirectoryError: another process has it; nothing was changed.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        directory = directory.resolve()
        if _own(directory):
            return False
        release(directory)  # of a directory that was removed since
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RunDirectoryError(
                f"{directory} is in use by {who or 'another process'} and was left untouched; wait for it to end, stop it, "
                f"or set {key} to another directory"
            ) from None
        log.warning("cannot lock %s (%s): a second run started there would not be noticed", directory, error.strerror)
        return False
    _held[directory] = os.getpid(), handle
    with contextlib.suppress(OSError):  # a full disk: then it has no name
        os.ftruncate(handle, 0)
        write_whole(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return True


def release(directory: Path) -> None:
    """Give the lock of ``directory`` back, if there is one; the file stays, since removing it could take another's lock away."""
    process, handle = _held.pop(directory.resolve(), (0, -1))
    if handle >= 0 and process == os.getpid():
        os.close(handle)


def release_all() -> None:
    """Give all locks of this process back."""
    for directory in list(_held):
        release(directory)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory`` for the block; it stays with whoever in this process took it before.

    Raises:
        RunDirectoryError: see ``acquire``.
    """
    taken = acquire(directory)
    try:
        yield
    finally:
        if taken:
            release(directory)
