"""Sweeps: the index, resuming, and that no job changes another one's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from event_files import events, hparams_of
from hydra import compose, initialize_config_dir
from launcher import Launcher, snapshot
from omegaconf import OmegaConf
from toy_task import rows

from hyperopt.app import sweep
from hyperopt.app.building import build
from hyperopt.app.config import ConfigError
from hyperopt.app.files import write_json
from hyperopt.app.preflight import Preflight
from hyperopt.app.resolvers import config_path, register

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ["-m", "hydra.sweep.dir=mine"]


def index() -> dict[str, Any]:
    return json.loads(Path("mine/sweep.json").read_text())


@pytest.mark.slow
def test_the_index_is_written_as_jobs_end(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, int]] = []
    write = sweep.write_index
    monkeypatch.setattr(sweep, "write_index", lambda where: (write(where), seen.append(index()["counts"])))
    assert launch(*SWEEP, "seed=1,13,2", "solver=anderson").status == 1
    assert seen == [{"completed": 1}, {"completed": 1, "failed": 1}, {"completed": 2, "failed": 1}]
    jobs = index()["jobs"]
    assert [(job["number"], job["directory"], job["status"]) for job in jobs] == [
        (0, "0", "completed"),
        (1, "1", "failed"),
        (2, "2", "completed"),
    ]
    assert jobs[0]["overrides"] == ["seed=1", "solver=anderson"] and jobs[2]["best"] == {"metrics": {"val/loss": 2.0}}
    assert "ArithmeticError: an unlucky seed" in Path("mine/1/FAILED").read_text()


def test_resuming_runs_only_what_is_missing_or_failed(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(*SWEEP, "seed=1,13,2")
    metrics: list[Any] = []
    spy = lambda self, config, job_return, **_: metrics.append(job_return._return_value)  # noqa: E731
    monkeypatch.setattr(Preflight, "on_job_end", spy)
    write_json(Path("mine/2/summary.json"), {"status": "running"})  # it was killed
    done = launch(*SWEEP, "seed=1,13,2,5", "resume=auto")
    assert [cfg.seed for cfg, _ in done.runs] == [13, 2, 5]
    assert "job 0 (seed=1) was done before: skipped" in done.err and done.err.count("skipped") == 1
    assert metrics[0] == 1.0 and isinstance(metrics[1], ArithmeticError) and metrics[2:] == [2.0, 5.0]
    assert index()["counts"] == {"completed": 3, "failed": 1}
    assert [job["overrides"] for job in index()["jobs"]] == [["seed=1"], ["seed=13"], ["seed=2"], ["seed=5"]]


@pytest.mark.slow
def test_a_longer_sweep_goes_on_with_every_job(launch: Launcher) -> None:
    launch(*SWEEP, "seed=1,2", "trainer.max_steps=10")
    assert not launch(*SWEEP, "seed=1,2", "trainer.max_steps=10", "resume=auto", "device=cpu").runs
    assert len(launch(*SWEEP, "seed=1,2", "trainer.max_steps=20", "resume=auto").runs) == 2


@pytest.mark.slow
def test_jobs_whose_overrides_changed_are_refused_untouched(launch: Launcher) -> None:
    launch(*SWEEP, "seed=1,2")
    before = snapshot(Path("mine"))
    refused = launch(*SWEEP, "seed=1,3", "resume=auto")
    assert refused.status == 1 and not refused.runs
    assert "job 1 (seed=3 resume=auto): mine/1 holds another experiment, and nothing was done: " in refused.err
    assert "; seed is 2 there and 3 here;" in refused.err
    assert "hydra.sweep.dir" in refused.err and snapshot(Path("mine")) == before


def test_an_interrupted_job_is_in_the_index_and_ends_the_sweep(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(cfg: Any, out: Path) -> float:
        write_json(out / "summary.json", {"status": "interrupted", "reason": "SIGTERM"})
        raise SystemExit(143)

    monkeypatch.setattr(sys.modules["hyperopt.app.run"], "run", interrupted)
    assert launch(*SWEEP, "seed=1,2").status == 143
    assert [(job["status"], job["reason"]) for job in index()["jobs"]] == [("interrupted", "SIGTERM")]


END = """
import sys
from pathlib import Path
from hyperopt.app.files import write_json
from hyperopt.app.sweep import write_index
sweep, first = Path(sys.argv[1]), int(sys.argv[2])
for number in range(first + 20, first, -1):
    job = sweep / f"group={first}" / str(number)
    job.mkdir(parents=True)
    write_json(job / "job.json", {"number": number, "overrides": [f"seed={number}"]})
    write_json(job / "summary.json", {"status": "completed", "seconds": 1.5, "metrics": {"val/loss": 0.25}})
    write_index(sweep)
"""


@pytest.mark.slow
def test_jobs_of_many_processes_in_any_order(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ends = [subprocess.Popen([sys.executable, "-c", END, str(tmp_path), str(100 * k)], env=env) for k in (2, 0, 1)]
    assert [process.wait(timeout=120) for process in ends] == [0, 0, 0]
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found == sweep.index(tmp_path) and found["counts"] == {"completed": 60}
    numbers = [job["number"] for job in found["jobs"]]
    assert numbers == sorted(numbers) and len(set(numbers)) == 60
    assert found["jobs"][0]["directory"] == "group=0/1" and found["jobs"][0]["metrics"] == {"val/loss": 0.25}


@pytest.mark.slow
def test_an_unreadable_summary_is_a_job_that_is_not_done(launch: Launcher) -> None:
    launch(*SWEEP, "seed=1,2")
    Path("mine/1/summary.json").write_text('{"status": "comp')
    assert index() and [job["status"] for job in sweep.index(Path("mine"))["jobs"]] == ["completed", "started"]
    assert [cfg.seed for cfg, _ in launch(*SWEEP, "seed=1,2", "resume=auto").runs] == [2]


@pytest.mark.slow
def test_no_job_changes_the_numbers_of_another_and_a_failure_hides_none(command: Launcher) -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    random = torch.get_rng_state()
    small = ["debug=default", "device=cpu", "task.state_size=5"]
    jobs = ["precision=float64,float32", "dataset.val=0,400"]  # without rows to select on there is no val/loss
    done = command(*SWEEP, *jobs, *small, "threads=1")
    assert done.status == 1 and "2 of this sweep's jobs failed: 0, 2" in done.err
    assert "job 0 (precision=float64 dataset.val=0 " in done.err and "see " in done.err
    assert index()["counts"] == {"completed": 2, "failed": 2}
    assert index()["jobs"][0]["reason"].startswith("MonitorError: trainer.monitor=") and Path("mine/0/FAILED").is_file()
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert command("hydra.run.dir=alone", "precision=float32", *small, "threads=1").status == 0
    assert rows(Path("mine/3")) == rows(Path("alone"))


@pytest.mark.manual
def test_a_dozen_runs_are_told_apart_in_tensorboard(command: Launcher) -> None:
    swept = ["solver=picard,anderson,broyden,newton", "adjoint=neumann,anderson,gmres"]
    assert command(*SWEEP, *swept, "debug=default", "device=cpu", "task.state_size=5", "threads=1").status == 0
    runs = [Path("mine") / str(number) for number in range(12)]
    found = [hparams_of(run) for run in runs]
    columns, metrics, _ = found[0]
    assert columns == ["adjoint", "solver"]  # what the sweep varies, and nothing else
    assert metrics == [f"{split}/{kind}" for kind in ("accuracy", "loss") for split in ("val", "test", "outer")]
    for run, (each, measured, values) in zip(runs, found, strict=True):
        assert each == columns and measured == metrics and set(values) == set(columns)
        assert set(metrics) <= set(events(run / "tb").Tags()["scalars"])
        [name] = (run / "tb").iterdir()
        assert name.name == f"solver={values['solver']},adjoint={values['adjoint']}"
    assert len({(values["solver"], values["adjoint"]) for _, _, values in found}) == 12


MIXED = [
    ["seed=0", "optimizer=sgd", "optimizer.lr=0.1"],
    ["seed=1", "optimizer=sgd", "optimizer.lr=0.3"],
    ["seed=1", "optimizer=adam", "optimizer.lr=0.3"],
    ["seed=2", "optimizer=adam", "optimizer.lr=1e-3", "optimizer.betas=[0.5,0.6]"],
    ["seed=3", "optimizer=adam", "optimizer.lr=1e-2", "optimizer.betas=[0.5,0.7]"],
    ["seed=4", "optimizer=adam", "optimizer.lr=${optimizer.eps}", "optimizer.betas=[0.5,0.7]"],
    ["seed=5", "+optimizer@stn.response=adam"],
    ["seed=6", "experiment=l2_ridge"],
    ["seed=7", "experiment=l2_ridge", "hydra.job.chdir=true"],
    ["seed=8", "experiment=l2_ridge", "hydra.job.chdir=false"],
]


@pytest.mark.slow
def test_jobs_that_differ_in_values_are_checked_as_they_are_composed() -> None:
    register()
    with initialize_config_dir(config_path(), version_base="1.3"):
        composer = sweep.Composer(compose("train", return_hydra_config=True))
        for overrides in MIXED:
            found, whole = composer.compose(overrides), compose("train", overrides, return_hydra_config=True)
            for config in (found, whole):
                config.hydra.job.override_dirname = ""
            assert OmegaConf.to_container(found) == OmegaConf.to_container(whole)
        assert len(composer.made) == len(MIXED) - 2  # the second and the sixth are copies
        with pytest.raises(ConfigError, match="seed='x' is not a whole number"):
            build(composer.compose(["seed=x", "optimizer=sgd", "optimizer.lr=0.1"]))
