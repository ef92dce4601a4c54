"""Checks of losses, batches and initial weights, with their error messages."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import optree
import torch
from torch import Tensor


def refuse_other_arguments(loss: Any, name: str, arguments: str = "w, lam, batch") -> None:
    """Refuse a loss that cannot be called with three arguments.

    Raises:
        TypeError: the message names the loss.
    """
    if not callable(loss):
        raise TypeError(f"{name} is a {type(loss).__name__}; it must be a function {name}({arguments})")
    if isinstance(loss, FunctionType) and loss.__code__.co_argcount == 3 and not loss.__code__.co_kwonlyargcount:
        return  # the usual case, without the slower inspect.signature
    try:
        inspect.signature(loss).bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"{name} is called {name}({arguments}), but takes other arguments: {error}") from None
    except ValueError:  # the signature is unknown, as for some built-in functions
        return


def refuse_shared(w: Any, lam: Any) -> None:
    """Refuse weights that share an entry in memory with a hyperparameter, which training would overwrite.

    Raises:
        ValueError: the message names the hyperparameter.
    """
    weights = [(part, at) for part in optree.tree_leaves(w) if (at := memory_of(part)) is not None]
    for name, leaf in named(lam, "lam"):
        at = memory_of(leaf)
        if at is not None and any(
            at[0] == where and at[1] < end and begin < at[2] and share_entries(leaf, part)
            for part, (where, begin, end) in weights
        ):
            raise ValueError(f"{name} shares memory with w, which training changes in place; give a clone of it")


def memory_of(x: Any) -> tuple[str, int, int] | None:
    """Return the device and the first and last address of a tensor's entries, or None if it has none in memory."""
    if not (isinstance(x, Tensor) and x.numel() and x.layout == torch.strided):
        return None
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return str(x.device), x.data_ptr(), x.data_ptr() + x.element_size() * reach


def share_entries(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors whose addresses overlap have an entry in common; columns of a matrix, for example, have none."""
    if (one.is_contiguous() and two.is_contiguous()) or one.dtype != two.dtype:
        return True

    def addresses(x: Tensor) -> Tensor:
        index = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(x.shape, x.stride(), strict=True):
            index = index[..., None] + torch.arange(size) * stride
        return x.data_ptr() + x.element_size() * index.flatten()

    return bool(torch.isin(addresses(one), addresses(two)).any())


def named(tree: Any, what: str) -> list[tuple[str, Any]]:
    """Return the leaves of a tree called ``what``, each with its name for messages, such as ``w['bias']``."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    return [(what + "".join(f"[{key!r}]" for key in path), leaf) for path, leaf in zip(paths, leaves, strict=True)]


def refuse_unlike(found: Any, w: Any, what: str) -> None:
    """Refuse a tree, called ``what``, that differs from ``w`` in structure, shapes, dtypes or devices.

    Raises:
        TypeError, ValueError: the message names the structures, or the leaf and the difference.
    """
    structure, wanted = optree.tree_structure(found), optree.tree_structure(w)
    if structure != wanted:
        raise ValueError(f"{what} has the structure {structure}, but w has {wanted}; make them the same")
    for (name, leaf), like in zip(named(found, what), optree.tree_leaves(w), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} is a {type(leaf).__name__}; it must be a tensor, as in w")
        for of in ("shape", "dtype", "device"):
            one, two = getattr(leaf, of), getattr(like, of)
            if one != two:
                one, two = (tuple(x) if of == "shape" else x for x in (one, two))
                raise ValueError(f"{name} has {of} {one}, but in w it has {two}; make them the same")


def rows_of(batch: Any) -> int | None:
    """Return the number of rows of a batch, which is the first dimension of its leaves, or None without one."""
    return next((leaf.shape[0] for leaf in optree.tree_leaves(batch) if len(getattr(leaf, "shape", ()))), None)


def refuse_no_scalar(loss: Any, name: str, batch: Any) -> None:
    """Refuse a loss that is not one number, or whose batch has no rows.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is complex or does not have exactly one number, or the batch has no rows.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} returned a {type(loss).__name__}; it must return a tensor with one number")
    if loss.is_complex():
        raise ValueError(f"{name} returned a complex number; it must be a real one: take its .real, or its .abs()")
    if loss.numel() != 1:
        raise ValueError(f"{name} returned a tensor of shape {tuple(loss.shape)}; it must be a scalar: take its mean or its sum")
    refuse_no_rows(name, batch)


def refuse_no_rows(name: str, batch: Any) -> None:
    """Refuse a batch without rows, of the loss called ``name``.

    Raises:
        ValueError: the message gives the shape.
    """
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() and not leaf.shape[0]:
            kind = "validation" if name in ("outer_loss", "val_loss", "valid_loss") else "training"
            raise ValueError(f"{name}: the batch has no rows (shape {tuple(leaf.shape)}); is the {kind} set empty?")
