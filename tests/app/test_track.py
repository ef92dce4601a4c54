"""What a run writes: one line and one scalar a number and step, one HParams row, figures, and strict JSON."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from event_files import events, given, session_starts
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_task import Killed, Toy, config, go, raise_at, rows, signal_at

from hyperopt.app.experiment import flatten
from hyperopt.app.files import write_json
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.track import START, Tracker
from hyperopt.core.status import Status


def strict(text: str) -> Any:
    """Parse JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_event_file_holds_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    given(tmp_path, "optimizer.lr=0.05")
    go(config(trainer={"figures_every": 5}), tmp_path)
    found = events(tmp_path / "tb")
    for tag in ("hypergrad/norm", "hypergrad/norm/a", "cost/evaluations", "outer/step_loss"):
        assert [event.step for event in found.Scalars(tag)] == list(range(12))
    flat = {"inner/iterations", "inner/residual", "inner/contraction", "inner/status", "optimizer/lr", "cost/jvps"}
    assert not flat & set(found.Tags()["scalars"]) and all(name in row for row in rows(tmp_path) for name in flat)
    for row in rows(tmp_path):
        for name, value in row.items():
            if name != "step" and name not in flat:
                (event,) = [event for event in found.Scalars(name) if event.step == row["step"]]
                assert math.isnan(event.value) if value is None else event.value == pytest.approx(value, rel=1e-6)
    assert len(found.Scalars("time/step_seconds")) == 12
    for name in ("residual", "error_against_cost"):
        assert [image.step for image in found.Images(f"figures/{name}")] == [4, 9, 11]
    for name in ("a", "b"):
        assert [each.step for each in found.Histograms(f"hyper/{name}")] == [0, 2, 4, 6, 8, 10, 11]
    assert (tmp_path / "figures" / "residual.png").read_bytes().startswith(b"\x89PNG")
    assert b"max_steps: 12" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert "max_steps: 12" in (tmp_path / "config.yaml").read_text()
    assert session_starts(tmp_path) == 1


@pytest.mark.cases(quick=1, slow=1)
@pytest.mark.parametrize("changes_at", [None, 1, 6, 10])
def test_resume_leaves_no_event_twice(tmp_path: Path, changes_at: int | None) -> None:
    def changing(task: Toy) -> Toy:
        """A status that is flat until it changes, in any of the sessions."""
        task.statuses = {} if changes_at is None else {changes_at: Status.max_steps}
        return task

    out = tmp_path / "run"
    for where in (tmp_path / "whole", out):
        given(where, "optimizer.lr=0.05")
    go(config(), tmp_path / "whole", changing(Toy()))
    with pytest.raises(Killed):
        go(config(), out, changing(raise_at(7, Killed())))
    with pytest.raises(SystemExit):
        go(config(resume="auto"), out, changing(signal_at(9, signal.SIGTERM)))
    go(config(resume="auto"), out, changing(Toy()))
    whole, found = events(tmp_path / "whole" / "tb"), events(out / "tb")
    assert found.Tags() == whole.Tags() and ("inner/status" in found.Tags()["scalars"]) == (changes_at is not None)
    if changes_at is not None:
        steps = sorted({0, changes_at - 1, *range(changes_at, 12)})
        assert [event.step for event in found.Scalars("inner/status")] == steps
    for tag in found.Tags()["histograms"]:
        pair = [[(event.step, event.histogram_value) for event in each.Histograms(tag)] for each in (found, whole)]
        assert pair[0] == pair[1], tag
    for tag in found.Tags()["scalars"]:
        if not tag.startswith("time/"):
            pair = [[(event.step, repr(event.value)) for event in each.Scalars(tag)] for each in (found, whole)]
            assert pair[0] == pair[1], tag
    assert session_starts(out) == 1


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_leaves_no_events(tmp_path: Path) -> None:
    given(tmp_path, "optimizer.lr=0.05")
    with pytest.raises(Killed):
        go(config(), tmp_path, raise_at(0, Killed()))
    go(config(resume="auto"), tmp_path)
    assert [event.step for event in events(tmp_path / "tb").Scalars("outer/step_loss")] == list(range(12))
    assert session_starts(tmp_path) == 1


def test_a_run_killed_in_its_first_checkpoint_leaves_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(tmp_path, "optimizer.lr=0.05")
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith("last.pt"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        go(config(), tmp_path)
    assert session_starts(tmp_path) == 1
    go(config(resume="auto"), tmp_path)
    assert session_starts(tmp_path) == 1


def test_flatten_keeps_values_once_and_drops_hydra() -> None:
    task = {"solver": "${solver}", "seed": "${seed}"}
    cfg = OmegaConf.create({"hydra": {"a": 1}, "solver": {"rtol": 1e-3, "steps": [1, 2]}, "task": task, "seed": 5})
    assert flatten(cfg) == {"solver.rtol": 1e-3, "solver.steps": [1, 2], "task.seed": 5, "seed": 5}


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.0], "z": {"w": -math.inf}})
    assert strict((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.0], "z": {"w": None}}
    tracker = Tracker(RunDirectory(tmp_path))
    tracker.log(3, {"inner/contraction": math.nan, "outer/loss": 0.1})
    tracker.close()
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "inner/contraction": None, "outer/loss": 0.1}


def test_floats_survive_to_the_last_bit(tmp_path: Path) -> None:
    tracker = Tracker(RunDirectory(tmp_path))
    tracker.log(0, {"outer/loss": 0.1 + 0.2})
    tracker.close()
    assert rows(tmp_path)[0]["outer/loss"] == 0.1 + 0.2


def test_cut_back_to_the_offset(tmp_path: Path) -> None:
    tracker = Tracker(RunDirectory(tmp_path))
    tracker.log(0, {"x": 1.0})
    position = tracker.position
    tracker.log(1, {"x": 2.0})
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "x"')  # a line cut short by a kill
    tracker = Tracker(RunDirectory(tmp_path), position, 1)
    tracker.log(1, {"x": 5.0})
    tracker.close()
    assert rows(tmp_path) == [{"step": 0, "x": 1.0}, {"step": 1, "x": 5.0}]


def test_lost_rows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    Tracker(RunDirectory(tmp_path), {**START, "rows": 400}, 5).close()
    assert "has lost its rows of steps 0 to 4" in caplog.text  # a checkpoint of an older version knew the length alone


def test_figures_are_closed(tmp_path: Path) -> None:
    from matplotlib import pyplot

    tracker = Tracker(RunDirectory(tmp_path))
    figure = pyplot.figure(figsize=(1, 1))
    assert isinstance(figure, Figure)
    tracker.figures(0, {"spectrum": figure})
    tracker.close()
    assert not pyplot.get_fignums() and (tmp_path / "figures" / "spectrum.png").stat().st_size > 100


def test_a_reader_beside_the_writer(tmp_path: Path) -> None:
    done, errors, seen = threading.Event(), [], []

    def read() -> None:
        """As TensorBoard does: one reader goes on where it stood, and another starts anew."""
        kept = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
        try:
            while not done.is_set():
                for reader in (kept, events(tmp_path / "tb")):
                    reader.Reload()
                    found = [each.step for each in reader.Scalars("val/loss")] if "val/loss" in reader.Tags()["scalars"] else []
                    assert found == list(range(len(found)))
                    seen.append(len(found))
        except Exception as error:
            errors.append(error)

    tracker = Tracker(RunDirectory(tmp_path))
    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        tracker.log(step, {"val/loss": float(step)})
        time.sleep(0.002)
    done.set()
    reader.join()
    tracker.close()
    assert errors == [] and len(set(seen)) > 2  # it did look in between
    assert [each.step for each in events(tmp_path / "tb").Scalars("val/loss")] == list(range(300))
