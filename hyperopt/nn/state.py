"""Helpers for states of a cell: zeros to start from, a check that they fit, and a test whether rows depend on each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hyperopt.core.replay import FrozenMap


def zero_state(x: Tensor, *shape: int) -> Tensor:
    """Return zeros of ``shape`` (none: the shape of x), like x; under autocast their dtype is at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return torch.zeros(shape or x.shape, dtype=dtype, device=x.device)


def alike(one: Any, two: Any) -> bool:
    """Whether two trees have the same structure, and tensors of the same shapes."""
    if optree.tree_structure(one) != optree.tree_structure(two):
        return False
    pairs = zip(optree.tree_leaves(one), optree.tree_leaves(two), strict=True)
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape for a, b in pairs)


def refuse_guess(error: Exception, cell: nn.Module, phi: Callable[..., Any], z0: Any, terms: tuple[Any, ...]) -> None:
    """Raise an error of the class of ``error`` that asks for ``initial``, if a solve from zeros failed as they are no state."""
    try:
        with torch.no_grad():
            fits = alike(FrozenMap(phi, [cell], optree.tree_leaves(z0)[0].device)(z0, *terms), z0)
    except Exception:  # whatever a cell raises for a wrong state
        fits = False
    if not fits and type(error) in (IndexError, RuntimeError, TypeError, ValueError):
        raise type(error)(
            f"{error}. The DEQ started at zeros like its input, of shape {tuple(z0.shape)}; if the cell's state has another size "
            "or structure, give DEQ(..., initial=...), a function of the input that returns the initial state"
        ) from error


def materialise(cell: nn.Module, z0: Any, x: Any, *, guessed: bool) -> Any:
    """Give the lazy modules of a cell their sizes by one call of it, and return the initial state.

    Args:
        cell: the cell; it is called in evaluation mode, in which only parameters are drawn and no statistics change.
        z0: the initial state.
        x: the input.
        guessed: whether ``z0`` is only a guess. If the cell then returns another size, the state is zeros of that size. The
            sizes of lazy modules are final, so both are tried in copies first.

    Raises:
        ValueError: neither the guess nor what the cell returns for it fits.
    """

    def call(cell: nn.Module, z: Any) -> Any:
        modes = {name: module.training for name, module in cell.named_modules()}
        try:
            with torch.no_grad():
                return cell.eval()(z, x)
        finally:
            for name, module in cell.named_modules():
                module.training = modes[name]

    if guessed:
        out = call(copy.deepcopy(cell), z0)
        if not alike(out, z0):
            found = optree.tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, out)
            if not alike(call(copy.deepcopy(cell), found), found):
                raise ValueError(
                    f"DEQ: the cell has lazy modules, and takes no state like its input, of shape {tuple(z0.shape)}; give "
                    "DEQ(..., initial=...), a function of the input that returns the initial state"
                )
            z0 = found
    call(cell, z0)
    return z0


def rows_are_coupled(phi: FrozenMap, z0: Any, terms: tuple[Any, ...]) -> bool:
    """Whether a row of the cell's output depends on another row of the state, near the state ``z0``.

    Any two rows differ in at least one bit of their numbers. For every bit, this takes the gradient of the output's rows with
    the bit in the state's rows without it, and the other way round, which costs two products a bit. The map of the solve is
    evaluated here for the first time, so its random numbers are drawn here.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    with torch.enable_grad():
        state = optree.tree_map(lambda x: (x + 0.1 * drawn(x)).requires_grad_(), z0)
        leaves: list[Tensor] = optree.tree_leaves(state)
        given = optree.tree_map(torch.clone, state)  # a map that changes it in place is refused later, by the solve
        found = optree.tree_leaves(phi(given, *terms))
    outs = [out for out in found if isinstance(out, Tensor) and out.requires_grad]
    ways, rows = [drawn(out) for out in outs], leaves[0].shape[0]
    places = torch.arange(rows, device=leaves[0].device)
    for bit in range((rows - 1).bit_length() if outs else 0):
        for value in (0, 1):
            ones = (places >> bit) % 2 == value
            given = [way * ones.view(-1, *(1,) * (way.dim() - 1)) for way in ways]
            slopes = torch.autograd.grad(outs, leaves, given, retain_graph=True, allow_unused=True)
            others = [slope[~ones] for slope in slopes if slope is not None]
            if any(bool(((slope != 0) & slope.isfinite()).any()) for slope in others):
                return True
    return False
