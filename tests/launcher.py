"""The command line in this process: what a launch did, and what lies in a directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig


@dataclass
class Launch:
    """What one in-process launch did: its exit status and output, and the runs that it started."""

    status: int
    out: str
    err: str
    runs: list[tuple[DictConfig, Path]] = field(default_factory=list)


Launcher = Callable[..., Launch]


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Return hash and modification time of every file under ``root``, but for locks: reading one's own would end it."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}
