"""Finds what a map changes in place: what it is given, or what it closes over.

PyTorch counts the changes of a tensor, which costs nothing to look at. Tensors of inference mode have no such count, and
``.data`` and numpy pass it by: the first evaluations of a solve compare with copies too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hyperopt.core.purity import ImpureMapError


class Given:
    """What a map is given, as it was before a call.

    Args:
        state: the state.
        args: the arguments, trees of anything.
        early: whether this is one of the first two calls of a solve, at which values are compared too. (A state of zeros may
            look unchanged.) A copy is made of the state, and of all that has no count of changes.
        reads: whether a device may be waited for; without it only what has no count is compared.
    """

    def __init__(self, state: Tensor, args: tuple[Any, ...], *, early: bool, reads: bool) -> None:
        """Count, and copy where that is asked for."""
        self.state, self.tensors = state, [state, *(x for arg in args for x in _tensors(arg))]
        self.counts = [None if x.is_inference() else x._version for x in self.tensors]
        looked_at = (x for x, count in zip(self.tensors, self.counts, strict=True) if count is None or (reads and x is state))
        self.copies = [(x, x.detach().clone()) for x in looked_at] if early else []

    def refuse_changes(self) -> None:
        """Refuse a call that has changed any of it.

        Raises:
            ValueError: it has; says whether the state or an argument.
        """
        counted = zip(self.tensors, self.counts, strict=True)
        changed = next((x for x, count in counted if count is not None and x._version != count), None)
        if changed is None:
            changed = next((x for x, copy in self.copies if not _same(x.detach(), copy)), None)
        if changed is not None:
            what = "the state" if changed is self.state else "an argument"
            raise ValueError(
                f"the map changed {what} that it was given, in place; return a new tensor (inplace=False in a module)"
            )


class ClosedOver:
    """The tensors that a map is seen to close over, with how often each was changed so far."""

    def __init__(self, phi: Callable[..., Any]) -> None:
        """Find them: in the closure, defaults, globals and owner of a function, and in modules."""
        self.phi = phi
        self.counts = {id(x): (name, x, x._version) for name, x in closed_over(phi) if not x.is_inference()}

    @torch.no_grad()
    def refuse_changes(self, value: Any, args: tuple[Any, ...]) -> None:
        """Refuse a map that has changed one of them since, unless two calls at ``value`` give the same to the bit.

        A map may write into memory that it owns, or count its calls, and be a function all the same.

        Raises:
            ImpureMapError: names the tensor.
        """
        changed = [name for name, x, count in self.counts.values() if x._version != count]
        if not changed:
            return
        one, two = (
            [x.detach().clone() for x in _tensors(self.phi(optree.tree_map(torch.clone, value), *args))] for _ in range(2)
        )
        if not all(_same(a, b) for a, b in zip(one, two, strict=True)):
            raise ImpureMapError(
                f"the map changes {', '.join(changed)}, which it closes over, in place, and gives another result at every call: "
                "it has no fixed point; compute new tensors instead, and pass what changes between solves through args="
            )


def closed_over(phi: Any) -> list[tuple[str, Tensor]]:
    """The tensors that a map is seen to close over, by name."""
    return list(_walk(phi, "phi", set()))


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value: a tensor, a nest of containers, a module, a function, or an object that is called."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for inner, module in value.named_modules():
            seen.add(id(module))
            for key, x in (*vars(module).items(), *module._buffers.items(), *module._parameters.items()):
                if isinstance(x, Tensor):
                    yield ".".join(part for part in (name, inner, key) if part), x
    elif isinstance(value, dict | list | tuple):
        for x in _tensors(value):
            yield name, x
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _walk(part, name, seen)
    elif isinstance(value, FunctionType):
        parts: dict[str, Any] = {f"the default of {name}": value.__defaults__}
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                parts[key] = cell.cell_contents
            except ValueError:  # a variable that is not assigned yet
                continue
        parts.update({key: value.__globals__[key] for key in value.__code__.co_names if key in value.__globals__})
        for key, part in parts.items():
            if not isinstance(part, type) and (isinstance(part, Tensor | nn.Module | dict | list | tuple | FunctionType)):
                yield from _walk(part, key, seen)
    elif callable(value):
        owner = getattr(value, "__self__", None)
        if owner is not None:
            yield from _walk(owner, name, seen)
        for key, part in getattr(value, "__dict__", {}).items():
            if isinstance(part, Tensor | nn.Module | FunctionType):
                yield from _walk(part, f"{name}.{key}", seen)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a nest of containers."""
    if isinstance(value, Tensor):
        return [value]
    leaves: list[Any] = optree.tree_leaves(value) if isinstance(value, dict | list | tuple) else []  # pyright: ignore[reportArgumentType]
    return [x for x in leaves if isinstance(x, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN equal to NaN."""
    if a.layout != torch.strided or torch.equal(a, b):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
