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
                name = wanted.get(str(PurePosixPath(member.name)))
                if fault := _fault(member) or ("is in it twice" if name in found else ""):
                    raise DataError(f"{archive.name}: refused, its member {member.name!r} {fault}")
                if name is None or not member.isreg():
                    continue
                file = members.extractfile(member)
                assert file is not None  # only a member that is no file has none
                found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive.name}: not a whole tar archive: {error}") from error
    return found


def _fault(member: tarfile.TarInfo) -> str:
    """Return what a member has that no honest one has, empty where there is nothing."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "leads out of the directory"
    if not (member.isreg() or member.isdir()):
        return "is a link or a device, not a file"
    return f"has {member.size} bytes, more than {LARGEST_MEMBER}" if member.size > LARGEST_MEMBER else ""
