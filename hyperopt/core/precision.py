"""The precision in which a map's products are computed, which may be lower than that of its state."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt.core.captured import nodes


def product_eps(dtype: torch.dtype, device: torch.device | None) -> float:
    """Return the eps to which the factors of a matrix product are rounded: that of autocast's dtype, TF32 or ``dtype`` itself.

    Neither lowers float64. ``torch.set_float32_matmul_precision("medium")`` allows bfloat16.
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
    """Return the eps of a floating-point dtype of fewer than 32 bits, and 0 for any other dtype.

    A state of float32 and float64 tensors does not count: its float32 entries can converge exactly.
    """
    return torch.finfo(dtype).eps if dtype.is_floating_point and dtype.itemsize < 4 else 0.0


def graph_eps(graph: Tensor, *ends: Tensor) -> float:
    """Return the largest ``half_eps`` of the tensors in the graph of a tensor.

    Under autocast the graph of a product holds tensors in the lower dtype, whatever the dtype of its inputs and outputs.

    Args:
        graph: a tensor with a graph.
        ends: tensors at which the search stops.
    """
    return max((half_eps(each.dtype) for node in nodes([graph], ends) for each in node._input_metadata), default=0.0)
