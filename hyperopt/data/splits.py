"""Rows of a dataset, its splits, and the function that draws them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from hyperopt.core.checks import check_choice, check_whole
from hyperopt.data.reading import DataError
from hyperopt.data.sparse import compressed_rows

ORDERS = ("shuffled", "head_tail", "tail_head")
NORMALIZATIONS = ("unit", "standard")


@dataclass(frozen=True)
class Rows:
    """Examples of one split.

    Attributes:
        x: features, flattened, dense or sparse (compressed rows). shape: (n, features), floating.
        y: class labels, int64, or targets of a regression, floating. shape: (n,).
        index: each row's number in its source. If a dataset has separate test images, training and validation rows are
            numbered within the training images and test rows within the test images. shape: (n,), int64.
    """

    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor

    @classmethod
    def of(cls, x: Any, y: Any, index: np.ndarray, dtype: torch.dtype, device: torch.device | str) -> Rows:
        """Return rows of arrays or tensors; whole numbers in ``y`` are labels, others are targets in ``dtype``."""
        targets = torch.as_tensor(y)
        targets = targets.to(device, dtype if targets.is_floating_point() else torch.int64)
        return cls(torch.as_tensor(x).to(device, dtype), targets, torch.as_tensor(index).to(device, torch.int64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.y.shape[0]

    def take(self, places: torch.Tensor | slice | None) -> Rows:
        """Return the rows at ``places`` or, for None, all of them without a copy."""
        if places is None:
            return self
        return Rows(_rows(self.x, places), self.y[places], self.index[places])


def _rows(x: torch.Tensor, places: torch.Tensor | slice) -> torch.Tensor:
    """Return rows of a feature matrix; torch cannot index compressed rows."""
    if x.layout == torch.strided:
        return x[places]
    index = torch.arange(x.shape[0], device=x.device)[places]
    with compressed_rows():
        return x.to_sparse_coo().index_select(0, index).coalesce().to_sparse_csr()


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset, on its device.

    Attributes:
        train: the training rows.
        val: the validation rows, none of them in ``train``; there may be none.
        test: the test rows, none of them in ``train`` or ``val``.
        num_classes: labels are ``0 .. num_classes - 1``; 0: the targets are floating numbers.
        shape: shape of one example before flattening, channels first, such as ``(1, 28, 28)``.
        name: the dataset's name in the configs, such as ``mnist``.
        checksums: md5 of the unpacked bytes of each file behind the rows.
        scaling: ``largest``, ``mean`` and ``std`` of ``x = (raw / largest - mean) / std`` before flattening, each a list of
            one number, or one for each channel (or feature, if an example has one dimension); None: ``x`` is made in another
            way.
    """

    train: Rows
    val: Rows
    test: Rows
    num_classes: int
    shape: tuple[int, ...]
    name: str
    checksums: dict[str, str]
    scaling: dict[str, list[float]] | None = None


@runtime_checkable
class Dataset(Protocol):
    """The source of a task's rows: any class with this method, which need not derive from this one.

    A class attribute ``regression`` may say whether the targets are numbers. A task that classifies then refuses such a
    dataset when the task is made, and otherwise only when the rows are loaded.
    """

    def load(self, dtype: torch.dtype, device: torch.device) -> Splits:
        """Return the splits.

        Args:
            dtype: floating dtype of the features, and of the targets of a regression.
            device: device of the rows.
        """
        ...

    @classmethod
    def __subclasshook__(cls, other: type, /) -> bool:
        """Whether a class has a ``load`` that can be called like this; the ``load`` of a task takes something else."""
        if cls is not Dataset:
            return NotImplemented
        found = inspect.getattr_static(other, "load", None)
        bound = isinstance(found, staticmethod | classmethod)
        try:
            inspect.signature(getattr(other, "load", None)).bind(*[None] * (2 if bound else 3))  # pyright: ignore
        except (TypeError, ValueError):
            return False
        return True


@dataclass(frozen=True)
class DrawnDataset:
    """A dataset of a known size, from which three disjoint splits are drawn.

    Since the size is known, a split that does not fit is refused before anything is loaded or fetched.

    Attributes:
        train: number of training rows, at least 1.
        val: number of validation rows, 0 for none; they share no row with ``train``.
        test: number of test rows, at least 1; None takes all (of a dataset without separate test rows: all that are left).
        order: ``shuffled`` draws the rows by ``seed``. ``head_tail`` takes the first ``train`` rows for training and the last
            ``val`` for validation, and ``tail_head`` the other way round; both test on the first test rows (of a dataset
            without separate test rows: the first of those in between).
        seed: seed of the draw, 0 to 2**32 - 1.
        normalize: ``unit`` divides pixels by their largest possible value; ``standard`` then subtracts each channel's mean and
            divides by its standard deviation, both over the training split.

    Raises:
        ValueError: a value is out of range, or a split is larger than the dataset.
    """

    train: int = 1
    val: int = 1
    test: int | None = None
    order: str = "shuffled"
    seed: int = 0
    normalize: str = "unit"

    regression: ClassVar[bool] = False
    train_images: ClassVar[int]  # number of rows from which train and val are taken
    test_images: ClassVar[int | None] = None  # number of rows from which test is taken; None: what train and val leave

    def __post_init__(self) -> None:
        """Check every value against the dataset's size."""
        pool = self.train_images
        check_choice(self, "order", ORDERS)
        check_choice(self, "normalize", NORMALIZATIONS)
        check_whole(self, "seed", 0, 2**32 - 1)
        check_whole(self, "train", 1, pool, ", the rows that there are to train on")
        check_whole(self, "val", 0, pool, ", the rows that there are to train on")
        left = pool - self.train - self.val
        if left < (1 if self.test_images is None else 0):
            raise ValueError(
                f"{type(self).__name__}: train={self.train} and val={self.val} need {self.train + self.val} different rows"
                f"{' and leave none to test on' if left == 0 else ''}; there are {pool}; lower train or val"
            )
        if self.test is not None and self.test_images is not None:
            check_whole(self, "test", 1, self.test_images, ", the test rows that there are")
        elif self.test is not None:
            check_whole(self, "test", 1, left, f", what train={self.train} and val={self.val} leave of {pool}")


@dataclass(frozen=True)
class Images:
    """Images and labels as they were read.

    Attributes:
        pixels: shape: (n, channels, height, width), uint8 or floating.
        labels: shape: (n,), whole numbers.
    """

    pixels: np.ndarray
    labels: np.ndarray


def draw_rows(settings: DrawnDataset) -> dict[str, np.ndarray]:
    """Return the row numbers of ``train``, ``val`` and ``test``, as ``settings.order`` says.

    The draw uses numpy's ``RandomState``, whose stream never changes (NEP 19), and nothing global: a seed gives the same rows
    on every machine, device and version.
    """
    pool, own_test = settings.train_images, settings.test_images
    if settings.order == "shuffled":
        random = np.random.RandomState(settings.seed)
        rows = random.permutation(pool)
        train, val, rest = np.split(rows, [settings.train, settings.train + settings.val])
        test = rest if own_test is None else random.permutation(own_test)
    else:
        head, tail = (settings.train, settings.val) if settings.order == "head_tail" else (settings.val, settings.train)
        first, rest, last = np.split(np.arange(pool), [head, pool - tail])
        train, val = (first, last) if settings.order == "head_tail" else (last, first)
        test = rest if own_test is None else np.arange(own_test)
    return {"train": train, "val": val, "test": test[: settings.test]}


def check_images(images: Images, name: str, num_classes: int) -> None:
    """Refuse pixels that are not finite, labels outside the classes, and different numbers of images and labels.

    Raises:
        DataError: the message names the dataset, the first bad row and its value.
    """
    pixels, labels = images.pixels, images.labels
    if len(pixels) != len(labels):
        raise DataError(f"{name}: {len(pixels)} images but {len(labels)} labels")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise DataError(f"{name}: label {labels[bad[0]]} of row {bad[0]} is outside the classes 0 to {num_classes - 1}")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        rows = np.flatnonzero(~np.isfinite(pixels).reshape(len(pixels), -1).all(1))
        raise DataError(f"{name}: row {rows[0]} holds values that are not finite ({rows.size} such rows)")


def make_splits(
    settings: DrawnDataset,
    train: Images,
    test: Images | None,
    *,
    name: str,
    checksums: dict[str, str],
    num_classes: int = 10,
    largest: float = 255,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Splits:
    """Draw the rows, scale the pixels and move them to the device.

    ``x = pixels / largest``, and with ``normalize=standard`` also ``(x - mean_c) / std_c`` for each channel ``c``, with mean
    and standard deviation over the training split.

    Args:
        settings: sizes, order, seed and normalization.
        train: the images from which train and val are drawn.
        test: the dataset's separate test images; None draws test from ``train`` as well.
        name: the dataset's name.
        checksums: md5 of each file behind the images.
        num_classes: number of classes.
        largest: the largest possible pixel (16 for digits, 255 for a byte).
        dtype: floating dtype of ``x``.
        device: device of the rows.

    Returns:
        The three splits.

    Raises:
        DataError: labels or values are bad, the number of images is not that of the dataset, or a channel is constant over the
            training rows under ``normalize=standard``.
    """
    for part, images, expected in (("train", train, settings.train_images), ("test", test, settings.test_images)):
        if images is None:
            continue
        check_images(images, f"{name} ({part} images)", num_classes)
        if len(images.labels) != expected:
            raise DataError(f"{name}: {len(images.labels)} {part} images, expected {expected}")
    shape = train.pixels.shape[1:]
    rows = draw_rows(settings)

    def gather(split: str) -> Rows:
        images, index = test if split == "test" and test is not None else train, rows[split]
        found = Rows.of(images.pixels[index], images.labels[index], index, dtype, device)
        found.x.div_(largest)  # shape: (n, channels, height, width)
        return found

    splits = {split: gather(split) for split in ("train", "val", "test")}
    scaling = scaled_by(largest)
    if settings.normalize == "standard":
        mean = splits["train"].x.mean((0, 2, 3), keepdim=True)
        std = splits["train"].x.std((0, 2, 3), correction=0, keepdim=True)
        if not (std > 0).all():
            raise DataError(f"{name}: a channel is constant over the {settings.train} training rows; set dataset.normalize=unit")
        for part in splits.values():
            part.x.sub_(mean).div_(std)
        scaling = scaled_by(largest, mean.flatten().tolist(), std.flatten().tolist())
    flat = {split: Rows(part.x.flatten(1), part.y, part.index) for split, part in splits.items()}
    return Splits(**flat, num_classes=num_classes, shape=tuple(shape), name=name, checksums=checksums, scaling=scaling)


def scaled_by(largest: float = 1.0, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> dict[str, list[float]]:
    """Return a value for ``Splits.scaling``."""
    return {"largest": [largest], "mean": list(mean), "std": list(std)}
