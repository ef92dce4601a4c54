"""Support for ``is_grads_batched`` and for ``torch.autograd.functional`` with ``vectorize=True``.

There, torch runs the backward pass on batched tensors of an older kind than those of ``torch.func.vmap``. They support neither
a branch on a number nor the ``vmap`` rule of a custom function. A solve therefore handles their members one by one, which
costs as much as a loop of backward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]


def batched(tensor: Tensor) -> bool:
    """Whether the tensor is such a batch."""
    return functorch.is_legacy_batchedtensor(tensor)


def each(function: Callable[..., Any], *batches: Any) -> Any:
    """Apply ``function`` to each member of ``batches`` and return the results as batches; an entry may be None."""
    torch._C._vmapmode_increment_nesting()  # no function of torch returns the running level by itself
    level = torch._C._vmapmode_decrement_nesting()
    remove, add = torch._C._VariableFunctions._remove_batch_dim, torch._C._VariableFunctions._add_batch_dim  # pyright: ignore
    size = next(remove(x, level, 1, 0).shape[0] for x in batches if x is not None and batched(x))
    members = [None if x is None else remove(x, level, size, 0) for x in batches]
    found = [function(*(None if x is None else x[i] for x in members)) for i in range(size)]
    if isinstance(found[0], Tensor):
        return add(torch.stack(found), 0, level)
    return tuple(None if one[0] is None else add(torch.stack(one), 0, level) for one in zip(*found, strict=True))
