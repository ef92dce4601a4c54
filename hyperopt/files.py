"""How files are written: small ones as a whole or not at all, growing ones by whole records, and what a failure says.

Every failure to write is a ``WriteError`` that names the file and what to do; what was written before it stays as it was. Free of
torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class WriteError(OSError):
    """A file could not be written; the message names it, the reason and what to do. ``errno`` is that of the cause."""

    def __init__(self, path: Path, number: int | None) -> None:
        """Say what happened to ``path``, by the error number of the operating system."""
        if number in FULL:
            advice = "free space there, or move the run to another disk and set hydra.run.dir to it"
        elif number in READ_ONLY:
            advice = "make the directory writable, or move the run and set hydra.run.dir to its new place"
        elif number in GONE:
            advice = "the directory was removed or moved while the run wrote to it: set hydra.run.dir to where it is"
        else:
            advice = "mend this, or move the run and set hydra.run.dir to its new place"
        what = os.strerror(number) if number is not None else "an error without a number"
        super().__init__(f"cannot write {path}: {what}; {advice}, then continue with resume=auto")
        self.errno = number


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block, which writes ``path``, into a ``WriteError``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error.errno) from error


def fsync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(handle: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; ``os.write`` may stop after a part of it."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def write_bytes(path: Path, data: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file as a whole or not at all, through a temporary one beside it.

    Args:
        path: where to.
        data: all of it.
        keep: where the file that is replaced goes, once the new one is written (None: nowhere).

    Raises:
        WriteError: it could not; the file that was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                write_whole(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def plain(value: Any) -> Any:
    """Return ``value`` with every float that JSON cannot hold as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as one JSON object, as ``write_bytes`` does."""
    write_text(path, json.dumps(plain(content), indent=2, default=str) + "\n")


def remove_leftovers(*directories: Path) -> None:
    """Remove the temporary files that killed processes left; only for whoever holds the directory's lock."""
    for directory in directories:
        for path in directory.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


class AppendFile:
    """A file that grows record by record: one that cannot be written whole leaves no part of itself.

    Args:
        path: the file; it is made where it is missing.
        size: bytes of it to keep; what follows is cut off.

    Attributes:
        path: the file.
        size: bytes written so far.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        """Open the file and cut it."""
        self.path = path
        with writing(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.size = min(size, os.fstat(self._handle).st_size)
            os.ftruncate(self._handle, self.size)

    def write(self, record: bytes) -> None:
        """Append one record.

        Raises:
            WriteError: it could not, or the file is no longer at its path: removed, or moved away with its directory.
        """
        with writing(self.path):
            if not os.path.samestat(os.fstat(self._handle), os.stat(self.path)):
                raise FileNotFoundError(errno.ENOENT, "replaced")
            try:
                write_whole(self._handle, record)
            except BaseException:
                os.ftruncate(self._handle, self.size)
                raise
        self.size += len(record)

    def sync(self) -> None:
        """Bring all of it to the disk."""
        with writing(self.path):
            os.fsync(self._handle)

    @property
    def removed(self) -> bool:
        """Whether the file was removed (one that was moved away with its directory was not)."""
        return os.fstat(self._handle).st_nlink == 0

    def rescue(self) -> None:
        """Write the file again if it was removed: its content is there for as long as it is open."""
        if self.removed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, os.pread(self._handle, self.size, 0))

    def close(self) -> None:
        """Close it."""
        os.close(self._handle)
