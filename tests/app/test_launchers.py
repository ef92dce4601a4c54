"""Sweeps through launchers that run jobs side by side: cores, GPUs, the index, resuming, requeuing, and what a kill leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import Launcher
from omegaconf import OmegaConf
from toy_task import rows

from hyperopt.app import sweep, workers
from hyperopt.app.files import write_json
from hyperopt.app.lock import RunDirectoryError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["dataset.train=60", "dataset.val=30", "dataset.test=20", "task.state_size=5", "device=cpu", "trainer.progress=false"]
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def needs(plugin: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher")
    return pytest.mark.skipif(not there, reason=f"pip install 'hyperopt-bilevel[{plugin}]'")


def index(where: Path = Path("mine")) -> dict[str, Any]:
    return json.loads((where / "sweep.json").read_text())


# ---- who gets what


def hydra(target: str, launcher: dict[str, Any] | None = None, batch: int | None = None) -> Any:
    return OmegaConf.create({"launcher": {"_target_": target, **(launcher or {})}, "sweeper": {"max_batch_size": batch}})


@pytest.mark.parametrize(
    ("config", "jobs", "expected"),
    [
        (hydra(BASIC), 9, 1),
        (hydra("a.JoblibLauncher", {"n_jobs": 3}), 9, 3),
        (hydra("a.JoblibLauncher", {"n_jobs": 3}), 2, 2),
        (hydra("a.JoblibLauncher", {"n_jobs": -1}), 99, 8),
        (hydra("a.JoblibLauncher", {"n_jobs": -3}), 99, 6),
        (hydra("a.LocalLauncher"), 9, 9),
        (hydra("a.LocalLauncher", batch=4), 9, 4),
        (hydra("a.SlurmLauncher"), 9, 1),
        (hydra("a.RayLauncher"), 9, 1),
    ],
)
def test_how_many_jobs_run_at_a_time(config: Any, jobs: int, expected: int) -> None:
    assert workers.at_a_time(config, jobs, cores=8) == expected


@pytest.mark.parametrize(
    ("jobs", "given", "expected"), [(2, None, "4"), (3, None, "2"), (99, None, "1"), (1, None, None), (2, "7", "7")]
)
def test_jobs_share_the_cores(jobs: int, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv(workers.THREADS, raising=False)
    if given is not None:
        monkeypatch.setenv(workers.THREADS, given)
    workers.prepare(OmegaConf.create({"hydra": hydra("a.LocalLauncher")}), jobs)
    assert os.environ.get(workers.THREADS) == expected


@pytest.mark.parametrize(
    ("device", "number", "count", "expected"),
    [
        ("auto", 0, 4, "cuda:0"),
        ("auto", 5, 4, "cuda:1"),
        ("cuda", 7, 4, "cuda:3"),
        ("cuda:2", 5, 4, "cuda:2"),
        ("cpu", 5, 4, "cpu"),
        ("auto", 5, 1, "auto"),
        ("auto", 5, 0, "auto"),
    ],
)
def test_jobs_take_the_gpus_in_turn(device: str, number: int, count: int, expected: str) -> None:
    assert workers.device_of(device, number, count) == expected


def job(target: str = "a.JoblibLauncher", number: int = 5, **config: Any) -> tuple[Any, Any]:
    cfg = OmegaConf.create({"resume": "never", "mode": "train", "device": "auto", "seed": 0, **config})
    made = {"job": {"num": number, "id": "17_5"}, "overrides": {"task": ["seed=0"]}, "sweep": {"dir": "."}}
    return cfg, OmegaConf.merge(OmegaConf.create(made), hydra(target))


def test_a_job_gets_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    monkeypatch.setattr(sweep, "gpus", lambda device: 4)
    monkeypatch.setattr(sweep, "lead", lambda cfg, out: seen.append(cfg.device))
    for target in ("a.JoblibLauncher", BASIC):
        sweep.run_job(*job(target), tmp_path)
    assert seen == ["cuda:1", "auto"]  # the basic launcher's jobs have the machine to themselves


# ---- queues


def test_a_job_that_a_queue_starts_again_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    monkeypatch.setattr(sweep, "lead", lambda cfg, out: seen.append(cfg.resume))
    monkeypatch.setattr(sweep, "finished", lambda cfg, out: None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for _ in range(2):
        sweep.run_job(*job(device="cpu"), tmp_path)
    write_json(tmp_path / "job.json", {"number": 5, "overrides": ["seed=0"], "queue": "16_5"})
    sweep.run_job(*job(device="cpu"), tmp_path)  # another sweep's job: run.py refuses its directory
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    for _ in range(2):
        sweep.run_job(*job(device="cpu"), tmp_path)  # other launchers count their jobs from 0 in every sweep
    assert seen == ["never", "auto", "never", "never", "never"]


def test_the_signal_of_a_queue_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGUSR2), []
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert workers.queue_signal() is None  # nobody waits for it: it is not ours to catch
        workers.put_back(128 + signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
        assert workers.queue_signal() == signal.SIGUSR2
        workers.put_back(143)
        assert seen == []
        workers.put_back(128 + signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
        monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "NONSENSE")
        assert workers.queue_signal() is None
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_another_process_s_run_is_not_marked_as_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def used(cfg: Any, out: Path) -> float:
        raise RunDirectoryError("in use")

    monkeypatch.setattr(sweep, "lead", used)
    with pytest.raises(RunDirectoryError):
        sweep.run_job(*job(device="cpu"), tmp_path)
    assert not (tmp_path / "FAILED").exists()


ORPHAN = """
import os, sys, time
from pathlib import Path
from hyperopt.app import workers
workers.PATIENCE = 0.05
if os.fork() == 0:
    try:
        with workers.tied_to_parent():
            Path(sys.argv[1]).write_text(str(os.getpid()))
            time.sleep(60)
    finally:
        os._exit(0)
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""


def test_a_worker_ends_with_its_launcher(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path / "pid")], env=environment, check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    wait(lambda: not alive(pid), 20)


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait(done: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- for real


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows(path)]


@pytest.mark.slow
@needs("joblib")
def test_joblib(command: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workers.THREADS, raising=False)
    parallel = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=mine", "trainer.max_steps=2"]
    done = command(
        *parallel, *(each for each in SMALL if "val" not in each), "seed=0,1", "dataset.val=30,0"
    )  # without rows there is no val/loss
    assert done.status == 1 and "2 of this sweep's jobs failed: 1, 3" in done.err
    assert index()["counts"] == {"completed": 2, "failed": 2} and [each["number"] for each in index()["jobs"]] == [0, 1, 2, 3]
    assert workers.THREADS not in os.environ
    threads = json.loads(Path("mine/0/run.json").read_text())["device"]["threads"]
    assert threads == max(len(os.sched_getaffinity(0)) // 2, 1)


@pytest.mark.manual
@needs("submitit")
def test_submitit_puts_a_job_back_and_it_goes_on(command: Launcher) -> None:
    long = [*SMALL, "trainer.max_steps=400", "trainer.checkpoint_every=1000", "trainer.eval_every=50", "threads=1"]
    arguments = ["-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=mine", *long, "seed=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "hyperopt.app.cli", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    run = Path("mine/0")
    wait(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 5, 100)
    os.kill(json.loads((run / "run.json").read_text())["host"]["pid"], signal.SIGUSR2)
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 0, err
    facts = json.loads((run / "run.json").read_text())
    assert len(facts["resumed"]) == 1 and 5 < facts["resumed"][0]["after_steps"] < 400
    assert index()["counts"] == {"completed": 1} and [row["step"] for row in rows(run)] == list(range(400))
    assert command("hydra.run.dir=alone", *long, "seed=0").status == 0
    assert without_time(run) == without_time(Path("alone"))


@pytest.mark.slow
@needs("ray")
def test_ray(command: Launcher) -> None:
    arguments = ["-m", "hydra/launcher=ray", "hydra.sweep.dir=mine", "trainer.max_steps=2", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "hyperopt.app.cli", *arguments]
    done = subprocess.run([*run, "seed=0,1,2"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and index()["counts"] == {"completed": 3}, done.stderr
    done = subprocess.run([*run, "seed=0,1,2,3", "resume=auto"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and index()["counts"] == {"completed": 4}, done.stderr
    search = ["sweep=hybrid", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2"]
    run = [each.replace("=mine", "=search") for each in run]
    done = subprocess.run([*run, *search], env=environment, capture_output=True, text=True, timeout=300)
    jobs = index(Path("search"))["jobs"]
    assert done.returncode == 0 and [job["status"] for job in jobs] == ["completed"] * 3, done.stderr
    assert [any("init_from=search/" in each for each in job["overrides"]) for job in jobs] == [False, False, True]


@needs("joblib")
@pytest.mark.manual
@pytest.mark.parametrize("whom", ["all", "the launcher"])
def test_a_parallel_sweep_that_is_killed_goes_on(whom: str, command: Launcher) -> None:
    long = [*SMALL, "trainer.max_steps=300", "trainer.checkpoint_every=7", "threads=1"]
    arguments = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=mine", *long, "seed=0,1,2,3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "hyperopt.app.cli", *arguments]
    process = subprocess.Popen(run, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    lines = Path("mine/2/metrics.jsonl")
    wait(lambda: lines.exists() and len(lines.read_text().splitlines()) > 20, 200)
    if whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        pids = [json.loads(path.read_text())["host"]["pid"] for path in Path("mine").glob("*/run.json")]
        process.kill()
        wait(lambda: not any(alive(pid) for pid in pids), 60)
        assert any(each["status"] == "interrupted" for each in index()["jobs"])
    process.wait(timeout=30)
    assert "completed" in {json.loads(path.read_text())["status"] for path in Path("mine").glob("*/summary.json")}
    done = subprocess.run([*run, "resume=auto"], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert index()["counts"] == {"completed": 4}
    for seed in range(4):
        assert command(f"hydra.run.dir=alone/{seed}", *long, f"seed={seed}").status == 0
        assert without_time(Path(f"mine/{seed}")) == without_time(Path(f"alone/{seed}"))
