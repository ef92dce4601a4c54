"""Rows drawn from a linear model: what the examples of the literature on one L2 strength a feature are about.

The draws are those of numpy's ``RandomState`` in the order of the example that came with hypertorch (one L2 per feature,
``seed=1``): the weights, all training and validation rows, their noise, the permutation that divides them (validation first), and
then the test rows.
"""

from __future__ import annotations

import numpy as np
import torch

from hyperopt.data.settings import SyntheticSettings
from hyperopt.data.splits import Rows, Splits, scaled_by


class Synthetic(SyntheticSettings):
    """A linear model's rows; settings in ``SyntheticSettings``."""

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits.

        Args:
            dtype: floating dtype of the features, and of targets that are numbers.
            device: where the rows go.
        """
        random = np.random.RandomState(self.seed)
        weights = random.randn(self.features) + self.shift

        def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
            x = random.randn(count, self.features)
            return x, x @ weights + self.noise * random.randn(count)

        x, y = rows(self.train + self.val)
        order = random.permutation(len(x))
        parts = {"val": order[: self.val], "train": order[self.val :]}
        drawn = {name: (x[at], y[at], at) for name, at in parts.items()}
        drawn["test"] = (*rows(self.test), np.arange(self.test))

        def split(name: str) -> Rows:
            x, y, index = drawn[name]
            targets = torch.from_numpy(y).to(dtype) if self.targets == "numbers" else torch.from_numpy((y > 0).astype(np.int64))
            numbers = torch.from_numpy(index).to(device, torch.int64)
            return Rows(torch.from_numpy(x).to(device, dtype), targets.to(device), numbers)

        classes = 2 if self.targets == "classes" else 0
        return Splits(split("train"), split("val"), split("test"), classes, (self.features,), "synthetic", {}, scaled_by())
