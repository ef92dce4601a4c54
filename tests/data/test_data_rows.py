"""Datasets that are not images: drawn from a linear model, scikit-learn's diabetes study, and sparse word counts."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mnist_files import md5

from hyperopt.data import DataError, newsgroups
from hyperopt.data.diabetes import Diabetes
from hyperopt.data.newsgroups import Newsgroups
from hyperopt.data.synthetic import Synthetic


def test_rows_of_a_linear_model() -> None:
    settings: dict[str, Any] = {"train": 300, "val": 200, "test": 100, "features": 5, "noise": 0.0, "shift": 3.0, "seed": 7}
    splits = Synthetic(**settings, targets="numbers").load(torch.float64)
    weights = np.random.RandomState(7).randn(5) + 3
    for rows, count in ((splits.train, 300), (splits.val, 200), (splits.test, 100)):
        assert len(rows) == count
        torch.testing.assert_close(rows.x @ torch.from_numpy(weights), rows.y)
    assert not set(splits.train.index.tolist()) & set(splits.val.index.tolist())
    labels = Synthetic(**settings).load(torch.float64)
    assert torch.equal(labels.train.y, (splits.train.y > 0).long()) and labels.num_classes == 2


def test_diabetes_is_standardised_over_the_training_rows_alone() -> None:
    splits = Diabetes(seed=3).load(torch.float64)
    assert [len(rows) for rows in (splits.train, splits.val, splits.test)] == [200, 121, 121]
    for values in (splits.train.x, splits.train.y[:, None]):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1], dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1], dtype=torch.float64))
    assert len({*splits.train.index.tolist(), *splits.val.index.tolist(), *splits.test.index.tolist()}) == 442


BAD = [
    (lambda: Synthetic(features=0), ": features=0"),
    (lambda: Synthetic(targets="words"), ": targets='words' is not one of classes, numbers"),
    (lambda: Synthetic(noise=float("nan")), ": noise=nan"),
    (lambda: Diabetes(train=400, val=42), "leave none to test on"),
    (lambda: Newsgroups(normalize="standard"), ": normalize='standard' is not one of unit"),
    (lambda: Newsgroups(train=11_000), "need 16657 different rows"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_newsgroups_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no 20news-bydate.tar.gz\n.*no 20news-bydate_py3.pkz\n.*dataset.download=false"):
        Newsgroups(root=str(tmp_path), download=False).load()


def packed(files: dict[str, bytes]) -> bytes:
    """A ``.tar.gz`` of these files."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=1) as members:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            members.addfile(member, io.BytesIO(data))
    return archive.getvalue()


def test_the_archive_and_the_cache_are_what_scikit_learn_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the posts is that of its ``load_files``; the cache is made as it makes its own."""
    from sklearn.datasets import load_files

    groups = ("sci.space", "alt.atheism", "rec.autos")
    files = {
        f"20news-bydate-{part}/{group}/{number}": f"From: {number}\n\n{group}, caf\xe9 {number}\n".encode("latin-1")
        for part in ("test", "train")
        for number in (9, 100, 33, 7)
        for group in groups
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    theirs: dict[str, Any] = {
        part: load_files(str(tmp_path / f"20news-bydate-{part}"), encoding="latin1") for part in ("train", "test")
    }
    cache = zlib.compress(pickle.dumps(theirs))
    texts = {part: md5("\0".join(theirs[part]["data"]).encode()) for part in theirs}
    monkeypatch.setattr(newsgroups, "CHECKSUMS", texts)
    for kind, name, data in (("archive", newsgroups.ARCHIVE, packed(files)), ("cache", newsgroups.CACHE, cache)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(data)
        monkeypatch.setattr(Newsgroups, f"{kind}_checksums", {name: md5(data)})
        found = Newsgroups(root=str(tmp_path / kind), download=False).posts()
        for part, posts in found.items():
            assert posts["data"] == theirs[part]["data"] and posts["target"].tolist() == theirs[part]["target"].tolist()


def test_a_download_is_kept_and_read(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"20news-bydate-{part}/group/{number}": b"\n\ntext" for part in ("train", "test") for number in range(3)}
    (server.folder / "5975967").write_bytes(archive := packed(files))
    monkeypatch.setattr(newsgroups, "URL", f"{server.url}5975967")
    with pytest.raises(DataError, match=r"torchvision's download: .*tar\.gz: sha256 \w+ of \d+ bytes, expected 8f1b2514"):
        Newsgroups(root=str(tmp_path / "root")).load()
    assert not (tmp_path / "root").exists()
    monkeypatch.setattr(Newsgroups, "archive_checksums", {newsgroups.ARCHIVE: hashlib.sha256(archive).hexdigest()})
    text = "\0".join(["\n\ntext"] * 3).encode()
    monkeypatch.setattr(newsgroups, "CHECKSUMS", dict.fromkeys(("train", "test"), md5(text)))
    asked = []
    for _ in range(2):
        assert Newsgroups(root=str(tmp_path / "root")).posts()["test"]["data"] == ["\n\ntext"] * 3
        asked.append(len(server.asked))
    assert asked[0] == asked[1] and [path.name for path in (tmp_path / "root").iterdir()] == [newsgroups.ARCHIVE]
    monkeypatch.setattr(newsgroups, "CHECKSUMS", {"train": md5(text), "test": "0" * 32})
    with pytest.raises(DataError, match=f"the test posts in .*: md5 {md5(text)} of .* expected 0000"):
        Newsgroups(root=str(tmp_path / "root")).posts()


class Mark:
    """Pickles to a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("what", ["code", "page", "empty", "cut"])
def test_another_cache_is_never_unpickled(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that scikit-learn made on another machine is another file too: it is refused, and left as it is."""
    cache = zlib.compress(pickle.dumps({"train": Mark(tmp_path / "made"), "test": []}))
    cache = {"code": cache, "page": b"<html>", "empty": b"", "cut": cache[:-5]}[what]
    (tmp_path / newsgroups.CACHE).write_bytes(cache)
    with pytest.raises(
        DataError, match=rf"{newsgroups.CACHE}: sha256 {hashlib.sha256(cache).hexdigest()} of .* expected 38ff3ad4"
    ):
        Newsgroups(root=str(tmp_path)).load()
    assert not (tmp_path / "made").exists() and (tmp_path / newsgroups.CACHE).read_bytes() == cache


def test_an_archive_with_a_file_outside_of_itself_writes_nothing_there(tmp_path: Path) -> None:
    """Were its checksum right: the standard library's filter for data refuses it."""
    with pytest.raises(tarfile.OutsideDestinationError):
        newsgroups.read_archive(packed({"../outside": b"hostile"}))


POSTS = [
    "",
    "\n",
    "a\n\n",
    "a\n\n\n-- \nname",
    "a\n\n> quoted\nX writes:\ntext\n\n--\nname\n",
    "a\n\ntext\n|x\n",
    "a\n\n \n---\n",
]


def removed_by_scikit_learn(text: str) -> str:
    from sklearn.datasets import _twenty_newsgroups as theirs

    return theirs.strip_newsgroup_quoting(theirs.strip_newsgroup_footer(theirs.strip_newsgroup_header(text)))


@pytest.mark.parametrize("text", POSTS)
def test_what_is_removed_is_what_scikit_learn_removes(text: str) -> None:
    assert newsgroups.strip(text) == removed_by_scikit_learn(text)


@pytest.mark.slow
def test_what_is_removed_from_the_real_posts(real_root: Any) -> None:
    posts = Newsgroups(root=real_root(newsgroups.CACHE), download=False).posts()
    for part in posts.values():
        assert [newsgroups.strip(text) for text in part["data"]] == [removed_by_scikit_learn(text) for text in part["data"]]
        assert np.bincount(part["target"]).min() > 200 and len(part["data"]) == len(part["target"])


@pytest.mark.slow
def test_the_words_of_the_newsgroups(real_root: Any) -> None:
    splits = Newsgroups(root=real_root("20news-bydate_py3.pkz"), download=False).load(torch.float64)
    assert splits.train.x.shape == (5657, 101_631) and splits.train.x.layout == torch.sparse_csr
    assert len(splits.test) == 7532 and splits.num_classes == 20
    lengths = splits.val.x.to_sparse_coo().pow(2).sum(1).to_dense()  # 1, or 0 for a post of which nothing is left
    assert bool(((lengths - 1).abs() < 1e-12).logical_or(lengths == 0).all())
