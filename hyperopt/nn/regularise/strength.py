"""Checks of the strength of a regulariser, which has one value for each example."""

from __future__ import annotations

import torch
from torch import Tensor


def column(strength: Tensor | float, x: Tensor, low: float, high: float, what: str) -> Tensor:
    """Return strengths in a shape that multiplies a batch, with NaN in place of those outside of ``[low, high]``.

    Args:
        strength: one number for all examples, or one for each. shape: (n,).
        x: the batch. shape: (n, ...), floating.
        low: least strength.
        high: largest strength.
        what: its name in messages.

    Returns:
        Strengths in the dtype of ``x``. shape: (n, 1, ..., 1), or (1, ..., 1).

    Raises:
        ValueError: a tensor of another shape, or a number outside of the range.
        TypeError: the batch is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"{what}: a batch of {x.dtype}; convert it to a floating dtype first")
    if not isinstance(strength, Tensor):
        if not low <= strength <= high:
            raise ValueError(f"{what}={strength!r} is not in [{low:g}, {high:g}]; change {what}")
        strength = torch.full((1,), float(strength), dtype=x.dtype, device=x.device)
    elif strength.dim() == 0:
        strength = strength[None]
    elif strength.shape != x.shape[:1]:
        raise ValueError(f"{what} of shape {tuple(strength.shape)} for a batch of {tuple(x.shape)}, expected ({len(x)},)")
    strength = strength.to(x.dtype)
    inside = (strength >= low) & (strength <= high)
    return torch.where(inside, strength, torch.nan).view(-1, *[1] * (x.dim() - 1))


def images_only(x: Tensor, what: str, channels: int | None = None) -> None:
    """Refuse a batch that does not consist of images, or has another number of channels."""
    if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
        raise ValueError(f"{what}: a batch of shape {tuple(x.shape)}, expected (n, {channels or 'channels'}, height, width)")
