"""Rates of the inner solvers: numbers or hyperparameters, one for all weights or one for each weight (Meta-SGD).

Reference: Li, Zhou, Chen & Li, arXiv 1707.09835: Meta-SGD, a learning rate for each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.core.checks import check_number


def check_rate(owner: object, name: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Like ``check_number``, for a field that may be the name of a hyperparameter instead."""
    value = getattr(owner, name)
    if isinstance(value, str) and value and "${" not in value:
        return
    check_number(owner, name, low, high, open_low=open_low)


def named_rate(value: float | str, lam: Any, key: str) -> Any:
    """Return a rate of an inner solver: the number itself, or the hyperparameter with that name.

    Raises:
        ValueError: ``lam`` has no entry with that name.
    """
    if not isinstance(value, str):
        return value
    if not isinstance(lam, dict) or value not in lam:
        has = f"has the names {', '.join(map(str, lam))}" if isinstance(lam, dict) else f"is a {type(lam).__name__}"
        raise ValueError(f"{key}={value!r} names a hyperparameter, but lam {has}; change {key} to a number or such a name")
    return lam[value]


def rates(value: float | str, lam: Any, key: str, w: Sequence[Tensor]) -> list[Any]:
    """Return the rate of each tensor of ``w``: a number, or a tensor that broadcasts to it."""
    leaves = [
        x.reshape(()) if isinstance(x, Tensor) and x.numel() == 1 else x for x in optree.tree_leaves(named_rate(value, lam, key))
    ]
    if len(leaves) == 1:
        leaves = leaves * len(w)
    return [r.to(x.dtype) if isinstance(r, Tensor) else r for r, x in zip(leaves, w, strict=True)]


def plain_rates(value: float | str, lam: Any, key: str, w: Sequence[Tensor]) -> list[Any]:
    """Return ``rates`` for a step in place: single numbers as floats, so that no copy of a weight is made."""
    found = rates(value, lam, key, w)
    numbers = {id(r): r.item() for r in found if isinstance(r, Tensor) and not r.dim()}
    return [numbers.get(id(r), r) for r in found]


def move(x: Tensor, direction: Tensor, rate: Any) -> None:
    """Make the step ``x <- x - rate direction`` in place."""
    if isinstance(rate, Tensor):
        x.sub_(rate * direction)
    else:
        x.sub_(direction, alpha=rate)


def refuse_unfit(value: float | str, lam: Any, key: str, w: Any) -> None:
    """Refuse rates that are neither one number nor in the structure of ``w``, each of a shape that broadcasts to its weight's.

    Raises:
        ValueError: ``lam`` has no entry with that name, or its structure or a shape does not fit.
    """
    found = named_rate(value, lam, key)
    structure, wanted = optree.tree_structure(found), optree.tree_structure(w)
    leaves, weights = optree.tree_leaves(found), optree.tree_leaves(w)
    if structure != wanted and not optree.tree_is_leaf(found):
        raise ValueError(
            f"{key}={value!r}: lam[{value!r}] has the structure {structure}, but w has {wanted}; give one rate, or a tree like w"
        )
    for r, x in zip(leaves if len(leaves) == len(weights) else leaves * len(weights), weights, strict=True):
        if isinstance(r, Tensor) and r.numel() != 1 and not _fits(r.shape, x.shape):
            raise ValueError(
                f"{key}={value!r}: a rate of shape {tuple(r.shape)} does not broadcast to a weight of shape {tuple(x.shape)}; "
                "give one number, or a tree like w of numbers or of tensors in the shapes of the weights"
            )


def smallest(value: float | str, lam: Any, key: str) -> float:
    """Return the smallest rate; if training contracts with all of the rates, it contracts with this one for all weights."""
    return min(_numbers(value, lam, key, torch.amin))


def rate_text(value: float | str, lam: Any, key: str) -> str:
    """Return the range of the rates, for messages."""
    low = smallest(value, lam, key)
    high = max(_numbers(value, lam, key, torch.amax))
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _numbers(value: float | str, lam: Any, key: str, of: Callable[[Tensor], Tensor]) -> list[float]:
    """Return ``of`` each of the rates' tensors, as numbers."""
    leaves = optree.tree_leaves(named_rate(value, lam, key))
    return [of(r.detach()).item() if isinstance(r, Tensor) else float(r) for r in leaves]


def _fits(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another one."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
