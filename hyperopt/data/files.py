"""The files of a dataset: found in a folder or fetched into one, and checked before anything parses them.

Whoever provides a data directory can put anything under the names of its files. Therefore no more bytes are read or unpacked
than a file may have, and only bytes with the right checksum are passed on, so that numpy or pickle reads only known files.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import logging
import os
import shutil
import socket
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from hyperopt.core.checks import check_flag
from hyperopt.core.text import one_line
from hyperopt.data.reading import DataError, UnreadableError, read_bytes
from hyperopt.data.splits import DrawnDataset

log = logging.getLogger(__name__)

LARGEST = 16 + 60_000 * 28 * 28  # bytes of the largest file of a known dataset, the training images of MNIST with their header
STAGING = ".hyperopt-download"  # a directory, and with .lock a file, in a dataset's folder while it is fetched
WAIT_SECONDS = 3600.0  # longer than any download takes; a process that holds the lock longer is stopped or stuck
STALL_SECONDS = 15.0  # a connection that is silent for so long is given up
OPEN: Mapping[str, Callable[..., Any]] = {"": lambda file: file, ".gz": gzip.open, ".bz2": bz2.open}

Folder = tuple[Path, Mapping[str, str]]  # a folder that may hold a dataset, and the md5 or sha256 of each unpacked file
Sources = Mapping[str, Callable[[Path], Path]]  # functions that fetch into a directory and return the files' folder, by name


def default_root() -> str:
    """Return the default data directory: ``$HYPEROPT_DATA``, else ``data`` in the working directory."""
    return os.environ.get("HYPEROPT_DATA") or "data"


def check_path(owner: Any, name: str) -> None:
    """Refuse a field of ``owner`` that does not name a file or directory."""
    value = getattr(owner, name)
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} does not name a file or directory; change {name}")


@dataclass(frozen=True)
class Stored:
    """A dataset that is read from files, which may be fetched.

    Attributes:
        root: the data directory, in torchvision's layout (``ROOT/MNIST/raw/...``); ``~`` is expanded.
        download: whether to fetch missing files; if False, only files under ``root`` are read.
    """

    root: str = field(default_factory=default_root)
    download: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        check_path(self, "root")
        check_flag(self, "download")


@dataclass(frozen=True)
class FilesDataset(Stored, DrawnDataset):
    """A dataset of a known size that is read from files, which may be fetched."""

    def __post_init__(self) -> None:
        """Check the values."""
        DrawnDataset.__post_init__(self)
        Stored.__post_init__(self)


def check(data: bytes, expected: str, where: object) -> bytes:
    """Return ``data`` if its md5 or sha256 is as expected; else raise a ``DataError`` that begins with ``where``."""
    kind = "sha256" if len(expected) == 64 else "md5"
    if (got := hashlib.new(kind, data, usedforsecurity=False).hexdigest()) != expected:  # FIPS forbids md5 for security
        raise DataError(f"{where}: {kind} {got} of {len(data)} bytes, expected {expected}")
    return data


def read_file(path: Path, largest: int = LARGEST, packing: str = "") -> bytes:
    """Return the bytes of a file, unpacked if ``packing`` is ``.gz`` or ``.bz2``; this never waits for a pipe or a device.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a file, cannot be unpacked, or has more than ``largest`` bytes.
    """
    try:
        packed = read_bytes(path, largest + largest // 1000 + 1000)  # incompressible data grows by headers when it is packed
        with OPEN[packing](io.BytesIO(packed)) as file:
            data = file.read(largest + 1)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"{path} cannot be unpacked: {one_line(error)}") from error
    if len(data) > largest:
        raise UnreadableError(f"{path} has more than the {largest} bytes that it may have at most")
    return data


def read_folders(folders: Sequence[Folder], advice: str = "") -> tuple[dict[str, bytes], list[str]]:
    """Return the files (unpacked bytes by name) of the first complete folder and no faults, or no files and what is missing.

    Raises:
        DataError: a file has other bytes, and no folder is complete without it; the message ends with ``advice``.
    """
    lacks, damage, ignored = [], [], []
    for folder, checksums in folders:
        files: dict[str, bytes] = {}
        for name, expected in checksums.items() if folder.is_dir() else ():
            faults = []
            for path, packing in ((folder / name, ""), (folder / f"{name}.gz", ".gz")):
                try:
                    files[name] = check(read_file(path, packing=packing), expected, path)
                    break
                except FileNotFoundError:
                    continue
                except (UnreadableError, DataError) as error:
                    faults.append(str(error))
            (ignored if name in files else damage).extend(faults)
        if files.keys() == checksums.keys():
            for fault in (*ignored, *damage):
                log.warning("%s; read %s without it", fault, folder)
            return files, []
        lacks.append(f"files in {folder}: no {', '.join(name for name in checksums if name not in files)}")
    if damage:
        raise DataError("; ".join(damage) + advice)
    return {}, lacks


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[Path]:
    """Give one process at a time a directory for unfinished files in ``folder``; empty directories are removed at the end.

    The lock belongs to the kernel and ends with its process. A killed process leaves only files, which the next one removes.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    staging, lock = folder / STAGING, FileLock(folder / f"{STAGING}.lock", timeout=WAIT_SECONDS)
    try:
        while not lock.is_locked:
            folder.mkdir(parents=True, exist_ok=True)
            log.info("fetching into %s, once no other process does", folder)
            with contextlib.suppress(FileNotFoundError):  # a process that got nothing has just removed the empty folder
                lock.acquire()
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
    finally:
        if lock.is_locked:
            shutil.rmtree(staging, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # before the release: whoever waits for it then makes a new one
            lock.release()
        with contextlib.suppress(OSError):  # not empty: the dataset, or another process's lock
            for each in made:
                each.rmdir()


def torchvision(folder: str, call: Callable[[Any, str], Any]) -> Sources:
    """Return a source in which ``call(torchvision.datasets, root)`` puts the files into ``folder`` under ``root``."""

    def fetch(staging: Path) -> Path:
        import torchvision.datasets  # imported here since it takes seconds and is not needed for files that exist

        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(STALL_SECONDS)  # torchvision sets no timeout, and would wait forever if packets are dropped
        try:
            with warnings.catch_warnings(action="ignore"):  # numpy warns about pickles from Python 2, and tarfile warns too
                call(torchvision.datasets, str(staging))
        finally:
            socket.setdefaulttimeout(before)
        return staging / folder

    return {"torchvision's download": fetch}


def obtain(settings: Stored, name: str, folders: Sequence[Folder], sources: Sources) -> dict[str, bytes]:
    """Return a dataset's files by name, from the first complete folder or else from the first source that has them.

    Args:
        settings: ``root`` and ``download``.
        name: the dataset's name, for messages.
        folders: where the files may be, under ``root`` or absolute. The files of a source are kept in the first one.
        sources: sources by name, tried in their order for the files of the first folder.

    Raises:
        DataError: a file is damaged and no folder is complete (the file may be the user's own and is never overwritten), or
            nothing has the files; the message lists all that was tried, with reasons, and says what to do.
    """
    places = " or ".join(str("DIR" / path) for path, _ in folders)
    folders = [(Path(settings.root).expanduser() / path, checksums) for path, checksums in folders]
    damaged = "; it is damaged or not the known file: move it away (what is missing is downloaded), or change dataset.root"
    files, tried = read_folders(folders, damaged)
    if not files and not settings.download:
        tried += [f"{source}: not tried, dataset.download=false" for source in sources]
    elif not files:
        try:
            with one_writer(folders[0][0]) as staging:
                files, tried = read_folders(folders, damaged)  # what another process has kept while this one waited
                files = files or _fetch(*folders[0], sources, staging, tried)
        except OSError as error:
            held = f" Another process has had it for {WAIT_SECONDS:.0f} s: end it." if isinstance(error, TimeoutError) else ""
            files, tried = {}, [*tried, f"cannot write into {folders[0][0]}: {one_line(error)}{held}"]
    if not files:
        do = f"dataset.root=DIR (or HYPEROPT_DATA=DIR) where {places} holds these files, plain or .gz, or can be written"
        do = f"What to do: dataset=digits, which is bundled and needs no files; or {do}."
        raise DataError("\n  ".join([f"{name}: no source has it. Tried:", *tried]) + f"\n{do}")
    return files


def _fetch(folder: Path, checksums: Mapping[str, str], sources: Sources, staging: Path, tried: list[str]) -> dict[str, bytes]:
    """Return the files of the first source that has them, and keep them in ``folder``; note in ``tried`` why others failed."""
    for label, source in sources.items():
        log.info("not in %s; trying %s", folder, label)
        try:
            files, lacks = read_folders([(source(staging), checksums)])
        except Exception as error:  # a source may fail in any way; its error is a reason for the list
            files, lacks = {}, [f"{type(error).__name__}: {one_line(error)}"]
        for name in (name for name in files if not (folder / name).exists() and not (folder / f"{name}.gz").exists()):
            with (whole := staging / "whole").open("wb") as out:
                out.write(files[name])
                out.flush()
                os.fsync(out.fileno())  # otherwise a power cut after the rename could leave an empty file
            os.replace(whole, folder / name)
        if files:
            return files
        tried.append(f"{label}: {lacks[0]}")
    return {}
