"""CIFAR-10.

Two versions are read, which hold the same images in the same order. The binary one has a record an image: its label, then its
32 x 32 pixels row by row, all red ones first, then the green, then the blue. The Python one has the same in pickled dictionaries.

Reference: A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, University of Toronto, 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hyperopt.data.errors import DataError
from hyperopt.data.fetch import TorchvisionArchive
from hyperopt.data.pickles import unpickle
from hyperopt.data.settings import CIFAR10Settings
from hyperopt.data.sources import Folder, advice, obtain
from hyperopt.data.splits import Images, Splits, make_splits

SHAPE = (3, 32, 32)
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
PYTHON_CHECKSUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",  # the names of the classes; torchvision reads no folder without it
}
BINARY_CHECKSUMS = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
LARGEST = 31_035_999  # bytes of data_batch_3 of the Python version


def read_binary(data: bytes, name: str) -> Images:
    """Return the images of one file of the binary version, as a read-only view.

    Raises:
        DataError: a length that is no whole number of records.
    """
    record = 1 + int(np.prod(SHAPE))
    if len(data) % record:
        raise DataError(f"{name}: {len(data)} bytes are no whole number of records of {record}")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return Images(records[:, 1:].reshape(-1, *SHAPE), records[:, 0])


def read_python(data: bytes, name: str) -> Images:
    """Return the images of one file of the Python version.

    Raises:
        DataError: a pickle of anything but an array of pixels, ``data``, and a list of labels, ``labels``.
    """
    batch = unpickle(data, name)
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (np.prod(SHAPE),):
        raise DataError(f"{name}: its 'data' is no array of {np.prod(SHAPE)} bytes an image")
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**31 for label in labels):
        raise DataError(f"{name}: its 'labels' is no list of whole numbers")
    return Images(pixels.reshape(-1, *SHAPE), np.asarray(labels, np.int64))


def join(parts: list[Images]) -> Images:
    """Return the images of several files as one."""
    return Images(np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]))


class CIFAR10(CIFAR10Settings):
    """Ten kinds of things in colour, pixels / 255, from either version under ``ROOT`` or torchvision's download."""

    python_checksums: ClassVar[Mapping[str, str]] = PYTHON_CHECKSUMS
    binary_checksums: ClassVar[Mapping[str, str]] = BINARY_CHECKSUMS

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, fetching the files if need be.

        Args:
            dtype: floating dtype of the features.
            device: where the rows go.

        Raises:
            DataError: a damaged file, or no source that has the dataset.
        """
        root = Path(self.root).expanduser()
        python = Folder(root / PYTHON_FOLDER, self.python_checksums, LARGEST)
        binary = Folder(root / BINARY_FOLDER, self.binary_checksums, LARGEST)
        sources = [TorchvisionArchive("CIFAR10", tuple(python.checksums))]
        hint = advice(PYTHON_FOLDER, BINARY_FOLDER)
        found = obtain("CIFAR-10", [python, binary], sources, download=self.download, hint=hint)
        read = read_python if found.folder is python else read_binary
        parts = {name: read(data, name) for name, data in found.files.items() if name != "batches.meta"}
        return make_splits(
            self,
            join([images for name, images in parts.items() if name.startswith("data_batch")]),
            join([images for name, images in parts.items() if name.startswith("test_batch")]),
            name="cifar10",
            num_classes=10,
            largest=255,
            checksums=dict(found.folder.checksums),
            dtype=dtype,
            device=device,
        )
