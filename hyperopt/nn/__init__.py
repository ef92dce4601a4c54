"""Building blocks of equilibrium models and implicit layers. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperopt.core.lazy import lazily

_PUBLIC = {
    "DEQ": "hyperopt.nn.deq",
    "TanhFixedPoint": "hyperopt.nn.tanh_layer",
    "ResNetCell": "hyperopt.nn.resnet_cell",
    "MDEQCell": "hyperopt.nn.mdeq",
    "Stabilise": "hyperopt.nn.stabilise",
    "normalise": "hyperopt.nn.contractive",
    "tanh_network": "hyperopt.nn.networks",
    "resnet_network": "hyperopt.nn.networks",
    "mdeq_network": "hyperopt.nn.networks",
}
__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from hyperopt.nn.contractive import normalise as normalise
    from hyperopt.nn.deq import DEQ as DEQ
    from hyperopt.nn.mdeq import MDEQCell as MDEQCell
    from hyperopt.nn.networks import mdeq_network as mdeq_network
    from hyperopt.nn.networks import resnet_network as resnet_network
    from hyperopt.nn.networks import tanh_network as tanh_network
    from hyperopt.nn.resnet_cell import ResNetCell as ResNetCell
    from hyperopt.nn.stabilise import Stabilise as Stabilise
    from hyperopt.nn.tanh_layer import TanhFixedPoint as TanhFixedPoint


__getattr__, __dir__ = lazily(__name__, _PUBLIC, __all__, also=", and its modules")
