"""The options in ``configs/``: the classes that a config may name, and the command-line option that chooses each.

An option is a plain YAML file with a ``_target_`` and the values that may be overridden. The class that it names defines the
keys, their types, defaults and ranges. A config may name only these classes inside ``hyperopt``. Only ``hints``, which imports
the classes that it is asked about, may import torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_object

from hyperopt.app.resolvers import config_root

TARGET = re.compile(r"^\s*(?:- )?_target_:\s*([\w.]+)", re.MULTILINE)
PLAIN = (int, float, str, bool, list, dict, tuple, type(None))
IMPLICIT = "hyperopt.core.adjoints.implicit.Implicit"


@functools.cache
def options() -> dict[str, str]:
    """Return the text of every option by its name, ``{"adjoint/cg": ...}``, including those of nested groups."""
    found: dict[str, str] = {}
    folders = [("", config_root())]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.endswith(".yaml"):
                found[f"{prefix}{entry.name.removesuffix('.yaml')}"] = entry.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


@functools.cache
def targets(group: str) -> dict[str, tuple[str, ...]]:
    """Return the class of each option of a group and the classes inside it: ``{"cg": (Implicit, CG)}``.

    Options that only change values of another one (``cg_rough``) have no class of their own and are left out.
    """
    of = {path.rpartition("/")[2]: text for path, text in options().items() if path.rpartition("/")[0] == group}
    return {
        name: tuple(TARGET.findall(text)) for name, text in of.items() if text.startswith("_target_:") or "\n_target_:" in text
    }


def own() -> tuple[str, ...]:
    """Return the options that name a class of their own, ``("adjoint/cg", ...)``."""
    found = (path for path in options() if path.rpartition("/")[2] in targets(path.rpartition("/")[0]))
    return tuple(path for path in found if not path.startswith("hydra/"))


@functools.cache
def named() -> frozenset[str]:
    """Return every class that an option names."""
    return frozenset(name for path, text in options().items() for name in TARGET.findall(text) if not path.startswith("hydra/"))


@functools.cache
def registered() -> frozenset[str]:
    """Return every class of ``hyperopt`` that an option names: all that a config may build inside this package."""
    return frozenset(name for name in named() if name.startswith("hyperopt."))


@functools.cache
def choices() -> dict[str, str]:
    """Return the command-line options of names in the library's messages; see ``hyperopt.app.errors.explain``.

    The name is the class of a solver, adjoint or inner solver; for a linear solver, the option is the adjoint that uses it.
    """
    found = {"float64": "precision=float64"}
    for group in ("solver", "adjoint", "inner"):
        for option, (own, *inside) in targets(group).items():
            linear = own == IMPLICIT
            place = "adjoint.linear_solver" if linear else group
            kind = (inside[0] if linear else own).rpartition(".")[2]
            found.setdefault(kind, f"{group}={option} (its arguments are keys of {place})")
    return found


@functools.cache
def hints(target: str) -> Mapping[str, Any] | None:
    """Return the arguments of a class or function with their types, ``Any`` if unknown; None if it takes any keyword."""
    kind = get_object(target)
    parameters = inspect.signature(kind).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return None
    try:
        known = typing.get_type_hints(kind)
        if isinstance(kind, type) and not dataclasses.is_dataclass(kind):
            known.update(typing.get_type_hints(kind.__init__))
    except NameError:  # a class of the user's may import its types for a type checker only
        known = {}
    return {name: known.get(name, Any) for name in parameters}


def kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes of parts that a value of this type may be or contain, in unions, lists and mappings; see ``hints``."""
    if hint is Any:
        return (object,)
    if isinstance(hint, type) and not typing.get_args(hint):
        return () if hint in PLAIN else (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return ()
    return tuple(kind for each in typing.get_args(hint) for kind in kinds(each))


def element(hint: Any, container: type) -> Any:
    """Return the type of the entries of a sequence or mapping type: ``Any`` if unknown, None if it is neither."""
    if hint is Any:
        return Any
    for each in (hint, *typing.get_args(hint)):
        origin = typing.get_origin(each) or each
        if isinstance(origin, type) and issubclass(origin, container) and origin is not str:
            inside = typing.get_args(each)
            return inside[0 if container is Sequence else 1] if inside else Any
    return None


def is_number(hint: Any) -> bool:
    """Whether values of this type are numbers (or None in place of one)."""
    inside = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    return set(inside) <= {int, float, type(None)} and set(inside) != {type(None)}


def leaves(
    values: Mapping[Any, Any], prefix: str = "", known: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Any, bool]]:
    """Yield ``(dotted key, value, whether it is a number or None in place of one)`` of the plain values of a config.

    Args:
        values: mappings, lists and scalars; a list is a value.
        prefix: beginning of the keys.
        known: types of the keys; those of a part are those of its class.
    """
    target = values.get("_target_")
    if isinstance(target, str) and target.startswith("torch.optim."):
        known = {**(hints(target) or {}), **(hints("hyperopt.bilevel.outer.OuterOptimizer") or {})}
    elif isinstance(target, str) and target in registered():
        known = hints(target)
    known = known or {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            yield f"{prefix}{name}", value, is_number(known[name]) if name in known and not plain else plain
