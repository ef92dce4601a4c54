"""The rows of ``metrics.jsonl``: what a checkpoint knows of them, and which rows a damaged file has lost. It imports no torch.

A checkpoint keeps marks ``[bytes, checksum of the bytes before, step of the row that follows]``. Since a CRC-32 can continue
from any value, the bytes between two marks are checked without those before them. Damage therefore loses only what is between
two marks: one row of a short run, and a thirtieth of a long one.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINEST = 32
"""At most one row, or this fraction of all bytes, is between two marks; there are at most twice as many marks."""
Mark = list[int]


def add_mark(marks: list[Mark], size: int, checksum: int, step: int) -> None:
    """Add a mark where the row of ``step`` begins, unless the last mark is near; if there are too many, drop every second."""
    if size - marks[-1][0] > size // FINEST:
        marks.append([size, checksum, step])
        if len(marks) > 2 * FINEST:
            del marks[1::2]


@dataclass(frozen=True)
class Rows:
    """The rows that a checkpoint knows and that still exist.

    Attributes:
        pieces: ``(first byte, bytes)`` of each part of the file that is unchanged.
        marks: the marks of these parts, put one after the other.
        lost: ``[first, last]`` steps of the rows that are missing or changed.
    """

    pieces: list[tuple[int, int]]
    marks: list[Mark]
    lost: list[list[int]]

    @property
    def said(self) -> str:
        """The steps of the lost rows, in words."""
        return spans(self.lost)

    def content(self, path: Path) -> bytes:
        """Return the unchanged parts of the file at ``path``."""
        found = []
        if self.pieces:
            with open(path, "rb") as file:
                for start, size in self.pieces:
                    file.seek(start)
                    found.append(file.read(size))
        return b"".join(found)


def spans(steps: Sequence[Sequence[int]]) -> str:
    """Return steps in words, such as ``step 3, steps 7 to 9``."""
    return ", ".join(f"step {first}" if first == last else f"steps {first} to {last}" for first, last in steps)


def check_rows(path: Path, position: Mapping[str, Any], step: int) -> Rows:
    """Compare the file of rows with what a checkpoint knows of it; later rows are ignored.

    Args:
        path: the file, which may be missing.
        position: the position in the checkpoint (``Tracker.position``).
        step: the step of its last row, which is the next in the file.
    """
    size = position["rows"]
    if not size:
        return Rows([], [[0, 0, step]], [])
    data = path.read_bytes()[:size] if path.exists() else b""  # read(size) would allocate whatever size a bad file gives
    whole = zlib.crc32(data) if len(data) == size else None
    marks = position.get("marks") or [[0, 0, 0], [size, whole, step]]  # an older version knew only the length
    if whole is not None and marks[-1][1] == whole:
        return Rows([(0, size)], marks, [])
    pieces, kept, lost, at, checksum = [], [[0, 0, marks[0][2]]], [], 0, 0
    for (start, before, first), (end, after, until) in itertools.pairwise(marks):
        length = end - start
        for place in (at, start):  # the bytes before may be missing, or only changed
            part = data[place : place + length]
            if len(part) == length and zlib.crc32(part, before) == after:
                pieces.append((place, length))
                at, checksum = place + length, zlib.crc32(part, checksum)
                kept.append([kept[-1][0] + length, checksum, until])
                break
        else:
            kept[-1][2] = until
            lost.append([first, until - 1])
    joined: list[list[int]] = []
    for first, last in lost:
        if joined and joined[-1][1] == first - 1:
            joined[-1][1] = last
        else:
            joined.append([first, last])
    return Rows(pieces, kept, joined)


def is_count(value: Any) -> bool:
    """Whether a value of a checkpoint is a whole number that can count something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def check_position(position: Any) -> None:
    """Refuse a position that no run can have written; the ``ValueError`` says what is wrong."""

    def is_flat(each: Any) -> bool:
        known = isinstance(each, list) and len(each) == 3 and is_count(each[0]) and is_count(each[2])
        return each is None or (known and isinstance(each[1], int | float))

    if not isinstance(position, dict):
        raise ValueError(f"position is {position!r:.40}")
    events, wall, marks = position.get("events"), position.get("wall"), position.get("marks", [])
    flat = position.get("flat") or {}  # an older version had no such curves
    good = {
        "rows": is_count(position.get("rows")),
        "events": isinstance(events, dict) and all(isinstance(name, str) and is_count(size) for name, size in events.items()),
        "wall": isinstance(wall, int | float) and 0 <= wall < 2**40,
        "marks": isinstance(marks, list)
        and all(isinstance(mark, list) and len(mark) == 3 and all(map(is_count, mark)) for mark in marks),
        "flat": isinstance(flat, dict) and all(isinstance(name, str) and is_flat(each) for name, each in flat.items()),
    }
    for name, fits in good.items():
        if not fits:
            raise ValueError(f"position.{name} is {position.get(name)!r:.40}")
    sizes, steps = [mark[0] for mark in marks], [mark[2] for mark in marks]
    if marks and (sizes[0] != 0 or sizes[-1] != position["rows"] or sizes != sorted(set(sizes)) or steps != sorted(steps)):
        raise ValueError("position.marks are out of order")
