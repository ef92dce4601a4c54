"""Locks: on a file, and on a directory to which one process writes at a time.

The locks belong to the kernel (``flock``, by the package ``filelock``). They end with their process, however it ends, and are
not inherited by forked children, which may outlive a killed parent. A reader can therefore tell whether a run is alive. This
module imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hyperopt.app.files import WriteError, refuse_foreign, writing
from hyperopt.core.text import printable

log = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system that has no locks."""
WAIT_SECONDS = 0.5
"""How long a new writer waits for the lock; another process that tests whether the run is alive holds it for a moment."""
LOOK_SECONDS = 0.02
"""How long such a test tries, since another process may test at the same moment."""
_held: dict[Path, tuple[FileLock, os.stat_result]] = {}
"""Locked directories of this process, from the check of a launch to the end of its run: resolved path -> lock, its file."""


class RunDirectoryError(FileExistsError):
    """The run directory holds another run or leads elsewhere, or another process is writing into it."""


def take(path: Path, seconds: float = -1, then: Callable[[int], None] | None = None) -> FileLock | None:
    """Take the lock on a file, which is created if it is missing and is not removed.

    Args:
        path: the file.
        seconds: how long to wait for another process (-1: until it ends).
        then: a function that is called with the open file once the lock is taken.

    Returns:
        The lock; None, with a warning, if the file system has none.

    Raises:
        Timeout: another process has it.
        WriteError: the file cannot be created, or leads elsewhere (``refuse_foreign``).
    """
    try:
        refuse_foreign(path)
        lock = FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=then)
        lock.acquire(timeout=seconds)
    except (Timeout, WriteError):
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise WriteError(path, error.errno) from error
        log.warning("cannot lock %s (%s): another process that writes there would not be noticed", path, error.strerror)
        return None
    return lock


class LockedDirectory:
    """A directory that one process at a time writes to, as long as all of them take its lock.

    Args:
        path: the directory, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        """Keep the path; nothing is read or created."""
        self.path = path

    @property
    def lock(self) -> Path:
        """The file on which the lock is; it holds the name of the process that took it last."""
        return self.path / LOCK

    def _is_mine(self) -> bool:
        """Whether this process holds the lock of the present directory at this path."""
        found = _held.get(self.path.resolve())
        if found is None or not found[0].is_locked:  # a forked child does not have its parent's locks
            return False
        try:
            return os.path.samestat(found[1], os.stat(self.lock))
        except FileNotFoundError:
            return False

    def acquire(self, key: str = "hydra.run.dir") -> bool:
        """Take the lock of the directory, which is created if it is missing.

        Args:
            key: the key that sets the directory, for the message.

        Returns:
            Whether it was taken now (False: this process has it already, or the file system has no locks).

        Raises:
            RunDirectoryError: another process has it; nothing was changed.
            WriteError: the directory or the lock's file cannot be created, or the file leads elsewhere.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if self._is_mine():
            return False
        self.release()  # the lock of a directory that has since been removed
        signed: list[os.stat_result] = []

        def sign(handle: int) -> None:
            signed.append(os.fstat(handle))
            with contextlib.suppress(OSError):  # on a full disk the file has no name in it
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

        try:
            lock = take(self.lock, WAIT_SECONDS, sign)
        except Timeout:
            who = ""
            with contextlib.suppress(OSError), open(self.lock, errors="replace") as file:
                who = printable(file.read(200).strip())
            raise RunDirectoryError(
                f"{self.path.resolve()} is in use by {who or 'another process'} and was left untouched; wait for it to end, stop "
                f"it, or set {key} to another directory"
            ) from None
        if lock is not None:
            _held[self.path.resolve()] = lock, signed[0]
        return lock is not None

    def release(self) -> None:
        """Give the lock back, if this process has it. The file stays, since removing it could take away another's lock."""
        lock, _ = _held.pop(self.path.resolve(), (None, None))
        if lock is not None and lock.is_locked:
            lock.release(force=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock during the block, or longer if this process had it before. Errors are those of ``acquire``."""
        taken = self.acquire()
        try:
            yield
        finally:
            if taken:
                self.release()

    @property
    def running(self) -> bool | None:
        """Whether a living process holds the lock; None if this is unknown. Nothing is changed."""
        try:
            if not stat.S_ISREG(os.lstat(self.lock).st_mode):
                return False
            with FileLock(self.lock, fallback_to_soft=False).acquire(timeout=LOOK_SECONDS, poll_interval=LOOK_SECONDS / 2):
                return False
        except FileNotFoundError:
            return False
        except Timeout:
            return True
        except OSError:  # a file system without locks, or a file that only someone else may write
            return None


def release_all() -> None:
    """Give all locks of this process back."""
    for path in list(_held):
        LockedDirectory(path).release()
