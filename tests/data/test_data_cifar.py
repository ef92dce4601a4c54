"""CIFAR-10: both versions, its pickles and archives, and everything hostile or damaged in them. Nothing here uses a network."""

from __future__ import annotations

import copyreg
import functools
import http.server
import os
import pickle
import tarfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cifar_files
import numpy as np
import pytest
import torch
from cifar_files import BATCHES, BINARY, FOLDERS, LABELS, PIXELS, PYTHON, TRAIN, SmallCIFAR10, fill, make_tar, small

from hyperopt.data import DataError, cifar
from hyperopt.data.cifar import CIFAR10, read_binary, read_python
from hyperopt.data.fetch import TorchvisionArchive
from hyperopt.data.files import md5, read_tar
from hyperopt.data.pickles import unpickle


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


def test_the_colours_are_the_channels() -> None:
    """As the official page says: 1024 red bytes, then 1024 green and 1024 blue ones, row by row."""
    record = bytearray(3073)
    record[0] = 7
    record[1 + 1024 + 2 * 32 + 5] = 9  # green, third row, sixth column
    images = read_binary(bytes(record), "one")
    assert images.labels.tolist() == [7] and images.pixels[0, 1, 2, 5] == 9 and images.pixels.sum() == 9


def test_torchvision_reads_the_same_from_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10 as Theirs

    fill(tmp_path, "cifar-10-batches-py")
    monkeypatch.setattr(Theirs, "train_list", [[name, md5(PYTHON[name])] for name in TRAIN])
    monkeypatch.setattr(Theirs, "test_list", [["test_batch", md5(PYTHON["test_batch"])]])
    monkeypatch.setattr(Theirs, "meta", {**Theirs.meta, "md5": md5(PYTHON["batches.meta"])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about what it wrote into pickles under Python 2
        theirs = Theirs(str(tmp_path), train=True)
    splits = small(tmp_path).load(torch.float64)
    ours = torch.cat([splits.train.x, splits.val.x]).unflatten(1, splits.shape)
    assert torch.equal(ours, torch.from_numpy(np.asarray(theirs.data)).permute(0, 3, 1, 2).double() / 255)
    assert [*splits.train.y.tolist(), *splits.val.y.tolist()] == theirs.targets


def test_checksums_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR10 as Theirs

    theirs: dict[str, Any] = dict([*Theirs.train_list, *Theirs.test_list])
    assert {**theirs, Theirs.meta["filename"]: Theirs.meta["md5"]} == CIFAR10.python_checksums
    assert Theirs.base_folder == cifar.PYTHON_FOLDER


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
    path.write_bytes({"corrupted": data[:-9] + b"?" + data[-8:], "truncated": data[:-1], "empty": b""}[how])

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(cifar, "unpickle", never)
    monkeypatch.setattr(TorchvisionArchive, "fetch", never)
    with pytest.raises(DataError, match=rf"{path}: md5 .* expected .*dataset\.root"):
        small(tmp_path).load()


def test_a_damaged_version_beside_a_whole_one_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = fill(tmp_path, "cifar-10-batches-py") / "test_batch"
    damaged.write_bytes(b"")
    fill(tmp_path, "cifar-10-batches-bin")
    assert small(tmp_path).load().checksums == SmallCIFAR10.binary_checksums
    assert str(damaged) in caplog.text


@pytest.mark.parametrize("label", [10, 255])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_labels_outside_the_classes_are_refused(tmp_path: Path, version: str, label: int) -> None:
    class Wrong(SmallCIFAR10):
        pass

    labels = [0, label, 0, 0]
    if version == "python":
        path, data = fill(tmp_path, "cifar-10-batches-py") / "data_batch_2", cifar_files.python_batch("data_batch_2", labels)
        Wrong.python_checksums = {**SmallCIFAR10.python_checksums, path.name: md5(data)}
    else:
        path, data = fill(tmp_path, "cifar-10-batches-bin") / "data_batch_2.bin", cifar_files.binary_batch("data_batch_2", labels)
        Wrong.binary_checksums = {**SmallCIFAR10.binary_checksums, path.name: md5(data)}
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"cifar10 \(train images\): label {label} of row 5 is outside the classes 0 to 9"):
        small(tmp_path, Wrong).load()


def test_files_of_another_layout_are_refused() -> None:
    with pytest.raises(DataError, match="some: 3072 bytes are no whole number of records of 3073"):
        read_binary(BINARY["test_batch.bin"][:3072], "some")
    with pytest.raises(DataError, match="some: its 'data' is no array of 3072 bytes an image"):
        read_python(PYTHON["batches.meta"], "some")
    narrow = cifar_files.array(1, 10, bytes(10))
    with pytest.raises(DataError, match="some: its 'data' is no array"):
        read_python(cifar_files.dictionary(data=narrow, labels=cifar_files.numbers([1])), "some")
    wide = cifar_files.array(1, 3072, bytes(8 * 3072), code=b"i8")
    with pytest.raises(DataError, match="some: its 'data' is no array"):
        read_python(cifar_files.dictionary(data=wide, labels=cifar_files.numbers([1])), "some")
    for labels in (b"N", b"](Ne", b"](\x88e", b"](\x8a\x09" + bytes(8) + b"\x01e"):  # None, [None], [True], [2**64]
        pixels = cifar_files.array(4, 3072, PIXELS["test_batch"].tobytes())
        with pytest.raises(DataError, match="some: its 'labels' is no list of whole numbers"):
            read_python(cifar_files.dictionary(data=pixels, labels=labels), "some")


# --- pickles -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fortran", [False, True])
def test_an_array_of_python_2_is_read_in_its_order(fortran: bool) -> None:
    images = read_python(cifar_files.python_batch("data_batch_1", fortran=fortran), "some")
    assert np.array_equal(images.pixels.reshape(4, 3072), PIXELS["data_batch_1"])


@pytest.mark.parametrize("protocol", [3, 4])
def test_an_array_of_todays_numpy_is_read(protocol: int) -> None:
    tree = unpickle(pickle.dumps({"data": PIXELS["test_batch"], "labels": [1, 2]}, protocol), "some")
    assert np.array_equal(tree["data"], PIXELS["test_batch"]) and tree["labels"] == [1, 2]


class Run:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path, call: Any = os.mkdir) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.call, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [os.mkdir, eval, np.load, getattr])
def test_a_pickle_that_calls_anything_is_refused_and_nothing_is_called(tmp_path: Path, call: Any, protocol: int) -> None:
    data = pickle.dumps({"data": Run(tmp_path / "made", call), "labels": [1]}, protocol)
    with pytest.raises(DataError, match=r"some: refused.*it asks for \w+\.\w+"):
        unpickle(data, "some")
    assert not (tmp_path / "made").exists()


HOSTILE = {
    "a name inside a known one": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "attributes set on a known class": b"cnumpy\nndarray\n}(U\x06valuesK\x01ub.",
    "attributes set on another known class": b"cnumpy\ndtype\nN}(U\x04codeK\x01u\x86b.",
    "objects in an array": cifar_files.dictionary(data=cifar_files.array(1, 8, bytes(8), code=b"O8")),
    "fractions in an array": cifar_files.dictionary(data=cifar_files.array(1, 1, bytes(8), code=b"f8")),
    "records in an array": cifar_files.dictionary(data=cifar_files.array(1, 8, bytes(8), code=b"V8")),
    "wide text in an array": cifar_files.dictionary(data=cifar_files.array(1, 1, bytes(8), code=b"U2\n")),
    "too few bytes": cifar_files.dictionary(data=cifar_files.array(2, 3072, bytes(10))),
    "an array without its state": cifar_files.dictionary(data=cifar_files.ARRAY[: cifar_files.ARRAY.index(b"(K\x01")]),
    "a persistent object": b"U\x01xQ.",
    "a registered extension": b"\x80\x02\x82\xf0.",
    "text": b"hello\n",
    "nothing": b"",
    "a cut": PYTHON["data_batch_1"][:-1],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_of_anything_else_is_refused(kind: str) -> None:
    copyreg.add_extension("os", "getcwd", 0xF0)
    try:
        with pytest.raises(DataError, match="some: refused"):
            unpickle(HOSTILE[kind], "some")
    finally:
        copyreg.remove_extension("os", "getcwd", 0xF0)
    assert np.array_equal(unpickle(PYTHON["test_batch"], "some")["data"], PIXELS["test_batch"])  # no stand-in was changed


def test_a_pickle_of_no_dictionary_is_refused() -> None:
    with pytest.raises(DataError, match="some: a pickle of a list, expected a dictionary"):
        unpickle(b"](K\x01e.", "some")


# --- archives ------------------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


HOSTILE_MEMBERS = {
    "a parent": member("../outside"),
    "an absolute path": member("/tmp/outside"),
    "a symlink": member("cifar-10-batches-py/data_batch_0", tarfile.SYMTYPE, "/etc/passwd"),
    "a symlinked folder": member("cifar-10-batches-py/up", tarfile.SYMTYPE, ".."),
    "a hard link": member("cifar-10-batches-py/data_batch_0", tarfile.LNKTYPE, "../../etc/passwd"),
    "a device": member("cifar-10-batches-py/null", tarfile.CHRTYPE),
    "a pipe": member("cifar-10-batches-py/data_batch_0", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_a_hostile_archive_writes_nothing(
    tmp_path: Path, kind: str, checked: bool, archive_url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before it is opened; and were its checksum the right one, the dataset's files would be all that is read."""
    archive_url(make_tar(tmp_path / "cifar-10-python.tar.gz", (HOSTILE_MEMBERS[kind], b"hostile")), official=checked)
    staging = tmp_path / "staging"
    staging.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(staging))
    kept: set[str] = set()
    if checked:
        assert len(small(tmp_path / "root").load().test) == 4
        kept = {"root", "cifar-10-batches-py", *PYTHON}
    else:
        with pytest.raises(DataError, match=r"torchvision's download: .*cifar-10-python\.tar\.gz: md5 .* expected c58f3010"):
            small(tmp_path / "root").load()
    assert {path.name for path in tmp_path.rglob("*")} == {"cifar-10-python.tar.gz", "staging", *kept}


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has more than the 1000 bytes"):
        read_tar(make_tar(tmp_path / "a.tgz").read_bytes(), 1000, "a.tgz")


@pytest.mark.parametrize("how", ["cut", "text", "empty"])
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, how: str) -> None:
    data = make_tar(tmp_path / "a.tgz").read_bytes()
    data = {"cut": data[: len(data) // 2], "text": b"<html>", "empty": b""}[how]
    with pytest.raises(DataError, match=r"a\.tgz (cannot be unpacked|is no whole tar archive)"):
        read_tar(data, 10**6, "a.tgz")


# --- torchvision's download ----------------------------------------------------------------------------------------------------


class Silent(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Says nothing when torchvision hangs up on the answer that tells it where the archive is."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def archive_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let torchvision download an archive of ours, which it takes for the official one."""
    from torchvision.datasets import CIFAR10 as Theirs

    handler = functools.partial(Silent, directory=str(tmp_path))
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")

        def serve(path: Path, official: bool = True) -> None:
            monkeypatch.setattr(Theirs, "url", f"http://127.0.0.1:{server.server_port}/{path.name}")
            if official:
                monkeypatch.setattr(Theirs, "tgz_md5", md5(path.read_bytes()))

        yield serve
        server.shutdown()


def test_a_download_is_kept_in_torchvisions_layout(tmp_path: Path, archive_url: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    archive_url(make_tar(tmp_path / "cifar-10-python.tar.gz"))
    root = tmp_path / "root"
    splits = small(root).load(torch.float64)
    assert torch.equal(splits.test.x, expected(["test_batch"]))
    assert {path.name: path.read_bytes() for path in (root / "cifar-10-batches-py").iterdir()} == PYTHON
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    monkeypatch.setattr(TorchvisionArchive, "fetch", lambda self: pytest.fail("asked again"))
    assert torch.equal(small(root).load(torch.float64).test.x, splits.test.x)


def test_another_archive_is_not_taken(tmp_path: Path, archive_url: Any) -> None:
    path = make_tar(tmp_path / "cifar-10-python.tar.gz")
    archive_url(path)
    path.write_bytes(path.read_bytes()[:-1])  # what a broken connection leaves
    with pytest.raises(DataError, match=r"torchvision's download: .*cifar-10-python\.tar\.gz: md5 .* expected"):
        small(tmp_path / "root").load()
    assert not (tmp_path / "root").exists()


def test_one_error_lists_both_versions_and_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(TorchvisionArchive, "fetch", unreachable)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(BINARY["data_batch_1.bin"])
    with pytest.raises(DataError) as error:
        small(tmp_path).load()
    lines = str(error.value).splitlines()
    assert lines[0] == "CIFAR-10: no source has it. Tried:"
    assert lines[1] == f"  files in {tmp_path / 'cifar-10-batches-py'}: no {', '.join([*BATCHES, 'batches.meta'])}"
    assert lines[2] == f"  files in {tmp_path / 'cifar-10-batches-bin'}: no {', '.join(list(BINARY)[1:])}"
    assert lines[3] == "  torchvision's download: OSError: no network"
    assert "dataset=digits" in lines[4] and "DIR/cifar-10-batches-py or DIR/cifar-10-batches-bin" in lines[4] and len(lines) == 5
