"""Plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with what would steer a terminal or break a line shown as an escape: ``\x1b``, ``\n``, ``\u202e``.

    Args:
        text: from a file, say.
        keep: characters to leave as they are.
    """
    return "".join(each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text)


def why_no_component(name: str) -> str | None:
    """Return why ``name`` is not one plain component of a path, or None."""
    if not name.strip() or name in (".", ".."):
        return "names no directory"
    if "/" in name or "\\" in name:
        return "has a separator of paths in it"
    if not name.isprintable():
        return "has a character in it that cannot be printed"
    return "has more than 100 bytes" if len(name.encode()) > 100 else None


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a table: cells in columns of equal width, two spaces apart, nothing trailing."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def one_line(text: object, longest: int = 600) -> str:
    """Return text from elsewhere as one line without escape sequences; of a very long one the beginning and the end."""
    line = printable(" ".join(str(text).split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def called(value: Any) -> str:
    """Return what to call an object in a message: a class or function by its full name, anything else by its class."""
    made = getattr(value, "func", value)  # of a functools.partial
    named = made if hasattr(made, "__qualname__") else type(made)
    module = getattr(named, "__module__", None)
    return named.__qualname__ if module in (None, "builtins", "__main__") else f"{module}.{named.__qualname__}"
