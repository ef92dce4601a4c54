"""Settings of networks with an implicit layer, as a config names them: each builds its network for the shape of the images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.checks import check_choice, check_count, check_counts, check_number, check_optional
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.nn.contractive import NORMS
from hyperopt.nn.mdeq import MDEQCell
from hyperopt.nn.networks import mdeq_network, resnet_network, tanh_network
from hyperopt.nn.resnet_cell import ResNetCell


@dataclass(frozen=True)
class Methods:
    """How the implicit layers of a network are solved and differentiated; see ``hyperopt.fixed_point``."""

    solver: FixedPointSolver | None = None
    adjoint: Adjoint | None = None
    policy: str = "warn"
    fallback: Sequence[FixedPointSolver] = ()

    def keywords(self) -> dict[str, Any]:
        """Return them as keywords of ``DEQ``."""
        return dict(vars(self))


class NetworkFactory(ABC):
    """The base class of ``task.network._target_``; for a network of your own, derive a frozen dataclass from it."""

    @abstractmethod
    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Return a network from images to logits, with initial values from torch's global generator.

        Args:
            shape: shape of one image, channels first.
            classes: number of logits.
            methods: methods for its implicit layers, each a ``hyperopt.nn.DEQ``.

        Raises:
            ValueError: the network does not take images of this shape.
        """


@dataclass(frozen=True)
class TanhMLP(NetworkFactory):
    """``Flatten, Linear, z = tanh(W z + x), Linear``; see ``hyperopt.nn.networks.tanh_network``.

    Attributes:
        width: number of entries of z.
        init_scale: standard deviation of the normal initial entries of W (None: uniform, as in ``torch.nn.Linear``).
    """

    width: int = 100
    init_scale: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count(self, "width")
        check_optional(self, "init_scale", 0.0)

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build the network."""
        return tanh_network(self.width, shape, classes, init_scale=self.init_scale, **methods.keywords())


@dataclass(frozen=True)
class DEQResNet(NetworkFactory):
    """A convolution, a DEQ with the residual cell, and a linear classifier; see ``hyperopt.nn.networks.resnet_network``.

    Attributes:
        channels: channels of the state.
        inner: channels between the cell's two convolutions.
        groups: groups of every GroupNorm; divides both numbers of channels.
        kernel_size: size of the cell's convolutions, odd.
        dropout: fraction of the cell's inner activations that is set to zero, the same for a whole solve.
        norm: normalisation of the weights of the cell's convolutions: None, ``weight`` or ``spectral``.
        init_scale: standard deviation of their normal initial entries.
        pool: side, in pixels, of the squares that are averaged before the classifier; divides the size of the images.
    """

    channels: int = 48
    inner: int = 64
    groups: int = 8
    kernel_size: int = 3
    dropout: float = 0.0
    norm: str | None = None
    init_scale: float = 0.01
    pool: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("channels", "inner", "groups", "kernel_size", "pool"):
            check_count(self, name)
        check_number(self, "dropout", 0.0, 1.0)
        check_choice(self, "norm", NORMS)
        check_number(self, "init_scale", 0.0)

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build the network.

        Raises:
            ValueError: ``pool`` does not divide the size of the images.
        """
        cell = ResNetCell(self.channels, self.inner, self.groups, self.kernel_size, self.dropout, self.norm, self.init_scale)
        return resnet_network(cell, shape, classes, self.pool, **methods.keywords())


@dataclass(frozen=True)
class MDEQ(NetworkFactory):
    """A multiscale DEQ between two convolutions and a head (arXiv 2006.08656); see ``hyperopt.nn.networks.mdeq_network``.

    Attributes:
        channels: channels of each scale, the finest first; each scale is half as high and wide as the one before.
        expansion: channels inside a residual block, as a multiple of the scale's.
        groups: groups of the group norms; even, and divides all channels.
        dropout: fraction of the residual branches that is set to zero, the same for a whole solve.
        norm: normalisation of the weights of the cell: None, ``weight`` or ``spectral``.
        init_scale: standard deviation of the normal initial weights of the cell's convolutions.
        head: channels inside the head's block of each scale.
        final: number of features of the last linear layer.
    """

    channels: tuple[int, ...] = (24, 24)
    expansion: int = 5
    groups: int = 8
    dropout: float = 0.25
    norm: str | None = "weight"
    init_scale: float = 0.01
    head: tuple[int, ...] = (8, 16)
    final: int = 200

    def __post_init__(self) -> None:
        """Check the ranges; a list becomes a tuple."""
        for name in ("channels", "head"):
            check_counts(self, name)
        for name in ("expansion", "groups", "final"):
            check_count(self, name)
        check_number(self, "dropout", 0.0, 1.0)
        check_choice(self, "norm", NORMS)
        check_number(self, "init_scale", 0.0)

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build the network."""
        cell = MDEQCell(self.channels, self.expansion, self.groups, self.dropout, self.norm, self.init_scale)
        return mdeq_network(cell, shape, classes, self.head, self.final, **methods.keywords())
