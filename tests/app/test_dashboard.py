"""What TensorBoard shows of a run: its name, its HParams row, the charts that come first, and which curves are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from event_files import PluginData, events, given, hparams_of
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
from toy_task import Killed, config, go, raise_at

from hyperopt.app.dashboard import FlatCurves, cost_figure, hparams, label, swept
from hyperopt.app.files import write_json
from hyperopt.app.lock import RunDirectoryError
from hyperopt.app.rows import check_position
from hyperopt.app.run_directory import RunDirectory

NAN = math.nan


def shown(rows: Sequence[dict[str, float]], known: Any) -> list[tuple[int, str, float]]:
    """Return the points of all curves, with the state going through JSON before every row."""
    found = []
    for step, row in enumerate(rows):
        curves = FlatCurves(known)
        for at, values in curves.shown(step, row):
            found += [(at, name, value) for name, value in values.items()]
        known = json.loads(json.dumps(curves.state))
    return found


def test_a_flat_curve_is_left_out_until_it_changes() -> None:
    rows = [{"inner/status": 0.0, "inner/contraction": NAN, "outer/step_loss": 1.0} for _ in range(6)]
    assert {name for _, name, _ in shown(rows, {})} == {"outer/step_loss"}
    rows[4]["inner/status"] = 2.0
    found = [(step, value) for step, name, value in shown(rows, {}) if name == "inner/status"]
    assert found == [(0, 0.0), (3, 0.0), (4, 2.0), (5, 0.0)]
    rows[1]["inner/contraction"] = 0.5
    found = [step for step, name, _ in shown(rows, {}) if name == "inner/contraction"]
    assert found == [0, 1, 2, 3, 4, 5]
    assert len(shown(rows, None)) == 18  # events of an older version show everything


def test_a_bad_state_of_the_curves_is_refused() -> None:
    position = {"rows": 0, "events": {}, "wall": 0.0}
    check_position({**position, "flat": {"a": None, "b": [0, NAN, 3]}})
    for flat in ([], {"a": [0, 1.0]}, {"a": [-1, 1.0, 2]}, {"a": [0, "x", 2]}):
        with pytest.raises(ValueError, match=r"position\.flat is"):
            check_position({**position, "flat": flat or [1]})


def job(out: Path, *overrides: str, task: Sequence[str] = (), params: Any = None) -> RunDirectory:
    """Return the directory of a sweep's job, beside the sweep's own config."""
    out.mkdir(parents=True)
    write_json(out / "job.json", {"number": 0, "overrides": [*overrides]})
    write_json(out.parent / "multirun.yaml", {"hydra": {"overrides": {"task": [*task]}, "sweeper": {"params": params}}})
    return RunDirectory(out)


def test_a_run_is_named_by_what_its_sweep_varies(tmp_path: Path) -> None:
    task = ["optimizer=sgd,adam", "seed=range(2)", "trainer.max_steps=5", "optimizer.lr=tag(log, interval(1e-3, 1))"]
    run = job(tmp_path / "a" / "0", "optimizer=adam", "seed=1", "trainer.max_steps=5", "optimizer.lr=0.1", task=task)
    assert swept(run) == ["optimizer=adam", "seed=1", "optimizer.lr=0.1"]
    assert label(swept(run)) == "optimizer=adam,seed=1,optimizer.lr=0.1"
    run = job(
        tmp_path / "b" / "0", "seed=3", "sweep=five_seeds", "experiment=l2_ridge", params={"seed": "0,1,2,3", "device": "cpu"}
    )
    assert swept(run) == ["seed=3"]
    run = job(tmp_path / "c" / "0", "task/cell=householder", "experiment=l2_ridge", params="damaged", task=["}{"])
    assert label(swept(run)) == "task.cell=householder,experiment=l2_ridge"


def test_a_single_run_is_named_by_its_overrides(tmp_path: Path) -> None:
    given(tmp_path, "experiment=l2_ridge", "optimizer=adam", "+optimizer.amsgrad=true", "paths.data=x", "resume=auto")
    assert label(swept(RunDirectory(tmp_path))) == "optimizer=adam,optimizer.amsgrad=true"
    assert label([]) == ""
    long = label([f"dataset.columns=[{'1,' * 100}]"])
    assert len(long.encode()) == 100 and long.endswith("...")
    assert label(["a=../../x\x1b[2J\n"]) == "a=......x.x1b[2J.n"


def folders(out: Path) -> list[str]:
    """Return the folders of a run's events, as TensorBoard names them."""
    return sorted({str(path.parent.relative_to(out)) for path in out.rglob("events.out.tfevents.*")})


def test_events_stay_in_one_folder_whatever_a_resumed_run_is_given(tmp_path: Path) -> None:
    given(tmp_path, "optimizer.lr=0.05")
    with pytest.raises(Killed):
        go(config(), tmp_path, raise_at(7, Killed()))
    given(tmp_path, "optimizer.lr=0.05", "trainer.max_steps=14")
    go(config(trainer={"max_steps": 14}, resume="auto"), tmp_path)
    assert folders(tmp_path) == ["tb/optimizer.lr=0.05"]
    assert [event.step for event in events(tmp_path / "tb").Scalars("outer/step_loss")] == list(range(14))


def test_an_attempt_without_a_checkpoint_leaves_no_second_name(tmp_path: Path) -> None:
    for overrides in (["seed=3"], [], ["seed=3", "threads=1"]):
        given(tmp_path, *overrides)
        with pytest.raises(Killed):
            go(config(resume="auto"), tmp_path, raise_at(0, Killed()))
        assert folders(tmp_path) == [f"tb/{label(overrides)}".rstrip("/")]


def test_a_link_among_the_events_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run/tb/seed=1").mkdir(parents=True)
    (tmp_path / "canary").write_text("mine")
    (tmp_path / "run/tb/seed=1/events.out.tfevents.0000000001.host.1.0").symlink_to(tmp_path / "canary")
    with pytest.raises(RunDirectoryError, match="a link"):
        go(config(), tmp_path / "run")
    assert (tmp_path / "canary").read_text() == "mine"


def test_hparams_hold_what_is_swept_and_the_metrics_of_interest(tmp_path: Path) -> None:
    for number, kind in enumerate(("sgd", "adam")):
        job(
            tmp_path / str(number),
            f"optimizer.kind={kind}",
            f"seed={number}",
            "threads=1",
            task=["optimizer.kind=sgd,adam", "seed=0,1"],
        )
        go(config(kind, seed=number), tmp_path / str(number))
        assert hparams_of(tmp_path / str(number)) == (
            ["optimizer.kind", "seed"],
            ["val/loss", "test/loss", "outer/loss"],
            {"optimizer.kind": kind, "seed": float(number)},
        )
        content = events(tmp_path / str(number) / "tb").PluginTagToContent("hparams")[EXPERIMENT_TAG]
        assert all(info.differs for info in PluginData.FromString(content).experiment.hparam_infos)


def test_hparams_have_one_type_in_all_runs() -> None:
    assert hparams(composed("optimizer=sgd"), ["optimizer=sgd"]) == {"optimizer": "sgd"}
    for key, value, expected in (
        ("optimizer.clip_norm", "null", NAN),
        ("optimizer.clip_norm", "1", 1),
        ("threads", "null", NAN),
        ("compile", "true", "True"),
        ("adjoint.linear_solver.rtol", "1e-3", 1e-3),
        ("task.warm_dtype", "null", "-"),
    ):
        row = hparams(composed(f"{key}={value}"), [f"{key}={value}"])
        assert row == pytest.approx({key: expected}, nan_ok=True) if isinstance(expected, float) else row == {key: expected}


def test_losses_come_first_in_the_charts(tmp_path: Path) -> None:
    go(config(), tmp_path)
    found = events(tmp_path / "tb")
    [event] = found.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [(each.title, each.closed) for each in layout.category] == [
        ("Losses and accuracies", False),
        ("Hypergradient", True),
        ("Inner problem and adjoint", True),
        ("Cost", True),
    ]
    assert [chart.title for chart in layout.category[0].chart] == ["loss"]


def test_the_figure_of_error_against_cost() -> None:
    rows = [
        {"step": k, "cost/evaluations": 10.0 * (k + 1), "cost/vjps": 5.0 * (k + 1), "val/loss": 1 / (k + 1)} for k in range(3)
    ]
    figure = cost_figure([*rows, {"step": 3, "cost/evaluations": 40.0}])
    assert figure is not None
    [axes] = figure.axes
    [line] = axes.lines
    assert line.get_xydata().tolist() == [[15.0, 1.0], [30.0, 0.5], [45.0, 1 / 3]]  # pyright: ignore
    both = cost_figure([{**row, "val/accuracy": 0.75} for row in rows])
    assert both is not None and both.axes[1].lines[0].get_ydata() == pytest.approx([0.25, 0.25, 0.25])  # pyright: ignore
    assert cost_figure([{"val/loss": 1.0, "cost/evaluations": 0.0}]) is None
