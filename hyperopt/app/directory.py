"""Who may write into a run directory: one process at a time, and only a run that is new there or goes on there.

The lock is a POSIX record lock on ``DIR/.lock``. It ends with its process, however that ends, and unlike ``flock`` it is not
shared with forked children, which may outlive a killed parent. So a reader can tell whether a run is alive.

A directory may come from someone else: one with a link, a pipe or a device where a run writes is refused before anything is
written. A directory that is itself reached through links is as good as any. Free of torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyperopt.app.files import foreign, open_own, why_foreign, write_whole, writing
from hyperopt.core.text import printable

log = logging.getLogger(__name__)

LOCK = ".lock"
RUN_FILES = ("metrics.jsonl", "summary.json", "checkpoints")
CHECKPOINTS = "checkpoints"
JOB, FAILED = "job.json", "FAILED"  # a sweep's job has the first: its number and overrides
FILES = (LOCK, "metrics.jsonl", "*.log", "config.yaml", "run.json", "summary.json", JOB, FAILED)
FOLDERS = (CHECKPOINTS, "figures", "tb", ".hydra")
IN_PLACE = (LOCK, "metrics.jsonl", "*.log")  # and all in tb/ and .hydra/; the other files are replaced as a whole
_held: dict[Path, tuple[int, int]] = {}
"""Locks of this process: resolved directory -> (process id, open lock file). Each is opened once, since a record lock ends when
its process closes *any* handle of the file."""


class RunDirectoryError(FileExistsError):
    """The run directory holds another run or leads elsewhere, or another process is writing into it."""


def goes_on_here(cfg: DictConfig, out: Path) -> bool:
    """Whether the job may write to what ``out`` holds: it trains on, or does again an evaluation, which holds a summary only."""
    if cfg.mode != "train":
        return cfg.resume == "auto" and [name for name in RUN_FILES if (out / name).exists()] == ["summary.json"]
    return cfg.resume == "auto" or from_own_checkpoint(cfg, out)


def from_own_checkpoint(cfg: DictConfig, out: Path) -> bool:
    """Whether ``ckpt_path`` names one of the checkpoints under ``out``."""
    return cfg.ckpt_path is not None and Path(cfg.ckpt_path).resolve().parent == (out / CHECKPOINTS).resolve()


def check_own(directory: Path, folders: Collection[str] = FOLDERS) -> None:
    """Refuse a directory with something in it that a run would write through: a link, a pipe, a device, a file's second name.

    Args:
        directory: of a run or a sweep.
        folders: those in it that a run writes to.

    Raises:
        RunDirectoryError: names what was found; nothing was changed.
    """
    for folder in ("", *folders):
        where = directory / folder
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
                wrong = not folder and any(fnmatch(name, each) for each in FILES)
                what = "a directory where a file belongs" if wrong else None
            else:
                in_place = folder not in ("", CHECKPOINTS, "figures") or any(fnmatch(name, each) for each in IN_PLACE)
                what = why_foreign(facts, in_place)
                what = what or ("a file where a directory belongs" if not folder and name in folders else None)
            if what is not None:
                raise RunDirectoryError(foreign(where / name, what))


def check_directory(cfg: DictConfig, out: Path, folders: Collection[str] = FOLDERS) -> None:
    """Refuse a directory that holds a run, unless this one goes on with it, and one that leads elsewhere (``check_own``).

    Raises:
        RunDirectoryError: it does.
    """
    check_own(out, folders)
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
        handle = open_own(directory / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = printable(os.pread(handle, 200, 0).decode(errors="replace").strip())
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


_LINUX = sys.platform == "linux"
FLOCK = struct.Struct("hhqqi" if _LINUX else "qqihh")  # type, whence, start, length, process; elsewhere the first two come last


def running(directory: Path) -> bool | None:
    """Whether a living process holds the lock of ``directory``; None where that cannot be told. Nothing is changed."""
    path = directory / LOCK
    try:
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode):
            return False
        own = [handle for process, handle in _held.values() if process == os.getpid()]
        if any(os.path.samestat(os.fstat(handle), facts) for handle in own):
            return True  # not opened: to close it would end the lock
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            kind = (fcntl.F_RDLCK, os.SEEK_SET)
            asked = FLOCK.pack(*kind, 0, 0, 0) if _LINUX else FLOCK.pack(0, 0, 0, *kind)
            found = FLOCK.unpack(fcntl.fcntl(handle, fcntl.F_GETLK, asked))
        finally:
            os.close(handle)
    except FileNotFoundError:
        return False
    except OSError:  # a file system without locks, or a file of someone else's
        return None
    return found[0 if _LINUX else 3] != fcntl.F_UNLCK


def status_of(directory: Path, summary: Mapping[str, Any]) -> str:
    """Return how a run stands: what its summary says, or ``failed`` or ``killed`` where that could not be said there."""
    if (directory / FAILED).exists():
        return "failed"
    status = str(summary.get("status", "started"))
    return "killed" if status == "running" and running(directory) is False else status


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
