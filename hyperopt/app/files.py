"""How files are written: small ones as a whole or not at all, growing ones by whole records, and what a failure says.

Every failure to write is a ``WriteError`` that names the file and what to do; what was written before it stays as it was. A run
directory may come from someone else, so nothing is written through a link, into a pipe or a device, or into a file that has a
second name elsewhere. Free of torch.
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
        super().__init__(f"cannot write {printable(str(path))}: {what}; {advice}, then continue with resume=auto")
        self.errno = number


class ForeignFileError(WriteError):
    """A file in a run directory leads out of it, or is no file: nothing is written to it."""

    def __init__(self, path: Path, what: str) -> None:
        """Say what the thing at ``path`` is."""
        OSError.__init__(self, foreign(path, what))
        self.errno = errno.ELOOP


def foreign(path: Path, what: str) -> str:
    """Return the message about a thing in a run directory that nothing is written to."""
    return f"{printable(str(path))} is {what}, and was left untouched; remove it, or set hydra.run.dir to another directory"


def why_foreign(facts: os.stat_result, in_place: bool = True) -> str | None:
    """Return what is wrong with a file of a run, or None.

    Args:
        facts: of the thing itself, by ``lstat`` or ``fstat``.
        in_place: its bytes are going to be changed, where another name of it would show that too; other files are replaced.
    """
    if stat.S_ISLNK(facts.st_mode):
        return "a link"
    if not stat.S_ISREG(facts.st_mode):
        return "not a regular file"
    return "a hard link, and another file would change with it" if in_place and facts.st_nlink > 1 else None


def refuse_foreign(path: Path) -> None:
    """Refuse a file of a run that is going to be changed in place, if it leads elsewhere.

    Raises:
        ForeignFileError: it is a link, a pipe, a device, or a file with a second name.
    """
    with contextlib.suppress(FileNotFoundError):
        if (what := why_foreign(os.lstat(path))) is not None:
            raise ForeignFileError(path, what)


def open_own(path: Path, flags: int) -> int:
    """Open a file of a run to change it, and return the handle; the one way to do so.

    Args:
        path: the file. The directory that it lies in may be reached through links.
        flags: of ``os.open``.

    Raises:
        ForeignFileError: it is a link, a pipe, a device, or a file with a second name.
        OSError: it cannot be opened.
    """
    refuse_foreign(path)  # before it is opened: to open a device has effects of its own
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if (what := why_foreign(os.fstat(handle))) is not None:
        os.close(handle)
        raise ForeignFileError(path, what)
    return handle


def make_directory(path: Path) -> None:
    """Make a directory of a run where it is missing.

    Raises:
        WriteError: it cannot be made, or is a link.
    """
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
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # of a killed process with this number, or a link, which goes itself
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
        checksum: of the bytes kept.

    Attributes:
        path: the file.
        size: bytes written so far.
        checksum: CRC-32 of them.

    Raises:
        WriteError: it cannot be opened, or is no file of its own; see ``open_own``.
    """

    def __init__(self, path: Path, size: int = 0, checksum: int = 0) -> None:
        """Open the file and cut it."""
        self.path, self.checksum = path, checksum
        with writing(path):
            self._handle = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
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
        self.checksum = zlib.crc32(record, self.checksum)

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
