"""CIFAR-10, from its Python version (pickled dictionaries, which torchvision downloads) or its official binary version.

Both hold the same images in the same order: a label, and 32 x 32 pixels row by row, first red, then green, then blue.

Reference: A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, University of Toronto, 2009.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hyperopt.data.files import FilesDataset, obtain, torchvision
from hyperopt.data.splits import Images, Splits, make_splits


def records(name: str, data: bytes) -> np.ndarray:
    """Return the records of a file of either version, whose checksum was verified; shape: (images, 1 + 3072)."""
    if name.endswith(".bin"):
        return np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    with warnings.catch_warnings(action="ignore"):  # numpy warns about pickles from Python 2
        batch = pickle.loads(data, encoding="latin1")
    return np.column_stack([np.asarray(batch["labels"], np.uint8), batch["data"]])


@dataclass(frozen=True)
class CIFAR10(FilesDataset):
    """Photographs of ten kinds of objects: 50,000 training and 10,000 test images of 3 x 32 x 32, pixels / 255.

    They come from either version under ``ROOT`` or from torchvision's download.
    """

    train: int = 5000
    val: int = 5000

    train_images: ClassVar[int] = 50_000
    test_images: ClassVar[int | None] = 10_000
    sources: ClassVar = torchvision("cifar-10-batches-py", lambda datasets, root: datasets.CIFAR10(root, download=True))
    forms: ClassVar = {  # the md5 of each file by folder
        "cifar-10-batches-py": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",  # names of the classes; torchvision needs this file
        },
        "cifar-10-batches-bin": {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        },
    }

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, fetching the files if needed; for arguments and errors see ``make_splits`` and ``obtain``."""
        files = obtain(self, "cifar10", [(Path(folder), form) for folder, form in self.forms.items()], self.sources)
        checksums = next(dict(form) for form in self.forms.values() if form.keys() == files.keys())

        def read(start: str) -> Images:
            rows = np.concatenate([records(name, data) for name, data in files.items() if name.startswith(start)])
            return Images(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])

        images = read("data_batch"), read("test_batch")
        return make_splits(self, *images, name="cifar10", checksums=checksums, dtype=dtype, device=device)
