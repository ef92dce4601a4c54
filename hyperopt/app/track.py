"""The files that a run writes as it goes: ``metrics.jsonl``, TensorBoard's ``tb/`` and ``figures/``.

A quantity has the same name in all of them. A number that is not finite is ``null`` in JSON, which has no NaN. TensorBoard leaves
out diagnostics that have not changed yet; see ``hyperopt.app.dashboard``.
"""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars
from torch.utils.tensorboard.summary import histogram as histogram_summary
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from torch.utils.tensorboard.summary import text as text_summary

from hyperopt.app.dashboard import OPEN, FlatCurves, layout, of_interest
from hyperopt.app.events import EventFiles, folder
from hyperopt.app.files import AppendFile, plain, write_bytes
from hyperopt.app.rows import Mark, add_mark, check_rows
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.trackers import Sent
from hyperopt.core.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

START: dict[str, Any] = {"rows": 0, "events": {}, "wall": 0.0, "flat": {}}
"""The position of a run that has written nothing yet."""
BINS = 30  # of a histogram


class Tracker:
    """Writes the metrics, events and figures of one run.

    Args:
        run: the run.
        position: where the files ended before the row of a checkpoint's step (``Tracker.position``); they are cut there. None:
            a new run, for which any files of an attempt without a checkpoint are removed.
        step: that step (None: a new run).
        name: the name that TensorBoard shows, see ``hyperopt.app.dashboard.label``.

    Attributes:
        lost: ``[first, last]`` steps of earlier rows that are missing or changed; other rows are kept.
        sent: another place that the run is logged to; none at first.
        status: the status of the run for that place, when the files are closed.
    """

    def __init__(
        self, run: RunDirectory, position: Mapping[str, Any] | None = None, step: int | None = None, name: str = ""
    ) -> None:
        """Open the files."""
        self.run, self.sent, self.status = run, Sent(), "failed"
        found = START if position is None else position
        path, self._next = run.metrics, step or 0
        rows = check_rows(path, found, self._next)
        self._marks, self.lost = list(rows.marks), rows.lost
        if rows.lost:
            log.warning("%s has lost its rows of %s; going on without them", path, rows.said)
            write_bytes(path, rows.content(path))
        size, checksum, _ = self._marks[-1]
        self._metrics = AppendFile(path, size, checksum)
        self._flat = FlatCurves(found.get("flat"))
        where = folder(run.tb, name, found["events"])
        self._events = EventFiles(where, found["events"], found["wall"], purge_step=step)
        self._files = self._metrics, self._events.file
        if short := sorted(name for name, kept in found["events"].items() if self._events.sizes.get(name, 0) < kept):
            log.warning("%s: events are lost, which TensorBoard will not show: %s", run.tb, printable(", ".join(short)))

    @property
    def position(self) -> dict[str, Any]:
        """Where the files end now, as plain values for a checkpoint."""
        end: Mark = [self._metrics.size, self._metrics.checksum, self._next]
        marks = [*(mark for mark in self._marks if mark[0] < end[0]), end]
        return {"rows": end[0], "events": self._events.sizes, "wall": self._events.wall, "marks": marks, "flat": self._flat.state}

    def sync(self) -> None:
        """Flush all files to the disk, so that the next checkpoint never refers to rows that a power cut has removed."""
        for file in self._files:
            file.sync()
        self.sent.flush()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write the numbers of outer step ``step``: one line, and one event with all scalars that TensorBoard shows."""
        self._metrics.write(json.dumps({"step": step, **plain(row)}).encode() + b"\n")
        self._next = step + 1
        add_mark(self._marks, self._metrics.size, self._metrics.checksum, self._next)
        for at, shown in self._flat.shown(step, row):
            self._events.add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]), at)
        self.sent.log(step, row)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Show how the entries of each hyperparameter are distributed; one of a single number is a curve already."""
        for name, tensor in values.items():
            flat = tensor.detach().flatten().double()
            flat = flat[flat.isfinite()].cpu().numpy()
            if flat.size > 1:
                self._events.add(histogram_summary(f"hyper/{name}", flat, bins=BINS), step)

    def config(self, text: str, step: int) -> None:
        """Show the resolved config as text."""
        self._events.add(text_summary("config", f"```yaml\n{text}```"), step)

    def figures(self, step: int, figures: Mapping[str, Figure | bytes]) -> None:
        """Write each figure to ``figures/<name>.png`` (an animation to ``.gif``) and to TensorBoard, and close it."""
        from matplotlib import pyplot  # imported here since it takes half a second

        for name, figure in figures.items():
            if isinstance(figure, bytes):
                image, kind = figure, "gif"
                width, height = struct.unpack("<HH", image[6:10])  # the header of every GIF file
            else:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=120)
                pyplot.close(figure)
                image, kind = buffer.getvalue(), "png"
                width, height = struct.unpack(">II", image[16:24])  # the header of every PNG file
            self.run.write_figure(f"{name}.{kind}", image)
            self.sent.figure(step, name, self.run.figures / f"{name}.{kind}")
            shown = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=image)
            self._events.add(Summary(value=[Summary.Value(tag=f"figures/{name}", image=shown)]), step)

    def start(self, row: Mapping[str, float | str], metrics: Iterable[str]) -> None:
        """Show the charts that come first, and start this run's row of the HParams tab.

        The row is in the run's own event file, since ``add_hparams`` would start a sub-run.

        Args:
            row: the settings, see ``hyperopt.app.dashboard.hparams``; without any there is no row.
            metrics: names logged so far. Losses and accuracies become columns, which show the latest value of the scalar.
        """
        names = [*metrics]
        titles = {title: {name: ("Multiline", [tag]) for name, tag in each.items()} for title, each in layout(names).items()}
        charts = custom_scalars(titles)
        content = charts.value[0].tensor.string_val
        sections = Layout.FromString(content[0])
        for each in sections.category:
            each.closed = each.title not in OPEN
        content[0] = sections.SerializeToString()
        self._events.add(charts)
        if not row:
            return
        experiment, start, _ = hparams_summaries(dict(row), dict.fromkeys(of_interest(names), 0.0))
        for value in experiment.value:
            content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            for info in content.experiment.hparam_infos:
                info.differs = True  # shows the column
            value.metadata.plugin_data.content = content.SerializeToString()
        for summary in (experiment, start):
            self._events.add(summary)

    def hparams_end(self) -> None:
        """Mark the row as finished, if there is one."""
        self._events.add(hparams_summaries({}, {})[2])

    @property
    def removed(self) -> bool:
        """Whether files that the run is writing to were removed."""
        return any(file.removed for file in self._files)

    def rescue(self) -> None:
        """Write the removed files again."""
        for file in self._files:
            file.rescue()

    def close(self) -> None:
        """Close the files, and end the session in another place."""
        self.sent.close(self.status)
        for file in self._files:
            file.close()
