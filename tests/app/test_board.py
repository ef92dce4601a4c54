"""``hyperopt tensorboard``: which names it shows, what it pins, and that TensorBoard finds the runs behind the links."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
from event_files import given
from launcher import Launcher
from toy_task import config, go

from hyperopt.app import board
from hyperopt.app.files import write_json


def sweep(root: Path) -> None:
    """Two jobs of a sweep that varies the rate."""
    for number in range(2):
        out = root / str(number)
        out.mkdir(parents=True)
        write_json(out / "job.json", {"number": number, "overrides": [f"optimizer.lr=0.0{number + 1}", "device=cpu"]})
        write_json(root / "multirun.yaml", {"hydra": {"overrides": {"task": ["optimizer.lr=0.01,0.02", "device=cpu"]}}})
        go(config(trainer={"max_steps": 1}), out)


@pytest.mark.slow
def test_runs_have_the_names_of_their_overrides(tmp_path: Path) -> None:
    root = tmp_path / "multirun"
    sweep(root / "mine")
    names = ["optimizer.lr=0.01", "optimizer.lr=0.02"]
    assert list(board.named(root / "mine")) == names and list(board.named(root)) == [f"mine/{each}" for each in names]
    for run in ("a", "b"):
        given(tmp_path / "outputs" / "train" / run, "seed=3")
        go(config(trainer={"max_steps": 1}), tmp_path / "outputs" / "train" / run)
    go(config(trainer={"max_steps": 1}), tmp_path / "outputs" / "train" / "c")
    outputs = tmp_path / "outputs"
    assert list(board.named(outputs)) == ["train/seed=3", "train/seed=3 (b)", "train/c"]
    assert list(board.named(outputs / "train" / "a")) == ["seed=3"] and list(board.named(outputs / "train" / "c")) == ["c"]
    board.link(root, tmp_path / "links")
    board.link(root, tmp_path / "links")  # again, as new runs come
    assert [each.resolve().name for each in sorted((tmp_path / "links" / "mine").iterdir())] == names
    assert board.pinned(outputs) == ["val/loss", "test/loss", "outer/loss"]


def test_the_address_pins_the_scalars() -> None:
    assert board.address("http://localhost:6006/", []) == "http://localhost:6006/?smoothing=0#timeseries"
    cards = "%5B%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22val/loss%22%7D%5D"
    assert board.address("http://h:1", ["val/loss"]) == f"http://h:1/?pinnedCards={cards}&smoothing=0#timeseries"


def test_a_missing_directory_is_refused(command: Launcher) -> None:
    done = command("tensorboard", "nowhere")
    assert done.status == 1 and done.err == "hyperopt: 'nowhere' is not a directory; give the folder of a run or a sweep\n"
    assert command("tensorboard", "--help").out.startswith("usage: hyperopt tensorboard")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the server
def test_tensorboard_shows_the_runs(tmp_path: Path, command: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(tmp_path / "mine")
    found: list[list[str]] = []

    def look(seconds: float) -> None:
        """In the place of the pause between two looks for new runs."""
        for _ in range(200):
            with urllib.request.urlopen(f"{url[0]}data/runs") as answer:
                names = sorted(json.loads(answer.read()))
            if len(names) == 2:
                break
            sleep(0.1)
        found.append(names)
        raise KeyboardInterrupt

    url: list[str] = []
    sleep = time.sleep
    known = board.address
    monkeypatch.setattr(board, "address", lambda where, tags: url.append(where) or known(where, tags))
    monkeypatch.setattr(board.time, "sleep", look)
    done = command("tensorboard", "mine", "--port", "0", "--load_fast", "false")
    assert done.status == 0 and re.search(r"TensorBoard is at http://.*pinnedCards=.*#timeseries", done.out), done.err
    assert found == [["optimizer.lr=0.01", "optimizer.lr=0.02"]]
