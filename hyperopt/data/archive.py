"""Reading an archive without unpacking it.

Nothing is ever written under a name that an archive gives: the members asked for are read into memory, and an archive that holds
anything an honest one would not (a path that leaves the directory, a link, a device) is refused whole.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hyperopt.data.errors import DataError

LARGEST_MEMBER = 200_000_000  # bytes; those of CIFAR-10 have 31 million


def read_tar(archive: Path, folder: str, names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of the members ``folder/name`` of a tar archive, compressed or not.

    Args:
        archive: the file.
        folder: the directory of the members in the archive.
        names: the members wanted.

    Returns:
        Bytes by name, of the members that there are.

    Raises:
        DataError: a member that is neither a file nor a directory, one whose path is absolute or holds ``..``, one of more than
            ``LARGEST_MEMBER`` bytes, the same member twice, or a file that is no whole tar archive.
    """
    wanted = {f"{folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as members:
            for member in members:
                _check(member, archive)
                name = wanted.get(str(PurePosixPath(member.name)))
                if name is None or not member.isreg():
                    continue
                if name in found:
                    raise DataError(f"{archive.name}: {member.name} is in it twice")
                file = members.extractfile(member)
                assert file is not None  # only a member that is no file has none
                found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive.name}: not a whole tar archive: {error}") from error
    return found


def _check(member: tarfile.TarInfo, archive: Path) -> None:
    """Refuse a member that no honest dataset has."""
    path = PurePosixPath(member.name)
    where = f"{archive.name}: refused, its member {member.name!r}"
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where} leads out of the directory")
    if not (member.isreg() or member.isdir()):
        raise DataError(f"{where} is a link or a device, not a file")
    if member.size > LARGEST_MEMBER:
        raise DataError(f"{where} has {member.size} bytes, more than {LARGEST_MEMBER}")
