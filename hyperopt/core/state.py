"""Checks of what ``load_state_dict`` is given, made before anything is changed: a state fits as a whole or is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def check_entries(given: Any, expected: Collection[str], what: str, optional: Collection[str] = ()) -> None:
    """Refuse a state that has not exactly the ``expected`` entries (those of ``optional`` may be missing).

    Args:
        given: the state.
        expected: names of the entries.
        what: whose state it is, for the message.
        optional: names of entries that may be there.

    Raises:
        TypeError: it is no mapping.
        ValueError: names the entries that are missing, or that are not known.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"the state of {what} is a {type(given).__name__}; give what its state_dict() returned")
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected and name not in optional]
    if missing or unknown:
        found = [f"has no entry {_names(missing)}"] * bool(missing) + [f"has the unknown entry {_names(unknown)}"] * bool(unknown)
        raise ValueError(
            f"the state for {what} {' and '.join(found)}; {what} has the entries {_names(expected)}. Give the state of the same "
            "problem"
        )


def check_tensors(given: Mapping[str, Any], own: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that cannot take the places of ``own`` as they are; entries that only one of the two has are left alone.

    A dtype that cannot hold the saved numbers exactly is refused too: float64 numbers would lose digits in a float32 tensor
    without a word.

    Args:
        given: the saved tensors by name.
        own: the tensors that would take them.
        what: whose state it is, for the message.

    Raises:
        TypeError: an entry is no tensor.
        ValueError: names the entry and both shapes, or both dtypes.
    """
    for name, mine in own.items():
        if name not in given:
            continue
        kept = given[name]
        if not isinstance(kept, Tensor):
            raise TypeError(f"the state for {what}: the entry {name} is a {type(kept).__name__}; it must be a tensor")
        if kept.shape != mine.shape:
            raise ValueError(
                f"the state for {what}: the entry {name} has shape {tuple(kept.shape)}, but here it has shape "
                f"{tuple(mine.shape)}; nothing was loaded. Give the state of a problem of the same sizes"
            )
        same_kind = (kept.is_floating_point(), kept.is_complex()) == (mine.is_floating_point(), mine.is_complex())
        if not same_kind or torch.promote_types(kept.dtype, mine.dtype) != mine.dtype:
            raise ValueError(
                f"the state for {what}: the entry {name} has dtype {kept.dtype}, which {mine.dtype} cannot hold exactly; nothing "
                f"was loaded. Convert {what} to {kept.dtype}, or the saved tensor to {mine.dtype}"
            )


def _names(names: Collection[str]) -> str:
    """At most eight names, in quotes."""
    shown = [repr(str(name)) for name in list(names)[:8]]
    return (", ".join(shown) or "none") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
