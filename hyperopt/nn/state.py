"""Initial states."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_state(x: Tensor, *shape: int) -> Tensor:
    """Return zeros of ``shape`` (none: that of x) on x's device and in its dtype, under autocast in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return torch.zeros(shape or x.shape, dtype=dtype, device=x.device)
