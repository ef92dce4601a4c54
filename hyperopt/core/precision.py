"""The precision in which the products of a map are worked out, which may be lower than that of its state."""

from __future__ import annotations

import torch
from torch import Tensor


def product_eps(dtype: torch.dtype, device: torch.device | None) -> float:
    """The rounding of the factors of a matrix product: that of autocast's dtype, of TF32, or of ``dtype`` itself.

    float64 is left alone by both. ``torch.set_float32_matmul_precision("medium")`` allows bfloat16.
    """
    eps = torch.finfo(dtype).eps
    if device is None or dtype == torch.float64:
        return eps
    if torch.is_autocast_enabled(device.type):
        return max(eps, half_eps(torch.get_autocast_dtype(device.type)))
    if dtype != torch.float32:
        return eps
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return half_eps(torch.bfloat16)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and precision == "high":
        return 2.0**-10
    return eps


def half_eps(dtype: torch.dtype) -> float:
    """The eps of a floating-point dtype of fewer than 32 bits, 0 of any other.

    A state of float32 and float64 tensors together is no such case: its float32 entries come to rest exactly.
    """
    return torch.finfo(dtype).eps if dtype.is_floating_point and dtype.itemsize < 4 else 0.0


def graph_eps(graph: Tensor, *ends: Tensor) -> float:
    """The largest ``half_eps`` of the tensors that lie between ``graph`` and its leaves: of what it was really made.

    Under autocast a product has a graph of tensors in the lower dtype, whatever the dtype of what goes in and comes out.

    Args:
        graph: a tensor with a graph.
        ends: tensors beyond which it is not followed.
    """
    found, seen, left = 0.0, {x.grad_fn for x in ends}, [graph.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found = max(found, *(half_eps(each.dtype) for each in node._input_metadata), 0.0)  # pyright: ignore[reportAttributeAccessIssue]
        left += [following for following, _ in node.next_functions]
    return found
