"""Plain text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with line breaks and characters that control a terminal as escapes: ``\x1b``, ``\n``, ``\u202e``.

    Args:
        text: text that may come from elsewhere.
        keep: characters that are not escaped.
    """
    return "".join(each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text)


def why_no_component(name: str) -> str | None:
    """Return why ``name`` cannot be one component of a path, or None if it can."""
    if not name.strip() or name in (".", ".."):
        return "names no directory"
    if "/" in name or "\\" in name:
        return "has a separator of paths in it"
    if not name.isprintable():
        return "has a character in it that cannot be printed"
    return "has more than 100 bytes" if len(name.encode()) > 100 else None


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a table with columns of equal width, two spaces apart, and no trailing spaces."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def with_article(word: str) -> str:
    """Return a word with "a" or "an" before it."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def one_line(text: object, longest: int = 600) -> str:
    """Return text from elsewhere as one line without escape sequences; the middle of a very long one is left out."""
    line = printable(" ".join(str(text).split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def called(value: Any) -> str:
    """Return the name of an object for a message: the full name of a class or function, or that of the object's class."""
    made = getattr(value, "func", value)  # of a functools.partial
    named = made if hasattr(made, "__qualname__") else type(made)
    module = getattr(named, "__module__", None)
    return named.__qualname__ if module in (None, "builtins", "__main__") else f"{module}.{named.__qualname__}"


def brief(value: Any) -> str:
    """Return an object for a ``repr``: a tensor as dtype and shape, a function as its name, a tree as its first entries."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}".removeprefix("torch.") + f"{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{_first(f'{key!r}: {brief(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"({_first(brief(each) for each in value)})"
    if hasattr(value, "__qualname__"):
        return value.__qualname__.rpartition(".")[2]
    return f"{value:.6g}" if isinstance(value, float) else one_line(repr(value), 110)


def _first(entries: Iterable[str], count: int = 3) -> str:
    """Return the first entries in one line, and how many there are in all if there are more."""
    found = list(entries)
    return ", ".join(found if len(found) <= count else [*found[:count], f"... ({len(found)} entries)"])


def described(of: object, **parts: Any) -> str:
    """Return a short ``repr`` that names some parts of an object, without the numbers in its tensors."""
    return f"{type(of).__name__}({', '.join(f'{name}={brief(each)}' for name, each in parts.items())})"
