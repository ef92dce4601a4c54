"""``init_from``: a run starts its hyperparameters from those of another run, of a checkpoint or of an exported file.

Only the hyperparameters are taken, by name and shape, in the user's units (``Task.values``): neither weights nor the state of an
optimizer. A file is read as a checkpoint is, without running any code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from hyperopt.app import checkpoint
from hyperopt.app.checkpoint import CheckpointError
from hyperopt.app.export import file as export
from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.text import printable
from hyperopt.tasks.base import Task

log = logging.getLogger(__name__)

MOST = 5  # largest number of hyperparameters that a message names


@dataclass(frozen=True)
class Start:
    """Hyperparameters to start from.

    Attributes:
        path: what ``init_from`` names.
        file: the checkpoint or the export.
        step: index of the step after which they were written (None: unknown).
        values: the hyperparameters by name, in the user's units.
        exact: whether all of them are hyperparameters; the model of an export may have buffers too.
        partial: whether those that do not fit are left out.
    """

    path: Path
    file: Path
    step: int | None
    values: dict[str, Tensor]
    exact: bool
    partial: bool


def read(cfg: DictConfig, run: RunDirectory) -> Start | None:
    """Return the hyperparameters that a new run starts from; None if it starts from the values in its config.

    Raises:
        CheckpointError: there is no such run or file, or it is damaged, unsafe or of an older version.
    """
    if (given := cfg.get("init_from")) is None:
        return None
    if cfg.ckpt_path is not None and not run.owns(cfg.ckpt_path):
        raise CheckpointError(
            f"ckpt_path={cfg.ckpt_path} and init_from={given} both say where the hyperparameters start; drop one"
        )
    path = Path(given)
    file = checkpoint_of(path) if path.is_dir() else path
    if file is None or not file.is_file():
        what = "has no checkpoints/best.pt or last.pt" if path.is_dir() else "is neither a directory nor a file"
        raise CheckpointError(f"init_from={given} {what}; set init_from to a run, a checkpoint or an exported file")
    step, values, exact = _content(file)
    return Start(path, file, step, values, exact, bool(cfg.get("init_partial", False)))


def checkpoint_of(run: Path) -> Path | None:
    """Return the checkpoint of a run's best evaluation, or else its last one; None without either."""
    found = RunDirectory(run)
    return next((each for each in (found.best, found.last) if each.is_file()), None)


def _content(file: Path) -> tuple[int | None, dict[str, Tensor], bool]:
    """Return step and hyperparameters of a checkpoint or an export, and whether the latter are nothing else."""
    content: Any = {} if file.suffix == ".safetensors" else checkpoint.content_of(file, "init_from")
    if file.suffix == ".safetensors" or (isinstance(content, dict) and "card" in content):
        tensors, card = export.read(file)
        kinds: dict[str, dict[str, Tensor]] = {"hyperparameters": {}, "model": {}}
        for name, tensor in tensors.items():
            kind, _, own = name.partition(".")
            kinds.setdefault(kind, {})[own] = tensor
        return card["step"], kinds["hyperparameters"] or kinds["model"], bool(kinds["hyperparameters"])
    checkpoint.check_format(file, content, "init_from")
    values = content.get("hyperparameters")
    if values is None:
        raise CheckpointError(
            f"init_from: {file} was written before checkpoints held values of hyperparameters; write them by hyperopt export, "
            f"and set init_from to that file"
        )
    with checkpoint.fitting(file, "init_from"):
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()):
            raise ValueError("hyperparameters are not tensors by name")
        return int(content["state"]["step"]) - 1, values, True


def begin(task: Task, start: Start | None, quiet: bool = False) -> dict[str, Any] | None:
    """Set the hyperparameters of a task to those to start from, and return what ``run.json`` says about it.

    Args:
        task: the task, after ``setup``.
        start: the hyperparameters (None: nothing is changed).
        quiet: whether to leave out the note about hyperparameters that do not fit, which ``run.json`` has too.

    Raises:
        CheckpointError: a hyperparameter does not fit, and ``start.partial`` does not allow it; nothing was changed.
    """
    if start is None:
        return None
    own, unfit = task.values(), dict[str, str]()
    for name in sorted({*own, *start.values}):
        if name not in start.values:
            unfit[name] = f"{name} is not there"
        elif name not in own:
            if start.exact:
                unfit[name] = f"{name} is not a hyperparameter here"
        elif (there := start.values[name].shape) != own[name].shape:
            unfit[name] = f"{name} has shape {tuple(there)} there and {tuple(own[name].shape)} here"
    fitting = {name: value for name, value in start.values.items() if name in own and name not in unfit}
    for values in [{name: value} for name, value in fitting.items()] if start.partial else [] if unfit else [fitting]:
        try:
            task.set_values(values)
        except ValueError as error:  # outside of the space that the hyperparameter has here
            unfit |= dict.fromkeys(values if start.partial else [""], str(error).partition("; change ")[0])
    taken = [name for name in fitting if name not in unfit]
    if unfit and not start.partial:
        raise CheckpointError(
            f"init_from={start.path} does not fit: {_said(unfit)}; change init_from, or add init_partial=true to start only the "
            f"others from there"
        )
    if unfit and not quiet:
        log.info("init_from=%s: %d of %d hyperparameters start from there; %s", start.path, len(taken), len(own), _said(unfit))
    return {"path": str(start.path), "file": str(start.file), "step": start.step, "taken": taken, "left_out": unfit}


def _said(unfit: Mapping[str, str]) -> str:
    """Return why hyperparameters do not fit, in one line."""
    told = [printable(why)[:200] for why in [*unfit.values()][:MOST]]
    return "; ".join([*told, *([f"and {len(unfit) - MOST} more"] if len(unfit) > MOST else [])])
