"""The files that a run writes as it goes: ``metrics.jsonl``, TensorBoard's ``tb/`` and ``figures/``.

A quantity has the same name in all of them. A number that is not finite is ``null`` in JSON, which has no NaN.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import math
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from torch.utils.tensorboard.summary import text as text_summary

from hyperopt.app.events import EventFiles
from hyperopt.app.experiment import counts, flatten
from hyperopt.app.files import AppendFile, plain, write_bytes
from hyperopt.app.options import leaves, options
from hyperopt.app.rows import Mark, add_mark, check_rows
from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

START: dict[str, Any] = {"rows": 0, "events": {}, "wall": 0.0}
"""The position of a run that has written nothing yet."""


def hparams(cfg: DictConfig) -> dict[str, float | str]:
    """Return the row of TensorBoard's HParams tab: the whole config, with the same keys and types in every run of a sweep.

    Keys that only other options of a group have (``solver.window`` under ``solver=picard``) exist too, as NaN for a number and
    as ``-`` otherwise: TensorBoard takes the columns from the first run that it reads, and NaN passes its number filters.
    ``solver._target_`` becomes ``solver: Picard``.
    """
    row: dict[str, float | str] = {}
    for option in options():
        group = option.rpartition("/")[0].replace("/", ".")  # task/cell/projected describes task.cell
        if group and OmegaConf.select(cfg, group) is not None:
            for key, _, number in _of_option(option):
                if not OmegaConf.is_dict(OmegaConf.select(cfg, key)):
                    row.setdefault(key, math.nan if number else "-")
    numbers = {key: number for key, _, number in leaves(_plain(cfg), known={"threads": int | None})}
    for key, value in flatten(cfg).items():
        if value is None:
            row[key] = math.nan if numbers[key] else "-"
        else:
            row[key] = value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    named: dict[str, float | str] = {}
    for key, value in row.items():
        if not counts(key, "hparams"):
            continue
        choice = key.endswith("._target_")
        named[key.removesuffix("._target_")] = str(value).rpartition(".")[2] if choice else value
    return dict(sorted(named.items()))


def swept(overridden: Iterable[str]) -> set[str]:
    """Return the columns of the HParams tab that show what was ``overridden``: the keys, and the options inside a group.

    By default the tab shows only its first five columns: those marked as different, then the others by name.
    """
    keys = {each.replace("/", ".") for each in overridden}
    found = set(keys)
    for option in options():
        if option.rpartition("/")[0].replace("/", ".") in keys:
            found |= {key.removesuffix("._target_") for key, *_ in _of_option(option) if key.endswith("._target_")}
    return found


@functools.cache
def _of_option(option: str) -> tuple[tuple[str, Any, bool], ...]:
    """Return the leaves of an option's own file, under the keys of its group; see ``hyperopt.app.options.leaves``."""
    values: Any = OmegaConf.to_container(OmegaConf.create(options()[option]))
    own = {name: value for name, value in values.items() if name != "defaults"}
    return tuple(leaves(own, f"{option.rpartition('/')[0].replace('/', '.')}."))


def _plain(cfg: DictConfig) -> Any:
    """Return the resolved values of a config, without Hydra's part."""
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True)


class Tracker:
    """Writes the metrics, events and figures of one run.

    Args:
        run: the run.
        position: where the files ended before the row of a checkpoint's step (``Tracker.position``); they are cut there. None:
            a new run, for which any files of an attempt without a checkpoint are removed.
        step: that step (None: a new run).

    Attributes:
        lost: ``[first, last]`` steps of earlier rows that are missing or changed; other rows are kept.
    """

    def __init__(self, run: RunDirectory, position: Mapping[str, Any] | None = None, step: int | None = None) -> None:
        """Open the files."""
        self.run = run
        found = START if position is None else position
        path, self._next = run.metrics, step or 0
        rows = check_rows(path, found, self._next)
        self._marks, self.lost = list(rows.marks), rows.lost
        if rows.lost:
            log.warning("%s has lost its rows of %s; going on without them", path, rows.said)
            write_bytes(path, rows.content(path))
        size, checksum, _ = self._marks[-1]
        self._metrics = AppendFile(path, size, checksum)
        self._events = EventFiles(run.tb, found["events"], found["wall"], purge_step=step)
        if short := sorted(name for name, kept in found["events"].items() if self._events.sizes.get(name, 0) < kept):
            log.warning("%s: events are lost, which TensorBoard will not show: %s", run.tb, printable(", ".join(short)))

    @property
    def position(self) -> dict[str, Any]:
        """Where the files end now, as plain values for a checkpoint."""
        end: Mark = [self._metrics.size, self._metrics.checksum, self._next]
        marks = [*(mark for mark in self._marks if mark[0] < end[0]), end]
        return {"rows": end[0], "events": self._events.sizes, "wall": self._events.wall, "marks": marks}

    def sync(self) -> None:
        """Flush all files to the disk, so that the next checkpoint never refers to rows that a power cut has removed."""
        self._metrics.sync()
        self._events.sync()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write the numbers of outer step ``step``: one line, and one event with all scalars."""
        self._metrics.write(json.dumps({"step": step, **plain(row)}).encode() + b"\n")
        self._next = step + 1
        add_mark(self._marks, self._metrics.size, self._metrics.checksum, self._next)
        self._events.add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in row.items()]), step)

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
            shown = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=image)
            self._events.add(Summary(value=[Summary.Value(tag=f"figures/{name}", image=shown)]), step)

    def hparams_start(self, row: Mapping[str, float | str], metrics: Iterable[str], differ: Collection[str] = ()) -> None:
        """Start this run's row of the HParams tab, in the run's own event file (``add_hparams`` would start a sub-run).

        Args:
            row: the settings, see ``hparams``.
            metrics: names logged so far; those of evaluations become columns, which show the latest value of the scalar.
            differ: settings that are shown first, see ``swept``.
        """
        columns = sorted(name for name in metrics if name.startswith(("outer/", "val/", "test/")) and name != "outer/step_loss")
        experiment, start, _ = hparams_summaries(dict(row), dict.fromkeys(columns, 0.0))
        for value in experiment.value:
            content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            for info in content.experiment.hparam_infos:
                info.differs = info.name in differ
            value.metadata.plugin_data.content = content.SerializeToString()
        for summary in (experiment, start):
            self._events.add(summary)

    def hparams_end(self) -> None:
        """Mark the row as finished."""
        self._events.add(hparams_summaries({}, {})[2])

    @property
    def removed(self) -> bool:
        """Whether files that the run is writing to were removed."""
        return self._metrics.removed or self._events.removed

    def rescue(self) -> None:
        """Write the removed files again."""
        self._metrics.rescue()
        self._events.rescue()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._events.close()
