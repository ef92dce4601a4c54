"""Checks of what ``load_state_dict`` is given. They run before anything changes: a state is loaded as a whole or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def check_entries(given: Any, expected: Collection[str], what: str, optional: Collection[str] = ()) -> None:
    """Refuse a state whose entries are not exactly ``expected``, plus any of ``optional``.

    Args:
        given: the state.
        expected: names of the entries.
        what: whose state it is, for the message.
        optional: names of entries that may be present or missing.

    Raises:
        TypeError: ``given`` is not a mapping.
        ValueError: entries are missing or unknown; the message names them.
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
    """Refuse saved tensors that cannot replace those of ``own``. Entries that only one of the two mappings has are ignored.

    A dtype that cannot hold the saved numbers exactly is refused too: a float32 tensor would silently lose digits of float64.

    Args:
        given: the saved tensors by name.
        own: the tensors to be replaced, by name.
        what: whose state it is, for the message.

    Raises:
        TypeError: an entry is not a tensor.
        ValueError: a shape or dtype does not fit; the message names the entry and both values.
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
    """Return at most eight names, in quotes."""
    shown = [repr(str(name)) for name in list(names)[:8]]
    return (", ".join(shown) or "none") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
