"""Checkpoints: written whole, read without running code, and only by the experiment that they belong to."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt.app import checkpoint
from hyperopt.app.checkpoint import CheckpointError


def content(step: int) -> dict[str, Any]:
    return {"state": {"step": step}, "weights": [torch.arange(3.0), {"x": torch.tensor(1.5, dtype=torch.float64)}], "none": None}


def newest(directory: Path) -> tuple[str, int] | None:
    """Return name and step of what ``load_last`` finds."""
    found = checkpoint.load_last(directory)
    return None if found is None else (found[0].name, found[1]["state"]["step"])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, content(5))
    found = checkpoint.load(path)
    assert found["state"] == {"step": 5} and found["none"] is None
    assert torch.equal(found["weights"][0], torch.arange(3.0)) and found["weights"][1]["x"].dtype == torch.float64
    assert [item.name for item in path.parent.iterdir()] == ["last.pt"]


def test_keeps_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", content(step), keep_previous=True)
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == 3
    assert checkpoint.load(tmp_path / "last.prev.pt")["state"]["step"] == 2
    assert newest(tmp_path) == ("last.pt", 3)


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "last.pt", content(1), keep_previous=True)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "last.pt", content(2), keep_previous=True)
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == 1


class Hostile:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HOSTILE"],)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_hostile_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("HOSTILE", str(tmp_path / "owned"))
    path = tmp_path / "last.pt"
    checkpoint.save(tmp_path / "last.prev.pt", content(1))
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "state": Hostile()}))
    else:
        torch.save({"format": checkpoint.FORMAT, "state": Hostile()}, path, _use_new_zipfile_serialization=kind == "zip")
    for read in (lambda: checkpoint.load(path), lambda: checkpoint.load_last(tmp_path)):  # nor does the one before it stand in
        with pytest.raises(CheckpointError, match=r"was not loaded.*written by this program"):
            read()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 0.5, -1])
def test_truncated_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: float) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "last.pt", content(step), keep_previous=True)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=r"last.pt is truncated or damaged; set ckpt_path"):
        checkpoint.load(tmp_path / "last.pt")
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == ("last.prev.pt", 1)
    assert len(caplog.records) == 1 and "after 1 steps" in caplog.text


def test_flipped_bit_is_noticed(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "last.pt", {**content(step), "big": torch.zeros(1000)}, keep_previous=True)
    data = bytearray((tmp_path / "last.pt").read_bytes())
    data[data.index(bytes(2000)) + 1000] ^= 1
    (tmp_path / "last.pt").write_bytes(data)
    assert newest(tmp_path) == ("last.prev.pt", 1)


def test_both_damaged(tmp_path: Path) -> None:
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"last\.prev\.pt is truncated"):
        checkpoint.load_last(tmp_path)
    (tmp_path / "last.prev.pt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt is truncated"):
        checkpoint.load_last(tmp_path)


def test_none_yet_and_none_there(tmp_path: Path) -> None:
    assert checkpoint.load_last(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint .*last.pt"):
        checkpoint.load(tmp_path / "last.pt")


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.prev.pt", content(4))
    assert newest(tmp_path) == ("last.prev.pt", 4)


@pytest.mark.parametrize("other", [{"format": 99}, {"weights": 1}, [1, 2]])
def test_other_formats_are_refused(tmp_path: Path, other: Any) -> None:
    torch.save(other, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"has format .*this version reads 2"):
        checkpoint.load(tmp_path / "last.pt")


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"loss,accuracy\n1,2\n")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_same_experiment() -> None:
    saved = {"seed": 1, "optimizer.lr": 0.1, "trainer.max_steps": 10, "device": "cpu", "dataset.root": "/a", "solver.rtol": 1e-5}
    check = checkpoint.check_same_experiment
    check(Path("c.pt"), saved, {**saved, "trainer.max_steps": 20, "device": "cuda", "dataset.root": "/b"})
    with pytest.raises(CheckpointError, match=r"c.pt is of another experiment: optimizer.lr is 0.1 there and 0.2 here"):
        check(Path("c.pt"), saved, {**saved, "optimizer.lr": 0.2})
    with pytest.raises(CheckpointError, match=r"solver.damping is None there and 0.5 here"):
        check(Path("c.pt"), saved, {**saved, "solver.damping": 0.5})
    check(Path("c.pt"), saved, {**saved, "solver.rtol": 1.0, "optimizer.lr": 0.2}, evaluate=True)
    with pytest.raises(CheckpointError, match="seed"):
        check(Path("c.pt"), saved, {**saved, "seed": 2}, evaluate=True)
