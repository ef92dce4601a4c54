"""Plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a table: cells in columns of equal width, two spaces apart, nothing trailing."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def one_line(text: object, longest: int = 600) -> str:
    """Return text from elsewhere as one line without escape sequences, cut at a length, so that a terminal shows it as it is."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
    return line if len(line) <= longest else f"{line[:longest]}..."
