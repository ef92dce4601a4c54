"""The checks of a composed config before any work, and the building of what it describes.

A config is built part by part: each node with a ``_target_`` becomes an object of that class, whose own checks say what is wrong
with a value. What may be named is known from the options in ``configs/`` (``hyperopt.app.options``) and from the command line.
What may stand where is the type of the argument that takes it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf

from hyperopt.app.errors import near
from hyperopt.app.options import element, hints, kinds, registered
from hyperopt.core.text import one_line, why_no_component

if TYPE_CHECKING:
    from hyperopt.bilevel.outer import OuterOptimizer
    from hyperopt.bilevel.outer_settings import TrainerSettings
    from hyperopt.tasks.base import Task


class ConfigError(ValueError):
    """A config that composes and cannot work; the message names the key, the value seen and what to change."""


MODES = ("train", "evaluate", "check")
RESUME = ("never", "auto")
PRECISIONS = ("float32", "float64")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
HYDRA = re.compile(r"_[a-z]+_")
"""Keys that Hydra's ``instantiate`` would read: ``_target_``, which is checked, and others, which no node needs."""
VALUES = ("name", "seed", "device", "precision", "compile", "mode", "ckpt_path", "resume", "accept_lost_rows", "threads")
PARTS = ("solver", "adjoint", "inner", "dataset", "stn", "optimizer", "trainer", "task")
"""The groups that are parts; ``task`` comes last, for it holds others by interpolation, and a user sets their own keys."""
KEYS = (*VALUES, *PARTS, "allow_targets", "paths")
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
    "hyperopt.tasks.stn_settings": "hyperopt.tasks.stn",
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


def parts(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield key and ``_target_`` of every part in a plain value of a config.

    Args:
        value: mappings, lists and scalars.
        key: where it is.

    Raises:
        ConfigError: a key that is for Hydra and no setting (``_args_``, ``_partial_``, ...).
    """
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
    """Refuse a ``_target_`` that is neither a class of an option nor in an allowed package; nothing is imported.

    Args:
        values: a whole config of plain values.
        allowed: top-level packages that may be named beside the options' classes.

    Raises:
        ConfigError: names the key, the value seen and what to change.
    """
    for name, value in values.items():
        for key, target in parts(value, str(name)):
            top = target.partition(".")[0] if isinstance(target, str) else ""
            if isinstance(target, str) and target in registered():
                continue
            if top == "hyperopt":
                raise ConfigError(f"{key}._target_={_short(target)} is no class of an option; {near(target, registered())}")
            if top not in allowed:
                hint = f"; if you trust it, add 'allow_targets=[{top}]' to the command line" if top.isidentifier() else ""
                raise ConfigError(f"{key}._target_={_short(target)} is outside hyperopt{hint}")


def make(value: Any, key: str, hint: Any, allowed: Collection[str]) -> Any:
    """Return what a plain value of a config stands for: a part is built, anything else is as it is.

    Args:
        value: has passed ``check_targets``.
        key: where it is.
        hint: the type of the argument that takes it, ``Any`` if that is not known.
        allowed: see ``check_targets``.

    Raises:
        ConfigError: a part where none belongs, one of another kind or one that cannot be imported, no part where one belongs,
            or a key or a value that the class refuses.
    """
    expected = kinds(hint)
    if isinstance(value, list):
        inside = element(hint, list | tuple)
        return [make(child, f"{key}.{n}", inside, allowed) for n, child in enumerate(value)]
    if not isinstance(value, Mapping):
        if value is not None and expected and not isinstance(value, expected) and not _plain(hint):
            names = " or ".join(kind.__name__ for kind in expected)
            raise ConfigError(f"{key}={_short(value)} names no {names}: it has no _target_; change {key}")
        return value
    if "_target_" not in value:
        inside = element(hint, dict)
        return {name: make(child, f"{key}.{name}", inside, allowed) for name, child in value.items()}
    target = value["_target_"]
    kind = _imported(key, target, allowed)
    if target in registered():
        _check_kind(key, target, kind, hint)
    known = hints(target)
    given = {str(name): child for name, child in value.items() if name != "_target_"}
    for name in given:
        if known and name not in known:
            raise ConfigError(f"{key}.{name}: {key} has no key {name!r}; {near(name, known)}")
    made = {name: make(child, f"{key}.{name}", known.get(name, Any), allowed) for name, child in given.items()}
    try:
        return kind(**made)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(_with_keys(str(error), key, kind)) from error


def _plain(hint: Any) -> bool:
    """Whether a value of this type may also be a number or a text: ``float | Space``."""
    return any(each in (int, float, str, bool) for each in getattr(hint, "__args__", ()))


def _check_kind(key: str, target: str, kind: type, hint: Any) -> None:
    """Refuse a class of ours where another kind belongs."""
    expected = kinds(hint)
    if hint is Any or (expected and issubclass(kind, expected)):
        return
    if not expected:
        raise ConfigError(f"{key} holds plain values, but has _target_={_short(target)}; drop {key}._target_")
    names = " or ".join(each.__name__ for each in expected)
    able = [each for each in registered() if issubclass(get_class(each), expected)]
    raise ConfigError(f"{key}._target_={_short(target)} is no {names}; {near(target, able)}")


def _with_keys(text: str, key: str, kind: type) -> str:
    """Return what a class said about a value, with the names that its arguments have in the config.

    ``Picard: rtol=-1 is not in [0, inf); change rtol`` becomes ``solver.rtol=-1 is not in [0, inf); change solver.rtol``.
    """
    owners = {kind.__name__: key}
    if dataclasses.is_dataclass(kind):
        for item in dataclasses.fields(kind):
            if isinstance(item.default_factory, type):
                owners[item.default_factory.__name__] = f"{key}.{item.name}"
    owners.update({each.__name__: key for each in kind.__mro__ if each.__name__ not in owners})
    owner, found, rest = text.partition(": ")
    if not found or owner not in owners:
        return f"{key}: {text}"
    return re.sub(r"; (change|drop|set) (?=\w+$)", rf"; \1 {owners[owner]}.", f"{owners[owner]}.{rest}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


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
    build(cfg)


def _plain_values(cfg: DictConfig) -> dict[str, Any]:
    """Return the plain values of a whole config whose top level is right."""
    cfg = _own(cfg)
    unknown = [str(key) for key in cfg if key not in KEYS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such group or key; {near(unknown[0], KEYS)}")
    missing = [key for key in KEYS if key not in cfg or OmegaConf.is_missing(cfg, key)]
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; choose an option of the group or set the key")
    OmegaConf.resolve(cfg)
    _check_top(cfg)
    values: Any = OmegaConf.to_container(cfg)
    for name in (item.name for item in dataclasses.fields(Built)):
        if values[name] is None:
            raise ConfigError(f"{name}=None: a run has one; choose an option of the group {name}")
    return values


def _check_top(cfg: DictConfig) -> None:
    """Refuse top-level values out of range."""
    if (why := why_no_component(str(cfg.name))) is not None:
        raise ConfigError(f"name={cfg.name!r:.120} {why}; change name")
    for key, choices in (("mode", MODES), ("resume", RESUME), ("precision", PRECISIONS)):
        if cfg[key] not in choices:
            raise ConfigError(f"{key}={cfg[key]!r} is none of {', '.join(choices)}; change {key}")
    for key in ("compile", "accept_lost_rows"):
        if not isinstance(cfg[key], bool):
            raise ConfigError(f"{key}={cfg[key]!r} must be true or false; change {key}")
    if not DEVICE.fullmatch(str(cfg.device)):
        raise ConfigError(f"device={cfg.device!r} is none of auto, cpu, cuda, cuda:N; change device")
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
    if cfg.mode == "evaluate" and cfg.ckpt_path is None:
        raise ConfigError("mode=evaluate needs a checkpoint, but ckpt_path=null; set ckpt_path")


def build(cfg: DictConfig) -> Built:
    """Build the task, the optimizer and the trainer that a config describes, and every other part to check its values.

    Args:
        cfg: a composed config; it is not changed.

    Raises:
        ConfigError: a value, a key or a target that cannot work; names the key, the value seen and what to change.
    """
    values = _plain_values(cfg)
    allowed = tuple(cfg.allow_targets)
    check_targets(values, allowed)
    made = {name: make(values[name], name, _group(name), allowed) for name in PARTS}
    return Built(**{item.name: made[item.name] for item in dataclasses.fields(Built)})


def _group(name: str) -> Any:
    """Return the type of the parts of a group at the top level."""
    from hyperopt.bilevel.estimator import Estimator
    from hyperopt.bilevel.inner.base import InnerSolver
    from hyperopt.bilevel.outer import OuterOptimizer
    from hyperopt.bilevel.outer_settings import TrainerSettings
    from hyperopt.core.adjoints.base import Adjoint
    from hyperopt.core.solvers.base import FixedPointSolver
    from hyperopt.data.splits import Dataset
    from hyperopt.tasks.base import Task
    from hyperopt.tasks.stn import SelfTuningOptions

    found: dict[str, Any] = {
        "solver": FixedPointSolver | None,
        "adjoint": Adjoint | Estimator | None,
        "inner": InnerSolver | None,
        "dataset": Dataset | None,
        "stn": SelfTuningOptions | None,
        "optimizer": OuterOptimizer,
        "trainer": TrainerSettings,
        "task": Task,
    }
    return found.get(name, Any)


def build_task(cfg: DictConfig, unneeded: Collection[str], allowed: Collection[str]) -> Task:
    """Check all parts of a config and build its task alone.

    Args:
        cfg: see ``plain_config``.
        unneeded: settings of the task that are left None.
        allowed: see ``check_targets``.

    Raises:
        ConfigError: see ``build``.
    """
    values: Any = OmegaConf.to_container(cfg)
    check_targets(values, allowed)
    task = {name: None if name in unneeded else value for name, value in values["task"].items()}
    return make(task, "task", _group("task"), allowed)


def _imported(key: str, target: str, allowed: Collection[str]) -> Any:
    """Return the class of a target; refuse one that only passes through an allowed package (``mine.os.system``)."""
    try:
        found = get_object(target)
    except ImportError as error:
        raise ConfigError(f"{key}._target_={target!r} cannot be imported: {one_line(error)}; change {key}._target_") from error
    if target in registered():
        return found
    home = str(getattr(found, "__module__", None) or type(found).__module__).partition(".")[0]
    if home == "hyperopt" or home not in allowed:
        raise ConfigError(f"{key}._target_={target!r} is defined in {home}, which is not allowed; change {key}._target_")
    return found


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
