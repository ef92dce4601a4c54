"""Rows drawn from a linear model, as in published examples with one L2 strength for each feature.

The draws are those of numpy's ``RandomState`` in the order of hypertorch's example (one L2 for each feature, ``seed=1``): the
weights, all training and validation rows, their noise, the permutation that divides them (validation first), and then the test
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hyperopt.core.checks import check_choice, check_number, check_whole
from hyperopt.data.splits import Rows, Splits, scaled_by


@dataclass(frozen=True)
class Synthetic:
    """Rows drawn from a linear model, ``y = x w + noise e`` with standard normal ``x``, ``e`` and ``w - shift``.

    Attributes:
        train: number of training rows.
        val: number of validation rows, which may be 0.
        test: number of test rows.
        features: number of entries of ``x``.
        targets: ``classes``: whether ``y`` is above 0; ``numbers``: ``y`` itself.
        noise: factor of ``e``.
        shift: mean of ``w``.
        seed: seed of all draws, 0 to 2**32 - 1.

    Raises:
        ValueError: a value is out of range.
    """

    train: int = 500
    val: int = 500
    test: int = 1000
    features: int = 20
    targets: str = "classes"
    noise: float = 0.1
    shift: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("train", "val", "test", "features"):
            check_whole(self, name, 0 if name == "val" else 1, 10**6)
        check_choice(self, "targets", ("classes", "numbers"))
        check_whole(self, "seed", 0, 2**32 - 1)
        for name in ("noise", "shift"):
            check_number(self, name, -math.inf)

    @property
    def regression(self) -> bool:
        """Whether the targets are numbers to predict."""
        return self.targets == "numbers"

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits; see ``Dataset.load``."""
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
            return Rows.of(x, y if self.targets == "numbers" else (y > 0).astype(np.int64), index, dtype, device)

        classes = 2 if self.targets == "classes" else 0
        return Splits(split("train"), split("val"), split("test"), classes, (self.features,), "synthetic", {}, scaled_by())
