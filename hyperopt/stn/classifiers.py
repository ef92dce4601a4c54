"""A classifier of images with dropout at tuned rates wherever one is declared: what the experiments on images train."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from torch import nn

from hyperopt.stn.classifier_settings import ClassifierSettings
from hyperopt.stn.row_dropout import RowDropout


class Classifier(ClassifierSettings):
    """Builds the network; settings in ``ClassifierSettings``."""

    def build(self, shape: tuple[int, ...], classes: int, rates: Collection[str]) -> nn.Sequential:
        """Return the network from images to logits, its initial values drawn from torch's global generator.

        Args:
            shape: of one image, channels first.
            classes: number of logits.
            rates: the dropout rates that are hyperparameters, out of ``dropouts``; there is no dropout elsewhere.

        Raises:
            ValueError: images of this shape do not go into it.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()

        def drop(place: int, channels: bool = False) -> None:
            if (name := f"dropout{place}") in rates:
                layers[name] = RowDropout(name, place, channels)

        features, *size = shape
        for k, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            layers[f"conv{k}"] = nn.Conv2d(features, channels, self.kernel_size, stride, padding=self.kernel_size // 2)
            layers[f"relu{k}"] = nn.ReLU()
            features, size = channels, [-(-side // stride) for side in size]
            if k in self.pooled:
                layers[f"pool{k}"] = nn.MaxPool2d(2)
                size = [side // 2 for side in size]
            if min(size) < 1:
                raise ValueError(f"images of shape {shape} shrink to nothing at convolution {k}; change strides or pooled")
            drop(k, channels=True)
        layers["flatten"] = nn.Flatten()
        for side in size:
            features *= side
        for k, width in enumerate(self.dense, start=len(self.channels)):
            if self.dense_dropout == "before":
                drop(k)
            layers[f"dense{k}"] = nn.Linear(features, width)
            layers[f"relu{k}"] = nn.ReLU()
            if self.dense_dropout == "after":
                drop(k)
            features = width
        layers["last"] = nn.Linear(features, classes)
        return nn.Sequential(layers)
