"""Checks for maps that are not functions: random ones (dropout), and ones that change state of their own (batch statistics).

A solve calls its map many times, and backward takes the derivative of one call. If two calls on one input differ, there is no
fixed point; if a call changes some state, a solve changes it dozens of times. Every solve makes two cheap checks: of the
modules that the map can be seen to use, and of whether its first evaluation draws random numbers. ``check_map`` finds anything
else by calling the map twice on one input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from hyperopt.core.draws import Unreplayed
from hyperopt.core.places import Places
from hyperopt.core.policy import ImpureMapError


def lazy_names(module: torch.nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of a lazy module that have no size yet."""
    return [name for name, x in (*module.named_parameters(), *module.named_buffers()) if is_lazy(x)]


def refuse_changing_modules(phi: Callable[..., Any], args: tuple[Any, ...] = ()) -> None:
    """Refuse a map with a module that changes when it is called: a lazy one, or one with running statistics in training mode.

    Raises:
        ImpureMapError: there is such a module; the message names the first.
    """
    for name, module in Places.of(phi, args, deep=False).named:
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


@torch.no_grad()
def refuse_changing(phi: Callable[..., Any], value: Any, args: tuple[Any, ...], written: list[Tensor]) -> None:
    """Refuse a map that changed captured tensors, unless two calls at ``value`` give exactly the same result.

    A map may write into memory that it owns, or count its calls, and still be a function.

    Raises:
        ImpureMapError: the results differ; the message gives the shapes of the tensors.
    """
    one, two = (optree.tree_leaves(phi(optree.tree_map(torch.clone, value), *args)) for _ in range(2))
    if not all(_same(a, b) for a, b in zip(one, two, strict=True)):
        shapes = ", ".join(dict.fromkeys(str(tuple(x.shape)) for x in written))
        raise ImpureMapError(
            f"the map changes tensors that it closes over (of shape {shapes}) in place, and gives another result at every call: "
            "it has no fixed point; compute new tensors instead, and pass what changes between solves through args="
        )


def random_map(phi: Callable[..., Any], args: tuple[Any, ...]) -> ImpureMapError:
    """Return the error for a map that draws random numbers; it names the dropout modules, if the map has any."""
    found = [name for name, m in Places.of(phi, args, deep=False).named if isinstance(m, _DropoutNd) and m.training and m.p > 0]
    what = f"through {', '.join(found)}" if found else "somewhere"
    return ImpureMapError(
        f"the map drew random numbers during the solve, {what}: it is another map at every call and has no fixed point; draw "
        f"them before the solve and pass them through args=, call .eval(), or make the module the cell of a hyperopt.nn.DEQ, "
        f"which draws them once a solve"
    )


@torch.no_grad()
def check_map(phi: Callable[..., Any], w0: Any, args: tuple[Any, ...] = ()) -> None:
    """Call a map twice on one input and refuse it if the results differ in a single bit.

    Args:
        phi: the map.
        w0: a state, as for ``fixed_point``; the map gets copies of it.
        args: further arguments.

    Raises:
        ImpureMapError: the map is random or stateful, or changes its input in place.

    Example:
        >>> import torch, hyperopt
        >>> hyperopt.check_map(lambda w: 0.5 * w, torch.zeros(1, 2))
        >>> try:
        ...     hyperopt.check_map(torch.nn.Dropout(), torch.ones(1, 50))
        ... except hyperopt.ImpureMapError:
        ...     print("dropout is random")
        dropout is random
    """
    refuse_changing_modules(phi, args)
    leaves = [leaf for leaf in optree.tree_leaves(w0) if isinstance(leaf, Tensor)]
    results = []
    for _ in range(2):
        given = optree.tree_map(lambda x: x.detach().clone(), w0)
        with Unreplayed() as mode:
            results.append(optree.tree_leaves(phi(given, *args)))
        if mode.random:
            raise random_map(phi, args)
        if not all(_same(a, b) for a, b in zip(optree.tree_leaves(given), leaves, strict=True)):
            raise ImpureMapError("the map changes the state that it is given, in place; return a new tensor")
    if not all(_same(a, b) for a, b in zip(*results, strict=True)):
        names = (
            ", ".join(dict.fromkeys(type(module).__name__ for _, module in Places.of(phi, args, deep=False).named)) or "none seen"
        )
        raise ImpureMapError(
            f"two calls of the map on one input gave different results: it keeps a state of its own (modules: {names}); pass "
            f"what changes through args="
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; NaN counts as equal to NaN."""
    return torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)) and torch.equal(a.isnan(), b.isnan())
