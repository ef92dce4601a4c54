"""Networks with implicit layers as a config names them: settings that build a network once the images' shape is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperopt.nn.settings import TanhMLPSettings
from hyperopt.nn.tanh_layer import TanhFixedPoint


@dataclass(frozen=True)
class Methods:
    """How the implicit layers of a network are solved and differentiated; see ``hyperopt.fixed_point``."""

    solver: Any = None
    adjoint: Any = None
    policy: str = "warn"
    fallback: Sequence[Any] = ()

    def keywords(self) -> dict[str, Any]:
        """Return them as ``DEQ`` takes them."""
        return {"solver": self.solver, "adjoint": self.adjoint, "policy": self.policy, "fallback": self.fallback}


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
    """``Flatten, Linear, z = tanh(W z + x), Linear``: the MNIST network of the implicit-layers tutorial."""

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        """Build it."""
        network = nn.Sequential()
        network.add_module("flatten", nn.Flatten())
        network.add_module("input", nn.Linear(math.prod(shape), self.width))
        network.add_module("equilibrium", TanhFixedPoint(self.width, init_scale=self.init_scale, **methods.keywords()))
        network.add_module("classifier", nn.Linear(self.width, classes))
        return network
