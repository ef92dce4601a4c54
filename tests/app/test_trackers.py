"""Other places that a run is logged to: each step once whatever stopped it, no harm from errors there, the real packages."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import signal
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from event_files import given
from launcher import Launcher
from toy_task import Killed, Toy, built, config, raise_at, rows, signal_at, summary

from hyperopt.app.config import ConfigError
from hyperopt.app.run import run
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.trackers import Elsewhere, MLflow, TrackedRun, TrackerSettings, WandB

ROWS = 12


class Notebook(Elsewhere):
    """A tracker in this process, which keeps what it gets by the run's id."""

    def __init__(self, pages: dict[str, list[Any]], known: str, broken: bool) -> None:
        self.page, self.broken = pages.setdefault(known, []), broken
        self.seen = max((entry[0] for entry in self.page if isinstance(entry[0], int)), default=-1)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.page.append((step, {name: value for name, value in row.items() if not name.startswith("time/")}))

    def figure(self, step: int, name: str, path: Path) -> None:
        self.page.append((name, path.read_bytes()[:4]))

    def close(self, status: str) -> None:
        self.page.append(("end", status))


@dataclasses.dataclass(frozen=True)
class Shelf(TrackerSettings):
    pages: dict[str, list[Any]]
    broken: bool = False
    package = "shelf"

    def open(self, run: TrackedRun) -> Elsewhere:
        known = run.known("shelf") or f"run-{len(self.pages)}"
        run.note("shelf", known)
        return Notebook(self.pages, known, self.broken)


def go(tracker: TrackerSettings, out: Path, task: Toy | None = None, **top: Any) -> float:
    """Run the toy task under a tracker."""
    cfg = config(**top)
    with mock.patch("hyperopt.app.run.build", lambda each: dataclasses.replace(built(each, task), tracker=tracker)):
        return run(cfg, out)


def stopped_twice(tracker: TrackerSettings, out: Path) -> None:
    """A run that is killed between two checkpoints, stopped by a signal, and continued."""
    given(out, "optimizer.lr=0.05")
    with pytest.raises(Killed):
        go(tracker, out, raise_at(7, Killed()))
    with pytest.raises(SystemExit):
        go(tracker, out, signal_at(9, signal.SIGTERM), resume="auto")
    go(tracker, out, resume="auto")


def test_each_step_is_sent_once_and_to_the_same_run(tmp_path: Path) -> None:
    pages: dict[str, list[Any]] = {}
    stopped_twice(Shelf(pages), tmp_path)
    [page] = pages.values()
    sent = [entry for entry in page if isinstance(entry[0], int)]
    expected = [{name: value for name, value in row.items() if name != "step"} for row in rows(tmp_path)]
    assert [step for step, _ in sent] == list(range(ROWS))
    for (_, row), other in zip(sent, expected, strict=True):
        assert {name: None if math.isnan(value) else value for name, value in row.items()} == other
    assert [entry for entry in page if entry[0] == "end"] == [("end", "failed"), ("end", "interrupted"), ("end", "completed")]
    assert ("residual", b"\x89PNG") in page and ("error_against_cost", b"\x89PNG") in page


def test_a_run_that_changes_its_tracker_is_sent_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        go(Shelf({}, broken=True), tmp_path, signal_at(5, signal.SIGTERM))
    (tmp_path / "tracker.json").write_text('{"tracker": "wandb", "id": "../../x"}')
    pages: dict[str, list[Any]] = {}
    go(Shelf(pages), tmp_path, resume="auto")
    assert [entry[0] for entry in pages["run-0"] if isinstance(entry[0], int)] == list(range(ROWS))


def test_an_error_there_is_a_warning_and_changes_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(Shelf({}, broken=True), tmp_path / "broken")
    go(Shelf({}), tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole") and summary(tmp_path / "broken")["status"] == "completed"
    said = [each.message for each in caplog.records if "tracker" in each.message]
    assert len(said) == 2 and "(ConnectionError: no network)" in said[0] and "the 10th time" in said[1]


def test_a_tracker_that_cannot_be_opened_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Shelf, run: TrackedRun) -> Elsewhere:
        raise ConnectionError("no answer\nfrom there")

    monkeypatch.setattr(Shelf, "open", refuse)
    told = r"tracker=shelf cannot be opened \(ConnectionError: no answer.*\); change the keys of tracker, or drop tracker=shelf"
    with pytest.raises(ConfigError, match=told):
        go(Shelf({}), tmp_path)
    assert not (tmp_path / "metrics.jsonl").read_text() and summary(tmp_path)["status"] == "failed"


def test_ids_from_a_strange_file_are_not_used(tmp_path: Path) -> None:
    tracked = TrackedRun(RunDirectory(tmp_path), "name", "study", {})
    for text in (
        '{"tracker": "mlflow", "id": "../x"}',
        '{"tracker": "mlflow", "id": 3}',
        "[]",
        '{"tracker": "wandb", "id": "a"}',
    ):
        (tmp_path / "tracker.json").write_text(text)
        assert tracked.known("mlflow") is None
    tracked.note("mlflow", "abc-1")
    assert tracked.known("mlflow") == "abc-1" and tracked.known("wandb") is None


@pytest.mark.cases(quick=0)
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_refused_before_the_run(launch: Launcher, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *more: None if each == name else find(each, *more))
    refused = launch(f"tracker={name}")
    assert refused.status == 1 and not refused.runs and not any(Path().iterdir())
    needs = f"hyperopt: tracker={name} needs the package {name}, which is not installed; pip install 'hyperopt-bilevel[{name}]'"
    assert refused.err.splitlines()[-1] == f"{needs}, or change tracker"
    assert launch("tracker=tensorboard").status == 0


def test_a_bad_setting_is_refused(launch: Launcher) -> None:
    pytest.importorskip("wandb")
    assert "tracker.mode='on' is not one of offline, online" in launch("tracker=wandb", "tracker.mode=on").err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package
def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    out = tmp_path / "run"
    stopped_twice(MLflow(directory=str(tmp_path / "store")), out)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/store/mlflow.db")
    [study] = client.search_experiments(filter_string="name = 'test'")
    [made] = client.search_runs([study.experiment_id])
    assert made.info.status == "FINISHED" and made.info.run_name == "optimizer.lr=0.05"
    assert made.data.params["optimizer.lr"] == "0.05" and made.data.tags["directory"] == str(out)
    for name in ("outer/step_loss", "hypergrad/norm", "inner/iterations"):
        found = client.get_metric_history(made.info.run_id, name)
        assert [(each.step, each.value) for each in found] == [(row["step"], row[name]) for row in rows(out)]
    found = client.get_metric_history(made.info.run_id, "val/loss")
    assert [each.step for each in found] == [row["step"] for row in rows(out) if "val/loss" in row]
    figures = [each.path for each in client.list_artifacts(made.info.run_id, "figures/residual")]
    assert figures == ["figures/residual/00000011.png"] and (tmp_path / "store" / "mlflow" / "test").is_dir()


def records(path: Path) -> Iterator[Any]:
    """Read the records of a file of Weights & Biases: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            return
        whole = (whole if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    out = tmp_path / "run"
    stopped_twice(WandB(directory=str(tmp_path)), out)
    steps: list[int] = []
    names, losses = set(), {}
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 3
    for path in files:
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names.add((record.run.run_id, record.run.display_name, record.run.project))
            elif kind == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                if "outer/step_loss" in items:
                    steps.append(record.history.step.num)
                    losses[record.history.step.num] = float(items["outer/step_loss"])
    assert len(names) == 1 and {each[1:] for each in names} == {("optimizer.lr=0.05", "hyperopt")}
    assert steps == list(range(ROWS)) and losses == {row["step"]: row["outer/step_loss"] for row in rows(out)}
