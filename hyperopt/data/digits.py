"""scikit-learn's bundled digits: real handwriting that needs no network.

Reference: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hyperopt.data.files import verify
from hyperopt.data.settings import DigitsSettings
from hyperopt.data.splits import Images, Splits, make_splits

# md5 of the pixels (0 to 16) and of the labels, one byte each, row by row; the same from every scikit-learn.
CHECKSUMS = {"digits-images": "fa70cba135d4cdd4cde65da70dbffde2", "digits-labels": "96ecbac7ce6c9c7e9f9f82160cffba40"}


class Digits(DigitsSettings):
    """1797 images of 8 x 8 handwritten digits; pixels / 16."""

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits.

        Args:
            dtype: floating dtype of the features.
            device: where the rows go.

        Raises:
            DataError: the installed scikit-learn bundles other data.
        """
        from sklearn.datasets import load_digits  # here: a second to import, and only this dataset needs it

        bunch: Any = load_digits()
        pixels = np.asarray(bunch["images"], np.uint8)[:, None]
        labels = np.asarray(bunch["target"], np.uint8)
        checksums = verify({"digits-images": pixels.tobytes(), "digits-labels": labels.tobytes()}, CHECKSUMS, "scikit-learn")
        return make_splits(
            self,
            Images(pixels, labels),
            None,
            name="digits",
            num_classes=10,
            largest=16,
            checksums=checksums,
            dtype=dtype,
            device=device,
        )
