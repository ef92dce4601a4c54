"""Writing of files: small ones as a whole or not at all, growing ones by whole records, with clear errors.

Every failure to write is a ``WriteError`` that names the file and what to do; what was written before stays as it was. A run
directory may come from someone else, so nothing is written through a link, into a pipe or a device, or into a file that has a
second name elsewhere. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hyperopt.core.text import printable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class WriteError(OSError):
    """A file could not be written; the message names the file, the reason and what to do. ``errno`` is that of the cause."""

    def __init__(self, path: Path, number: int | None) -> None:
        """Make the message for ``path`` from the error number of the operating system."""
        if number in FULL:
            advice = "free space there, or move the run to another disk and set hydra.run.dir to it"
        elif number in READ_ONLY:
            advice = "make the directory writable, or move the run and set hydra.run.dir to its new place"
        elif number in GONE:
            advice = "the directory was removed or moved while the run wrote to it: set hydra.run.dir to where it is"
        else:
            advice = "mend this, or move the run and set hydra.run.dir to its new place"
        what = os.strerror(number) if number is not None else "an error without a number"
        super().__init__(f"cannot write {printable(str(path))}: {what}; {advice}, then continue with resume=auto")
        self.errno = number


class ForeignFileError(WriteError):
    """A file in a run directory leads out of it, or is not a regular file; nothing is written to it."""

    def __init__(self, path: Path, what: str) -> None:
        """Make the message that says what ``path`` is."""
        OSError.__init__(self, foreign(path, what))
        self.errno = errno.ELOOP


def foreign(path: Path, what: str) -> str:
    """Return the message about something in a run directory to which nothing is written."""
    return f"{printable(str(path))} is {what}, and was left untouched; remove it, or set hydra.run.dir to another directory"


def why_foreign(facts: os.stat_result, in_place: bool = True) -> str | None:
    """Return what is wrong with a file of a run, or None.

    Args:
        facts: the result of ``lstat`` or ``fstat`` on it.
        in_place: whether its bytes will be changed, which would also change a second name of it; other files are replaced.
    """
    if stat.S_ISLNK(facts.st_mode):
        return "a link"
    if not stat.S_ISREG(facts.st_mode):
        return "not a regular file"
    return "a hard link, and another file would change with it" if in_place and facts.st_nlink > 1 else None


def refuse_foreign(path: Path) -> None:
    """Refuse a file of a run that will be changed in place, if it is a link, a pipe, a device, or has a second name."""
    with contextlib.suppress(FileNotFoundError):
        if (what := why_foreign(os.lstat(path))) is not None:
            raise ForeignFileError(path, what)


def open_own(path: Path, flags: int) -> int:
    """Open a file of a run in order to change it, and return the handle. Every such file is opened here.

    Its directory may be reached through links. The errors are those of ``refuse_foreign`` and ``os.open``.
    """
    refuse_foreign(path)  # before opening, since opening a device may have effects
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if (what := why_foreign(os.fstat(handle))) is not None:
        os.close(handle)
        raise ForeignFileError(path, what)
    return handle


def make_directory(path: Path) -> None:
    """Make a directory of a run if it is missing; a link is refused."""
    with writing(path):
        if path.is_symlink():
            raise ForeignFileError(path, "a link")
        path.mkdir(parents=True, exist_ok=True)


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
    """Write all of ``data``; a single ``os.write`` may write only a part."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def write_bytes(path: Path, data: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file as a whole or not at all, by a temporary file beside it.

    Args:
        path: the file.
        data: its whole content.
        keep: where to keep the file that is replaced (None: nowhere).

    Raises:
        WriteError: it could not be written; the file that was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # left by a killed process with the same number, or a link, which is itself removed
            handle = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
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
    """Return ``value`` with None in place of every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as one JSON object, as ``write_bytes`` does."""
    write_text(path, json.dumps(plain(content), indent=2, default=str) + "\n")


def remove_leftovers(*directories: Path) -> None:
    """Remove temporary files of killed processes; only the process that holds the directory's lock may call this."""
    for directory in directories:
        for path in directory.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


class AppendFile:
    """A file that grows record by record; a record that cannot be written whole is removed again.

    Args:
        path: the file, which is created if it is missing.
        size: number of bytes to keep; the rest is cut off.
        checksum: checksum of these bytes.

    Attributes:
        size: number of bytes written so far.
        checksum: CRC-32 of these bytes.

    Raises:
        WriteError: it cannot be opened, or leads elsewhere; see ``open_own``.
    """

    def __init__(self, path: Path, size: int = 0, checksum: int = 0) -> None:
        """Open the file and truncate it."""
        self.path, self.checksum = path, checksum
        with writing(path):
            self._handle = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self.size = min(size, os.fstat(self._handle).st_size)
            os.ftruncate(self._handle, self.size)

    def write(self, record: bytes) -> None:
        """Append one record.

        Raises:
            WriteError: it could not be written, or the file was removed or moved away with its directory.
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
        self.checksum = zlib.crc32(record, self.checksum)

    def sync(self) -> None:
        """Flush the file to the disk."""
        with writing(self.path):
            os.fsync(self._handle)

    @property
    def removed(self) -> bool:
        """Whether the file was removed; a file that was moved away with its directory was not."""
        return os.fstat(self._handle).st_nlink == 0

    def rescue(self) -> None:
        """Write the file again if it was removed; its content exists as long as it is open."""
        if self.removed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, os.pread(self._handle, self.size, 0))

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)
