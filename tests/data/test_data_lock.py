"""Several processes at one folder, folders that can't be written, and processes that die: with real processes, no network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import filelock
import pytest
import ranks
from mnist_files import CHECKSUMS, FILES, fill, md5, serve_to_torchvision

from hyperopt.data import DataError, files
from hyperopt.data.mnist import MNIST

REPOSITORY = Path(__file__).parents[2]
SIMPLE = {"a": b"first" * 1000, "b": b"second" * 1000}
SIMPLE_CHECKSUMS = {name: md5(data) for name, data in SIMPLE.items()}
# A process that obtains SIMPLE from a source that takes its time; `started` is a line for each time that the source is asked, and
# half of a file is there all that time.
CODE = """
import hashlib, pathlib, sys, time
from hyperopt.data.files import obtain
from hyperopt.data.mnist import MNIST
FILES = {"a": b"first" * 1000, "b": b"second" * 1000}
root, seconds, fails = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "fails"

def slow(staging):
    (staging / "a").write_bytes(FILES["a"][:10])
    with open(root / "started", "a") as file:
        file.write("asked\\n")
    time.sleep(seconds)
    if fails:
        raise OSError("no network")
    for name, data in FILES.items():
        (staging / name).write_bytes(data)
    return staging

folder = pathlib.Path("raw"), {name: hashlib.md5(data).hexdigest() for name, data in FILES.items()}
assert obtain(MNIST(root=str(root / "data")), "NAME", [folder], {"a slow source": slow}) == FILES
"""


def start(root: Path, seconds: float = 0.0, outcome: str = "works") -> ForkServerProcess:
    return ranks.start(CODE, root, seconds, outcome)


def wait_for(path: Path, process: ForkServerProcess) -> None:
    """Wait until ``path`` is there; the process that makes it must not end before."""
    end = time.monotonic() + 60
    while not path.exists():
        assert process.exitcode is None
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process: ForkServerProcess) -> int | None:
    """The exit status of a process that ends by itself within a minute."""
    process.join(60)
    return process.exitcode


def killed(process: ForkServerProcess) -> None:
    process.kill()  # SIGKILL
    process.join()


def asked(root: Path) -> int:
    return len((root / "started").read_text().splitlines())


class Source:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, staging: Path) -> Path:
        self.asked += 1
        for name, data in SIMPLE.items():
            (staging / name).write_bytes(data)
        return staging


def obtain(root: Path, source: Callable[[Path], Path]) -> dict[str, bytes]:
    return files.obtain(MNIST(root=str(root)), "NAME", [(Path("raw"), SIMPLE_CHECKSUMS)], {"a source": source})


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- several at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_second_process_waits_and_reads_what_the_first_fetched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = start(tmp_path, seconds=0.5)
    wait_for(tmp_path / "started", first)
    source = Source()
    assert obtain(tmp_path / "data", source) == SIMPLE and source.asked == 0
    assert "once no other process does" in caplog.text
    assert ended(first) == 0
    assert kept(tmp_path / "data" / "raw") == SIMPLE  # and no lock


@pytest.mark.slow
def test_of_five_processes_at_once_one_asks_the_source(tmp_path: Path) -> None:
    processes = [start(tmp_path, seconds=0.3) for _ in range(5)]
    assert [ended(process) for process in processes] == [0] * 5
    assert asked(tmp_path) == 1 and kept(tmp_path / "data" / "raw") == SIMPLE


@pytest.mark.manual
def test_of_processes_that_load_a_dataset_at_once_one_downloads_it(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torchvision's own download, from a server of ours; it asks for each file twice, once to see where it is."""
    import torchvision.datasets

    serve_to_torchvision(monkeypatch, torchvision.datasets.MNIST, server.folder, server.url)
    code = (
        "import json, sys, torchvision.datasets\n"
        "from hyperopt.data.mnist import MNIST\n"
        "theirs, (mirrors, resources, checksums) = torchvision.datasets.MNIST, json.loads(sys.argv[2])\n"
        "theirs.mirrors, theirs.resources = mirrors, resources\n"
        "class Small(MNIST): train_images, test_images = 12, 5\n"
        "Small.checksums = checksums\n"
        "print(len(Small(train=4, val=3, root=sys.argv[1]).load().test))"
    )
    facts = json.dumps([torchvision.datasets.MNIST.mirrors, torchvision.datasets.MNIST.resources, CHECKSUMS])
    command = [sys.executable, "-c", code, str(tmp_path / "root"), facts]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == ["5\n"] * 3
    assert sorted(server.asked) == sorted(2 * [f"/{name}.gz" for name in FILES])
    assert kept(tmp_path / "root" / "MNIST" / "raw") == FILES


@pytest.mark.slow
def test_processes_that_all_fail_leave_no_file_behind(tmp_path: Path) -> None:
    code = CODE.rpartition("assert ")
    caught = "import pytest\nwith pytest.raises(Exception, match='a slow source: OSError: no network'): " + code[2].lstrip()
    processes = [ranks.start(code[0] + caught, tmp_path, 0.0, "fails") for _ in range(3)]
    assert [ended(process) for process in processes] == [0] * 3
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == ["started"] and asked(tmp_path) == 3


def test_a_process_waits_no_longer_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.1)
    source = Source()
    with (
        files.one_writer(tmp_path / "raw"),
        pytest.raises(DataError, match=r"\.lock'.*nother process.*end it(?s:.*)dataset\.root"),
    ):
        obtain(tmp_path, source)
    assert source.asked == 0 and not (tmp_path / "raw").exists()
    assert obtain(tmp_path, source) == SIMPLE  # and the lock that was waited for in vain is in nobody's way


def test_a_file_system_without_locks_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: object, **_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    source = Source()
    with pytest.raises(DataError, match=rf"cannot write into {tmp_path / 'raw'}: .*No locks available\n.*dataset\.root"):
        obtain(tmp_path, source)
    assert source.asked == 0 and not list(tmp_path.iterdir())


# --- processes that die --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_no_lock_and_its_half_files_are_removed(tmp_path: Path) -> None:
    first = start(tmp_path, seconds=600)
    wait_for(tmp_path / "started", first)
    killed(first)
    folder = tmp_path / "data" / "raw"
    # The files are left, the lock is gone; nothing bears the name of a file of the dataset.
    assert {path.name for path in folder.iterdir()} == {".hyperopt-download", ".hyperopt-download.lock"}
    assert kept(folder / ".hyperopt-download") == {"a": SIMPLE["a"][:10]}
    source, started = Source(), time.monotonic()
    assert obtain(tmp_path / "data", source) == SIMPLE and source.asked == 1 and time.monotonic() - started < 10
    assert kept(folder) == SIMPLE


@pytest.mark.slow
def test_a_process_killed_while_another_waits_hands_on_the_lock(tmp_path: Path) -> None:
    first = start(tmp_path, seconds=600)
    wait_for(tmp_path / "started", first)
    second = start(tmp_path)
    time.sleep(0.2)
    assert second.exitcode is None and asked(tmp_path) == 1
    killed(first)
    assert ended(second) == 0 and asked(tmp_path) == 2
    assert kept(tmp_path / "data" / "raw") == SIMPLE


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the first", "between the two", "after the last"])
def test_a_process_killed_while_it_writes_leaves_no_half_file(tmp_path: Path, moment: str) -> None:
    """Killed when the first file is half way to the disk, when it is there and the second is not, and when both are."""
    function, calls = {"before the first": ("fsync", 1), "between the two": ("fsync", 2), "after the last": ("replace", 2)}[
        moment
    ]
    change = (
        f"real, calls = files.os.{function}, []\n"
        "def hang(*arguments):\n"
        "    calls.append(real(*arguments))\n"
        f"    if len(calls) == {calls}:\n"
        f"        {'os.truncate(arguments[0], 10)' if function == 'fsync' else 'pass'}\n"
        "        (root / 'writing').touch(); time.sleep(600)\n"
        f"files.os.{function} = hang\n"
    )
    code = CODE.replace("folder =", f"import os\nfrom hyperopt.data import files\n{change}folder =")
    writer = ranks.start(code, tmp_path, 0, "works")
    wait_for(tmp_path / "writing", writer)
    killed(writer)
    folder = tmp_path / "data" / "raw"
    there = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    whole = {"before the first": [], "between the two": ["a"], "after the last": ["a", "b"]}[moment]
    assert there == {name: SIMPLE[name] for name in whole}
    source = Source()
    assert obtain(tmp_path / "data", source) == SIMPLE and source.asked == (moment != "after the last")
    assert {name: (folder / name).read_bytes() for name in SIMPLE} == SIMPLE


@pytest.mark.slow
def test_a_reader_never_sees_a_half_file(tmp_path: Path) -> None:
    """One process fetches again and again while this one reads without a lock: a file is whole or not there."""
    code = (
        "import pathlib, shutil, sys; sys.argv[2:] = ['0', 'works']\n" + CODE.rpartition("assert ")[0] + "for _ in range(40):\n"
        "    obtain(MNIST(root=str(root / 'data')), 'NAME', [folder], {'a slow source': slow})\n"
        "    shutil.rmtree(root / 'data')"
    )
    writer = ranks.start(code, tmp_path)
    while writer.exitcode is None:
        files.read_folders([(tmp_path / "data" / "raw", SIMPLE_CHECKSUMS)])  # raises on a half-written file
    assert writer.exitcode == 0
    assert asked(tmp_path) == 40


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
    fill(read_only / "raw")
    source = Source()
    with closed(read_only):
        settings = MNIST(root=str(read_only))
        assert files.obtain(settings, "NAME", [(Path("raw"), CHECKSUMS)], {"a source": source}) == FILES
    assert source.asked == 0 and {path.name for path in (read_only / "raw").iterdir()} == set(FILES)


@pytest.mark.parametrize("there", [False, True])
def test_a_read_only_root_without_the_files_is_said_and_nothing_is_asked(read_only: Path, there: bool) -> None:
    """Whether the dataset's folder is there, empty, or cannot be made."""
    if there:
        (read_only / "raw").mkdir()
    source = Source()
    with closed(read_only), pytest.raises(DataError) as error:
        obtain(read_only, source)
    lines = str(error.value).splitlines()
    assert lines[1] == f"  files in {read_only / 'raw'}: no a, b"
    assert lines[2].startswith(f"  cannot write into {read_only / 'raw'}: ") and "ermission denied" in lines[2]
    assert "dataset.root=DIR" in lines[3] and len(lines) == 4
    assert source.asked == 0 and [path.name for path in read_only.rglob("*")] == ["raw"] * there


def test_an_error_of_the_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", full)
    source = Source()
    with pytest.raises(DataError, match=rf"cannot write into {tmp_path / 'raw'}: .*Read-only file system\n.*dataset\.root"):
        obtain(tmp_path, source)
    assert source.asked == 0
