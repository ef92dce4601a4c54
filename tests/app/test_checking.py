"""``mode=check``: the tables of an experiment's hypergradient, from the real command's pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composing import composed

from hyperopt.app import cli
from hyperopt.app.run import run
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.sweep import finished
from hyperopt.tasks.base import HypergradientError

SMALL = ["mode=check", "precision=float64", "dataset.train=40", "dataset.val=20", "dataset.test=20", "task.state_size=8"]


def check(out: Path, *overrides: str) -> float:
    return run(composed(*SMALL, "device=cpu", *overrides), out)


def test_the_main_job_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worst = check(tmp_path, "solver.rtol=1e-10", "adjoint.linear_solver.rtol=1e-10")
    assert worst < 1e-6
    printed = capsys.readouterr().out
    assert "passed" in printed and "finite differences" in printed and "one_step" in printed
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["passed"] and [row["name"] for row in found["against"]] == ["finite differences", "dense", "unrolled"]
    errors = {row["name"]: row["error"] for row in found["adjoints"]}
    assert errors["gmres"] < 1e-4 and errors["one_step"] > 1e-3
    assert (tmp_path / "figures" / "adjoints.png").stat().st_size > 1000
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "checked"
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_sweep_that_goes_on_knows_the_metric_of_a_check_that_is_done(tmp_path: Path) -> None:
    worst = check(tmp_path)
    assert finished(composed(*SMALL, "device=cpu"), RunDirectory(tmp_path)) == worst


def test_an_inexact_adjoint_fails(tmp_path: Path) -> None:
    with pytest.raises(HypergradientError, match=r"does not pass its check; see .*check\.json"):
        check(tmp_path, "adjoint=one_step", "task.cell.init_scale=0.2")
    assert not json.loads((tmp_path / "check.json").read_text())["passed"]


@pytest.mark.parametrize(("argv", "given"), [([], "float64"), (["precision=float32"], None)])
def test_the_command_is_the_mode_in_float64(argv: list[str], given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "launch", seen.append)
    cli.check(argv)
    assert seen == [["mode=check", *([f"precision={given}"] if given else []), *argv]]
