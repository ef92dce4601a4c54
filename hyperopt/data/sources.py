"""Where a dataset's files come from: folders first, then each source in turn, every one checked by its size and checksum.

A ``Folder`` is a directory that may hold the dataset already, in one form (the Python or the binary version of CIFAR-10, say).
A ``Source`` hands over the unpacked bytes of the files of the first folder, whatever it had to do to get them. ``obtain`` decides
in which order they are asked, checks what they say, keeps it in the first folder, and makes one error of all their reasons. A new
dataset is a list of folders with their checksums and a list of sources.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from hyperopt.core.text import one_line
from hyperopt.data.errors import DataError
from hyperopt.data.files import LARGEST, read_folder, verify, why_unwritable, write_folder
from hyperopt.data.lock import one_process

log = logging.getLogger(__name__)


class Source(Protocol):
    """One place that a dataset's files can be fetched from."""

    name: str
    """What the user reads in a log or an error, as ``torchvision's download``."""

    def fetch(self) -> dict[str, bytes]:
        """Return the unpacked bytes of every file by its name, or raise any exception whose text is the reason."""
        ...


@dataclass(frozen=True)
class Folder:
    """A directory that may hold the dataset in one of its forms.

    Attributes:
        path: the directory; need not exist.
        checksums: md5 or sha256 of the unpacked bytes by file name, of every file that makes the form complete.
        largest: bytes that none of these files has more of, unpacked.
    """

    path: Path
    checksums: Mapping[str, str]
    largest: int = LARGEST


class Found(NamedTuple):
    """The files of a dataset, all checked: the folder that they are of, and their unpacked bytes by name."""

    folder: Folder
    files: dict[str, bytes]


def advice(*places: str, more: str = "") -> str:
    """Return the last line of the error of a dataset that no source has.

    Args:
        places: the directories under ``dataset.root`` that may hold the files.
        more: another way, as the name of a system's package.
    """
    under = " or ".join(f"DIR/{place}" for place in places)
    return (
        "What to do: dataset=digits, which is bundled and needs no files; or dataset.root=DIR (or HYPEROPT_DATA=DIR) where "
        f"{under} holds these files, plain or .gz, or can be written{f'; or {more}' if more else ''}."
    )


def obtain(name: str, folders: Sequence[Folder], sources: Sequence[Source], *, download: bool, hint: str) -> Found:
    """Return a dataset's files, from the first folder that has all or else from the first source; those are kept.

    Of several processes that find nothing at once, one asks the sources; the others wait for it and read what it has kept.

    Args:
        name: the dataset's name, for messages.
        folders: where the files may lie. What a source gives is kept in the first; the others are only read.
        sources: asked in this order, for the files of the first folder.
        download: whether sources may be asked.
        hint: what to do when there is none; ends the error.

    Returns:
        The files and the folder that they are of.

    Raises:
        DataError: a damaged file in a folder while no other is complete (nothing is fetched then), or one list of all that was
            tried with each reason.
    """
    found, tried = _look(folders)
    if found:
        return found
    keep = folders[0]
    # Said before the download and not after it.
    blocked = why_unwritable(keep.path) if download else "dataset.download=false"
    if not blocked:
        with one_process(keep.path):
            found, tried = _look(folders)  # what another process has kept while this one waited
            found = found or _ask(name, keep, sources, tried)
        if found:
            return found
    else:
        tried += [f"{source.name}: not tried, {blocked}" for source in sources]
    raise DataError("\n  ".join([f"{name}: no source has it. Tried:", *tried]) + f"\n{hint}")


def _look(folders: Sequence[Folder]) -> tuple[Found | None, list[str]]:
    """Return the files of the first folder that has all of them, or what each folder lacks.

    Raises:
        DataError: a damaged file, and no folder that is complete.
    """
    lacks, damage = [], []
    for folder in folders:
        try:
            files = read_folder(folder.path, folder.checksums, folder.largest)
        except DataError as error:
            damage.append(error)
            continue
        missing = [file for file in folder.checksums if file not in files]
        if not missing:
            for error in damage:
                log.warning("%s; read %s in its place", error, folder.path)
            return Found(folder, files), []
        lacks.append(f"files in {folder.path}: no {', '.join(missing)}")
    if damage:
        raise damage[0]
    return None, lacks


def _ask(name: str, keep: Folder, sources: Sequence[Source], tried: list[str]) -> Found | None:
    """Return what the first source gives, kept in ``keep``; adds the reason of each that gives nothing to ``tried``."""
    for source in sources:
        log.info("%s: not in %s; trying %s", name, keep.path, source.name)
        try:
            fetched = source.fetch()
            verify(fetched, keep.checksums, "what came")
        except Exception as error:  # a source may fail in any way; each is a reason for the list
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            tried.append(f"{source.name}: {kind}{one_line(error)}")
            continue
        files = {file: fetched[file] for file in keep.checksums}
        there = read_folder(keep.path, keep.checksums, keep.largest)
        write_folder(keep.path, {file: data for file, data in files.items() if file not in there})
        return Found(keep, files)
    return None
