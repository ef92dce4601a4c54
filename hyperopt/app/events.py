"""TensorBoard's event files of one run: one a session, written at once, cut back on resuming.

TensorBoard's own writer puts events into a queue that a thread empties: a full disk then shows up later and elsewhere, and nobody
knows which byte belongs to which step. Here a call returns when its event is in the file, so that a checkpoint can say where the
files ended, and a resumed run can cut them there: no event is ever in them twice.
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


class EventFiles:
    """The event files under ``directory``, of which this session writes the last.

    Clocks of machines differ and are set back. TensorBoard reads files in the order of their names, which begin with a time, so a
    new file is named after all that are there; and the wall time of an event is never before that of the one before it.

    Args:
        directory: ``tb/`` of the run.
        keep: how many bytes to keep of each file; what follows is cut off, and other event files are removed.
        wall: wall time of the last event kept.
        purge_step: tells a TensorBoard that is looking on to forget what it has read from this step on (None: nothing).
    """

    def __init__(self, directory: Path, keep: Mapping[str, int], wall: float = 0.0, purge_step: int | None = None) -> None:
        """Cut the files back and open a new one."""
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
        self._file = AppendFile(directory / f"{PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    @property
    def wall(self) -> float:
        """The wall time now, by a clock that does not go back."""
        return time.monotonic() + self._offset

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each event file so far."""
        return {**self._kept, self._file.path.name: self._file.size}

    def _write(self, event: Any) -> None:
        """Append one event."""
        event.wall_time = self.wall
        self._records.write(event.SerializeToString())

    def add(self, summary: Any, step: int = 0) -> None:
        """Append the values of a ``Summary`` at ``step``."""
        self._write(Event(step=step, summary=summary))

    def sync(self) -> None:
        """Bring the file to the disk."""
        self._file.sync()

    @property
    def removed(self) -> bool:
        """Whether this session's file was removed."""
        return self._file.removed

    def rescue(self) -> None:
        """Write this session's file again if it was removed."""
        self._file.rescue()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
