"""CIFAR-10: both versions, and what is damaged or hostile in them. Nothing here uses a network."""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import cifar_files
import numpy as np
import pytest
import torch
from cifar_files import BATCHES, BINARY, FOLDERS, LABELS, PIXELS, PYTHON, TRAIN, SmallCIFAR10, fill, make_tar, small
from mnist_files import md5

from hyperopt.data import DataError, cifar
from hyperopt.data.cifar import CIFAR10, records

PYTHON_FOLDER, BINARY_FOLDER = CIFAR10.forms


def expected(names: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([PIXELS[name] for name in names])).double() / 255


# --- the two versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_either_version_gives_the_images_in_their_order(tmp_path: Path, folder: str) -> None:
    fill(tmp_path, folder)
    splits = small(tmp_path).load(torch.float64)
    assert splits.shape == (3, 32, 32) and splits.name == "cifar10" and splits.num_classes == 10
    assert torch.equal(torch.cat([splits.train.x, splits.val.x]), expected(TRAIN))
    assert torch.equal(splits.test.x, expected(["test_batch"]))
    assert [*splits.train.y.tolist(), *splits.val.y.tolist()] == [label for name in TRAIN for label in LABELS[name]]
    assert splits.test.y.tolist() == LABELS["test_batch"]
    assert splits.checksums == {name: md5(data) for name, data in FOLDERS[folder].items()}


def test_the_colours_are_the_channels(tmp_path: Path) -> None:
    """As the official page says: 1024 red bytes, then 1024 green and 1024 blue ones, row by row."""
    record = bytearray(3073)
    record[0] = 7
    record[1 + 1024 + 2 * 32 + 5] = 9  # green, third row, sixth column
    data = bytes(record) + BINARY["test_batch.bin"][3073:]

    class Marked(SmallCIFAR10):
        forms = {BINARY_FOLDER: {**SmallCIFAR10.forms[BINARY_FOLDER], "test_batch.bin": md5(data)}}  # noqa: RUF012

    (fill(tmp_path, BINARY_FOLDER) / "test_batch.bin").write_bytes(data)
    test = small(tmp_path, Marked).load(torch.float64).test
    pixels = test.x[0].unflatten(0, (3, 32, 32))
    assert test.y[0] == 7 and pixels[1, 2, 5] == 9 / 255 and pixels.sum() == 9 / 255


@pytest.mark.parametrize("fortran", [False, True])
def test_an_array_of_python_2_is_read_in_its_order(fortran: bool) -> None:
    rows = records("data_batch_1", cifar_files.python_batch("data_batch_1", fortran=fortran))
    assert np.array_equal(rows[:, 1:], PIXELS["data_batch_1"]) and rows[:, 0].tolist() == LABELS["data_batch_1"]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision's class, which takes the files of ours for the official ones."""
    from torchvision.datasets import CIFAR10 as Theirs

    monkeypatch.setattr(Theirs, "train_list", [[name, md5(PYTHON[name])] for name in TRAIN])
    monkeypatch.setattr(Theirs, "test_list", [["test_batch", md5(PYTHON["test_batch"])]])
    monkeypatch.setattr(Theirs, "meta", {**Theirs.meta, "md5": md5(PYTHON["batches.meta"])})
    return Theirs


def test_torchvision_reads_the_same_from_the_same_files(tmp_path: Path, theirs: Any) -> None:
    fill(tmp_path, PYTHON_FOLDER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about what it wrote into pickles under Python 2
        found = theirs(str(tmp_path), train=True)
    splits = small(tmp_path).load(torch.float64)
    ours = torch.cat([splits.train.x, splits.val.x]).unflatten(1, splits.shape)
    assert torch.equal(ours, torch.from_numpy(np.asarray(found.data)).permute(0, 3, 1, 2).double() / 255)
    assert [*splits.train.y.tolist(), *splits.val.y.tolist()] == found.targets


def test_checksums_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR10 as Theirs

    found: dict[str, Any] = dict([*Theirs.train_list, *Theirs.test_list])
    assert {**found, Theirs.meta["filename"]: Theirs.meta["md5"]} == CIFAR10.forms[Theirs.base_folder]


def test_real_files(real_root: Any) -> None:
    splits = CIFAR10(root=real_root(*FOLDERS), download=False, train=200, val=100, test=2000, order="head_tail").load()
    assert splits.train.y[:5].tolist() == [6, 9, 9, 4, 1] and splits.test.y[:5].tolist() == [3, 8, 8, 0, 6]
    assert splits.val.index[-1] == 49_999 and splits.test.x.shape == (2000, 3072)


@pytest.mark.slow
def test_the_real_images_have_the_published_means(real_root: Any) -> None:
    splits = CIFAR10(root=real_root(*FOLDERS), download=False, train=45_000, val=5000, order="head_tail").load()
    assert splits.test.y.bincount().tolist() == [1000] * 10
    assert (splits.train.y.bincount() + splits.val.y.bincount()).tolist() == [5000] * 10
    total = splits.train.x.unflatten(1, splits.shape).sum((0, 2, 3)) + splits.val.x.unflatten(1, splits.shape).sum((0, 2, 3))
    published = torch.tensor([0.4914, 0.4822, 0.4465])  # of the 50,000 images, as everyone normalises by
    torch.testing.assert_close(total / (50_000 * 1024), published, atol=6e-5, rtol=0)


# --- damaged files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["corrupted", "truncated", "empty"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_damaged_file_is_named_and_never_unpickled(
    tmp_path: Path, folder: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(fill(tmp_path, folder).glob("data_batch_3*"))
    data = path.read_bytes()
    path.write_bytes(damaged := {"corrupted": data[:-9] + b"?" + data[-8:], "truncated": data[:-1], "empty": b""}[how])

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(cifar.pickle, "loads", never)
    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(SmallCIFAR10, "sources", {"a source": never})
    with pytest.raises(DataError, match=rf"{path}: md5 {md5(damaged)} .* expected {md5(data)}.*dataset\.root"):
        small(tmp_path).load()
    assert path.read_bytes() == damaged


class Run:
    """Pickles to a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_pickle_that_runs_code_is_never_unpickled(tmp_path: Path, name: str, protocol: int) -> None:
    """Nor is any other: of a damaged form nothing is parsed, and the whole form beside it is read in its place."""
    hostile = pickle.dumps({"data": Run(tmp_path / "made"), "labels": [1]}, protocol)
    (fill(tmp_path, PYTHON_FOLDER) / name).write_bytes(hostile)
    with pytest.raises(DataError, match=rf"{name}: md5 {md5(hostile)} .* expected"):
        small(tmp_path).load()
    fill(tmp_path, BINARY_FOLDER)
    assert len(small(tmp_path).load().test) == 4
    assert not (tmp_path / "made").exists()


def test_a_damaged_version_beside_a_whole_one_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = fill(tmp_path, PYTHON_FOLDER) / "test_batch"
    damaged.write_bytes(b"")
    fill(tmp_path, BINARY_FOLDER)
    assert small(tmp_path).load().checksums == SmallCIFAR10.forms[BINARY_FOLDER]
    assert str(damaged) in caplog.text


# --- torchvision's download ----------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(server: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive that torchvision downloads and takes for the official one."""
    path = make_tar(server.folder / "cifar-10-python.tar.gz")
    monkeypatch.setattr(theirs, "url", f"{server.url}{path.name}")
    monkeypatch.setattr(theirs, "tgz_md5", md5(path.read_bytes()))
    return path


def test_a_download_is_kept_in_torchvisions_layout(tmp_path: Path, archive: Path, server: Any) -> None:
    root = tmp_path / "root"
    splits = small(root).load(torch.float64)
    assert torch.equal(splits.test.x, expected(["test_batch"]))
    assert {path.name: path.read_bytes() for path in (root / PYTHON_FOLDER).iterdir()} == PYTHON
    assert [path.name for path in root.iterdir()] == [PYTHON_FOLDER]
    asked = len(server.asked)
    assert asked and torch.equal(small(root).load(torch.float64).test.x, splits.test.x) and len(server.asked) == asked


def test_a_binary_version_is_read_and_nothing_downloaded(tmp_path: Path, archive: Path, server: Any) -> None:
    fill(tmp_path / "root", BINARY_FOLDER)
    assert len(small(tmp_path / "root").load().test) == 4 and not server.asked


@pytest.mark.parametrize("how", ["cut", "page", "bomb", "hostile"])
def test_another_archive_is_refused_and_never_opened(
    tmp_path: Path, archive: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a broken connection leaves, what a login page sends, a bomb of two gigabytes, and a pickle that runs code."""
    if how == "hostile":
        make_tar(archive, data_batch_1=pickle.dumps({"data": Run(tmp_path / "made"), "labels": [1]}))
    else:
        bomb = 200 * gzip.compress(bytes(10_000_000))
        archive.write_bytes({"cut": archive.read_bytes()[:-1], "page": b"<html>", "bomb": bomb}[how])

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(tarfile, "open", never)
    with pytest.raises(DataError, match=r"torchvision's download: RuntimeError: File not found or corrupted"):
        small(tmp_path / "root").load()
    assert not (tmp_path / "root").exists() and not (tmp_path / "made").exists()


def test_an_archive_of_other_files_is_refused_by_their_checksums(
    tmp_path: Path, archive: Path, theirs: Any, monkeypatch: Any
) -> None:
    """Were the archive's checksum right and a file's not, the pickle is not read either."""
    make_tar(archive, data_batch_1=pickle.dumps({"data": Run(tmp_path / "made"), "labels": [1]}))
    monkeypatch.setattr(theirs, "tgz_md5", md5(archive.read_bytes()))
    with pytest.raises(DataError, match=r"torchvision's download: RuntimeError: Dataset not found or corrupted"):
        small(tmp_path / "root").load()
    assert not (tmp_path / "root").exists() and not (tmp_path / "made").exists()


def test_one_error_lists_both_versions_and_the_download(tmp_path: Path, archive: Path) -> None:
    archive.unlink()
    (tmp_path / BINARY_FOLDER).mkdir()
    (tmp_path / BINARY_FOLDER / "data_batch_1.bin").write_bytes(BINARY["data_batch_1.bin"])
    with pytest.raises(DataError) as error:
        small(tmp_path).load()
    lines = str(error.value).splitlines()
    assert lines[0] == "cifar10: no source has it. Tried:"
    assert lines[1] == f"  files in {tmp_path / PYTHON_FOLDER}: no {', '.join([*BATCHES, 'batches.meta'])}"
    assert lines[2] == f"  files in {tmp_path / BINARY_FOLDER}: no {', '.join(list(BINARY)[1:])}"
    assert lines[3].startswith("  torchvision's download: HTTPError: HTTP Error 404")
    assert "dataset=digits" in lines[4] and f"DIR/{PYTHON_FOLDER} or DIR/{BINARY_FOLDER} holds" in lines[4] and len(lines) == 5
