"""Building of the parts that a config describes, before anything else is done.

Each node with a ``_target_`` becomes an object of that class, whose own checks say what is wrong with a value. The classes
that may be named come from the options in ``configs/`` (``hyperopt.app.options``) and from the command line. The type of an
argument says which classes fit there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf

from hyperopt.app.config import PARTS, TORCH, ConfigError, check_targets, plain_values, short
from hyperopt.app.errors import near
from hyperopt.app.options import element, hints, kinds, named, registered, targets
from hyperopt.app.trackers import TensorBoard, TrackerSettings
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.outer import MakeScheduler, OuterOptimizer, with_values
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.text import called, one_line, with_article
from hyperopt.data.own import Own
from hyperopt.data.splits import Dataset
from hyperopt.nn.cells import CellFactory, OwnCell
from hyperopt.tasks.base import Task
from hyperopt.tasks.stn import SelfTuningOptions
from hyperopt.tasks.trainer import TrainerSettings

LAST = ("optimizer", "stn")
"""Parts that are built after all other checks: making an optimizer of torch imports the compiler, which takes seconds."""
TORCHS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
GROUPS: dict[str, Any] = {
    "solver": FixedPointSolver | None,
    "adjoint": Adjoint | Estimator | None,
    "inner": InnerSolver | None,
    "dataset": Dataset | None,
    "stn": SelfTuningOptions | None,
    "optimizer": OuterOptimizer,
    "trainer": TrainerSettings,
    "tracker": TrackerSettings,
    "task": Task,
}
"""The kind of each group's parts."""
ORDINARY: dict[type, type] = {Dataset: Own, CellFactory: OwnCell}
"""For these kinds, the class that wraps an ordinary class or function of the user's, and calls it when it is needed."""


@dataclass(frozen=True)
class Built:
    """The parts that a config describes, built."""

    task: Task
    optimizer: OuterOptimizer
    trainer: TrainerSettings
    tracker: TrackerSettings = field(default_factory=TensorBoard)


def build(cfg: DictConfig) -> Built:
    """Build the task, the optimizer and the trainer that a composed config describes, and all other parts to check their values.

    Raises:
        ConfigError: a value, a key or a target cannot work; the message names the key, the value seen and what to change.
    """
    values = plain_values(cfg)
    allowed = tuple(cfg.allow_targets)
    check_targets(values, allowed)
    # A part that the task has by interpolation is named by the key that a user sets: solver.rtol, and not task.solver.rtol.
    task = {str(name): cfg.task._get_node(name) for name in cfg.task} if OmegaConf.is_config(cfg.task) else {}
    shared = {
        f"task.{name}": str(node._value())[2:-1] for name, node in task.items() if OmegaConf.is_interpolation(cfg.task, name)
    }
    try:
        made = {name: make(values[name], name, GROUPS[name], allowed) for name in PARTS if name not in LAST}
    except ConfigError as error:
        where = re.match(r"task\.\w+", text := str(error))
        if where is None or where[0] not in shared:
            raise
        raise ConfigError(_with_options(text.replace(where[0], shared[where[0]]), shared[where[0]])) from error
    trainer, task = made["trainer"], made["task"]
    if isinstance(task, Task) and task.MEASURES and trainer.monitor not in task.MEASURES:
        known = near(trainer.monitor, task.MEASURES)
        raise ConfigError(f"trainer.monitor={trainer.monitor!r} is not a metric of the task; {known}; change trainer.monitor")
    made |= {name: make(values[name], name, GROUPS[name], allowed) for name in LAST}
    return Built(**{item.name: made[item.name] for item in dataclasses.fields(Built)})


def build_task(cfg: DictConfig, unneeded: Collection[str], allowed: Collection[str]) -> Task:
    """Check all parts of a plain config, and build its task alone; its settings in ``unneeded`` become None."""
    values: Any = OmegaConf.to_container(cfg)
    check_targets(values, allowed)
    if not isinstance(values["task"], Mapping):
        raise ConfigError(f"task={short(values['task'])} does not name a Task: it has no _target_; change task")
    for name in PARTS:  # parts that are not built must be of the right kind too
        if isinstance(part := values.get(name), Mapping) and "_target_" in part:
            kind = _imported(name, part["_target_"], allowed)
            of_torch = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
            if part["_target_"] in registered() or of_torch:
                _check_kind(name, part["_target_"], OuterOptimizer if of_torch else kind, GROUPS[name])
    task = {name: None if name in unneeded else value for name, value in values["task"].items()}
    return make(task, "task", GROUPS["task"], allowed)


def make(value: Any, key: str, hint: Any, allowed: Collection[str]) -> Any:
    """Return the object that a plain value of a config describes; a value without a ``_target_`` stays as it is.

    Args:
        value: a value that has passed ``check_targets``.
        key: the value's key.
        hint: the type of the argument that takes it, ``Any`` if it is unknown.
        allowed: see ``check_targets``.

    Raises:
        ConfigError: there is a part where none belongs, or none where one belongs; a part is of the wrong kind or cannot be
            imported; or the class refuses a key or a value.
    """
    expected = kinds(hint)
    if isinstance(value, list):
        inside = element(hint, Sequence)
        if inside is not None or object in expected or not expected:
            return [make(child, f"{key}.{n}", inside or Any, allowed) for n, child in enumerate(value)]
    if not isinstance(value, Mapping):
        if value is not None and expected and not isinstance(value, expected) and not _plain(hint):
            raise ConfigError(f"{key}={short(value)} does not name {_names(expected)}: it has no _target_; change {key}")
        return value
    if "_target_" not in value:
        inside = element(hint, Mapping)
        if inside is None and expected and object not in expected:
            raise ConfigError(
                f"{key} does not name {_names(expected)}: it has no _target_; choose an option, or set {key}._target_"
            )
        return {name: make(child, f"{key}.{name}", inside or Any, allowed) for name, child in value.items()}
    target = value["_target_"]
    kind = _imported(key, target, allowed)
    given = {str(name): child for name, child in value.items() if name != "_target_"}
    if isinstance(kind, type) and issubclass(kind, TORCHS):
        return _of_torch(key, target, kind, given, hint, allowed)
    if target in registered():
        _check_kind(key, target, kind, hint)
    known = hints(target)
    ordinary = None if target in registered() else _ordinary(kind, hint)
    beside = set() if ordinary is None or known is None else {each.name for each in dataclasses.fields(ordinary)[1:]} - {*known}
    for name in given:
        if known is not None and name not in known and name not in beside:
            raise ConfigError(f"{key}.{name}: {key} has no key {name!r}; {near(name, {*known, *beside})}")
    made = {name: make(child, f"{key}.{name}", (known or {}).get(name, Any), allowed) for name, child in given.items()}
    try:
        if ordinary is not None:
            own = {name: made.pop(name) for name in beside & {*made}}
            return ordinary(functools.partial(kind, **made), **own)
        found = kind(**made)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(_with_keys(str(error), key, ordinary or kind)) from error
    if expected and not isinstance(found, expected):
        names = " or ".join(with_article(f"{each.__module__}.{each.__name__}") for each in expected)
        raise ConfigError(f"{key}._target_={short(target)} makes {called(found)}, which is not {names}; derive it from that")
    return found


def _ordinary(kind: Any, hint: Any) -> type | None:
    """Return the class that wraps an ordinary class or function for this place, or None if no wrapper is needed."""
    fitting = (each for each in kinds(hint) if each in ORDINARY and not (isinstance(kind, type) and issubclass(kind, each)))
    return next((ORDINARY[each] for each in fitting), None)


def _of_torch(key: str, target: str, kind: type, given: dict[str, Any], hint: Any, allowed: Collection[str]) -> Any:
    """Return a factory of a torch optimizer or schedule, which needs its parameters first; see ``hyperopt.bilevel.outer``."""
    takes_schedule = issubclass(kind, torch.optim.Optimizer)
    _check_kind(key, target, OuterOptimizer if takes_schedule else kind, hint)
    own = {name: given.pop(name) for name in ("scheduler", "clip_norm") if takes_schedule and name in given}
    known = [name for name in inspect.signature(kind).parameters if name not in ("params", "optimizer")]
    for name in given:
        if name not in known:
            raise ConfigError(f"{key}.{name}: {target} takes no {name!r}; {near(name, known)}")
    try:
        made = with_values(kind, given)
        if not takes_schedule:
            return made
        scheduler = make(own.get("scheduler") or None, f"{key}.scheduler", MakeScheduler | None, allowed)
        return OuterOptimizer(made, scheduler, own.get("clip_norm"))
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error).replace(f"{OuterOptimizer.__name__}: ", f"{kind.__name__}: ", 1)
        raise ConfigError(_with_keys(text, key, kind)) from error


def _names(kinds: Sequence[type]) -> str:
    """Return the names of the kinds that fit somewhere, with an article, for a message."""
    return with_article(" or ".join(kind.__name__ for kind in kinds))


def _plain(hint: Any) -> bool:
    """Whether a value of this type may also be a number or a text, as in ``float | Space``."""
    return any(each in (int, float, str, bool) for each in getattr(hint, "__args__", ()))


def _check_kind(key: str, target: str, kind: type, hint: Any) -> None:
    """Refuse a class of this package where another kind belongs."""
    expected = kinds(hint)
    if hint is Any or (expected and issubclass(kind, expected)):
        return
    if not expected:
        raise ConfigError(f"{key} holds plain values, but has _target_={short(target)}; drop {key}._target_")
    names = _names(expected)
    group = key.rpartition(".")[2]
    able = [name for name, (own, *_) in targets(group).items() if issubclass(get_class(own), expected)]
    if able and (option := next((name for name, (own, *_) in targets(group).items() if own == target), None)):
        raise ConfigError(f"{key}={option} is not {names}, and nothing else fits here; choices: {', '.join(able)}; change {key}")
    wanted = (*expected, torch.optim.Optimizer) if OuterOptimizer in expected else expected
    fitting = [each for each in named() if issubclass(get_class(each), wanted)]
    raise ConfigError(f"{key}._target_={short(target)} is not {names}; {near(target, fitting)}")


def _with_options(text: str, group: str) -> str:
    """Return a task's message about a part that it cannot have, with the names of options instead of classes.

    ``dataset=Diabetes(...) has numbers to predict, ...; change dataset`` becomes ``dataset=diabetes has ...; choices: ...``.
    """
    classes = {option: get_class(own) for option, (own, *_) in targets(group).items()}
    for option, kind in classes.items():
        if f"{group}={kind.__name__}(...)" in text:
            others = [name for name, each in classes.items() if getattr(each, "regression", False) is not True]
            said, _, advice = text.replace(f"{kind.__name__}(...)", option).rpartition("; ")
            return f"{said}; choices: {', '.join(others)}; {advice}"
    return text


def _with_keys(text: str, key: str, kind: type) -> str:
    """Return a class's message about a value, with the names that its arguments have in the config.

    ``Picard: rtol=-1 is not in [0, inf); change rtol`` becomes ``solver.rtol=-1 is not in [0, inf); change solver.rtol``.
    """
    owners = {getattr(kind, "__name__", ""): key}
    if dataclasses.is_dataclass(kind):
        for item in dataclasses.fields(kind):
            if isinstance(item.default_factory, type):
                owners[item.default_factory.__name__] = f"{key}.{item.name}"
    owners.update({each.__name__: key for each in getattr(kind, "__mro__", ()) if each.__name__ not in owners})
    owner, found, rest = text.partition(": ")
    if not found or owner not in owners:
        return f"{key}: {text}"
    place = owners[owner]
    return re.sub(
        r"; (change|drop|set|lower|raise) (\w+(?: or \w+)*)$",
        lambda found: f"; {found[1]} " + " or ".join(f"{place}.{name}" for name in found[2].split(" or ")),
        f"{place}.{rest}",
    )


def _imported(key: str, target: str, allowed: Collection[str]) -> Any:
    """Return the class of a target; refuse one that an allowed package only re-exports (``mine.os.system``)."""
    try:
        found = get_object(target)
    except ImportError as error:
        raise ConfigError(f"{key}._target_={target!r} cannot be imported: {one_line(error)}; change {key}._target_") from error
    if target in registered():
        return found
    if TORCH.fullmatch(target) and isinstance(found, type) and issubclass(found, TORCHS):
        return found
    home = str(getattr(found, "__module__", None) or type(found).__module__).partition(".")[0]
    if home == "hyperopt" or home not in allowed:
        raise ConfigError(f"{key}._target_={target!r} is defined in {home}, which is not allowed; change {key}._target_")
    return found
