"""Checks of a composed config before anything is built: its top level and the classes it names. It imports no torch."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from hyperopt.app.errors import near
from hyperopt.app.options import registered
from hyperopt.core.text import why_no_component


class ConfigError(ValueError):
    """A config cannot work although it composes; the message names the key, the value seen and what to change."""


MODES = ("train", "evaluate", "check")
RESUME = ("never", "auto")
PRECISIONS = ("float32", "float64")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
TORCH = re.compile(r"torch\.optim\.(lr_scheduler\.)?[A-Z]\w*")
"""Names of torch's optimizers and schedules."""
HYDRA = re.compile(r"_[a-z]+_")
"""Keys with a meaning for Hydra's ``instantiate``: ``_target_``, which is checked, and others, which no node needs."""
VALUES = ("name", "seed", "device", "precision", "compile", "mode", "ckpt_path", "resume", "accept_lost_rows", "threads")
LATER = ("init_from", "init_partial")
"""Values that the configs of older runs do not have."""
PARTS = ("solver", "adjoint", "inner", "dataset", "stn", "optimizer", "trainer", "tracker", "task")
"""The groups that are parts. ``task`` is last: it holds others by interpolation, and messages name the keys of those first."""
KEYS = (*VALUES, *LATER, *PARTS, "allow_targets", "paths")
MOVED = {
    "hyperopt.solvers.newton": "hyperopt.core.newton.newton",
    "hyperopt.solvers.newton_krylov": "hyperopt.core.newton.newton_krylov",
    "hyperopt.solvers.chord": "hyperopt.core.newton.chord",
    "hyperopt.core.solvers.newton": "hyperopt.core.newton.newton",
    "hyperopt.core.solvers.newton_krylov": "hyperopt.core.newton.newton_krylov",
    "hyperopt.core.solvers.chord": "hyperopt.core.newton.chord",
    "hyperopt.solvers": "hyperopt.core.solvers",
    "hyperopt.linsolve": "hyperopt.core.linear",
    "hyperopt.adjoints": "hyperopt.core.adjoints",
    "hyperopt.spaces": "hyperopt.spaces.space",
    "hyperopt.train_settings": "hyperopt.tasks.trainer",
    "hyperopt.bilevel.settings.PowerSettings": "hyperopt.bilevel.step_map.PowerSettings",
    "hyperopt.bilevel.settings": "hyperopt.bilevel.implicit",
    "hyperopt.tasks.stn_settings": "hyperopt.tasks.stn",
    "hyperopt.optim.Momentum": "torch.optim.SGD",
    "hyperopt.optim": "torch.optim",
}
"""Former names of classes and modules, which older files contain, and their present names."""


def _present(target: str) -> str:
    """Return the present name of a class that an older file names."""
    for old, new in MOVED.items():
        if f"{target}.".startswith(f"{old}.") and not f"{target}.".startswith(f"{new}."):
            return f"{new}{target.removeprefix(old)}"
    return target


def parts(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield key and ``_target_`` of every part in a plain value; refuse other keys that Hydra gives a meaning (``_partial_``)."""
    if isinstance(value, Mapping):
        for name in value:
            if isinstance(name, str) and HYDRA.fullmatch(name) and name != "_target_":
                raise ConfigError(f"{key}.{name}: a node has a _target_ and plain settings; drop {name}")
        if "_target_" in value:
            yield key, value["_target_"]
    if isinstance(value, Mapping | list):
        for name, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from parts(child, f"{key}.{name}")


def check_targets(values: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Refuse a ``_target_`` that is neither a class of an option nor in an allowed top-level package; nothing is imported."""
    for name, value in values.items():
        for key, target in parts(value, str(name)):
            top = target.partition(".")[0] if isinstance(target, str) else ""
            if isinstance(target, str) and (target in registered() or TORCH.fullmatch(target)):
                continue
            if top == "hyperopt":
                raise ConfigError(f"{key}._target_={short(target)} is not the class of an option; {near(target, registered())}")
            if top not in allowed:
                hint = f"; if you trust it, add 'allow_targets=[{top}]' to the command line" if top.isidentifier() else ""
                raise ConfigError(f"{key}._target_={short(target)} is outside hyperopt{hint}")


def short(value: Any) -> str:
    """Return a value for a message, at most about 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """Return the plain values of a whole config, after checks of its top level."""
    unknown = [str(key) for key in cfg if key not in (*KEYS, "hydra")]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such group or key; {near(unknown[0], KEYS)}")
    missing = [key for key in KEYS if (key not in cfg and key not in LATER) or OmegaConf.is_missing(cfg, key)]
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; choose an option of the group or set the key")
    _check_top(cfg)
    values: dict[str, Any] = {}
    for key in KEYS:
        value = cfg.get(key)
        try:
            values[key] = (
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value
            )
        except MissingMandatoryValue as error:
            raise ConfigError(f"no value for {error.full_key}; set {error.full_key}") from error
    for name in ("task", "optimizer", "trainer", "tracker"):
        if values[name] is None:
            raise ConfigError(f"{name}=None: a run has one; choose an option of the group {name}")
    return values


def _check_top(cfg: DictConfig) -> None:
    """Refuse top-level values out of range."""
    if (why := why_no_component(str(cfg.name))) is not None:
        raise ConfigError(f"name={cfg.name!r:.120} {why}; change name")
    for key, choices in (("mode", MODES), ("resume", RESUME), ("precision", PRECISIONS)):
        if cfg[key] not in choices:
            raise ConfigError(f"{key}={cfg[key]!r} is not one of {', '.join(choices)}; change {key}")
    for key in ("compile", "accept_lost_rows"):
        if not isinstance(cfg[key], bool):
            raise ConfigError(f"{key}={cfg[key]!r} must be true or false; change {key}")
    if not DEVICE.fullmatch(str(cfg.device)):
        raise ConfigError(f"device={cfg.device!r} is not one of auto, cpu, cuda, cuda:N; change device")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed!r} is not a whole number in [0, {2**32 - 1}]; change seed")
    if cfg.threads is not None and (type(cfg.threads) is not int or cfg.threads < 1):
        raise ConfigError(f"threads={cfg.threads!r} must be a whole number >= 1, or null for torch's choice; change threads")
    if cfg.threads is not None and cfg.threads > (cores := os.cpu_count() or 1):
        raise ConfigError(f"threads={cfg.threads} is more than the {cores} cores of this machine; change threads")
    if not OmegaConf.is_list(cfg.allow_targets):
        raise ConfigError(f"allow_targets={cfg.allow_targets!r} must list packages, as [mine]; change allow_targets")
    if cfg.ckpt_path is not None and not Path(str(cfg.ckpt_path)).is_file():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path!r} is not a file; change ckpt_path")
    start, partial = cfg.get("init_from"), cfg.get("init_partial", False)
    if start is not None and not (isinstance(start, str) and start.strip()):
        raise ConfigError(f"init_from={start!r} is not the path of a run or of a file; change init_from")
    if not isinstance(partial, bool):
        raise ConfigError(f"init_partial={partial!r} must be true or false; change init_partial")
    if start is not None and cfg.mode == "evaluate":
        raise ConfigError(f"init_from={start}: mode=evaluate has the hyperparameters of ckpt_path; drop init_from")
    if cfg.mode == "evaluate" and cfg.ckpt_path is None:
        raise ConfigError("mode=evaluate needs a checkpoint, but ckpt_path=null; set ckpt_path")


def plain_config(values: Mapping[str, Any], where: str) -> DictConfig:
    """Return values from a file as a config with the present names of classes; refuse interpolations and missing values.

    Args:
        values: values as ``hyperopt.data.reading`` returns them.
        where: what to call the file in an error.
    """
    values = copy.deepcopy(dict(values))
    stack: list[tuple[str, Any]] = [("", values)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ConfigError(f"{where}: {key[1:]}={short(value)} is not a plain value; write the value itself there")
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{key}.{name}", child) for name, child in pairs]
        if isinstance(value, dict) and isinstance(value.get("_target_"), str):
            value["_target_"] = _present(value["_target_"])
    return OmegaConf.create(values)
