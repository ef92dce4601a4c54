"""scikit-learn's bundled digits: real handwriting without a download.

Reference: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hyperopt.data.files import check
from hyperopt.data.splits import DrawnDataset, Images, Splits, make_splits

# md5 of the pixels (0 to 16) and of the labels, one byte each, row by row; the same for every version of scikit-learn.
CHECKSUMS = {"digits-images": "fa70cba135d4cdd4cde65da70dbffde2", "digits-labels": "96ecbac7ce6c9c7e9f9f82160cffba40"}


@dataclass(frozen=True)
class Digits(DrawnDataset):
    """1797 images of 8 x 8 handwritten digits; pixels / 16. There are no separate test rows, and no files are needed."""

    train: int = 1000
    val: int = 400
    test: int | None = 397

    train_images: ClassVar[int] = 1797

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits; see ``Dataset.load``.

        Raises:
            DataError: the installed scikit-learn bundles other data.
        """
        pixels, labels = bundled()
        for (name, expected), array in zip(CHECKSUMS.items(), (pixels, labels), strict=True):
            check(array.tobytes(), expected, f"scikit-learn: {name}")
        images = Images(pixels, labels), None
        return make_splits(self, *images, name="digits", largest=16, checksums=dict(CHECKSUMS), dtype=dtype, device=device)


def bundled() -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels, shape (1797, 1, 8, 8), and the labels, from the file inside scikit-learn.

    The file is read without importing scikit-learn, which takes more than a second; its loader is used if there is no such
    file.
    """
    spec = find_spec("sklearn")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for path in (Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders):
        if path.is_file():
            table = np.loadtxt(path, np.uint8, delimiter=",")
            return np.ascontiguousarray(table[:, :-1]).reshape(-1, 1, 8, 8), table[:, -1].copy()
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return np.asarray(bunch["images"], np.uint8)[:, None], np.asarray(bunch["target"], np.uint8)
