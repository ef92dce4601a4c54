"""Datasets in the LIBSVM format: one file for training and one for validation and test, such as ijcnn1 and ijcnn1.t.

A line is ``label index:value index:value ...`` with indices from 1. The files are those of the LIBSVM data collection, packed
(``.bz2``, ``.gz``) or not, under ``dataset.root``; nothing is fetched. Labels become 0, 1, ... in ascending order. Any file of
this format is accepted, so there is no checksum. It is read as text, and the limits below keep a wrong one from taking all
memory or hours.

Reference: C.-C. Chang and C.-J. Lin, LIBSVM: a library for support vector machines, ACM TIST 2, 2011. ijcnn1 is by D.
Prokhorov,
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hyperopt.core.checks import check_count, check_optional_count
from hyperopt.core.text import one_line
from hyperopt.data.files import check_path, default_root, read_file
from hyperopt.data.reading import DataError, UnreadableError
from hyperopt.data.splits import Rows, Splits

PACKED = ("", ".bz2", ".gz")
LARGEST, LONGEST_LINE = 500_000_000, 10_000_000  # bytes of an unpacked file, and of a line
MOST_LINES, MOST_CLASSES = 10_000_000, 10_000
MOST_VALUES = 1_000_000_000  # entries of the dense matrix that a file becomes
CHANGE = "change dataset.root or dataset.file"


@dataclass(frozen=True)
class Libsvm:
    """Two files in the LIBSVM format, ``root``/``file`` and ``root``/``file``.t; rows are taken in their order.

    Attributes:
        root: the data directory; ``~`` is expanded.
        file: name of the first file, without ``.bz2`` or ``.gz``.
        train: number of training rows, the first of the first file; None: all.
        val: number of validation rows, the first of the second file; None: all but those of ``test``.
        test: number of test rows, the last of the second file; 0: none.

    Raises:
        ValueError: a value is out of range.
    """

    root: str = field(default_factory=default_root)
    file: str = "ijcnn1"
    train: int | None = None
    val: int | None = None
    test: int = 0

    regression: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every value."""
        check_path(self, "root")
        check_path(self, "file")
        check_optional_count(self, "train")
        check_optional_count(self, "val")
        check_count(self, "test", 0)

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits: ``train`` from the first file; ``val`` and then ``test`` from the second, in the files' order.

        Raises:
            DataError: a file is missing, unreadable or too large, or has too few rows, values that are not finite, or labels
                that the other file does not have.
        """
        found = [self._find(self.file), self._find(f"{self.file}.t")]
        files = dict(zip(("train", "val"), (path for path, *_ in found), strict=True))
        (x, y), (xv, yv) = self._read({path: text for path, text, _ in found})
        labels = np.unique(y)
        if len(labels) > MOST_CLASSES:
            raise DataError(f"{files['train']} has {len(labels)} different labels, more than {MOST_CLASSES}; {CHANGE}")
        if len(others := np.setdiff1d(yv, labels)):
            raise DataError(f"{files['val']} has labels {others[:3]} that {files['train']} has not; are they a pair? {CHANGE}")
        kept = len(yv) - self.test
        parts = {
            "train": (x, y, self._rows("train", self.train, len(y), files["train"])),
            "val": (xv, yv, self._rows("val", self.val, kept, files["val"])),
            "test": (xv, yv, np.arange(max(kept, 0), len(yv))),
        }

        def split(name: str) -> Rows:
            matrix, targets, at = parts[name]
            return Rows.of(matrix[at].toarray(), np.searchsorted(labels, targets[at]), at, dtype, device)

        checksums = {path.name: checksum for path, _, checksum in found}
        return Splits(split("train"), split("val"), split("test"), len(labels), (x.shape[1],), "libsvm", checksums)

    def _find(self, name: str) -> tuple[Path, bytes, str]:
        """Return the path of a file under the root, packed or not, its text, and the md5 of its bytes as they are."""
        root = Path(self.root).expanduser()
        for packing in PACKED:
            path = root / f"{name}{packing}"
            try:
                checksum = hashlib.md5(read_file(path, LARGEST), usedforsecurity=False).hexdigest()
                return path, read_file(path, LARGEST, packing), checksum
            except FileNotFoundError:
                continue
            except UnreadableError as error:
                raise DataError(f"{error}; {CHANGE}") from error
        raise DataError(
            f"there is no {root / name} (nor {name}.bz2 or {name}.gz): put {self.file} and {self.file}.t of the LIBSVM data "
            "collection there, or change dataset.root or dataset.file"
        )

    def _read(self, texts: dict[Path, bytes]) -> list[tuple[Any, np.ndarray]]:
        """Return the matrices and labels of both files, with the same number of features."""
        from sklearn.datasets import load_svmlight_files  # imported here since it takes a second

        for path, text in texts.items():
            lines, longest = text.count(b"\n"), max(map(len, io.BytesIO(text)), default=0)
            if lines > MOST_LINES or longest > LONGEST_LINE:
                most = f"at most {MOST_LINES} lines of {LONGEST_LINE} bytes are read"
                raise DataError(f"{path} has {lines} lines, the longest of {longest} bytes; {most}; {CHANGE}")
        try:
            x, y, xv, yv = load_svmlight_files([io.BytesIO(text) for text in texts.values()])
        except (ValueError, OverflowError) as error:
            names = " or ".join(map(str, texts))
            raise DataError(f"{names} is not in the LIBSVM format: {one_line(error)}; {CHANGE}") from error
        for path, matrix, labels in zip(texts, (x, xv), (y, yv), strict=True):
            if not np.isfinite(matrix.data).all() or not np.isfinite(labels).all():
                raise DataError(f"{path} has values or labels that are not finite; {CHANGE}")
            if matrix.shape[0] * matrix.shape[1] > MOST_VALUES:
                size = f"{matrix.shape[0]} rows of {matrix.shape[1]} features, more than {MOST_VALUES} values"
                raise DataError(f"{path} has {size}; {CHANGE}")
        return [(x.tocsr(), np.asarray(y)), (xv.tocsr(), np.asarray(yv))]

    def _rows(self, key: str, asked: int | None, there: int, path: Path) -> np.ndarray:
        """Return the numbers of the first rows of a file."""
        count = there if asked is None else asked
        if not 1 <= count <= there:
            raise DataError(
                f"dataset.{key}={asked}, but {path} has {there} rows for it (dataset.test={self.test} are kept of the second "
                f"file); lower dataset.{key} or dataset.test"
            )
        return np.arange(count)
