"""Settings of every dataset: frozen, validated before anything is loaded, and free of torch.

The dataset classes (``hyperopt.data.mnist.MNIST``, ...) inherit from these. The sizes of the datasets are known beforehand, so a
split that does not fit is refused when the config is instantiated and not after a download.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hyperopt.core.checks import plain, taken

ORDERS = ("shuffled", "head_tail", "tail_head")
NORMALIZATIONS = ("unit", "standard")


def default_root() -> str:
    """Return the data directory of a user who names none: ``$HYPEROPT_DATA``, else ``data`` in the working directory."""
    return os.environ.get("HYPEROPT_DATA") or "data"


def _check_whole(name: str, value: Any, low: int, high: int, why: str) -> None:
    """Refuse ``dataset.<name>`` that is not a whole number in ``[low, high]``."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"dataset.{name}={value!r} must be a whole number from {low} to {high}{why}; change dataset.{name}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse ``dataset.<name>`` that is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"dataset.{name}={value!r} is none of {', '.join(choices)}; change dataset.{name}")


@dataclass(frozen=True)
class DatasetSettings:
    """What every dataset has: three disjoint splits and the way in which their rows are drawn.

    Attributes:
        train: rows of the training split, at least 1.
        val: rows of the validation split, 0 for none; never shares a row with ``train``.
        test: rows of the test split, at least 1; None takes all (for a dataset without test rows of its own: all that are left).
        order: ``shuffled`` draws the rows by ``seed``; ``head_tail`` takes the first ``train`` rows for training and the last
            ``val`` for validation, ``tail_head`` the other way round. Both then test on the first test rows (for a dataset
            without test rows of its own, the first of those in between).
        seed: seed of the draw, 0 to 2**32 - 1.
        normalize: ``unit`` divides pixels by their largest possible value; ``standard`` then subtracts each channel's mean and
            divides by its standard deviation, both taken over the training split only.

    Raises:
        ValueError: a value out of range, or a split larger than the dataset.
    """

    train: int = 1
    val: int = 1
    test: int | None = None
    order: str = "shuffled"
    seed: int = 0
    normalize: str = "unit"

    train_images: ClassVar[int]  # rows that train and val are taken from
    test_images: ClassVar[int | None] = None  # rows that test is taken from; None: what train and val leave over

    def __post_init__(self) -> None:
        """Check every value against the dataset's size."""
        pool, name = self.train_images, type(self).__name__.removesuffix("Settings")
        _check_choice("order", self.order, ORDERS)
        _check_choice("normalize", self.normalize, NORMALIZATIONS)
        _check_whole("seed", self.seed, 0, 2**32 - 1, "")
        _check_whole("train", self.train, 1, pool, f", the rows that {name} has to train on")
        _check_whole("val", self.val, 0, pool, f", the rows that {name} has to train on")
        left = pool - self.train - self.val
        if left < (1 if self.test_images is None else 0):
            raise ValueError(
                f"dataset.train={self.train} and dataset.val={self.val} need {self.train + self.val} different rows"
                f"{' and leave none to test on' if left == 0 else ''}; {name} has {pool}; lower dataset.train or dataset.val"
            )
        if self.test is not None and self.test_images is not None:
            _check_whole("test", self.test, 1, self.test_images, f", the test rows that {name} has")
        elif self.test is not None:
            why = f", what dataset.train={self.train} and dataset.val={self.val} leave of {name}'s {pool}"
            _check_whole("test", self.test, 1, left, why)


@dataclass(frozen=True)
class DigitsSettings(DatasetSettings):
    """scikit-learn's bundled digits: 1797 images of 8 x 8, 10 classes, no test rows of their own; needs no files."""

    train: int = 1000
    val: int = 400
    test: int | None = 397

    train_images: ClassVar[int] = 1797


@dataclass(frozen=True)
class DiabetesSettings(DatasetSettings):
    """scikit-learn's bundled diabetes study: 442 patients, 10 features, a number to predict; needs no files.

    ``normalize=unit`` leaves scikit-learn's scaling (columns of length 1); the numbers to predict have mean 0 and deviation 1
    over the training rows, always.
    """

    train: int = 200
    val: int = 121
    test: int | None = None
    normalize: str = "standard"

    train_images: ClassVar[int] = 442


@dataclass(frozen=True)
class SyntheticSettings:
    """Rows drawn from a linear model, ``y = x w + noise e`` with standard normal ``x``, ``e`` and ``w - shift``.

    Attributes:
        train: training rows.
        val: validation rows, as many as one likes.
        test: test rows.
        features: entries of ``x``.
        targets: ``classes``: whether ``y`` is above 0; ``numbers``: ``y`` itself.
        noise: factor of ``e``.
        shift: mean of ``w``.
        seed: seed of all draws, 0 to 2**32 - 1.

    Raises:
        ValueError: a value out of range.
    """

    train: int = 500
    val: int = 500
    test: int = 1000
    features: int = 20
    targets: str = "classes"
    noise: float = 0.1
    shift: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("train", "val", "test", "features"):
            _check_whole(name, getattr(self, name), 0 if name == "val" else 1, 10**6, "")
        _check_choice("targets", self.targets, ("classes", "numbers"))
        _check_whole("seed", self.seed, 0, 2**32 - 1, "")
        for name in ("noise", "shift"):
            value = taken(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"dataset.{name}={value!r} must be a finite number; change dataset.{name}")


@dataclass(frozen=True)
class FilesSettings(DatasetSettings):
    """A dataset that lies in files or is fetched.

    Attributes:
        root: the data directory, in torchvision's layout (``ROOT/MNIST/raw/...``); ``~`` is expanded.
        download: whether to fetch what is not there; with False only files under ``root`` are read.
    """

    root: str = field(default_factory=default_root)
    download: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not isinstance(self.root, str | os.PathLike) or not str(self.root).strip():
            raise ValueError(f"dataset.root={self.root!r} is not a directory name; change dataset.root")
        if not isinstance(self.download, bool):
            raise ValueError(f"dataset.download={self.download!r} must be true or false; change dataset.download")


@dataclass(frozen=True)
class MNISTSettings(FilesSettings):
    """MNIST: 60,000 training and 10,000 test images of 28 x 28, 10 classes."""

    train: int = 5000
    val: int = 5000

    train_images: ClassVar[int] = 60_000
    test_images: ClassVar[int | None] = 10_000


@dataclass(frozen=True)
class FashionMNISTSettings(MNISTSettings):
    """Fashion-MNIST: same sizes and shapes as MNIST, 10 kinds of clothing."""


@dataclass(frozen=True)
class NewsgroupsSettings(FilesSettings):
    """20 newsgroups, by date: 11,314 training and 7,532 test posts, 20 classes; word counts, sparse.

    ``normalize=unit`` scales the counts of a post to length 1; ``standard`` would not stay sparse and is refused.
    """

    train: int = 5657
    val: int = 5657

    train_images: ClassVar[int] = 11_314
    test_images: ClassVar[int | None] = 7532

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        _check_choice("normalize", self.normalize, ("unit",))


@dataclass(frozen=True)
class CIFAR10Settings(FilesSettings):
    """CIFAR-10: 50,000 training and 10,000 test images of 3 x 32 x 32, 10 kinds of things."""

    train: int = 5000
    val: int = 5000

    train_images: ClassVar[int] = 50_000
    test_images: ClassVar[int | None] = 10_000


@dataclass(frozen=True)
class LibsvmSettings:
    """Two files in the LIBSVM format, ``root``/``file`` and ``root``/``file``.t; rows are taken in their order.

    Attributes:
        root: the data directory; ``~`` is expanded.
        file: name of the first file, without ``.bz2`` or ``.gz``.
        train: training rows, the first of the first file; None: all.
        val: validation rows, the first of the second file; None: all but those of ``test``.
        test: test rows, the last of the second file; 0: none.

    Raises:
        ValueError: a value out of range.
    """

    root: str = field(default_factory=default_root)
    file: str = "ijcnn1"
    train: int | None = None
    val: int | None = None
    test: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("root", "file"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike) or not str(value).strip():
                raise ValueError(f"dataset.{name}={value!r} is no name; change dataset.{name}")
        for name in ("train", "val"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1, 10**9, "")
        _check_whole("test", self.test, 0, 10**9, "")


@dataclass(frozen=True)
class AugmentSettings:
    """How a batch of images is changed at random; see ``hyperopt.data.augment.Augment``.

    Attributes:
        padding: a crop of the image's own size is taken from the image padded by so many pixels on each side; 0 leaves it.
        flip: chance that an image is turned left to right, 0 to 1.
        fill: value of the padding, in the pixels' own units. 0 is black in a byte or under ``normalize=unit``, and the channel's
            mean under ``normalize=standard``.

    Raises:
        ValueError: a value out of range.
    """

    padding: int = 4
    flip: float = 0.5
    fill: float = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("padding", "flip", "fill"):
            taken(self, name)
        if not isinstance(self.padding, int) or isinstance(self.padding, bool) or not 0 <= self.padding <= 2**15:
            raise ValueError(f"padding={self.padding!r} must be a whole number from 0 to {2**15}; change padding")
        if not isinstance(self.flip, int | float) or isinstance(self.flip, bool) or not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip!r} must be a chance from 0 to 1; change flip")
        if not isinstance(self.fill, int | float) or isinstance(self.fill, bool) or not math.isfinite(self.fill):
            raise ValueError(f"fill={self.fill!r} must be a finite number; change fill")
