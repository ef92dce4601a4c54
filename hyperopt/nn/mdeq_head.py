"""The classification head of the multiscale deep equilibrium model, from all scales, the largest first, to logits.

    y = widen_0(z_0);  y = widen_i(z_i) + down(y) for i = 1, 2, ...;  logits = linear(mean over pixels of last(y))

Reference: Bai, Koltun & Kolter, NeurIPS 2020, arXiv 2006.08656, section 4.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

WIDENING = 4  # channels after a residual block, as a multiple of those inside


class MDEQHead(nn.Module):
    """Logits from one image per scale.

    Args:
        channels: channels of each scale.
        inner: channels inside the residual block of each scale.
        final: number of features of the last linear layer.
        classes: number of classes.

    Raises:
        ValueError: ``inner`` and ``channels`` have different lengths.
    """

    def __init__(self, channels: Sequence[int], inner: Sequence[int], final: int, classes: int) -> None:
        """Build the blocks."""
        super().__init__()
        if len(inner) != len(channels):
            raise ValueError(
                f"MDEQHead: inner={tuple(inner)} must have one number for each of channels={tuple(channels)}; change inner"
            )
        wide = [WIDENING * n for n in inner]
        self.widen = nn.ModuleList(_Bottleneck(*sizes) for sizes in zip(channels, inner, strict=True))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(wide)
        )
        self.last = nn.Sequential(nn.Conv2d(wide[-1], final, 1), nn.BatchNorm2d(final), nn.ReLU())
        self.classifier = nn.Linear(final, classes)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """Return the logits. shapes: (rows, channels[i], height / 2^i, width / 2^i) to (rows, classes)."""
        y = self.widen[0](z[0])
        for widen, down, at in zip(self.widen[1:], self.down, z[1:], strict=True):  # pyright: ignore[reportArgumentType]
            y = widen(at) + down(y)
        return self.classifier(self.last(y).mean(dim=(2, 3)))


class _Bottleneck(nn.Module):
    """A residual block with one 3 x 3 convolution, from ``channels`` to ``WIDENING * inner``."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        wide = WIDENING * inner
        self.convs = nn.ModuleList(
            (
                nn.Conv2d(channels, inner, 1, bias=False),
                nn.Conv2d(inner, inner, 3, padding=1, bias=False),
                nn.Conv2d(inner, wide, 1, bias=False),
            )
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, affine=False) for n in (inner, inner, wide))
        self.short = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = x
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(functional.relu(y) if k else y))
        return functional.relu(y + self.short(x))
