"""Made-up CIFAR-10 files in both versions, written without the code that reads them."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from mnist_files import md5

from hyperopt.data.cifar import CIFAR10

RANDOM = np.random.RandomState(1)
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
BATCHES = [*TRAIN, "test_batch"]
PIXELS = {name: RANDOM.randint(0, 256, (4, 3072)).astype(np.uint8) for name in BATCHES}
LABELS = {name: RANDOM.randint(0, 10, 4).tolist() for name in BATCHES}
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K%cM%b\x86"
DTYPE = b"cnumpy\ndtype\nU\x02%bK\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def array(rows: int, columns: int, data: bytes, code: bytes = b"u1", fortran: bool = False) -> bytes:
    """The instructions that numpy wrote under Python 2 for an array of bytes."""
    head = ARRAY % (rows, struct.pack("<H", columns)) + DTYPE % code
    return head + (b"\x88" if fortran else b"\x89") + b"T" + struct.pack("<i", len(data)) + data + b"tb"


def dictionary(**values: bytes) -> bytes:
    """A pickle of protocol 2 as Python 2 wrote it, each value given by its instructions."""
    items = b"".join(b"U" + bytes([len(key)]) + key.encode() + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


def numbers(labels: list[int]) -> bytes:
    """The instructions for a list of small whole numbers."""
    return b"](" + b"".join(b"J" + struct.pack("<i", label) for label in labels) + b"e"


def python_batch(name: str, labels: list[int] | None = None, fortran: bool = False) -> bytes:
    """A file of the Python version."""
    pixels = PIXELS[name]
    data = array(len(pixels), 3072, pixels.tobytes("F" if fortran else "C"), fortran=fortran)
    return dictionary(batch_label=b"U\x01x", labels=numbers(labels or LABELS[name]), data=data, filenames=b"](U\x05a.pnge")


def binary_batch(name: str, labels: list[int] | None = None) -> bytes:
    """A file of the binary version."""
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels or LABELS[name], PIXELS[name], strict=True))


PYTHON = {name: python_batch(name) for name in BATCHES} | {"batches.meta": dictionary(label_names=b"](" + b"U\x01a" * 10 + b"e")}
BINARY = {f"{name}.bin": binary_batch(name) for name in BATCHES}
FOLDERS = {"cifar-10-batches-py": PYTHON, "cifar-10-batches-bin": BINARY}


class SmallCIFAR10(CIFAR10):
    """CIFAR-10 with 20 and 4 made-up images."""

    train_images = 20
    test_images = 4
    forms = {folder: {name: md5(data) for name, data in found.items()} for folder, found in FOLDERS.items()}  # noqa: RUF012


def small(root: Path, kind: type[CIFAR10] = SmallCIFAR10) -> CIFAR10:
    return kind(train=12, val=8, order="head_tail", root=str(root))


def fill(root: Path, folder: str) -> Path:
    """Write one version under ``root`` and return its folder."""
    (root / folder).mkdir(parents=True)
    for name, data in FOLDERS[folder].items():
        (root / folder / name).write_bytes(data)
    return root / folder


def make_tar(path: Path, **files: bytes) -> Path:
    """Write an archive laid out as the official one, with other ``files`` in the place of some."""
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-py")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (PYTHON | files).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
