"""What a run writes as it goes: ``metrics.jsonl``, TensorBoard's ``tb/`` and ``figures/*.png``; and how files are written whole.

One name a quantity in all of them. A number that is not finite is ``null`` in JSON, which has no NaN.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, FloatNode, IntegerNode, OmegaConf
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from torch.utils.tensorboard.writer import SummaryWriter

from hyperopt.schema import SCHEMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Of no interest to a comparison of runs: where things lie and how the job was started.
NOT_HPARAMS = ("hydra", "paths", "ckpt_path", "resume", "mode", "allow_targets")
NOT_HPARAM_NAMES = ("root", "dir", "download")
HPARAMS_FIRST = ("seed",)


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield ``(dotted key, resolved value, whether the schema says number)``.

    A node that is an interpolation of another one (``task.solver: ${solver}``) is left out, since its values are already there,
    and so is Hydra's part.
    """
    for name in map(str, node):
        if not prefix and name == "hydra":
            continue
        key, child = f"{prefix}{name}", node._get_node(name)
        if OmegaConf.is_missing(node, name) or (OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name])):
            continue
        value = node[name]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value
            yield key, value, isinstance(child, FloatNode | IntegerNode)


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved config, without Hydra's part, as ``{dotted key: plain value}``."""
    return {key: value for key, value, _ in leaves(cfg)}


def hparams(cfg: DictConfig) -> dict[str, float | str]:
    """Return the row of TensorBoard's HParams tab: the whole config, with the same keys and types in every run of a sweep.

    Keys that only other choices of a group have (``solver.window`` under ``solver=picard``) are there too, as NaN where a number
    belongs and ``-`` elsewhere: TensorBoard takes the columns from the first run that it sees, and NaN passes its number filters.
    ``solver._target_`` becomes ``solver: Picard``. The choices come first, since TensorBoard shows the first few columns only.
    """
    row: dict[str, float | str] = {}
    for option, settings in SCHEMA.items():
        group = option.rpartition("/")[0].replace("/", ".")  # task/cell/projected describes task.cell
        if OmegaConf.select(cfg, group) is not None:
            for key, _, number in leaves(OmegaConf.structured(settings), f"{group}."):
                if not OmegaConf.is_dict(OmegaConf.select(cfg, key)):
                    row.setdefault(key, math.nan if number else "-")
    for key, value, number in leaves(cfg):
        if value is None:
            row[key] = math.nan if number else "-"
        else:
            row[key] = value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    chosen: dict[str, float | str] = {}
    others: dict[str, float | str] = {}
    for key, value in sorted(row.items()):
        if key.partition(".")[0] in NOT_HPARAMS or key.rpartition(".")[2] in NOT_HPARAM_NAMES:
            continue
        if key.endswith("._target_"):
            chosen[key.removesuffix("._target_")] = str(value).rpartition(".")[2]
        else:
            others[key] = value
    first = [key for key in HPARAMS_FIRST if key in others]
    return {**{key: others[key] for key in first}, **chosen, **{key: others[key] for key in others if key not in first}}


def plain(value: Any) -> Any:
    """Return ``value`` with every float that JSON cannot hold as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a small file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as one JSON object, as a whole or not at all."""
    write_text(path, json.dumps(plain(content), indent=2, default=str) + "\n")


def write_config(out: Path, cfg: DictConfig) -> str:
    """Write the resolved config, without Hydra's part, to ``config.yaml`` and return its text."""
    text = OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True)
    write_text(out / "config.yaml", text)
    return text


class Tracker:
    """Writes the metrics, events and figures of one run.

    Args:
        out: the run directory.
        resume: ``(step, offset)`` of the checkpoint that the run continues from: rows from byte ``offset`` on, which are those of
            steps from ``step`` on, are cut away, in ``metrics.jsonl`` and (by ``purge_step``) in TensorBoard. None: a new run.
    """

    def __init__(self, out: Path, resume: tuple[int, int] | None = None) -> None:
        """Open the files."""
        self.out = out
        path = out / "metrics.jsonl"
        self._metrics = open(path, "ab")
        if resume is None:
            # A run that was killed before its first checkpoint starts anew in its directory: nothing of it may stay.
            self._metrics.truncate(0)
            for stale in (out / "tb").glob("events.out.tfevents.*"):
                stale.unlink()
        elif self._metrics.tell():
            if self._metrics.tell() < resume[1]:
                log.warning("%s is shorter than when its checkpoint was written: rows are lost", path)
            self._metrics.truncate(min(resume[1], self._metrics.tell()))
        self._metrics.seek(0, os.SEEK_END)
        self._writer = SummaryWriter(str(out / "tb"), purge_step=None if resume is None else resume[0])

    @property
    def offset(self) -> int:
        """Bytes in ``metrics.jsonl`` so far."""
        return self._metrics.tell()

    def sync(self) -> None:
        """Bring everything to the disk, so that a checkpoint written next never refers to rows that a power cut took."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        self._writer.flush()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write the numbers of outer step ``step``: one line, and one scalar each."""
        self._metrics.write(json.dumps({"step": step, **plain(row)}).encode() + b"\n")
        self._metrics.flush()
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def config(self, text: str, step: int) -> None:
        """Show the resolved config as text."""
        self._writer.add_text("config", f"```yaml\n{text}```", step)

    def figures(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Write each figure to ``figures/<name>.png`` and to TensorBoard, and close it."""
        directory = self.out / "figures"
        directory.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png", dpi=120)
            self._writer.add_figure(f"figures/{name}", figure, step, close=True)

    def hparams_start(self, row: Mapping[str, float | str], metrics: Iterable[str]) -> None:
        """Open this run's one row of the HParams tab, in the run's own event file (``add_hparams`` would open a sub-run).

        Args:
            row: the settings, see ``hparams``.
            metrics: names logged so far; those of evaluations become columns, which show the latest value of the scalar.
        """
        columns = sorted(name for name in metrics if name.startswith(("outer/", "val/", "test/")) and name != "outer/step_loss")
        experiment, start, _ = hparams_summaries(dict(row), dict.fromkeys(columns, 0.0))
        for summary in (experiment, start):
            self._writer._get_file_writer().add_summary(summary)

    def hparams_end(self) -> None:
        """Mark the row as finished."""
        self._writer._get_file_writer().add_summary(hparams_summaries({}, {})[2])

    def close(self) -> None:
        """Flush and close the files."""
        self._metrics.close()
        self._writer.close()
