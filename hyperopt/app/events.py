"""TensorBoard's event files of one run: one for each session, written at once, truncated on resuming.

TensorBoard's own writer puts events into a queue that a thread empties. A full disk then shows up later and elsewhere, and it
is unknown which byte belongs to which step. Here a call returns when its event is in the file. A checkpoint can therefore
store the lengths of the files, and a resumed run truncates them to these, so that no event occurs twice.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from hyperopt.app.files import AppendFile, make_directory, open_own, writing

PREFIX = "events.out.tfevents."


def folder(directory: Path, name: str, keep: Mapping[str, int]) -> Path:
    """Return the folder of a run's events in ``tb/``, and remove events that no checkpoint knows from the others.

    Args:
        directory: ``tb/`` of the run.
        name: name of a new folder, which TensorBoard shows as that of the run; empty: ``tb/`` itself.
        keep: the files that are kept. A run that is resumed with other overrides stays where they are.
    """
    found = [directory, *(each for each in sorted(directory.glob("*")) if each.is_dir())]
    kept = [each for each in found if any((each / file).exists() for file in keep)]
    chosen = kept[0] if kept else directory / name
    for other in found:
        if other != chosen:
            for path in other.glob(f"{PREFIX}*"):
                path.unlink()
    return chosen


class EventFiles:
    """The event files under ``directory``; this session writes the last of them.

    The clocks of machines differ and may be set back. TensorBoard reads files in the order of their names, which begin with a
    time. A new file therefore gets a later name than all existing ones, and the wall time of an event is never before that of
    the previous event.

    Args:
        directory: see ``folder``.
        keep: number of bytes to keep of each file; the rest is cut off, and other event files are removed.
        wall: wall time of the last event that is kept.
        purge_step: a running TensorBoard is told to forget what it has read from this step on (None: nothing).

    Attributes:
        file: the file that this session writes.
    """

    def __init__(self, directory: Path, keep: Mapping[str, int], wall: float = 0.0, purge_step: int | None = None) -> None:
        """Truncate the files and open a new one."""
        make_directory(directory)
        with writing(directory):
            self._kept: dict[str, int] = {}
            for path in directory.glob(f"{PREFIX}*"):
                if path.name in keep:
                    handle = open_own(path, os.O_WRONLY)
                    try:
                        self._kept[path.name] = min(keep[path.name], os.fstat(handle).st_size)
                        os.ftruncate(handle, self._kept[path.name])
                    finally:
                        os.close(handle)
                else:
                    path.unlink()
        self._offset = max(time.time(), wall) - time.monotonic()
        stamps = [int(found[1]) for name in self._kept if (found := re.match(rf"{re.escape(PREFIX)}(\d{{1,12}})\.", name))]
        stamp = max(int(time.time()), *(stamp + 1 for stamp in stamps), 0)
        self.file = AppendFile(directory / f"{PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0")
        self._records = RecordWriter(self.file)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    @property
    def wall(self) -> float:
        """The present wall time, from a clock that does not go back."""
        return time.monotonic() + self._offset

    @property
    def sizes(self) -> dict[str, int]:
        """Number of bytes of each event file."""
        return {**self._kept, self.file.path.name: self.file.size}

    def _write(self, event: Any) -> None:
        """Append one event."""
        event.wall_time = self.wall
        self._records.write(event.SerializeToString())

    def add(self, summary: Any, step: int = 0) -> None:
        """Append the values of a ``Summary`` at ``step``."""
        self._write(Event(step=step, summary=summary))
