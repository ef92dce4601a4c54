"""The checks of a composed config before any work, and the single ``instantiate`` call.

Free of torch up to ``build``: everything before it runs at the speed of tab completion.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from hyperopt.app.errors import near
from hyperopt.app.schema import GROUPS, SCHEMA, SETTINGS, SEVERAL, TrainConfig, places, register
from hyperopt.core.text import why_no_component

if TYPE_CHECKING:
    from hyperopt.bilevel.outer import OuterOptimizer
    from hyperopt.bilevel.outer_settings import TrainerSettings
    from hyperopt.tasks.base import Task

__all__ = ["SCHEMA", "Built", "ConfigError", "build", "build_task", "plain_config", "register", "validate"]


class ConfigError(ValueError):
    """A config that composes and cannot work; the message names the key, the value seen and what to change."""


MODES = ("train", "evaluate", "check")
RESUME = ("never", "auto")
PRECISIONS = ("float32", "float64")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
HYDRA = re.compile(r"_[a-z]+_")
"""Keys that Hydra's ``instantiate`` would read: ``_target_``, which is checked, and others, which no node needs."""
ANY = "any"
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
    "hyperopt.optim": "hyperopt.bilevel.outer",
    "hyperopt.train_settings": "hyperopt.bilevel.outer_settings",
}
"""Where the modules of classes lay when older files named them, and where they lie now."""


def _present(target: str) -> str:
    """Return the present name of a class that an older file names."""
    module, _, name = target.rpartition(".")
    for old, new in MOVED.items():
        if module == old or (module.startswith(f"{old}.") and not module.startswith(new)):
            return f"{new}{module.removeprefix(old)}.{name}"
    return target


@dataclass(frozen=True)
class Built:
    """What a config describes, built."""

    task: Task
    optimizer: OuterOptimizer
    trainer: TrainerSettings


@dataclass(frozen=True)
class Part:
    """A node of a config that names what is to be built.

    Attributes:
        key: where it is.
        group: of ``hyperopt.app.schema.GROUPS``, what belongs there; ``ANY`` inside of a part from an allowed package, whose
            places are its own; empty where only plain values belong.
        target: its ``_target_``.
        values: the other keys.
    """

    key: str
    group: str
    target: Any
    values: dict[str, Any]


def parts(value: Any, key: str, group: str, *, several: bool = False) -> Iterator[Part]:
    """Yield every part in a plain value of a config, outermost first.

    Args:
        value: mappings, lists and scalars.
        key: where it is.
        group: what belongs there, see ``Part``.
        several: whether the place holds a list or a mapping of parts.

    Raises:
        ConfigError: a key that is for Hydra and no setting (``_args_``, ``_partial_``, ...), or no part where one belongs.
    """
    if isinstance(value, dict):
        for name in value:
            if isinstance(name, str) and HYDRA.fullmatch(name) and name != "_target_":
                raise ConfigError(f"{key}.{name}: a node has a _target_ and plain settings; drop {name}")
    if isinstance(value, dict) and "_target_" in value:
        target = value["_target_"]
        inside = {str(name): child for name, child in value.items() if name != "_target_"}
        yield Part(key, group, target, inside)
        held = places(SETTINGS[target]) if _registered(target) else dict.fromkeys(inside, ANY)
        for name, child in inside.items():
            yield from parts(child, f"{key}.{name}", held.get(name, ""), several=name in SEVERAL)
    elif isinstance(value, dict | list) and (several or group in ("", ANY)):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from parts(child, f"{key}.{name}", group)
    elif value is not None and group not in ("", ANY):
        raise ConfigError(f"{key}={_short(value)} names no {group}: it has no _target_; change {key}")


def all_parts(values: Mapping[str, Any]) -> Iterator[Part]:
    """Yield every part of a whole config of plain values; see ``parts``."""
    held = places(TrainConfig)
    return itertools.chain.from_iterable(parts(value, str(name), held.get(name, "")) for name, value in values.items())


def _registered(target: Any) -> bool:
    return isinstance(target, str) and target in SETTINGS


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_parts(found: Iterable[Part], allowed: Collection[str]) -> None:
    """Refuse a part that may not be named, that belongs elsewhere, or whose settings refuse its values.

    Args:
        found: as ``parts`` yields them.
        allowed: top-level packages that may be named beside the registered settings.

    Raises:
        ConfigError: names the key, the value seen and what to change.
    """
    # Outermost first: task holds the solver and the rest by interpolation, and solver.rtol is the key that a user set.
    found = sorted(found, key=lambda part: part.key.count("."))
    for part in found:
        _check_target(part, allowed)
    for part in found:
        if _registered(part.target):
            _check_values(part.key, SETTINGS[part.target], part.values)


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
    values: Any = OmegaConf.to_container(cfg)
    for name in (item.name for item in dataclasses.fields(Built)):
        if values[name] is None:
            raise ConfigError(f"{name}=None: a run has one; choose an option of the group {name}")
    check_parts(all_parts(values), tuple(cfg.allow_targets))


def _check_values(key: str, settings: type, values: dict[str, Any]) -> None:
    """Refuse values that the settings class of a node refuses, under the names that they have in the config."""
    names = [item.name for item in dataclasses.fields(settings)]
    for name in values:
        if name not in names:
            raise ConfigError(f"{key}.{name}: {key} has no key {name!r}; {near(name, names)}")
    try:
        settings(**values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
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


def _check_target(part: Part, allowed: Collection[str]) -> None:
    """Refuse a ``_target_`` that is no registered setting of its place, unless it is in an allowed package."""
    key, target = part.key, part.target
    top = target.partition(".")[0] if isinstance(target, str) else ""
    if not part.group:
        raise ConfigError(f"{key} holds plain values, but has _target_={_short(target)}; drop {key}._target_")
    choices = SETTINGS if part.group == ANY else GROUPS[part.group]
    if target in choices if _registered(target) else top != "hyperopt" and top in allowed:
        return
    if _registered(target) or top == "hyperopt":
        what = "setting of hyperopt" if part.group == ANY else f"{part.group}; {near(target, choices)}"
        raise ConfigError(f"{key}._target_={_short(target)} is no {what}")
    hint = f"; if you trust it, add 'allow_targets=[{top}]' to the command line" if top.isidentifier() else ""
    raise ConfigError(f"{key}._target_={_short(target)} is outside hyperopt{hint}")


def build(cfg: DictConfig) -> Built:
    """Build the task, the optimizer and the trainer that a config describes.

    Args:
        cfg: a composed config; it is not changed.

    Raises:
        ConfigError: the config does not pass ``validate``, or a target is not there or not of the package that it names.
    """
    validate(cfg)
    whole = _own(cfg)
    OmegaConf.resolve(whole)
    names = [item.name for item in dataclasses.fields(Built)]
    return Built(**_instantiate(OmegaConf.masked_copy(whole, names), tuple(cfg.allow_targets)))


def build_task(cfg: DictConfig, unneeded: Collection[str], allowed: Collection[str]) -> Task:
    """Check all parts of a config and build its task alone.

    Args:
        cfg: see ``plain_config``.
        unneeded: settings of the task that are left None.
        allowed: see ``check_parts``.

    Raises:
        ConfigError: see ``build``.
    """
    values: Any = OmegaConf.to_container(cfg)
    check_parts(all_parts(values), allowed)
    task = {name: None if name in unneeded else value for name, value in values["task"].items()}
    return _instantiate(OmegaConf.create({"task": task}), allowed)["task"]


def _instantiate(cfg: DictConfig, allowed: Collection[str]) -> dict[str, Any]:
    """Build the parts of a resolved config whose parts have passed ``check_parts``."""
    values: Any = OmegaConf.to_container(cfg)
    for name, value in values.items():
        for part in parts(value, name, name):
            if not _registered(part.target):
                _check_import(part.key, part.target, allowed)
    return instantiate(cfg, _convert_="all")


def _check_import(key: str, target: str, allowed: Collection[str]) -> None:
    """Refuse a target that is not there, or that only passes through an allowed package (``mine.os.system``)."""
    try:
        found = get_object(target)
    except ImportError as error:
        raise ConfigError(f"{key}._target_={target!r} cannot be imported: {error}; change {key}._target_") from error
    home = str(getattr(found, "__module__", None) or type(found).__module__).partition(".")[0]
    if home == "hyperopt" or home not in allowed:
        raise ConfigError(f"{key}._target_={target!r} is defined in {home}, which is not allowed; change {key}._target_")


def plain_config(values: Mapping[str, Any], where: str) -> DictConfig:
    """Return what was read from a file as a config, in which nothing is left to resolve, and every part has its present name.

    Args:
        values: as ``hyperopt.data.reading`` returns them.
        where: what to call the file in an error.

    Raises:
        ConfigError: an interpolation, a resolver, or a value that is marked as missing.
    """
    values = copy.deepcopy(dict(values))
    stack: list[tuple[str, Any]] = [("", values)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ConfigError(f"{where}: {key[1:]}={_short(value)} is no plain value; write the value itself there")
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{key}.{name}", child) for name, child in pairs]
        if isinstance(value, dict) and isinstance(value.get("_target_"), str):
            value["_target_"] = _present(value["_target_"])
    return OmegaConf.create(values)
