"""Datasets in the LIBSVM format: two files, one trained on and one to validate (and test) with, such as ijcnn1 and ijcnn1.t.

A line is ``label index:value index:value ...`` with indices from 1. The files are those of the LIBSVM data collection, packed
(``.bz2``, ``.gz``) or not, under ``dataset.root``; nothing is fetched. Labels become 0, 1, ... in their order.

Reference: C.-C. Chang and C.-J. Lin, LIBSVM: a library for support vector machines, ACM TIST 2, 2011; ijcnn1 is of D. Prokhorov,
IJCNN 2001 neural network competition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperopt.data.errors import DataError
from hyperopt.data.files import md5
from hyperopt.data.settings import LibsvmSettings
from hyperopt.data.splits import Rows, Splits

PACKED = ("", ".bz2", ".gz")


class Libsvm(LibsvmSettings):
    """Rows of two files in the LIBSVM format; settings in ``LibsvmSettings``."""

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits: ``train`` of the one file; ``val`` and then ``test`` of the other, in the order of the files.

        Args:
            dtype: floating dtype of the features.
            device: where the rows go.

        Raises:
            DataError: a file is not there, cannot be read, or has too few rows, or labels that the other does not have.
        """
        files = {"train": self._find(self.file), "val": self._find(f"{self.file}.t")}
        (x, y), (xv, yv) = self._read(files)
        labels = np.unique(y)
        if not np.isin(yv, labels).all():
            raise DataError(f"{files['val']} has labels {np.unique(yv)}, {files['train']} only {labels}; are they a pair?")
        kept = len(yv) - self.test
        parts = {
            "train": (x, y, self._rows("train", self.train, len(y), files["train"])),
            "val": (xv, yv, self._rows("val", self.val, kept, files["val"])),
            "test": (xv, yv, np.arange(max(kept, 0), len(yv))),
        }

        def split(name: str) -> Rows:
            matrix, targets, at = parts[name]
            features = torch.from_numpy(matrix[at].toarray()).to(device, dtype)
            classes = torch.from_numpy(np.searchsorted(labels, targets[at]).astype(np.int64)).to(device)
            return Rows(features, classes, torch.from_numpy(at.astype(np.int64)).to(device))

        checksums = {path.name: md5(path.read_bytes()) for path in files.values()}
        return Splits(split("train"), split("val"), split("test"), len(labels), (x.shape[1],), "libsvm", checksums)

    def _find(self, name: str) -> Path:
        """The file of a name under the root, packed or not."""
        root = Path(self.root).expanduser()
        for suffix in PACKED:
            if (root / f"{name}{suffix}").is_file():
                return root / f"{name}{suffix}"
        raise DataError(
            f"there is no {root / name} (nor {name}.bz2 or {name}.gz): put {self.file} and {self.file}.t of the LIBSVM data "
            "collection there, or change dataset.root or dataset.file"
        )

    def _read(self, files: dict[str, Path]) -> list[tuple[Any, np.ndarray]]:
        """Both files, with as many features."""
        from sklearn.datasets import load_svmlight_files  # here: a second to import, and only this dataset needs it

        try:
            x, y, xv, yv = load_svmlight_files([str(path) for path in files.values()])
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{' or '.join(map(str, files.values()))} is not in the LIBSVM format: {error}") from error
        return [(x.tocsr(), np.asarray(y)), (xv.tocsr(), np.asarray(yv))]

    def _rows(self, key: str, asked: int | None, there: int, path: Path) -> np.ndarray:
        """The first rows of a file."""
        count = there if asked is None else asked
        if not 1 <= count <= there:
            raise DataError(
                f"dataset.{key}={asked}, but {path} has {there} rows for it (dataset.test={self.test} are kept of the second "
                f"file); lower dataset.{key} or dataset.test"
            )
        return np.arange(count)
