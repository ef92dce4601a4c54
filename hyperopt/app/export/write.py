"""``export``: turns the files of a run's directory into one file, a card and, if asked for and possible, a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optree
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hyperopt.app import checkpoint as checkpoints
from hyperopt.app.config import ConfigError, plain_config
from hyperopt.app.export.card import card_of, page
from hyperopt.app.export.file import ExportError, write
from hyperopt.app.export.load import Bounded, built_from, explained, load_exported
from hyperopt.app.export.program import write_program
from hyperopt.app.files import WriteError, write_text, writing
from hyperopt.app.repro import configure, preserved_global_state, resolve_precision, seed_everything
from hyperopt.app.run_directory import RunDirectory
from hyperopt.data.reading import DataError, UnreadableError, parse_yaml, read_json, read_json_lines, read_text
from hyperopt.tasks.base import Environment

REFUSALS = (
    *(ExportError, UnreadableError, ConfigError, DataError, WriteError, NotImplementedError),
    checkpoints.CheckpointError,
)
"""Errors that ``export`` reports in one line."""
CARD = "MODEL_CARD.md"


def export(
    run: Path,
    out: Path | None = None,
    *,
    checkpoint: str = "best",
    form: str = "pt",
    data: str | None = None,
    download: bool = False,
    program: bool = False,
    steps: int | None = None,
    allow_targets: Sequence[str] = (),
) -> list[Path]:
    """Write what a run has learned, and return the files; ``hyperopt export --help`` says what the arguments mean.

    The task is built once more with its data and evaluated, so that the card has the metrics of what is written.

    Raises:
        ExportError: there is no run, or something prevents the export; the message names it.
        UnreadableError: a file of the run is not what this program writes.
        CheckpointError: there is no such checkpoint, or it is unsafe or damaged.
        NotImplementedError: the task has nothing that predicts.
    """
    files = RunDirectory(run)
    try:
        text = read_text(files.config)
    except FileNotFoundError as error:
        raise ExportError(f"{run} holds no run: there is no {files.config}; name the directory of a run") from error
    cfg = plain_config(parse_yaml(text, str(files.config)), str(files.config))
    if data is not None:
        if OmegaConf.select(cfg, "dataset.root") is None:
            raise ExportError(f"--data={data}, but this run's dataset has no root; drop --data")
        OmegaConf.update(cfg, "dataset.root", data)
        OmegaConf.update(cfg, "task.dataset.root", data)
    saved = checkpoints.load({"best": files.best, "last": files.last}[checkpoint])
    try:
        facts = read_json(files.facts) if files.facts.is_file() else {}
        rows = list(read_json_lines(files.metrics))
        with preserved_global_state():
            device, dtype = torch.device("cpu"), resolve_precision(cfg.precision)
            configure(device, dtype, None)
            generator = seed_everything(cfg.seed)
            built = built_from(cfg, allow_targets, download=download)
            tensors: Any = [leaf for leaf in optree.tree_leaves(saved["task"]) if isinstance(leaf, Tensor)]
            with Bounded(tensors, numbers=500_000_000, calls=100_000):  # these limits leave room for the rows of the dataset
                built.task.setup(Environment(device, dtype, cfg.seed, False, generator, built.trainer))
            built.task.load_state_dict(saved["task"])
            learned = built.task.learned()
            card = card_of(built.task, learned, text, cfg, facts, rows, saved["state"]["step"] - 1, checkpoint)
    except REFUSALS:
        raise
    except Exception as error:  # a run that this program did not write can cause any kind of error
        raise ExportError(f"{run} cannot be built here: {explained(error)}") from error
    if out is None:
        out = files.export
        if out.is_symlink():  # whoever made the run must not choose which files are replaced
            raise ExportError(f"{out} is a link to {out.readlink()}; remove it, or name a directory by --out")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    file = out / f"model.{form}"
    tensors = {f"model.{name}": tensor for name, tensor in learned.weights.items()}
    tensors |= {f"hyperparameters.{name}": tensor for name, tensor in learned.hyperparameters.items()}
    write(file, tensors, card)
    write_text(out / CARD, page(card, file.name))
    written = [file, out / CARD]
    if program:
        written.append(write_program(load_exported(file, allow_targets=allow_targets), out / "program.pt2", steps))
    return written
