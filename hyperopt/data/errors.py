"""The one error of the data package."""

from __future__ import annotations


class DataError(RuntimeError):
    """A dataset is absent, unreachable or not what it says; the message names the file and the key to change."""


def one_line(error: BaseException) -> str:
    """Return an error's text as one line for a terminal: a file may have put line ends and escapes into it, or very much."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
    return text if len(text) <= 500 else f"{text[:240]} ... {text[-240:]}"
