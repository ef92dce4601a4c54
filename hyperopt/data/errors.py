"""The one error of the data package."""

from __future__ import annotations


class DataError(RuntimeError):
    """A dataset is absent, unreachable or not what it says; the message names the file and the key to change."""
