"""What a run goes on from: found, read and checked, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyperopt.app import checkpoint
from hyperopt.app.directory import CHECKPOINTS, from_own_checkpoint
from hyperopt.app.experiment import flatten
from hyperopt.app.rows import METRICS, check_rows

Found = tuple[Path, dict[str, Any]]
"""A checkpoint: where it lies, and what it holds."""


def is_own(path: Path, out: Path) -> bool:
    """Whether ``path`` is a checkpoint of the run in ``out``."""
    return path.resolve().parent == (out / CHECKPOINTS).resolve()


def find_checkpoint(cfg: DictConfig, out: Path, quiet: bool = False) -> Found | None:
    """Return the checkpoint that the job goes on from or evaluates, if any: that of the run in ``out`` comes first.

    Args:
        cfg: of the job.
        out: its directory.
        quiet: leave out the warning that the checkpoint before the last one stands in for it.

    Raises:
        CheckpointError: it is missing, damaged or unsafe, or of another experiment, or rows that it knows of are lost.
    """
    found, train = None, cfg.mode == "train"
    if cfg.resume == "auto" and train and not from_own_checkpoint(cfg, out):
        found = checkpoint.load_last(out / CHECKPOINTS, quiet)
    if found is None and cfg.ckpt_path is not None:
        path = Path(cfg.ckpt_path)
        last = path.name == checkpoint.LAST and path.is_file()
        found = checkpoint.load_last(path.parent, quiet) if last else (path, checkpoint.load(path))
    if found is not None:
        checkpoint.check_content(*found)
        checkpoint.check_same_experiment(found[0], found[1]["config"], flatten(cfg), evaluate=not train)
    if train and not cfg.get("accept_lost_rows", False):
        _check_rows(out / METRICS, found, out)
    return found


def _check_rows(path: Path, found: Found | None, out: Path) -> None:
    """Refuse to go on where rows are gone, or would go.

    Raises:
        CheckpointError: says which.
    """
    accept = "put the file back from a copy, or add accept_lost_rows=true to go on without them"
    if found is not None and is_own(found[0], out):
        if (rows := check_rows(path, found[1]["position"], found[1]["state"]["step"] - 1)).lost:
            what = f"{path} is not what the checkpoint {found[0]} knows: the rows of {rows.said} are missing or changed"
            raise checkpoint.CheckpointError(f"{what}; {accept}")
    elif path.exists() and path.stat().st_size > 0:
        raise checkpoint.CheckpointError(
            f"{path} holds rows, but there is no checkpoint of theirs to go on from: they would be lost; put "
            f"{out / CHECKPOINTS} back from a copy, or add accept_lost_rows=true to start anew"
        )
