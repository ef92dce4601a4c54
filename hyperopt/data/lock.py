"""One process at a time per folder, so that ten jobs started at once fetch a dataset once."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hyperopt.data.errors import DataError

log = logging.getLogger(__name__)

WAIT_SECONDS = 3600.0  # longer than any source takes; after that the other process is stopped or stuck


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if need be, and removed again if it is empty at the end.

    The lock is the kernel's (``flock``): it goes with its process, so one that was killed never leaves it behind. It saves work
    and is no condition of correctness, since files are written whole or not at all: where a file system has none, or something
    else than a file bears the lock's name (a link, say, which is not followed), go on without.

    Raises:
        DataError: the folder cannot be made or written into, or another process holds the lock for ``WAIT_SECONDS``.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    lock = FileLock(folder / ".lock")
    try:
        _acquire(lock, folder)
    except Timeout as error:
        raise DataError(
            f"another process has been fetching into {folder} for {WAIT_SECONDS:.0f} s: end it, change dataset.root, or delete "
            f"{lock.lock_file} if there is no such process"
        ) from error
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error}; change dataset.root") from error
    try:
        yield
    finally:
        if lock.is_locked:
            # Before the release: whoever waits for this file finds it unlinked and takes a new one.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        with contextlib.suppress(OSError):  # not empty: the dataset, or another process's lock
            for path in made:
                path.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    """Take the lock, and say so where that means waiting or there is none to be had."""
    seconds = 0.0
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if os.path.lexists(lock.lock_file) and not stat.S_ISREG(os.lstat(lock.lock_file).st_mode):
                raise OSError(f"{lock.lock_file} is not a regular file")
            lock.acquire(timeout=seconds)
            return
        except Timeout:
            if seconds:
                raise
            log.info("another process is fetching into %s; waiting for it", folder)
            seconds = WAIT_SECONDS
        except FileNotFoundError:
            continue  # a process that got nothing has just removed the empty folder
        except OSError as error:
            log.warning("cannot lock %s (%s): another process may fetch the same at the same time", folder, error)
            return
