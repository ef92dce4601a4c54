"""The batches of ``is_grads_batched`` and of ``torch.autograd.functional`` with ``vectorize=True``.

They are not those of ``torch.func.vmap``: torch runs the backward pass on tensors of an older kind, which know no branch on a
number and no custom rule. A solve takes their members one by one, which costs what a loop of backward passes would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]


def batched(tensor: Tensor) -> bool:
    """Whether the tensor is a batch of that kind."""
    return functorch.is_legacy_batchedtensor(tensor)


def each(function: Callable[..., Any], *batches: Any) -> Any:
    """``function`` of each member of ``batches``, tensors or None, and the results, tensors or None, as batches again."""
    torch._C._vmapmode_increment_nesting()  # the running level is told by no function of its own
    level = torch._C._vmapmode_decrement_nesting()
    remove, add = torch._C._VariableFunctions._remove_batch_dim, torch._C._VariableFunctions._add_batch_dim  # pyright: ignore
    size = next(remove(x, level, 1, 0).shape[0] for x in batches if x is not None and batched(x))
    members = [None if x is None else remove(x, level, size, 0) for x in batches]
    found = [function(*(None if x is None else x[i] for x in members)) for i in range(size)]
    if isinstance(found[0], Tensor):
        return add(torch.stack(found), 0, level)
    return tuple(None if one[0] is None else add(torch.stack(one), 0, level) for one in zip(*found, strict=True))
