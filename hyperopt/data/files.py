"""Files of a dataset on disk: checked by md5 when read, whole or not there when written.

Nothing that is read is changed, and a file that is half written never bears the name of a file.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

from hyperopt.data.errors import DataError

log = logging.getLogger(__name__)


def md5(data: bytes) -> str:
    """Return the md5 of ``data`` in hexadecimal (against accidents, not attacks; allowed where FIPS forbids it for security)."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _fault(data: bytes, expected: str) -> str:
    """Return what is wrong with the bytes of one file, empty where they are the right ones."""
    got = md5(data)
    return "" if got == expected else f"md5 {got} of {len(data)} bytes, expected {expected}"


def verify(files: Mapping[str, bytes], checksums: Mapping[str, str], where: str) -> dict[str, str]:
    """Check the unpacked bytes of every file against its md5.

    Args:
        files: bytes by file name.
        checksums: md5 by file name, of every file that there must be.
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


def _read_file(folder: Path, name: str, expected: str) -> bytes | None:
    """Return the unpacked bytes of one file, plain or ``.gz``; None where it is in neither form."""
    faults = []
    for path in (folder / name, folder / f"{name}.gz"):
        try:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, EOFError, zlib.error) as error:
            faults.append(f"{path}: {error}")
            continue
        if not (fault := _fault(data, expected)):
            if faults:
                log.warning("%s; read %s in its place", faults[0], path)
            return data
        faults.append(f"{path}: {fault}")
    if faults:
        raise DataError(f"{'; '.join(faults)}; it is damaged or not this dataset: move it away, or change dataset.root")
    return None


def read_folder(folder: Path, checksums: Mapping[str, str]) -> dict[str, bytes]:
    """Read the files that are in ``folder``, each as it is or packed as ``.gz``; nothing is written.

    A file that is there but holds other bytes is an error and not a missing file: it may be the user's, so it is neither used nor
    overwritten. Where its other form is good, that one is read.

    Args:
        folder: the directory of the files; need not exist.
        checksums: md5 of the unpacked bytes by file name.

    Returns:
        The unpacked bytes by name, of the files that are there.

    Raises:
        DataError: names the file, its md5 and the one expected.
    """
    files = {name: _read_file(folder, name, expected) for name, expected in checksums.items()}
    return {name: data for name, data in files.items() if data is not None}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files so that every one is whole or not there, whoever else writes the same ones and whenever it is killed.

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
