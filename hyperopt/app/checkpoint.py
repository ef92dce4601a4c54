"""Checkpoints: plain containers and tensors, replaced as a whole, and read without running any code.

A file is written beside its place, flushed to the disk and moved there by ``os.replace``, so that a kill at any moment leaves
a complete file. The previous ``last.pt`` stays as ``last.prev.pt`` in case the disk damages the newer one.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig

from hyperopt.app import tensor_files
from hyperopt.app.experiment import differences, flatten
from hyperopt.app.files import fsync_directory, make_directory, write_bytes, writing
from hyperopt.app.loop_state import LoopState
from hyperopt.app.rows import check_position, check_rows
from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.text import printable

log = logging.getLogger(__name__)

FORMAT = 2
LAST, PREVIOUS = RunDirectory.last.name, RunDirectory.previous.name
Found = tuple[Path, dict[str, Any]]
"""A checkpoint: its path and its content."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe or of another experiment; the message names the file and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint has changed since it was written. The previous one may replace it, unlike a checkpoint that is unsafe."""


def save(path: Path, content: Mapping[str, Any], *, keep_previous: bool = False) -> None:
    """Write plain containers and tensors, as a whole or not at all; the file that is replaced may stay as ``last.prev.pt``.

    Raises:
        WriteError: it could not be written; the existing files are still there.
    """
    # Write to memory first: torch turns a failed write to a file into an error that hides the reason.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with writing(path):
        make_directory(path.parent)
        write_bytes(path, buffer.getbuffer(), keep=path.with_name(PREVIOUS) if keep_previous else None)
        fsync_directory(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        DamagedError: the file is truncated, has a flipped bit, or is not a checkpoint.
        CheckpointError: there is no such file, it holds more than plain data, or it has another format.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; change ckpt_path, or set resume=never to start anew")
    content = content_of(path)
    check_format(path, content)
    return content


def content_of(path: Path, key: str = "ckpt_path") -> Any:
    """Read one file by ``torch.save`` onto the CPU, of whatever content; messages call it ``key``.

    Raises:
        DamagedError: the file is truncated or has a flipped bit.
        CheckpointError: it holds more than plain data.
    """
    try:
        with open(path, "rb") as file:
            return _read(path, file, key)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch raise many kinds of errors for damaged files
        raise DamagedError(f"the checkpoint {path} is truncated or damaged; set {key} to another one") from error


def check_format(path: Path, content: Any, key: str = "ckpt_path") -> None:
    """Refuse the content of a file that is not a checkpoint of this format."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"the checkpoint {path} has format {found!r:.40}, but this version reads {FORMAT}; change {key}")


def _read(path: Path, file: IO[bytes], key: str) -> Any:
    """Return the content of a file after its checksums were verified; it gets no more memory than it has bytes."""
    head = file.read(2)
    if head[:1] == b"\x80":  # a bare pickle, which this program never writes; it is not read
        raise CheckpointError(f"{path} is not a checkpoint, and was not loaded; set {key} to one written by this program")
    if head not in (b"", b"P", b"PK"):
        raise DamagedError(f"{path} is not a checkpoint, or its first bytes are damaged; set {key} to another one")
    try:
        return tensor_files.read(file)
    except tensor_files.UnsafeError as error:
        raise CheckpointError(f"the checkpoint {path}: {error}; set {key} to one written by this program") from error


def load_last(directory: Path, quiet: bool = False) -> Found | None:
    """Return path and content of the newest complete checkpoint in ``checkpoints/`` of a run, or None if there is none yet.

    If ``last.pt`` is missing or damaged, the one before it is used, with a warning unless ``quiet``. A file that is unsafe or has
    another format is an error: no disk can make it so, and the user should know that someone has put it there.

    Raises:
        CheckpointError: as ``load``, or both files are damaged.
    """
    last, previous = directory / LAST, directory / PREVIOUS
    what = "is missing"
    if last.exists():
        try:
            return last, load(last)
        except DamagedError:
            if not previous.exists():
                raise
            what = "is truncated or damaged"
    if not previous.exists():
        return None
    content = load(previous)
    with fitting(previous):
        step = int(content["state"]["step"])
    if not quiet:
        log.warning(
            "the checkpoint %s %s; going on from the one before it, after %d steps: step %d is repeated, and those after it",
            last,
            what,
            step,
            step,
        )
    return previous, content


@contextlib.contextmanager
def fitting(path: Path, key: str = "ckpt_path") -> Iterator[None]:
    """Turn any error of the block, which uses the content of the checkpoint at ``path``, into a ``CheckpointError``."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = printable(f"{type(error).__name__}: {error}")[:300]
        raise CheckpointError(
            f"the checkpoint {path} holds what does not fit this run ({why}); set {key} to another one"
        ) from error


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of the right format that no run can have written, before any of it is used."""
    kinds = {**dict.fromkeys(("task", "optimizer", "schedule", "rng", "config"), dict), "generator": torch.Tensor}
    with fitting(path):
        LoopState.of(content.get("state"))
        check_position(content.get("position"))
        for name, kind in kinds.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"{name} is {content.get(name)!r:.40}")
        if not all(isinstance(key, str) for key in content["config"]):
            raise ValueError("config has keys that cannot be names")
        name, keys, place, *_ = content["rng"]["numpy"]
        if name != "MT19937" or keys.shape != (624,) or not 0 <= place <= 624:  # numpy would read beyond the state
            raise ValueError("rng.numpy is not a state of numpy's generator")


def promote(run: RunDirectory, path: Path, content: Mapping[str, Any]) -> None:
    """Make a checkpoint the last one of a run, which continues from it.

    Unless that checkpoint is ``last.prev.pt``, this file is removed, since it belongs to steps that the run repeats.
    """
    save(run.last, content)
    if path.name != PREVIOUS or not run.owns(path):
        run.previous.unlink(missing_ok=True)


def check_same_experiment(path: Path, saved: Mapping[str, Any], config: Mapping[str, Any], *, evaluate: bool = False) -> None:
    """Refuse a checkpoint whose config differs in more than where and how long it runs and what it shows; both configs are flat.

    With ``evaluate`` only the data and the model are compared, since another solver may evaluate a checkpoint.
    """
    if found := differences(saved, config, "evaluate" if evaluate else "resume"):
        raise CheckpointError(f"the checkpoint {path} is of another experiment: {found}; make these equal or change ckpt_path")


def find(cfg: DictConfig, run: RunDirectory, quiet: bool = False) -> Found | None:
    """Return the checkpoint that the job continues from or evaluates, if any; that of the run itself takes precedence.

    Raises:
        CheckpointError: it is missing, damaged, unsafe or of another experiment, or rows that it knows of are lost.
    """
    found, train = None, cfg.mode == "train"
    if cfg.resume == "auto" and train and not run.owns(cfg.ckpt_path):
        found = load_last(run.checkpoints, quiet)
    if found is None and cfg.ckpt_path is not None:
        path = Path(cfg.ckpt_path)
        found = load_last(path.parent, quiet) if path.name == LAST and path.is_file() else (path, load(path))
    if found is not None:
        check_content(*found)
        check_same_experiment(found[0], found[1]["config"], flatten(cfg), evaluate=not train)
    if train and not cfg.get("accept_lost_rows", False):
        _check_rows(run, found)
    return found


def _check_rows(run: RunDirectory, found: Found | None) -> None:
    """Refuse to continue if rows are lost, or would be."""
    accept = "put the file back from a copy, or add accept_lost_rows=true to go on without them"
    path = run.metrics
    if found is not None and run.owns(found[0]):
        if (rows := check_rows(path, found[1]["position"], found[1]["state"]["step"] - 1)).lost:
            what = f"{path} is not what the checkpoint {found[0]} knows: the rows of {rows.said} are missing or changed"
            raise CheckpointError(f"{what}; {accept}")
    elif path.exists() and path.stat().st_size > 0:
        raise CheckpointError(
            f"{path} holds rows, but there is no checkpoint of theirs to go on from: they would be lost; put "
            f"{run.checkpoints} back from a copy, or add accept_lost_rows=true to start anew"
        )
