"""The residual cell of the implicit-layers tutorial, for images.

f(z, x) = norm3(relu(z + norm2(x + conv2(norm1(relu(conv1(z)))))))
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hyperopt.nn.contractive import normalise
from hyperopt.nn.state import zero_state


class ResNetCell(nn.Module):
    """Two convolutions without bias, three group norms, and x injected between them; its rows are independent.

    Args:
        channels: channels of the state and of x.
        inner: channels between the two convolutions.
        groups: groups of every GroupNorm; divides both numbers of channels.
        kernel_size: size of both convolutions, odd.
        dropout: fraction of the inner activations that is set to zero, the same for a whole solve; in [0, 1).
        norm: normalisation of the convolutions' weights: None, ``"weight"`` or ``"spectral"``.
        init_scale: standard deviation of the normal initial weights of the convolutions.

    Raises:
        ValueError: a number is out of range, or ``groups`` does not divide both numbers of channels.

    Reference: Kolter, Duvenaud & Johnson, Deep Implicit Layers, NeurIPS 2020 tutorial, chapter 4.

    Example:
        >>> import torch, hyperopt
        >>> cell = hyperopt.nn.ResNetCell(channels=8, inner=8, groups=4)
        >>> cell(torch.zeros(2, 8, 6, 6), torch.ones(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        channels: int = 48,
        inner: int = 64,
        groups: int = 8,
        kernel_size: int = 3,
        dropout: float = 0.0,
        norm: str | None = None,
        init_scale: float = 0.01,
    ) -> None:
        """Check the numbers and draw the weights."""
        super().__init__()
        check_groups("ResNetCell", groups, channels=channels, inner=inner)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ResNetCell: kernel_size={kernel_size} must be odd, to keep the size; change kernel_size")
        self.channels = channels
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(channels, inner, kernel_size, padding=padding, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, kernel_size, padding=padding, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, n) for n in (inner, channels, channels))
        self.dropout = dropout_of("ResNetCell", dropout)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=init_scale)
        normalise(self, norm)

    def initial(self, x: Tensor) -> Tensor:
        """Return zeros.

        Raises:
            ValueError: x has another number of channels.
        """
        check_images("ResNetCell", x, self.channels)
        return zero_state(x)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x). shapes: (rows, channels, height, width)."""
        y = self.dropout(self.norm1(functional.relu(self.conv1(z))))
        return self.norm3(functional.relu(z + self.norm2(x + self.conv2(y))))


def check_groups(owner: str, groups: int, **channels: int) -> None:
    """Refuse channel counts below 1, and those that ``groups`` does not divide."""
    for name, count in {"groups": groups, **channels}.items():
        if count < 1:
            raise ValueError(f"{owner}: {name}={count} must be at least 1; change {name}")
        if count % groups:
            raise ValueError(f"{owner}: {name}={count} is not divisible by groups={groups}; change {name} or groups")


def check_images(owner: str, x: Tensor, channels: int) -> None:
    """Refuse an x that is not a batch of images with this number of channels."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{owner}: x has shape {tuple(x.shape)}, but the cell takes (rows, channels={channels}, height, width); change "
            f"channels or the layer before"
        )


def dropout_of(owner: str, p: float) -> nn.Module:
    """Return a dropout layer, or the identity for ``p=0``; refuse a p outside of [0, 1)."""
    if not 0 <= p < 1:
        raise ValueError(f"{owner}: dropout={p} is not in [0, 1); change dropout")
    return nn.Dropout(p) if p else nn.Identity()
