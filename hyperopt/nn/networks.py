"""Networks for images of a fixed size, from pixels to logits, with an implicit layer called ``deq``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hyperopt.nn.deq import DEQ
from hyperopt.nn.mdeq import MDEQCell
from hyperopt.nn.mdeq_head import MDEQHead
from hyperopt.nn.resnet_cell import ResNetCell
from hyperopt.nn.tanh_layer import TanhFixedPoint


class ImageNetwork(nn.Sequential):
    """A sequence of layers, one of which is called ``deq``; images of another shape are refused.

    Args:
        layers: the modules by name.
        image: channels, height and width (None: whatever the first layer takes).
    """

    def __init__(self, layers: dict[str, nn.Module], image: Sequence[int] | None = None) -> None:
        """Make a sequence of the layers."""
        super().__init__(OrderedDict(layers))
        self.image = None if image is None else tuple(image)

    def head(self, z: Any) -> Tensor:
        """Return the logits for a state of the implicit layer."""
        names = list(self._modules)
        for name in names[names.index("deq") + 1 :]:
            z = self._modules[name](z)  # pyright: ignore[reportOptionalCall]
        return z

    def forward(self, input: Tensor, z0: Any = None, v0: Any = None) -> Tensor:
        """Return the logits. shapes: (rows, channels, height, width) to (rows, classes).

        Args:
            input: images.
            z0: where the implicit layer's solve starts, see ``DEQ``.
            v0: where its adjoint solve starts.

        Raises:
            ValueError: the images have another shape.
        """
        if self.image is not None and tuple(input.shape[1:]) != self.image:
            raise ValueError(
                f"the images have shape {tuple(input.shape)}, but the network takes (rows, channels, height, width) = (rows, "
                f"{', '.join(map(str, self.image))}); change dataset or image"
            )
        y: Any = input
        for name, module in self.named_children():
            y = module(y, z0, v0) if name == "deq" else module(y)
        return y


def tanh_network(width: int = 100, image: Sequence[int] = (1, 28, 28), classes: int = 10, **layer: Any) -> ImageNetwork:
    """Return ``Flatten, Linear, TanhFixedPoint, Linear``, the tutorial's network for MNIST.

    Args:
        width: number of entries of the state.
        image: channels, height and width of the images.
        classes: number of classes.
        layer: keywords of ``TanhFixedPoint``: solver, adjoint, policy, ...

    Returns:
        ``torch.nn.Sequential``: from images, shape (rows, channels, height, width), to logits, shape (rows, classes).

    Raises:
        TypeError, ValueError: a keyword of the layer is of another kind.

    Reference: Kolter, Duvenaud & Johnson, Deep Implicit Layers, NeurIPS 2020 tutorial, chapter 1.

    Example:
        >>> import torch, hyperopt
        >>> network = hyperopt.nn.tanh_network(width=10, image=(1, 8, 8))
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    pixels = image[0] * image[1] * image[2]
    layers = {
        "flatten": nn.Flatten(),
        "inject": nn.Linear(pixels, width),
        "deq": TanhFixedPoint(width, **layer),
        "classifier": nn.Linear(width, classes),
    }
    return ImageNetwork(layers, image)


def resnet_network(
    cell: ResNetCell | None = None, image: Sequence[int] = (3, 32, 32), classes: int = 10, pool: int = 8, **layer: Any
) -> ImageNetwork:
    """Return ``Conv, BatchNorm, DEQ, BatchNorm, AvgPool, Flatten, Linear``, the tutorial's network for CIFAR-10.

    Args:
        cell: the cell (None: ``ResNetCell()``, which gives 64,842 parameters for CIFAR-10).
        image: channels, height and width of the images.
        classes: number of classes.
        pool: side, in pixels, of the squares that are averaged; divides height and width.
        layer: keywords of ``DEQ``: solver, adjoint, policy, ...

    Returns:
        ``torch.nn.Sequential``: from images, shape (rows, channels, height, width), to logits, shape (rows, classes).

    Raises:
        ValueError: ``pool`` does not divide height and width.

    Reference: Kolter, Duvenaud & Johnson, Deep Implicit Layers, NeurIPS 2020 tutorial, chapter 4.

    Example:
        >>> import torch, hyperopt
        >>> cell = hyperopt.nn.ResNetCell(channels=8, inner=8, groups=4)
        >>> network = hyperopt.nn.resnet_network(cell, image=(3, 8, 8), solver=hyperopt.Anderson(rtol=1e-2))
        >>> network(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    cell = ResNetCell() if cell is None else cell
    channels, height, width = image
    if height % pool or width % pool:
        raise ValueError(f"resnet_network: pool={pool} does not divide images of {height} x {width}; change pool")
    layers = {
        "inject": nn.Conv2d(channels, cell.channels, 3, padding=1),
        "norm_in": nn.BatchNorm2d(cell.channels),
        "deq": DEQ(cell, **layer),
        "norm_out": nn.BatchNorm2d(cell.channels),
        "pool": nn.AvgPool2d(pool),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(cell.channels * (height // pool) * (width // pool), classes),
    }
    return ImageNetwork(layers, image)


def mdeq_network(
    cell: MDEQCell | None = None,
    image: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    head: Sequence[int] = (8, 16),
    final: int = 200,
    **layer: Any,
) -> ImageNetwork:
    """Return two convolutions, a multiscale DEQ, and a head: by default the small model for CIFAR-10 of arXiv 2006.08656.

    Args:
        cell: the cell (None: ``MDEQCell()``, two scales of 24 channels, which gives 158,890 parameters for CIFAR-10).
        image: channels, height and width of the images.
        classes: number of classes.
        head: channels inside the head's block of each scale.
        final: number of features of the last linear layer.
        layer: keywords of ``DEQ``: solver, adjoint, policy, ...

    Returns:
        ``torch.nn.Sequential``: from images, shape (rows, channels, height, width), to logits, shape (rows, classes).

    Raises:
        ValueError: a number does not fit the cell or the image.

    Reference: Bai, Koltun & Kolter, NeurIPS 2020, arXiv 2006.08656.

    Example:
        >>> import torch, hyperopt
        >>> cell = hyperopt.nn.MDEQCell(channels=(8, 8), groups=4, dropout=0.0)
        >>> network = hyperopt.nn.mdeq_network(cell, image=(3, 8, 8), solver=hyperopt.Picard(rtol=0, max_steps=2))
        >>> network(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    cell = MDEQCell() if cell is None else cell
    first = cell.channels[0]
    inject = nn.Sequential(
        nn.Conv2d(image[0], first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
    )
    classifier = MDEQHead(cell.channels, head, final, classes)
    return ImageNetwork({"inject": inject, "deq": DEQ(cell, **layer), "classifier": classifier}, image)
