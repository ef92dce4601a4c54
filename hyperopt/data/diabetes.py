"""scikit-learn's bundled diabetes study: a regression without files or network.

Reference: B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least angle regression, Annals of Statistics 32, 2004.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from hyperopt.data.splits import DrawnDataset, Rows, Splits, draw_rows, scaled_by


@dataclass(frozen=True)
class Diabetes(DrawnDataset):
    """442 patients, with 10 features each and the progression of the disease after a year.

    ``normalize=unit`` leaves scikit-learn's scaling (columns of length 1). The targets always have mean 0 and deviation 1 over
    the training rows.
    """

    train: int = 200
    val: int = 121
    test: int | None = None
    normalize: str = "standard"

    regression: ClassVar[bool] = True
    train_images: ClassVar[int] = 442

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits; see ``Dataset.load``."""
        from sklearn.datasets import load_diabetes  # imported here since it takes a second

        bunch: Any = load_diabetes()
        rows = draw_rows(self)
        x, y = np.asarray(bunch["data"], np.float64), np.asarray(bunch["target"], np.float64)
        y = (y - y[rows["train"]].mean()) / y[rows["train"]].std()
        scaling = scaled_by()
        if self.normalize == "standard":
            mean, std = x[rows["train"]].mean(0), x[rows["train"]].std(0)
            x, scaling = (x - mean) / std, scaled_by(1.0, mean.tolist(), std.tolist())

        def split(name: str) -> Rows:
            at = rows[name]
            return Rows.of(x[at], y[at], at, dtype, device)

        return Splits(split("train"), split("val"), split("test"), 0, (10,), "diabetes", {}, scaling)
