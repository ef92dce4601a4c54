"""Which configs describe the same experiment: one table says what each key means for this. This module imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from hyperopt.core.text import printable

Purpose = Literal["resume", "repeat", "evaluate", "overrides", "hparams", "group"]
"""The purpose for which configs are compared or shown.

``resume``: may a run continue under this config? ``repeat``: is a job of a sweep, finished under another config, also finished
under this one? ``evaluate``: may a checkpoint be evaluated under this config? ``overrides``: which overrides of a run are used
again when its checkpoint is evaluated? ``hparams``: which keys are columns of TensorBoard's HParams tab? ``group``: which keys
are equal for all runs that a report puts into one group?
"""
DO_NOT_COUNT: dict[str, tuple[Purpose, ...]] = {
    "accept_lost_rows": ("resume", "repeat", "overrides", "hparams", "group"),
    "allow_targets": ("resume", "repeat", "overrides", "hparams", "group"),
    "hydra": ("resume", "repeat", "overrides", "hparams", "group"),
    "mode": ("resume", "repeat", "overrides", "hparams", "group"),
    "paths": ("resume", "repeat", "overrides", "hparams", "group"),
    "resume": ("resume", "repeat", "overrides", "hparams", "group"),
    "ckpt_path": ("resume", "overrides", "hparams", "group"),  # it counts for "repeat": another start is another job
    "init_from": ("overrides",),  # an evaluation has the hyperparameters of its checkpoint
    "init_partial": ("resume", "repeat", "overrides", "hparams", "group"),
    "device": ("resume", "repeat", "overrides", "group"),
    "threads": ("resume", "repeat", "overrides", "group"),
    "compile": ("resume", "repeat"),
    "name": ("resume", "repeat", "group"),
    "seed": ("group",),
    "tracker": ("resume", "repeat", "overrides", "hparams", "group"),
    "trainer": ("resume",),  # how long a run takes, and what it shows
}
"""The purposes for which a top-level key does not count, since it says where, how or how long a launch runs."""
PLACES = ("root", "dir", "download")
"""Last parts of keys that say where files are. They count only for ``overrides`` and ``group``."""
DATA_AND_MODEL = ("seed", "dataset", "task")
"""The keys on which an evaluation depends; another solver, for example, may evaluate a model."""
MOST = 20  # largest number of differences that are named


def counts(key: str, purpose: Purpose) -> bool:
    """Whether a dotted key, or that of an override (``task/cell``, ``dataset@task.other``), counts for a purpose."""
    parts = re.split(r"[./@]", key)
    if purpose == "evaluate" and parts[0] not in DATA_AND_MODEL:
        return False
    return purpose not in DO_NOT_COUNT.get(parts[0], ()) and (purpose in ("overrides", "group") or parts[-1] not in PLACES)


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, resolved value)``.

    A node that is an interpolation of another one (``task.solver: ${solver}``) is left out, since its values occur elsewhere,
    and so is Hydra's part.
    """
    for name in map(str, node):
        if not prefix and name == "hydra":
            continue
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(node, name) or (OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name])):
            continue
        value = node[name]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            yield key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved config, without Hydra's part, as ``{dotted key: plain value}``, for comparisons of experiments."""
    return dict(leaves(cfg))


def plain_leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of plain data; a list is a value.

    Nothing is resolved, so that a manipulated file cannot read the environment.
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from plain_leaves(value, f"{prefix}{name}.")
        elif value != "???":
            yield f"{prefix}{name}", value


def differences(saved: Mapping[str, Any], config: Mapping[str, Any], purpose: Purpose = "resume") -> str:
    """Return the keys that make ``config`` another experiment than ``saved``, each with both values; empty if there are none."""
    differ = [key for key in sorted({*saved, *config}) if counts(key, purpose) and saved.get(key) != config.get(key)]
    said = [f"{printable(key)} is {saved.get(key)!r:.80} there and {config.get(key)!r:.80} here" for key in differ[:MOST]]
    return "; ".join([*said, *([f"and {len(differ) - MOST} more"] if len(differ) > MOST else [])])
