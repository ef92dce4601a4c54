"""``Places``: where a function keeps state of its own, as far as Python shows it.

A function reaches its state through its closure, its defaults, the globals that it names and the object that it is a method
of, and through what these contain: modules, other objects, lists and dicts. A place is a container and a key in it. A
``Replay`` puts back the state that is found here, and messages name the modules that are found.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hyperopt.core.contents import COMMON, GENERATORS, Attributes, Content, Items, content_of
from hyperopt.core.streams import library, streamed

PLAIN = (bool, int, float, complex, str, type(None))
LONG = 256  # a container with more entries than this is taken for data, and its entries are not searched
MANY = 20_000  # at most this many objects are searched
FOREIGN = "torch numpy builtins collections optree logging threading matplotlib pandas scipy sklearn".split()
# Attributes that every torch module has.
INTERNAL = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Cell:
    """A variable of an enclosing function, as a container with one entry."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: Any) -> Any:
        return self.cell.cell_contents

    def __setitem__(self, key: Any, value: Any) -> None:
        self.cell.cell_contents = value


class Places:
    """The state that some functions use.

    Attributes:
        named: the modules, with their names for messages.
        modules: the modules.
        others: pairs of a container and a key, outside of modules, whose value is a plain number, a string, a tensor, None or
            an iterator.
        contents: the contents of the containers, objects and classes.
        names: the global names and attributes that the functions use.
    """

    def __init__(self, *, deep: bool = True) -> None:
        self._deep = deep
        self.named: list[tuple[str, nn.Module]] = []
        self.modules: list[nn.Module] = []
        self.others: list[tuple[Any, Any]] = []
        self.contents: list[Content] = []
        self.names: set[str] = set()
        self._seen: set[int] = set()

    @staticmethod
    def of(function: Callable[..., Any], args: tuple[Any, ...] = (), *, deep: bool = True) -> Places:
        """Return what a function called with ``args`` can be seen to use; with ``deep``, also inside objects and containers."""
        found = Places(deep=deep)
        found._walk(
            deque([("phi", function), *((f"args[{i}]", arg) for i, arg in enumerate(args) if isinstance(arg, nn.Module))])
        )
        return found

    @staticmethod
    def of_modules(modules: Iterable[nn.Module]) -> Places:
        """Return the state of these modules and their submodules."""
        found = Places()
        found._walk(deque(("", module) for module in modules))
        return found

    def slots(self) -> list[tuple[Any, Any, Any]]:
        """Return the places and their present values, except the buffers of modules in training mode."""
        slots: list[tuple[Any, Any, Any]] = [(place, key, place[key]) for place, key in self.others]
        for m in self.modules:
            own = vars(m)
            slots += [(own, key, value) for key, value in own.items() if _is_state(key, value)]
            slots += [(m._parameters, name, p) for name, p in m._parameters.items() if p is not None]
            if not m.training:
                slots += [(m._buffers, name, b) for name, b in m._buffers.items()]
        return slots

    def buffers(self) -> list[tuple[Any, Any, Any]]:
        """Return the places of the buffers of modules in training mode, with their present values."""
        return [(m._buffers, name, b) for m in self.modules if m.training for name, b in m._buffers.items() if b is not None]

    @property
    def draws(self) -> bool:
        """Whether the functions can be seen to use the generators of Python or numpy that all threads share."""
        return "random" in self.names or any(id(generator) in self._seen for generator in COMMON)

    def _walk(self, queue: deque[tuple[str, Any]]) -> None:
        while queue and len(self._seen) < MANY:
            name, value = queue.popleft()
            if id(value) in self._seen or isinstance(value, (*PLAIN, Tensor)):
                continue
            self._seen.add(id(value))
            if isinstance(value, nn.Module):
                self._add_module(name, value, queue)
            else:
                queue.extend(self._inside(name, value))

    def _add_module(self, name: str, root: nn.Module, queue: deque[tuple[str, Any]]) -> None:
        for inner, module in root.named_modules():
            if module is not root and id(module) in self._seen:
                continue
            self._seen.add(id(module))
            self.named.append((".".join(part for part in (name, inner) if part), module))
            self.modules.append(module)
            # A module may keep another one in a list or an object.
            own = vars(module)
            queue.extend((f"{name}.{key}", value) for key, value in own.items() if key not in INTERNAL)
            if self._deep:
                self.contents.append(Attributes(module, INTERNAL))
                queue.append((name, type(module)))
                queue.extend((name, hook) for hooks in HOOKS for hook in own[hooks].values())

    def _inside(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield what a function, object or container refers to, and note its own state."""
        if isinstance(value, functools.partial):
            yield name, value.func
            yield from ((f"{name}.args", arg) for arg in (*value.args, *value.keywords.values()))
        elif isinstance(value, types.MethodType):
            yield f"{name}.__self__", value.__self__
            yield name, value.__func__
        elif isinstance(value, types.FunctionType):
            yield from self._function(name, value)
        elif self._deep:
            yield from self._content(name, value)

    def _content(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield what an object, container or class refers to, and note its own state."""
        if isinstance(owner := getattr(value, "__self__", None), GENERATORS):  # value is a method of a generator
            yield name, owner
        content = None if any(value is generator for generator in COMMON) else content_of(value)
        if content is not None:
            self.contents.append(content)
        if isinstance(value, type):
            if not library(value.__module__):
                yield from self._class(name, value)
        elif isinstance(value, MutableMapping):
            if len(value) <= LONG:
                yield from self._entries(name, value, list(value.items()))
        elif isinstance(value, list):
            if len(value) <= LONG:
                yield from self._entries(name, value, list(enumerate(value)))
        elif isinstance(value, tuple | set | frozenset | deque):
            if len(value) <= LONG:
                yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value))
        elif not isinstance(value, types.ModuleType | DataLoader | Dataset) and _own(value):
            self.contents.append(Attributes(value))
            state = getattr(value, "__dict__", {})
            yield from self._entries(name, state, [(key, entry) for key, entry in state.items() if not key.startswith("__")])
            yield name, type(value)

    def _class(self, name: str, value: type) -> Iterator[tuple[str, Any]]:
        """Yield the functions of a class of the user's, and note what the class keeps for all of its instances."""
        self.contents.append(Attributes(value))
        yield from ((name, base) for base in value.__bases__)
        for key, entry in list(vars(value).items()):
            if not (key.startswith("__") and key != "__call__"):
                entry = getattr(entry, "__func__", getattr(entry, "fget", entry))  # of a static method or a property
                yield f"{name}.{key}", entry

    def _entries(self, name: str, place: Any, entries: list[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
        for key, entry in entries:
            if _is_variable(entry):
                self.others.append((place, key))
            else:
                yield f"{name}.{key}" if isinstance(key, str) else f"{name}[{key!r}]", entry

    def _function(self, name: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a variable that is not assigned yet
                continue
            if _is_variable(content):
                self.others.append((_Cell(cell), None))
            else:
                yield variable, content
        yield from ((name, value) for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            yield name, wrapped
        if (function.__module__ or "").split(".")[0] in FOREIGN:  # None: it was run by exec
            return
        if self._deep and vars(function):
            self.contents.append(Items(vars(function)))
            yield from self._entries(name, vars(function), list(vars(function).items()))
        names, scope = _names(function.__code__), function.__globals__
        self.names.update(names)
        for variable in names:
            if variable not in scope:
                continue
            content = scope[variable]
            if _is_variable(content):
                self.others.append((scope, variable))
            elif isinstance(content, types.ModuleType):
                inside = [(inner, vars(content)[inner]) for inner in names if inner in vars(content)]
                if self._deep and not library(content.__name__):
                    yield from self._entries(variable, vars(content), inside)
                else:
                    yield from ((f"{variable}.{inner}", value) for inner, value in inside if isinstance(value, nn.Module))
            else:
                yield variable, content


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> list[str]:
    """Return the global names and attributes that a function uses, including those of functions inside it."""
    found = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _names(constant)
    return list(dict.fromkeys(found))


def _is_variable(value: Any) -> bool:
    """Whether a value is replaced, or consumed, in the place where it is."""
    return isinstance(value, (*PLAIN, Tensor)) or streamed(value)


def _own(value: Any) -> bool:
    """Whether an object may be the user's own. The state of a library's object is left to the library."""
    return type(value).__module__.split(".")[0] not in FOREIGN


def _is_state(key: str, value: Any) -> bool:
    """Whether an attribute of a module is part of its state."""
    return key == "training" or (key not in INTERNAL and _is_variable(value))
