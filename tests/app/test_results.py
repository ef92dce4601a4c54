"""What a sweep says: one line for each job, the table at the end, the best command line, and ``best.json``."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from launcher import Launcher

from hyperopt.app.results import Goal, conclude, show_job

ONE = Goal(["val/loss"], ["minimize"])


def job(number: int, loss: float | None, status: str = "completed", *overrides: str, **others: float) -> dict[str, Any]:
    metrics = {"val/loss": loss, **{name.replace("_", "/"): value for name, value in others.items()}}
    given = ["fixed=1", f"seed={number}", *overrides]
    return {
        "number": number,
        "directory": str(number),
        "overrides": given,
        "status": status,
        "reason": None,
        "steps": 3,
        "seconds": 1.25,
        "metrics": metrics,
        "best": {"metrics": metrics},
    }


def index(*jobs: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": list(jobs)}


def test_the_best_job_is_first_and_others_are_named(tmp_path: Path) -> None:
    jobs = index(job(0, 0.5), job(1, None, "failed"), job(2, 0.25), job(3, 0.1, "pruned"), job(4, 0.75), job(5, None))
    lines = conclude(tmp_path, jobs, ONE).splitlines()
    assert lines[0].split() == ["job", "status", "val/loss", "seconds", "seed"]
    assert [line.split()[:2] for line in lines[1:7]] == [
        ["2", "completed"],
        ["0", "completed"],
        ["4", "completed"],
        ["1", "failed"],
        ["3", "pruned"],
        ["5", "completed"],
    ]
    assert lines[7:] == [
        "failed: 1",
        "pruned: 3",
        "best (job 2): hyperopt fixed=1 seed=2",
        f"next: hyperopt report {tmp_path}",
    ]
    found = json.loads((tmp_path / "best.json").read_text())
    assert found["metric"] == ["val/loss"] and found["direction"] == ["minimize"]
    assert [(run["number"], run["values"]) for run in found["runs"]] == [(2, {"val/loss": 0.25})]
    assert found["runs"][0]["command"] == "hyperopt fixed=1 seed=2"


def test_where_a_run_has_started_is_one_column(tmp_path: Path) -> None:
    jobs = index(job(0, 0.5), job(1, 0.25, "completed", "init_from=mine/0", "init_partial=true"))
    lines = conclude(tmp_path, jobs, ONE).splitlines()
    assert lines[0].split() == ["job", "status", "val/loss", "seconds", "seed", "init_from"] and lines[1].split()[-1] == "mine/0"
    assert lines[3] == "best (job 1): hyperopt fixed=1 seed=1 init_from=mine/0 init_partial=true"


def test_larger_may_be_better(tmp_path: Path) -> None:
    goal = Goal(["val/accuracy"], ["maximize"])
    jobs = index(*(job(n, 0.0, "completed", val_accuracy=value) for n, value in enumerate([0.2, 0.9, 0.4])))
    lines = conclude(tmp_path, jobs, goal).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "0"] and "best (job 1)" in lines[4]


def test_two_objectives_name_the_front(tmp_path: Path) -> None:
    goal = Goal(["val/loss", "val/accuracy"], ["minimize", "maximize"])
    values = [(0.1, 0.5), (0.2, 0.9), (0.2, 0.8), (0.3, 0.85), (0.4, 0.9)]
    jobs = index(*(job(n, loss, "completed", val_accuracy=accuracy) for n, (loss, accuracy) in enumerate(values)))
    assert [each["number"] for each in goal.best(jobs["jobs"])] == [0, 1]
    said = conclude(tmp_path, jobs, goal)
    assert "\n0*   completed" in said and "\n1*   completed" in said and "\n2    completed" in said
    assert "* no other job is better in all of val/loss, val/accuracy" in said
    assert [run["number"] for run in json.loads((tmp_path / "best.json").read_text())["runs"]] == [0, 1]


def test_a_long_table_is_cut(tmp_path: Path) -> None:
    jobs = index(*(job(n, float(n), "failed" if n > 70 else "completed") for n in range(100)))
    lines = conclude(tmp_path, jobs, ONE).splitlines()
    assert lines[19] == f"and 82 more, in {tmp_path}/sweep.json" and lines[18].split()[0] == "17"
    assert lines[20] == "failed: 71, 72, 73, 74, 75, 76, 77, 78, 79, 80 and 19 more"


def test_a_command_can_be_copied(tmp_path: Path) -> None:
    strange = ["solver=picard", "optimizer.betas=[0.5, 0.6]", "name='a b'", "sweep=five_seeds"]
    goal = Goal(["val/loss"], ["minimize"], options=["hydra.searchpath=[file://my configs]"])
    command = goal.command(job(0, 0.5, "completed", *strange))
    words = ["hyperopt", "hydra.searchpath=[file://my configs]", "fixed=1", "seed=0", *strange, "hydra.mode=RUN"]
    assert shlex.split(command) == words


def test_nothing_that_worked_has_no_best(tmp_path: Path) -> None:
    said = conclude(tmp_path, index(job(0, None, "failed"), job(1, None)), ONE)
    assert "best" not in said and f"next: hyperopt report {tmp_path}" in said
    assert json.loads((tmp_path / "best.json").read_text())["runs"] == []


@pytest.mark.parametrize("terminal", [True, False])
def test_one_line_for_the_sweep(terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    ended = [job(0, 0.5), job(1, 0.25), job(2, 0.75)]
    for number in range(3):
        jobs = index(*ended[: number + 1], job(3, None, "running"))
        show_job(jobs, number, Goal(["val/loss"], ["minimize"], 4))
    show_job(jobs, 7, ONE)  # a job without a directory
    err = capsys.readouterr().err
    assert "hyperopt: 2/4 jobs (best: job 1, val/loss 0.25): job 1 completed, val/loss 0.25 (fixed=1 seed=1)" in err
    assert "hyperopt: 3/4 jobs (best: job 1, val/loss 0.25): job 2 completed, val/loss 0.75 (fixed=1 seed=2)" in err
    assert (err.count("\n"), err.count("\r")) == ((0, 3) if terminal else (3, 0))


@pytest.mark.slow
def test_a_sweep_says_one_line_a_job_and_a_table(command: Launcher) -> None:
    small = ["debug=default", "device=cpu", "task.state_size=5", "threads=1"]
    done = command("-m", "hydra.sweep.dir=mine", "solver=picard,anderson", *small)
    told = done.err.splitlines()
    assert done.status == 0 and len(told) == 2, done.err
    assert all(
        re.match(rf"hyperopt: {k}/2 jobs \(best: job \d.*\): job {k - 1} completed", line) for k, line in enumerate(told, 1)
    )
    lines = done.out.splitlines()[1:]  # after the line that says what is loaded
    assert len(lines) == 5 and lines[-1] == "next: hyperopt report mine" and lines[0].split()[-1] == "solver"
    again = command(*shlex.split(lines[-2].partition(": ")[2])[1:], "hydra.run.dir=alone")
    assert again.status == 0 and "ended by" in again.out
    best = json.loads(Path("mine/best.json").read_text())["runs"][0]
    alone = json.loads(Path("alone/summary.json").read_text())
    assert best["values"]["val/loss"] == alone["best"]["metrics"]["val/loss"]


@pytest.mark.slow
def test_the_best_of_a_ready_sweep_is_a_single_run(launch: Launcher) -> None:
    done = launch("sweep=five_seeds", "hydra.sweep.dir=mine")
    command = next(line for line in done.out.splitlines() if line.startswith("best")).partition(": ")[2]
    again = launch(*shlex.split(command)[1:], "hydra.run.dir=alone")
    assert again.status == 0 and [cfg.seed for cfg, _ in again.runs] == [0] and not Path("alone/sweep.json").exists()


@pytest.mark.slow
def test_the_failed_are_named_at_the_end(launch: Launcher) -> None:
    done = launch("-m", "hydra.sweep.dir=mine", "seed=1,13,2")
    assert done.status == 1 and "failed: 1" in done.out and "best (job 0): hyperopt seed=1" in done.out
    assert "1 of this sweep's jobs failed: 1" in done.err
