"""Checkpoints: plain containers and tensors, replaced as a whole, and read without running any code.

A file is written beside its place, flushed to the disk and moved there by ``os.replace``, so a kill at any moment leaves a whole
file; the ``last.pt`` before it stays as ``last.prev.pt`` in case the disk damages the newer one.
"""

from __future__ import annotations

import io
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hyperopt.experiment import differences
from hyperopt.files import fsync_directory, write_bytes, writing

log = logging.getLogger(__name__)

FORMAT = 2
LAST, PREVIOUS, BEST = "last.pt", "last.prev.pt", "best.pt"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe or of another experiment; the message names the file and what to do."""


def save(path: Path, content: Mapping[str, Any], *, keep_previous: bool = False) -> None:
    """Write ``content`` to ``path``, as a whole or not at all.

    Args:
        path: where to.
        content: plain containers and tensors.
        keep_previous: keep the file that is replaced as ``last.prev.pt``.

    Raises:
        WriteError: it could not be written; the files that were there are still there.
    """
    # To memory first: torch turns a failed write to a file into an error of its own, which hides the reason.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getbuffer(), keep=path.with_name(PREVIOUS) if keep_previous else None)
        fsync_directory(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: no such file, not a whole one, one that holds more than plain data, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; change ckpt_path, or set resume=never to start anew")
    if damaged(path):
        raise CheckpointError(f"the checkpoint {path} is truncated or damaged; set ckpt_path to another one")
    if not zipfile.is_zipfile(path):  # a bare pickle, which is never ours; nothing of it is read
        raise CheckpointError(f"{path} is not a checkpoint, and was not loaded; set ckpt_path to one written by this program")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the checkpoint {path} holds objects other than tensors and plain containers, and was not loaded, since that could "
            f"run code; set ckpt_path to one written by this program"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a checkpoint ({error}); change ckpt_path") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"the checkpoint {path} has format {found!r}, but this version reads {FORMAT}; change ckpt_path")
    return content


def damaged(path: Path) -> bool:
    """Whether the file is empty, cut short or has a wrong checksum inside (a file of another kind altogether is not)."""
    with open(path, "rb") as file:
        head = file.read(2)
    if head not in (b"", b"P", b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        return True


def load_last(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the newest whole checkpoint of a run, or None where it has none yet.

    A ``last.pt`` that is missing or damaged gives way to the one before it, which is said in one warning; one that is unsafe or
    of another format is an error.

    Args:
        directory: the run's ``checkpoints/``.

    Raises:
        CheckpointError: see ``load``; also when both files are damaged.
    """
    last, previous = directory / LAST, directory / PREVIOUS
    if last.exists() and (not damaged(last) or not previous.exists()):
        return last, load(last)
    if not previous.exists():
        return None
    content = load(previous)
    what = "is truncated or damaged" if last.exists() else "is missing"
    log.warning("the checkpoint %s %s; going on from the one before it, after %s steps", last, what, content["state"]["step"])
    return previous, content


def promote(directory: Path, path: Path, content: Mapping[str, Any]) -> None:
    """Make a checkpoint that is not ``last.pt`` the last one of a run, which goes on from it.

    Args:
        directory: the run's ``checkpoints/``.
        path: where the checkpoint came from. Unless that is ``last.prev.pt`` itself, this file is removed, since it belongs to
            steps that the run takes anew.
        content: the checkpoint.
    """
    save(directory / LAST, content)
    if path.name != PREVIOUS or path.resolve().parent != directory.resolve():
        (directory / PREVIOUS).unlink(missing_ok=True)


def check_same_experiment(path: Path, saved: Mapping[str, Any], config: Mapping[str, Any], *, evaluate: bool = False) -> None:
    """Refuse a checkpoint whose configuration differs in more than where it runs, how long, and what it shows.

    Args:
        path: named in the message.
        saved: the flat configuration in the checkpoint.
        config: the flat configuration now.
        evaluate: compare only what says which data and which model it is: another solver may evaluate it.

    Raises:
        CheckpointError: lists each key with the value there and here.
    """
    if found := differences(saved, config, evaluate=evaluate):
        raise CheckpointError(f"the checkpoint {path} is of another experiment: {found}; make these equal or change ckpt_path")
