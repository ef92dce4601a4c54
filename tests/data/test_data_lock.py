"""Several processes at one folder, folders that can't be written, and processes that die: with real processes, no network."""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperopt.data import DataError, lock, sources
from hyperopt.data.files import md5, write_folder
from hyperopt.data.lock import one_process
from hyperopt.data.mnist import FashionMNIST

REPOSITORY = Path(__file__).parents[2]
FILES = {"a": b"first" * 1000, "b": b"second" * 1000}
CHECKSUMS = {name: md5(data) for name, data in FILES.items()}
# A process that obtains FILES from a source that takes its time; `started` is a line for each time that a source is asked.
CODE = """
import pathlib, sys, time
from hyperopt.data.sources import Folder, obtain
from hyperopt.data.files import md5
FILES = {"a": b"first" * 1000, "b": b"second" * 1000}
root, seconds, fails = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "fails"

class Slow:
    name = "a slow source"
    def fetch(self):
        with open(root / "started", "a") as file:
            file.write("asked\\n")
        time.sleep(seconds)
        if fails:
            raise OSError("no network")
        return FILES

folder = Folder(root / "data" / "raw", {name: md5(data) for name, data in FILES.items()})
print(obtain("NAME", [folder], [Slow()], download=True, hint="pray").files == FILES)
"""


def start(root: Path, seconds: float = 0.0, outcome: str = "works") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(root), str(seconds), outcome]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until ``path`` is there; the process that makes it must not end before."""
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def asked(root: Path) -> int:
    return len((root / "started").read_text().splitlines())


class Source:
    name = "a source"

    def __init__(self, works: bool = True) -> None:
        self.works, self.asked = works, 0

    def fetch(self) -> dict[str, bytes]:
        self.asked += 1
        if not self.works:
            raise OSError("no network")
        return FILES


def obtain(folder: Path, source: Source) -> dict[str, bytes]:
    return sources.obtain("NAME", [sources.Folder(folder, CHECKSUMS)], [source], download=True, hint="pray").files


# --- several at once -----------------------------------------------------------------------------------------------------------


def test_the_second_process_waits_and_reads_what_the_first_fetched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = start(tmp_path, seconds=0.5)
    wait_for(tmp_path / "started", first)
    source = Source()
    assert obtain(tmp_path / "data" / "raw", source) == FILES and source.asked == 0
    assert "another process is fetching" in caplog.text
    assert first.communicate()[0] == "True\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "data" / "raw").iterdir()} == FILES  # and no lock


def test_of_many_processes_at_once_one_asks_the_source(tmp_path: Path) -> None:
    processes = [start(tmp_path, seconds=0.3) for _ in range(4)]
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 4
    assert asked(tmp_path) == 1


def test_processes_that_all_fail_leave_nothing_behind(tmp_path: Path) -> None:
    processes = [start(tmp_path, outcome="fails") for _ in range(2)]
    for process in processes:
        assert "a slow source: OSError: no network" in process.communicate()[1] and process.returncode == 1
    assert not list((tmp_path / "data").rglob("*.lock")) and asked(tmp_path) == 2


def test_a_process_waits_no_longer_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)
    source = Source()
    with one_process(tmp_path / "raw"), pytest.raises(DataError, match=r"another process .* end it, .*/raw/\.lock"):
        obtain(tmp_path / "raw", source)
    assert source.asked == 0 and not (tmp_path / "raw").exists()
    assert obtain(tmp_path / "raw", source) == FILES  # and the lock that was waited for in vain is in nobody's way


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(self: object, **_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", none)
    assert obtain(tmp_path / "raw", Source()) == FILES
    assert "cannot lock" in caplog.text and "No locks available" in caplog.text


# --- processes that die --------------------------------------------------------------------------------------------------------


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = start(tmp_path, seconds=600)
    wait_for(tmp_path / "started", first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    folder = tmp_path / "data" / "raw"
    assert (folder / ".lock").exists()  # the file is left, the lock is gone
    source = Source()
    assert obtain(folder, source) == FILES and source.asked == 1
    assert "waiting" not in caplog.text
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_a_process_killed_while_another_waits_hands_on_the_lock(tmp_path: Path) -> None:
    first = start(tmp_path, seconds=600)
    wait_for(tmp_path / "started", first)
    second = start(tmp_path)
    time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "True\n" and asked(tmp_path) == 2
    first.communicate()


def test_a_process_killed_while_it_writes_leaves_no_half_file(tmp_path: Path) -> None:
    """Killed with the first file half way to the disk and the second not begun."""
    code = (
        "import os, pathlib, sys, time; from hyperopt.data import files\n"
        "def hang(descriptor): os.truncate(descriptor, 10); pathlib.Path(sys.argv[1], 'writing').touch(); time.sleep(600)\n"
        "files.os.fsync = hang\n"
        "files.write_folder(pathlib.Path(sys.argv[1]), {'a': b'first' * 1000})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writer = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "writing", writer)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert [path.stat().st_size for path in tmp_path.glob(".a.*.part")] == [10]
    source = Source()
    assert obtain(tmp_path, source) == FILES and source.asked == 1


# --- what cannot be written ----------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only() -> Iterator[Path]:
    """An empty directory that may not be written into; as the superuser, whom nothing stops, become another user."""
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents are closed to other users
        root = Path(name)
        yield root
        for path in (root, *root.iterdir()):
            path.chmod(0o755)


@contextlib.contextmanager
def closed(root: Path) -> Iterator[None]:
    for path in (root, *root.iterdir()):
        path.chmod(0o555)
    superuser = os.getuid() == 0
    if superuser:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if superuser:
            os.setresuid(0, 0, 0)


def test_a_read_only_root_works_when_the_files_are_there(read_only: Path) -> None:
    write_folder(read_only / "raw", FILES)
    source = Source()
    with closed(read_only):
        assert obtain(read_only / "raw", source) == FILES
    assert source.asked == 0 and {path.name for path in (read_only / "raw").iterdir()} == set(FILES)


def test_a_read_only_root_without_the_files_is_said_and_nothing_is_asked(read_only: Path) -> None:
    source = Source()
    with closed(read_only), pytest.raises(DataError) as error:
        obtain(read_only / "raw", source)
    assert f"files in {read_only / 'raw'}: no a, b\n  a source: not tried, {read_only} is read-only\npray" in str(error.value)
    assert source.asked == 0 and not list(read_only.iterdir())


def test_an_error_of_the_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", full)
    source = Source()
    with pytest.raises(DataError, match=rf"cannot write into {tmp_path / 'raw'}.*Read-only file system.*dataset\.root"):
        obtain(tmp_path / "raw", source)
    assert source.asked == 0


# --- folders of the system -----------------------------------------------------------------------------------------------------


def test_a_folder_of_the_system_is_read_in_place_whatever_the_root(tmp_path: Path) -> None:
    packaged, root = tmp_path / "share", tmp_path / "root" / "raw"
    write_folder(packaged, {f"{name}.gz": gzip.compress(data) for name, data in FILES.items()})  # as Debian has them
    folders = [sources.Folder(root, CHECKSUMS), sources.Folder(packaged, CHECKSUMS)]
    source = Source()
    found = sources.obtain("NAME", folders, [source], download=False, hint="pray")
    assert found.files == FILES and found.folder.path == packaged and source.asked == 0 and not root.parent.exists()
    write_folder(root, {"a": FILES["a"]})  # half a dataset in the root does not hide it
    assert sources.obtain("NAME", folders, [source], download=True, hint="pray").folder.path == packaged
    write_folder(root, {"b": FILES["b"]})
    assert sources.obtain("NAME", folders, [source], download=True, hint="pray").folder.path == root


def test_fashion_mnist_looks_into_debians_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(FashionMNIST.packaged) == ("/usr/share/datasets/fashion-mnist",)
    monkeypatch.setattr(FashionMNIST, "packaged", (str(tmp_path / "share"),))
    with pytest.raises(DataError) as error:
        FashionMNIST(root=str(tmp_path / "root"), download=False).load()
    text = str(error.value)
    assert f"files in {tmp_path / 'share'}: no train-images" in text and "apt-get install dataset-fashion-mnist" in text
    assert "torchvision's download: not tried, dataset.download=false" in text
