"""Datasets: settings refused before loading, splits, digits, and the real MNIST and Fashion-MNIST where they lie."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperopt.data import DataError, digits
from hyperopt.data.cifar import CIFAR10
from hyperopt.data.digits import Digits
from hyperopt.data.mnist import MNIST, FashionMNIST
from hyperopt.data.splits import Images, Splits, draw_rows, make_splits

# --- settings: refused before anything is loaded -------------------------------------------------------------------------------

BAD = [
    (Digits, {"train": 0}, "train=0"),
    (Digits, {"train": -5}, "train=-5"),
    (Digits, {"val": -1}, "val=-1"),
    (Digits, {"test": 0}, "test=0"),
    (Digits, {"train": 1.5}, "train=1.5"),
    (Digits, {"train": True}, "train=True"),
    (Digits, {"train": 2000}, "train=2000"),
    (Digits, {"test": 398}, "test=398"),
    (Digits, {"train": 1397, "val": 400, "test": None}, "train=1397"),
    (Digits, {"order": "random"}, "order='random'"),
    (Digits, {"normalize": "minmax"}, "normalize='minmax'"),
    (Digits, {"seed": -1}, "seed=-1"),
    (Digits, {"seed": 2**32}, "seed=4294967296"),
    (MNIST, {"train": 60_001}, "train=60001"),
    (MNIST, {"train": 55_001, "val": 5000}, "train=55001 and val=5000"),
    (MNIST, {"test": 10_001}, "test=10001"),
    (MNIST, {"root": " "}, "root=' '"),
    (FashionMNIST, {"val": 70_000}, "val=70000"),
    (FashionMNIST, {"download": "maybe"}, "download='maybe'"),
    (CIFAR10, {"train": 45_001}, "train=45001 and val=5000"),
]


@pytest.mark.parametrize(("kind", "values", "message"), BAD)
def test_a_bad_value_is_refused_with_key_and_value(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        kind(**values)
    assert str(error.value).startswith(f"{kind.__name__}: {message}")
    assert str(error.value).endswith(tuple(f"; change {name}" for name in values)) or "; lower train or val" in str(error.value)


def test_the_largest_splits_are_accepted() -> None:
    assert Digits(train=1396, val=400, test=1).test == 1
    assert MNIST(train=55_000, val=5000, test=10_000).val == 5000
    assert MNIST(train=60_000, val=0).train == 60_000


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Digits().train = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_default_root_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPEROPT_DATA", "/somewhere")
    assert MNIST().root == "/somewhere"
    monkeypatch.delenv("HYPEROPT_DATA")
    assert MNIST().root == "data"


def test_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, hyperopt.data; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# --- splits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "head_tail", "tail_head"])
@pytest.mark.parametrize("settings", [Digits, MNIST])
def test_splits_are_disjoint_and_have_their_sizes(settings: Any, order: str) -> None:
    choices: list[dict[str, Any]] = [
        {},
        {"train": 1, "val": 1, "test": 7},
        {"train": 90, "val": 0, "test": 9},
        {"train": 900, "val": 800, "test": None},
    ]
    for values in choices:
        chosen = settings(order=order, **values)
        rows = {name: set(index.tolist()) for name, index in draw_rows(chosen).items()}
        assert len(rows["train"]) == chosen.train and len(rows["val"]) == chosen.val
        assert not rows["train"] & rows["val"]
        if settings is Digits:
            assert not rows["test"] & (rows["train"] | rows["val"])
            assert len(rows["test"]) == (97 if chosen.test is None else chosen.test)
        else:
            assert len(rows["test"]) == (chosen.test or 10_000) and max(rows["test"]) < 10_000
        assert max(rows["train"] | rows["val"]) < chosen.train_images


def test_shuffled_rows_come_from_the_seed_alone() -> None:
    first = draw_rows(MNIST(seed=3))
    np.random.seed(0)
    torch.manual_seed(1)
    again, other = draw_rows(MNIST(seed=3)), draw_rows(MNIST(seed=4))
    for name in first:
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_shuffled_rows_are_pinned() -> None:
    """The rows behind every published number: a change of generator must not pass unseen."""
    rows = draw_rows(Digits(seed=0))
    expected = np.random.RandomState(0).permutation(1797)
    assert np.array_equal(np.concatenate([rows["train"], rows["val"], rows["test"]]), expected)
    assert rows["train"][:4].tolist() == [1081, 1707, 927, 713]


def test_head_tail_takes_exactly_the_first_and_the_last_rows() -> None:
    rows = draw_rows(MNIST(train=5000, val=3000, test=200, order="head_tail"))
    assert np.array_equal(rows["train"], np.arange(5000))
    assert np.array_equal(rows["val"], np.arange(57_000, 60_000))
    assert np.array_equal(rows["test"], np.arange(200))
    turned = draw_rows(MNIST(train=3000, val=5000, order="tail_head"))
    assert np.array_equal(turned["train"], rows["val"]) and np.array_equal(turned["val"], rows["train"])


def test_head_tail_without_own_test_rows_tests_in_between() -> None:
    rows = draw_rows(Digits(train=10, val=20, test=5, order="head_tail"))
    assert np.array_equal(rows["test"], np.arange(10, 15))
    assert np.array_equal(rows["val"], np.arange(1777, 1797))


class TinySettings(Digits):
    train_images = 6


def tiny(pixels: np.ndarray | None = None, labels: Any = (0, 1, 2, 0, 1, 2), **values: Any) -> Splits:
    pixels = np.arange(6 * 4).reshape(6, 1, 2, 2).astype(np.uint8) if pixels is None else pixels
    chosen: dict[str, Any] = {"train": 3, "val": 2, "test": None, "order": "head_tail", **values}
    settings = TinySettings(**chosen)
    images = Images(pixels, np.asarray(labels))
    return make_splits(settings, images, None, name="tiny", num_classes=3, largest=8, checksums={}, dtype=torch.float64)


def test_rows_keep_pixels_labels_and_numbers_together() -> None:
    splits = tiny()
    assert splits.shape == (1, 2, 2) and splits.num_classes == 3 and len(splits.train) == 3
    assert torch.equal(splits.val.x, torch.arange(16, 24, dtype=torch.float64).reshape(2, 4) / 8)
    assert splits.val.y.tolist() == [1, 2] and splits.val.index.tolist() == [4, 5]
    assert splits.test.y.tolist() == [0] and splits.test.index.tolist() == [3]
    assert splits.val.y.dtype == splits.val.index.dtype == torch.int64


def test_standard_normalization_uses_the_training_rows_only() -> None:
    pixels = np.arange(6 * 2 * 4).reshape(6, 2, 2, 2).astype(np.float64)
    pixels[:, 1] *= 10  # each channel has its own scale
    splits = tiny(pixels, normalize="standard")
    train = splits.train.x.reshape(3, 2, 4)
    torch.testing.assert_close(train.mean((0, 2)), torch.zeros(2, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(train.std((0, 2), correction=0), torch.ones(2, dtype=torch.float64), atol=1e-14, rtol=0)
    mean, std = pixels[:3].mean((0, 2, 3)), pixels[:3].std((0, 2, 3))
    expected = (pixels[4:] - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(splits.val.x.numpy(), expected.reshape(2, -1), atol=1e-12)


def test_a_constant_channel_is_refused_rather_than_divided_by_zero() -> None:
    pixels = np.random.RandomState(0).randint(0, 8, (6, 2, 2, 2)).astype(np.uint8)
    pixels[:3, 1] = 5  # in the training rows only
    with pytest.raises(DataError, match=r"tiny: a channel is constant over the 3 training rows; set dataset\.normalize=unit"):
        tiny(pixels, normalize="standard")
    assert torch.isfinite(tiny(pixels).train.x).all()


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"tiny \(train images\): label 3 of row 5 is outside the classes 0 to 2"):
        tiny(labels=(0, 1, 2, 0, 1, 3))
    with pytest.raises(DataError, match="label -1 of row 0"):
        tiny(labels=(-1, 1, 2, 0, 1, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    pixels = np.ones((6, 1, 2, 2), np.float32)
    pixels[4, 0, 1, 0] = value
    with pytest.raises(DataError, match=r"row 4 holds values that are not finite \(1 such rows\)"):
        tiny(pixels)


def test_wrong_numbers_of_images_are_refused() -> None:
    with pytest.raises(DataError, match="6 images but 5 labels"):
        tiny(labels=(0, 1, 2, 0, 1))
    with pytest.raises(DataError, match="tiny: 5 train images, expected 6"):
        tiny(np.ones((5, 1, 2, 2), np.uint8), labels=(0, 1, 2, 0, 1))


# --- digits --------------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    splits = Digits(seed=7).load(torch.float64)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1000, 400, 397)
    assert splits.shape == (1, 8, 8) and splits.num_classes == 10 and splits.name == "digits"
    assert set(splits.checksums) == {"digits-images", "digits-labels"}
    bunch: Any = load_digits()
    rows = torch.cat([splits.train.index, splits.val.index, splits.test.index])
    assert torch.equal(rows.sort().values, torch.arange(1797))
    for part in (splits.train, splits.val, splits.test):
        assert torch.equal(part.x, torch.from_numpy(bunch["data"])[part.index] / 16)
        assert torch.equal(part.y, torch.from_numpy(bunch["target"])[part.index])
    assert splits.train.x.min() == 0 and splits.train.x.max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits_have_the_asked_dtype_and_leave_the_default(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    splits = Digits(train=20, val=10, test=5).load(dtype, "cpu")
    assert splits.train.x.dtype == splits.test.x.dtype == dtype and torch.get_default_dtype() == before


def test_digits_whose_file_is_elsewhere_come_by_scikit_learns_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = digits.bundled()
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    by_loader = digits.bundled()
    for one, two in zip(usual, by_loader, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())


@pytest.mark.slow
def test_digits_do_not_import_scikit_learn() -> None:
    code = "import sys; from hyperopt.data.digits import bundled; bundled(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = digits.bundled()
    labels = labels.copy()
    labels[5] = 0
    monkeypatch.setattr(digits, "bundled", lambda: (pixels, labels))
    with pytest.raises(DataError, match="scikit-learn: digits-labels: md5"):
        Digits().load()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_digits_on_cuda_equal_those_on_the_cpu() -> None:
    here, there = Digits().load(torch.float64, "cpu"), Digits().load(torch.float64, "cuda")
    for name in ("x", "y", "index"):
        assert getattr(there.train, name).device.type == "cuda"
        assert torch.equal(getattr(here.train, name), getattr(there.train, name).cpu())


# --- the real files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "folder"), [(MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")])
def test_real_files(kind: Any, folder: str, real_root: Any) -> None:
    splits = kind(root=real_root(f"{folder}/raw"), download=False, train=300, val=200, order="head_tail").load()
    assert splits.train.x.shape == (300, 784) and splits.test.x.shape == (10_000, 784) and splits.shape == (1, 28, 28)
    assert splits.train.x.min() == 0 and splits.train.x.max() == 1
    assert splits.test.y.bincount().shape == (10,)
    first = {"MNIST": [5, 0, 4, 1, 9], "FashionMNIST": [9, 0, 0, 3, 0]}[folder]
    assert splits.train.y[:5].tolist() == first
    assert splits.val.index[-1] == 59_999 and splits.checksums == kind.checksums
