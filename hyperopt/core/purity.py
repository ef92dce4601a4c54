"""Finds maps that are not functions: random ones (dropout), and ones that change a state of their own (batch statistics).

A solve calls its map many times and a backward takes the derivative of one call: if two calls on one input differ, there is no
fixed point, and if a call leaves a trace, a solve leaves dozens. Two checks cost next to nothing and are made at every solve: of
the modules that the map can be seen to use, and of whether the random generators moved. ``check_map`` makes the third, two calls
on one input, for whatever else there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy


class ImpureMapError(RuntimeError):
    """The map is random, or changes a state of its own; the message names the module where it can be seen."""


def modules_of(phi: Callable[..., Any], args: tuple[Any, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules, with their names, that a map is seen to use: itself, its owner, closed-over ones, globals, arguments."""
    while isinstance(phi, functools.partial):
        args, phi = (*args, *phi.args, *phi.keywords.values()), phi.func
    roots: dict[str, Any] = {"phi": phi, "phi.__self__": getattr(phi, "__self__", None)}
    code = getattr(phi, "__code__", None)
    if code is not None:
        cells = zip(code.co_freevars, getattr(phi, "__closure__", None) or (), strict=False)
        for name, cell in cells:
            try:
                roots[name] = cell.cell_contents
            except ValueError:  # a variable that is not assigned yet
                continue
        scope = getattr(phi, "__globals__", {})
        roots.update({name: scope[name] for name in code.co_names if isinstance(scope.get(name), nn.Module)})
    roots.update({f"args[{i}]": arg for i, arg in enumerate(args) if isinstance(arg, nn.Module)})
    for name, root in roots.items():
        if isinstance(root, nn.Module):
            for inner, module in root.named_modules():
                yield f"{name}.{inner}" if inner else name, module


def lazy_names(module: nn.Module) -> list[str]:
    """The parameters and buffers of a lazy module that have no size yet."""
    return [name for name, x in (*module.named_parameters(), *module.named_buffers()) if is_lazy(x)]


def refuse_changing_modules(phi: Callable[..., Any], args: tuple[Any, ...] = ()) -> None:
    """Refuse a map with a module that changes when it is called: a lazy one, or running statistics in training mode.

    Raises:
        ImpureMapError: names the first one.
    """
    for name, module in modules_of(phi, args):
        if isinstance(module, LazyModuleMixin) and lazy_names(module):
            raise ImpureMapError(
                f"the map calls {name} = {module}, whose parameters have no size yet: call it once on an input before the solve"
            )
        if isinstance(module, _NormBase) and module.training and module.track_running_stats:
            raise ImpureMapError(
                f"the map calls {name} = {module} in training mode: every evaluation of a solve would update its running "
                f"statistics, and its rows would depend on each other; call .eval() on it, use GroupNorm or LayerNorm, or make "
                f"the module the cell of a hyperopt.nn.DEQ, which freezes it for a solve"
            )


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a map on ``device`` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Put the generators back to what ``random_states`` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def refuse_random(before: list[Tensor], phi: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> None:
    """Refuse a map during whose calls the generators moved on from the states ``before``.

    Raises:
        ImpureMapError: names the dropout modules, if it has any.
    """
    if all(torch.equal(a, b) for a, b in zip(before, random_states(device), strict=True)):
        return
    found = [name for name, m in modules_of(phi, args) if isinstance(m, _DropoutNd) and m.training and m.p > 0]
    what = f"through {', '.join(found)}" if found else "somewhere"
    raise ImpureMapError(
        f"the map drew random numbers during the solve, {what}: it is another map at every call and has no fixed point; draw "
        f"them before the solve and pass them through args=, call .eval(), or make the module the cell of a hyperopt.nn.DEQ, "
        f"which draws them once a solve"
    )


@torch.no_grad()
def check_map(phi: Callable[..., Any], w0: Any, args: tuple[Any, ...] = ()) -> None:
    """Call a map twice on one input and refuse it if the results differ in a single bit.

    Args:
        phi: the map.
        w0: a state, as for ``fixed_point``; it is handed over in copies.
        args: further arguments.

    Raises:
        ImpureMapError: the map is random or stateful, or changes its input in place.
    """
    refuse_changing_modules(phi, args)
    leaves = [leaf for leaf in optree.tree_leaves(w0) if isinstance(leaf, Tensor)]
    before = random_states(leaves[0].device) if leaves else []
    results = []
    for _ in range(2):
        given = optree.tree_map(lambda x: x.detach().clone(), w0)
        results.append(optree.tree_leaves(phi(given, *args)))
        if not all(_same(a, b) for a, b in zip(optree.tree_leaves(given), leaves, strict=True)):
            raise ImpureMapError("the map changes the state that it is given, in place; return a new tensor")
    if leaves:
        refuse_random(before, phi, args, leaves[0].device)
    if not all(_same(a, b) for a, b in zip(*results, strict=True)):
        names = ", ".join(dict.fromkeys(type(module).__name__ for _, module in modules_of(phi, args))) or "none seen"
        raise ImpureMapError(
            f"two calls of the map on one input gave different results: it keeps a state of its own (modules: {names}); pass "
            f"what changes through args="
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN equal to NaN."""
    return torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)) and torch.equal(a.isnan(), b.isnan())
