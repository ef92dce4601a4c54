"""The cell of the multiscale deep equilibrium model: images at several sizes that find their equilibrium together.

y_i = norm3(relu(z_i + norm2(x_i + dropout(conv2(norm1(relu(conv1(z_i))))))))        on each scale, x_0 = x, other x_i = 0
f_i = norm(conv(relu(sum_j resize_ij(y_j))))                                         j -> i: strided convolutions down, a
                                                                                     1 x 1 convolution and repetition up
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.nn.contractive import normalise
from hyperopt.nn.resnet_cell import check_groups, check_images, dropout_of
from hyperopt.nn.state import zero_state


class MDEQCell(nn.Module):
    """A map of one image per scale, each half as high and wide as the one before; its rows are independent.

    Args:
        channels: channels of each scale; x has those of the first.
        expansion: channels inside a residual block, as a multiple of the scale's.
        groups: groups of the group norms; divides all channels, and is even (the last norm of a scale has half as many).
        dropout: fraction of the residual branch that is set to zero, the same for a whole solve; in [0, 1).
        norm: normalisation of the weights of residual blocks and last convolutions: None, ``"weight"`` or ``"spectral"``.
        init_scale: standard deviation of the normal initial weights of the convolutions.

    Raises:
        ValueError: a number is out of range.

    Reference: Bai, Koltun & Kolter, NeurIPS 2020, arXiv 2006.08656, section 3.2 and figure 2.

    Example:
        >>> import torch, hyperopt
        >>> cell, x = hyperopt.nn.MDEQCell(channels=(8, 8), groups=4), torch.ones(1, 8, 4, 4)
        >>> [tuple(z.shape) for z in cell.initial(x)]
        [(1, 8, 4, 4), (1, 8, 2, 2)]
    """

    def __init__(
        self,
        channels: Sequence[int] = (24, 24),
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.25,
        norm: str | None = "weight",
        init_scale: float = 0.01,
    ) -> None:
        """Check the numbers and draw the weights."""
        super().__init__()
        if not channels:
            raise ValueError("MDEQCell: channels is empty; give one number for each scale")
        check_groups("MDEQCell", groups, **{f"channels[{i}]": n for i, n in enumerate(channels)})
        if groups % 2 or expansion < 1:
            raise ValueError(f"MDEQCell: groups={groups} must be even and expansion={expansion} at least 1; change them")
        self.channels = tuple(channels)
        self.blocks = nn.ModuleList(_Block(n, expansion * n, groups, dropout) for n in self.channels)
        self.resize = nn.ModuleList(nn.ModuleList(self._resize(j, i, groups) for j in self._scales) for i in self._scales)
        self.last = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(n, n, 1, bias=False), nn.GroupNorm(groups // 2, n, affine=False))
            for n in self.channels
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=init_scale)
        for part in (*self.blocks, *self.last):
            normalise(part, norm)

    @property
    def _scales(self) -> range:
        return range(len(self.channels))

    def _resize(self, j: int, i: int, groups: int) -> nn.Module:
        """Return the module that maps scale j to scale i."""
        a, b = self.channels[j], self.channels[i]
        if i == j:
            return nn.Identity()
        if i < j:
            up = nn.Upsample(scale_factor=2 ** (j - i), mode="nearest")
            return nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.GroupNorm(groups, b), up)
        steps: list[nn.Module] = []
        for k in range(i - j):
            out = b if k == i - j - 1 else a
            steps += [nn.Conv2d(a, out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(groups, out), nn.ReLU()]
        return nn.Sequential(*steps[:-1])

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return zeros at every scale. shapes: (rows, channels[i], height / 2^i, width / 2^i).

        Raises:
            ValueError: x has other channels, or its size cannot be halved so often.
        """
        check_images("MDEQCell", x, self.channels[0])
        rows, _, height, width = x.shape
        least = 2 ** (len(self.channels) - 1)
        if height % least or width % least:
            raise ValueError(
                f"MDEQCell: images of {height} x {width} cannot be halved {len(self.channels) - 1} times; change the number of "
                f"channels, one for each scale, or the images' size to a multiple of {least}"
            )
        return tuple(zero_state(x, rows, n, height >> i, width >> i) for i, n in enumerate(self.channels))

    def forward(self, z: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Return f(z, x)."""
        inside = [block(at, x if i == 0 else None) for i, (block, at) in enumerate(zip(self.blocks, z, strict=True))]
        fused = []
        for resize, last in zip(self.resize, self.last, strict=True):
            parts = [step(y) for step, y in zip(resize, inside, strict=True)]  # pyright: ignore[reportArgumentType]
            fused.append(last(functools.reduce(torch.add, parts)))
        return tuple(fused)


class _Block(nn.Module):
    """The residual block of one scale."""

    def __init__(self, channels: int, inner: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, n) for n in (inner, channels, channels))
        self.dropout = dropout_of("MDEQCell", dropout)

    def forward(self, z: Tensor, x: Tensor | None) -> Tensor:
        """Return the block's output, with x added inside."""
        y = self.dropout(self.conv2(functional.relu(self.norm1(self.conv1(z)))))
        return self.norm3(functional.relu(z + self.norm2(y if x is None else y + x)))
