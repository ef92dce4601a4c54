"""Made-up MNIST files, written without the code that reads them, and a dataset that knows them."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hyperopt.data import files
from hyperopt.data.mnist import MNIST

RANDOM = np.random.RandomState(0)
IMAGES = {
    "train": RANDOM.randint(0, 256, (12, 28, 28)).astype(np.uint8),
    "t10k": RANDOM.randint(0, 256, (5, 28, 28)).astype(np.uint8),
}
LABELS = {"train": (np.arange(12) % 10).astype(np.uint8), "t10k": np.arange(5).astype(np.uint8)}
HEADER = {"train": bytes.fromhex("0000000c"), "t10k": bytes.fromhex("00000005")}
SIZE = bytes.fromhex("0000001c 0000001c")
FILES = {
    f"{part}-images-idx3-ubyte": bytes.fromhex("00000803") + HEADER[part] + SIZE + IMAGES[part].tobytes() for part in IMAGES
} | {f"{part}-labels-idx1-ubyte": bytes.fromhex("00000801") + HEADER[part] + LABELS[part].tobytes() for part in LABELS}
NAME = "train-images-idx3-ubyte"


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


CHECKSUMS = {name: md5(data) for name, data in FILES.items()}


class SmallMNIST(MNIST):
    """MNIST with 12 and 5 made-up images."""

    train_images = 12
    test_images = 5
    checksums = CHECKSUMS


def small(root: Path, **values: Any) -> SmallMNIST:
    return SmallMNIST(**{"train": 4, "val": 3, "root": str(root), **values})


def fill(folder: Path, packed: bool = False) -> Path:
    """Write the files, as they are or packed, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def serve_to_torchvision(patch: Any, kind: Any, root: Path, url: str) -> None:
    """Put packed files under ``root`` and let a class of torchvision's find them at ``url``."""
    fill(root, packed=True)
    packed = [(f"{name}.gz", md5((root / f"{name}.gz").read_bytes())) for name in FILES]
    patch.setattr(kind, "mirrors", [url])
    patch.setattr(kind, "resources", packed)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    else:
        data[-5] ^= 1
    path.write_bytes(bytes(data))


def obtain(root: Path, *some: Callable[[Path], Path], download: bool = True) -> dict[str, bytes]:
    sources = {f"source {number}": source for number, source in enumerate(some)}
    settings = MNIST(root=str(root), download=download)
    return files.obtain(settings, "MNIST", [(Path("raw"), CHECKSUMS)], sources)
