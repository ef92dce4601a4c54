"""Files of a dataset on disk: of a known size and checksum before anything is made of them, whole or not there when written.

Whoever hands over a dataset can put anything under the names of its files. So no more of a file is read or unpacked than the
largest of the dataset's files has, and its checksum is right before anything parses it. Nothing that is read is changed, and a
file that is half written never bears the name of a file.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import logging
import os
import tarfile
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from hyperopt.core.text import one_line
from hyperopt.data.errors import DataError
from hyperopt.data.reading import UnreadableError, read_bytes

log = logging.getLogger(__name__)

LARGEST = 200_000_000
"""Bytes of a file, packed or not, whose dataset knows no smaller bound."""
UNPACK: dict[str, Callable[[bytes, int], bytes]] = {
    "": lambda data, count: data[:count],
    ".gz": lambda data, count: gzip.GzipFile(fileobj=io.BytesIO(data)).read(count),
    ".bz2": lambda data, count: bz2.BZ2File(io.BytesIO(data)).read(count),
    ".pkz": lambda data, count: zlib.decompressobj().decompress(data, count),
}
"""By the end of a file's name: unpacks, and stops after so many bytes."""


def md5(data: bytes) -> str:
    """Return the md5 of ``data`` in hexadecimal (against accidents, not attacks; allowed where FIPS forbids it for security)."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _fault(data: bytes, expected: str) -> str:
    """Return what is wrong with the bytes of one file, empty where they are the right ones."""
    kind, got = ("sha256", hashlib.sha256(data).hexdigest()) if len(expected) == 64 else ("md5", md5(data))
    return "" if got == expected else f"{kind} {got} of {len(data)} bytes, expected {expected}"


def verify(files: Mapping[str, bytes], checksums: Mapping[str, str], where: str) -> dict[str, str]:
    """Check the unpacked bytes of every file against its checksum.

    Args:
        files: bytes by file name.
        checksums: md5 or sha256 by file name, of every file that there must be.
        where: what to call the place in the error.

    Returns:
        The checksums.

    Raises:
        DataError: names the first file that is missing or has other bytes.
    """
    for name, expected in checksums.items():
        fault = _fault(files[name], expected) if name in files else "missing"
        if fault:
            raise DataError(f"{where}: {name}: {fault}")
    return dict(checksums)


def unpack(data: bytes, packing: str, largest: int, where: str) -> bytes:
    """Return the bytes that ``data`` unpacks to; one more than ``largest`` is as far as it goes.

    Args:
        data: the whole packed file.
        packing: a key of ``UNPACK``.
        largest: bytes that the file may have.
        where: what to call it in an error.

    Raises:
        DataError: damaged, or more bytes.
    """
    try:
        found = UNPACK[packing](data, largest + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where} cannot be unpacked: {one_line(error)}") from error
    if len(found) > largest:
        raise DataError(f"{where} has more than the {largest} bytes that it may have at most")
    return found


def read_file(path: Path, largest: int = LARGEST) -> bytes:
    """Return the bytes of a file as they are, through links too; a pipe or a device is neither read nor waited for.

    Raises:
        FileNotFoundError: there is none.
        DataError: no file, one that cannot be read, or one too large for what ``largest`` bytes can be packed to.
    """
    try:
        return read_bytes(path, largest + largest // 1000 + 1000)  # what cannot be packed any smaller grows by its headers
    except UnreadableError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            raise FileNotFoundError(str(path)) from error
        raise DataError(str(error)) from error


def read_known(path: Path, expected: str, largest: int = LARGEST, packing: str = "") -> bytes:
    """Return the unpacked bytes of a file whose checksum is known.

    Args:
        path: the file.
        expected: md5 or sha256 of its unpacked bytes.
        largest: bytes that it may have, unpacked.
        packing: a key of ``UNPACK``.

    Raises:
        FileNotFoundError: there is none.
        DataError: see ``read_file`` and ``unpack``, or another checksum.
    """
    data = unpack(read_file(path, largest), packing, largest, str(path))
    if fault := _fault(data, expected):
        raise DataError(f"{path}: {fault}")
    return data


def read_tar(archive: bytes, largest: int, where: str) -> dict[str, bytes]:
    """Return the files of a ``.tar.gz`` by their paths in it. Call it on bytes whose checksum is right.

    Nothing is written, so it does not matter where a path leads; what is no file (a link, a device) is left out.

    Args:
        archive: the whole file.
        largest: bytes that it may have, unpacked.
        where: what to call it in an error.

    Raises:
        DataError: no whole archive, or more bytes.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(unpack(archive, ".gz", largest, where)), mode="r:") as members:
            files = {member.name: members.extractfile(member) for member in members if member.isreg() and not member.issparse()}
            return {name: file.read() for name, file in files.items() if file is not None}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{where} is no whole tar archive: {one_line(error)}") from error


def _read_either(folder: Path, name: str, expected: str, largest: int) -> bytes | None:
    """Return the unpacked bytes of one file, plain or ``.gz``; None where it is in neither form."""
    faults = []
    for path, packing in ((folder / name, ""), (folder / f"{name}.gz", ".gz")):
        try:
            data = read_known(path, expected, largest, packing)
        except FileNotFoundError:
            continue
        except DataError as error:
            faults.append(str(error))
            continue
        if faults:
            log.warning("%s; read %s in its place", faults[0], path)
        return data
    if faults:
        do = "move it away (what is missing is downloaded), or change dataset.root"
        raise DataError(f"{'; '.join(faults)}; it is damaged or not the known file: {do}")
    return None


def read_folder(folder: Path, checksums: Mapping[str, str], largest: int = LARGEST) -> dict[str, bytes]:
    """Read the files that are in ``folder``, each as it is or packed as ``.gz``; nothing is written.

    A file that is there but holds other bytes is an error and not a missing file: it may be the user's, so it is neither used nor
    overwritten. Where its other form is good, that one is read.

    Args:
        folder: the directory of the files; need not exist.
        checksums: md5 or sha256 of the unpacked bytes by file name.
        largest: bytes that a file may have, unpacked.

    Returns:
        The unpacked bytes by name, of the files that are there.

    Raises:
        DataError: names the file, its checksum and the one expected.
    """
    files = {name: _read_either(folder, name, expected, largest) for name, expected in checksums.items()}
    return {name: data for name, data in files.items() if data is not None}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files so that every one is whole or not there, whoever else writes the same ones and whenever it is killed.

    A link under the name of a file is replaced; what it leads to stays as it is.

    Raises:
        DataError: names the folder and why nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            part = folder / f".{name}.{uuid.uuid4().hex}.part"
            try:
                with part.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # before the rename: else a power cut can leave an empty file under the name
                os.replace(part, folder / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error}; change dataset.root") from error


def why_unwritable(folder: Path) -> str:
    """Return why ``folder`` can't be made or written into, empty where it can; nothing is made."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is read-only"
