"""The checks of a composed config before any work, and the single ``instantiate`` call.

Free of torch up to ``build``: everything before it runs at the speed of tab completion.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from hyperopt.messages import near
from hyperopt.schema import SCHEMA, SETTINGS, TrainConfig, register
from hyperopt.text import why_no_component

if TYPE_CHECKING:
    from hyperopt.optim import OuterOptimizer
    from hyperopt.tasks.base import Task
    from hyperopt.train_settings import TrainerSettings

__all__ = ["SCHEMA", "Built", "ConfigError", "build", "register", "targets", "validate"]


class ConfigError(ValueError):
    """A config that composes and cannot work; the message names the key, the value seen and what to change."""


MODES = ("train", "evaluate", "check")
RESUME = ("never", "auto")
PRECISIONS = ("float32", "float64")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Built:
    """What a config describes, built."""

    task: Task
    optimizer: OuterOptimizer
    trainer: TrainerSettings


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Any, DictConfig]]:
    """Yield ``(key, _target_, node)`` of every node of a resolved config that has a ``_target_``, outermost first."""
    children: list[tuple[Any, Any]] = []
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node["_target_"], node
        children = list(node.items())
    elif isinstance(node, ListConfig):
        children = list(enumerate(node))
    for key, child in children:
        yield from targets(child, f"{path}.{key}" if path else str(key))


def _own(cfg: DictConfig) -> DictConfig:
    """Return a copy of ``cfg`` without Hydra's own node."""
    return OmegaConf.masked_copy(copy.deepcopy(cfg), [str(key) for key in cfg if key != "hydra"])


def validate(cfg: DictConfig) -> None:
    """Check all that can be checked before any work: ranges, choices, targets, and keys that depend on each other.

    Args:
        cfg: a composed config; it is not changed.

    Raises:
        ConfigError: names the key, the value seen and what to change.
    """
    cfg = _own(cfg)
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    unknown = [str(key) for key in cfg if key not in known]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such group or key; {near(unknown[0], known)}")
    missing = [key for key in known if key not in cfg or OmegaConf.is_missing(cfg, key)]
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; choose an option of the group or set the key")
    OmegaConf.resolve(cfg)
    _check_top(cfg)
    allowed = tuple(cfg.allow_targets)
    # Outermost first: task holds the solver and the rest by interpolation, and solver.rtol is the key that a user set.
    for key, target, node in sorted(targets(cfg), key=lambda item: item[0].count(".")):
        _check_target(key, target, allowed)
        if target in SETTINGS:
            _check_values(key, SETTINGS[target], node)


def _check_values(key: str, settings: type, node: DictConfig) -> None:
    """Refuse values that the settings class of a node refuses, under the names that they have in the config."""
    values: Any = OmegaConf.to_container(node)
    values.pop("_target_")
    names = [item.name for item in dataclasses.fields(settings)]
    for name in values:
        if name not in names:
            raise ConfigError(f"{key}.{name}: {key} has no key {name!r}; {near(name, names)}")
    try:
        settings(**values)
    except (TypeError, ValueError) as error:
        owners = {item.default_factory: f"{key}.{item.name}" for item in dataclasses.fields(settings)}
        paths = {owner.__name__: path for owner, path in {**owners, settings: key}.items() if isinstance(owner, type)}
        owner, found, text = str(error).partition(": ")
        if found and owner in paths:  # "PicardSettings: rtol=-1 ...; change rtol"
            text = re.sub(r"; (change|drop|set) (?=\w+$)", rf"; \1 {paths[owner]}.", f"{paths[owner]}.{text}")
        raise ConfigError(text if found and owner in paths else str(error)) from error


def _check_top(cfg: DictConfig) -> None:
    """Refuse top-level values out of range."""
    if (why := why_no_component(cfg.name)) is not None:
        raise ConfigError(f"name={cfg.name!r:.120} {why}; change name")
    for key, choices in (("mode", MODES), ("resume", RESUME), ("precision", PRECISIONS)):
        if cfg[key] not in choices:
            raise ConfigError(f"{key}={cfg[key]!r} is none of {', '.join(choices)}; change {key}")
    if not DEVICE.fullmatch(cfg.device):
        raise ConfigError(f"device={cfg.device!r} is none of auto, cpu, cuda, cuda:N; change device")
    if not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed} is not in [0, {2**32 - 1}]; change seed")
    if cfg.threads is not None and cfg.threads < 1:
        raise ConfigError(f"threads={cfg.threads} must be at least 1, or null for torch's choice; change threads")
    if cfg.threads is not None and cfg.threads > (cores := os.cpu_count() or 1):
        raise ConfigError(f"threads={cfg.threads} is more than the {cores} cores of this machine; change threads")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path!r} is not a file; change ckpt_path")
    if cfg.mode == "evaluate" and cfg.ckpt_path is None:
        raise ConfigError("mode=evaluate needs a checkpoint, but ckpt_path=null; set ckpt_path")


def _check_target(key: str, target: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a ``_target_`` outside the project and the packages allowed on the command line."""
    top = target.partition(".")[0] if isinstance(target, str) else ""
    if top != "hyperopt" and top not in allowed:
        raise ConfigError(
            f"{key}._target_={target!r} is outside hyperopt; if you trust it, add 'allow_targets=[{top}]' to the command line"
        )


def build(cfg: DictConfig) -> Built:
    """Build the task, the optimizer and the trainer that a config describes.

    Args:
        cfg: a composed config; it is not changed.

    Raises:
        ConfigError: the config does not pass ``validate``, or a ``hyperopt.`` target leads to something from elsewhere.
    """
    validate(cfg)
    whole = _own(cfg)
    OmegaConf.resolve(whole)
    parts = OmegaConf.masked_copy(whole, [item.name for item in dataclasses.fields(Built)])
    for key, target, _ in targets(parts):
        _check_import(key, target)
    return Built(**instantiate(parts, _convert_="all"))


def _check_import(key: str, target: str) -> None:
    """Refuse a target that is not there, or that only passes through ``hyperopt`` (``hyperopt.command.os.system``)."""
    own = target.startswith("hyperopt.")
    try:
        found = get_object(target)
    except ImportError as error:
        if own:
            raise
        raise ConfigError(f"{key}._target_={target!r} cannot be imported: {error}; change {key}._target_") from error
    if own and not str(getattr(found, "__module__", "")).startswith("hyperopt."):
        raise ConfigError(f"{key}._target_={target!r} is not defined in hyperopt; change {key}._target_")
