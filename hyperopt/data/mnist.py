"""MNIST and Fashion-MNIST.

References:
    Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition, 1998.
    H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv 1708.07747.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from hyperopt.data import idx
from hyperopt.data.fetch import MNISTWheel, Torchvision
from hyperopt.data.settings import FashionMNISTSettings, MNISTSettings
from hyperopt.data.sources import Folder, Source, advice, obtain
from hyperopt.data.splits import Images, Splits, make_splits

# md5 of the unpacked files: whoever packs them anew changes the .gz, never these.
MNIST_CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FASHION_MNIST_CHECKSUMS = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
LARGEST = 16 + 60_000 * 28 * 28  # bytes of the training images with their header


def load_idx(
    settings: MNISTSettings,
    *,
    name: str,
    folder: str,
    checksums: Mapping[str, str],
    sources: Sequence[Source],
    packaged: Sequence[str] = (),
    more: str = "",
    dtype: torch.dtype,
    device: torch.device | str,
) -> Splits:
    """Load a dataset of four IDX files from ``ROOT/<folder>/raw`` or another folder, or fetch it there.

    Args:
        settings: root, sizes and the way in which the rows are drawn.
        name: the dataset's name in the configs.
        folder: torchvision's name of the dataset.
        checksums: md5 of the unpacked bytes by file name.
        sources: asked for what is in no folder.
        packaged: folders of the system that may have the files; only read.
        more: how else to come by the files, for the error.
        dtype: floating dtype of the features.
        device: where the rows go.

    Raises:
        DataError: a damaged file, or no source that has the dataset.
    """
    paths = [Path(settings.root).expanduser() / folder / "raw", *map(Path, packaged)]
    folders = [Folder(path, checksums, LARGEST) for path in paths]
    files = obtain(folder, folders, sources, download=settings.download, hint=advice(f"{folder}/raw", more=more)).files

    def read(part: str) -> Images:
        images, labels = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        return Images(idx.unpack(files[images], images)[:, None], idx.unpack(files[labels], labels))

    return make_splits(
        settings,
        read("train"),
        read("t10k"),
        name=name,
        num_classes=10,
        largest=255,
        checksums=dict(checksums),
        dtype=dtype,
        device=device,
    )


class MNIST(MNISTSettings):
    """Handwritten digits, pixels / 255, from ``ROOT/MNIST/raw``, torchvision's download or a wheel on the package index."""

    checksums: ClassVar[Mapping[str, str]] = MNIST_CHECKSUMS

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, fetching the files if need be.

        Args:
            dtype: floating dtype of the features.
            device: where the rows go.

        Raises:
            DataError: a damaged file, or no source that has the dataset.
        """
        sources = [Torchvision("MNIST", tuple(self.checksums)), MNISTWheel()]
        return load_idx(self, name="mnist", folder="MNIST", checksums=self.checksums, sources=sources, dtype=dtype, device=device)


class FashionMNIST(FashionMNISTSettings):
    """Ten kinds of clothing, pixels / 255, from ``ROOT/FashionMNIST/raw``, Debian's package or torchvision's download."""

    checksums: ClassVar[Mapping[str, str]] = FASHION_MNIST_CHECKSUMS
    packaged: ClassVar[Sequence[str]] = ("/usr/share/datasets/fashion-mnist",)  # where dataset-fashion-mnist puts them

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, fetching the files if need be.

        Args:
            dtype: floating dtype of the features.
            device: where the rows go.

        Raises:
            DataError: a damaged file, or no source that has the dataset.
        """
        sources = [Torchvision("FashionMNIST", tuple(self.checksums))]
        return load_idx(
            self,
            name="fashion_mnist",
            folder="FashionMNIST",
            checksums=self.checksums,
            sources=sources,
            packaged=self.packaged,
            more="apt-get install dataset-fashion-mnist (Debian, Ubuntu)",
            dtype=dtype,
            device=device,
        )
