"""Networks with an implicit layer as a config names them: settings that build one once the shape of the images is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperopt.nn.mdeq import MDEQCell
from hyperopt.nn.networks import mdeq_network, resnet_network, tanh_network
from hyperopt.nn.resnet_cell import ResNetCell
from hyperopt.nn.settings import DEQResNetSettings, MDEQSettings, TanhMLPSettings


@dataclass(frozen=True)
class Methods:
    """How the implicit layers of a network are solved and differentiated; see ``hyperopt.fixed_point``."""

    solver: Any = None
    adjoint: Any = None
    policy: str = "warn"
    fallback: Sequence[Any] = ()

    def keywords(self) -> dict[str, Any]:
        """Return them as ``DEQ`` takes them."""
        return dict(vars(self))


class NetworkFactory(ABC):
    """What ``task.network._target_`` names; for a network of your own, derive from it and from a frozen dataclass of settings."""

    @abstractmethod
    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Return a network from images to logits, its initial values drawn from torch's global generator.

        Args:
            shape: of one image, channels first.
            classes: number of logits.
            methods: for its implicit layers, each a ``hyperopt.nn.DEQ``.

        Raises:
            ValueError: images of this shape do not go into it.
        """


class TanhMLP(TanhMLPSettings, NetworkFactory):
    """``Flatten, Linear, z = tanh(W z + x), Linear``; see ``hyperopt.nn.networks.tanh_network``."""

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build it."""
        return tanh_network(self.width, shape, classes, init_scale=self.init_scale, **methods.keywords())


class DEQResNet(DEQResNetSettings, NetworkFactory):
    """A convolution, a DEQ with the residual cell, and a linear classifier; see ``hyperopt.nn.networks.resnet_network``."""

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build it.

        Raises:
            ValueError: ``pool`` does not divide the size of the images.
        """
        cell = ResNetCell(self.channels, self.inner, self.groups, self.kernel_size, self.dropout, self.norm, self.init_scale)
        return resnet_network(cell, shape, classes, self.pool, **methods.keywords())


class MDEQ(MDEQSettings, NetworkFactory):
    """A multiscale DEQ; see ``hyperopt.nn.networks.mdeq_network``."""

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build it."""
        cell = MDEQCell(self.channels, self.expansion, self.groups, self.dropout, self.norm, self.init_scale)
        return mdeq_network(cell, shape, classes, self.head, self.final, **methods.keywords())
