"""The directory of a run: its names, its lock, what is read of it, and which keys count for which comparison."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from hyperopt.app import lock
from hyperopt.app.config import KEYS
from hyperopt.app.experiment import DO_NOT_COUNT, Purpose, counts, differences, flatten
from hyperopt.app.files import ForeignFileError, WriteError
from hyperopt.app.lock import RunDirectoryError, release_all
from hyperopt.app.run_directory import RunDirectory, or_empty
from hyperopt.data.reading import UnreadableError

ROOT = Path(__file__).resolve().parents[2]
NAMED = "import os, sys, time, pathlib; from hyperopt.app.run_directory import RunDirectory; "
NAMED += "run = RunDirectory(pathlib.Path(sys.argv[1]))\n"


def another(code: str, where: Path) -> subprocess.Popen[str]:
    """Start a process that has ``run``, the directory ``where``, and wait for its first line."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", NAMED + code, str(where)]
    process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and close its pipes."""
    process.kill()
    process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A run directory that is not there yet; all locks are given back in the end."""
    yield RunDirectory(tmp_path / "run")
    release_all()


def test_names(run: RunDirectory) -> None:
    assert RunDirectory.metrics == Path("metrics.jsonl") and run.metrics == run.path / "metrics.jsonl"
    assert run.last.parent == run.checkpoints and RunDirectory.last == Path("checkpoints/last.pt")
    assert run.owns(run.best) and not run.owns(run.path / "best.pt") and not run.owns(None)
    assert run.held == [] and not run.used and not run.left
    run.acquire()
    assert not run.used  # no more than its lock
    run.summary.write_text("{}")
    assert run.held == ["summary.json"] and run.used and run.left


# The lock


@pytest.mark.parametrize("way", ["killed", "ended", "given back"])
def test_a_lock_ends_with_its_process(run: RunDirectory, way: str) -> None:
    code = {"killed": "time.sleep(60)", "ended": "sys.stdin.readline()", "given back": "sys.stdin.readline(); run.release()"}[way]
    other = another(f"run.acquire(); print('ready', flush=True); {code}", run.path)
    try:
        assert run.running
        with pytest.raises(RunDirectoryError, match=f"in use by process {other.pid} on "):
            run.acquire()
        assert f"process {other.pid} " in run.lock.read_text()  # the refusal has not emptied the file
        if way == "killed":
            other.send_signal(signal.SIGKILL)
        other.communicate("\n")
        assert run.running is False and run.acquire() and run.running
    finally:
        end(other)


def test_a_forked_child_that_outlives_its_killed_parent_does_not_keep_the_lock(run: RunDirectory) -> None:
    code = "run.acquire()\nchild = os.fork()\nif not child: time.sleep(60)\nprint(child, flush=True)\ntime.sleep(60)"
    other = another("print('ready', flush=True)\n" + code, run.path)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    try:
        assert run.running
        other.send_signal(signal.SIGKILL)
        other.wait()
        os.kill(child, 0)  # it lives
        assert run.running is False and run.acquire()
    finally:
        os.kill(child, signal.SIGKILL)
        end(other)


def test_a_forked_child_does_not_have_its_parents_lock(run: RunDirectory) -> None:
    code = "run.acquire()\nif not os.fork():\n  print(run.running, flush=True)\n  try: run.acquire()\n"
    code += "  except FileExistsError as error: print('in use' in str(error), flush=True)\n  run.release()\n  os._exit(0)\n"
    other = another("print('ready', flush=True)\n" + code + "os.wait(); print(run.running, flush=True); time.sleep(60)", run.path)
    assert other.stdout is not None
    try:
        assert [other.stdout.readline() for _ in range(3)] == ["True\n"] * 3 and run.running
    finally:
        end(other)


def test_whoever_looks_keeps_no_run_from_starting(run: RunDirectory) -> None:
    run.acquire()
    run.release()
    others = [another("print('ready', flush=True)\nwhile True: run.running", run.path) for _ in range(2)]
    try:
        for _ in range(30):
            assert run.acquire()
            run.release()
    finally:
        for other in others:
            end(other)


def test_to_look_changes_nothing(run: RunDirectory) -> None:
    assert run.running is False and not run.path.exists()
    run.path.mkdir()
    assert run.running is False and not list(run.path.iterdir())
    run.acquire()
    before = run.lock.read_text()
    run.release()
    for _ in range(3):
        assert run.running is False and run.lock.read_text() == before


def test_the_block_leaves_a_lock_with_whoever_took_it_before(run: RunDirectory) -> None:
    with run.locked():
        assert run.running
        with RunDirectory(run.path / "..").locked(), RunDirectory(run.path / ".." / "run").locked():
            assert run.running
        assert run.running
    assert run.running is False
    run.acquire()
    with run.locked():
        pass
    assert run.running


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_a_warning(
    run: RunDirectory, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(self: FileLock, *args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with run.locked():
        run.lock.touch()
        assert run.running is None
    assert run.status({"status": "running"}) == "running"  # nobody knows better
    assert os.strerror(number) in caplog.text and "would not be noticed" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_lock_that_cannot_be_made_is_an_error(run: RunDirectory, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: FileLock, *args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(WriteError, match=rf"\.lock: {os.strerror(number)}.*resume=auto"):
        run.acquire()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "second name", "directory"])
def test_a_lock_that_leads_elsewhere_is_refused(run: RunDirectory, tmp_path: Path, kind: str) -> None:
    run.path.mkdir()
    canary = tmp_path / "canary"
    if kind != "dangling link":
        canary.write_text("mine")
    if "link" in kind:
        run.lock.symlink_to(canary)
    elif kind == "pipe":
        os.mkfifo(run.lock)
    elif kind == "directory":
        run.lock.mkdir()
    else:
        os.link(canary, run.lock)
    started = time.perf_counter()
    with pytest.raises(ForeignFileError, match="left untouched"):
        run.acquire()
    with pytest.raises(ForeignFileError, match="left untouched"):
        lock.take(run.lock)
    assert time.perf_counter() - started < 5 and (
        not canary.exists() if kind == "dangling link" else canary.read_text() == "mine"
    )


# What is read


def test_the_config_without_what_it_repeats(run: RunDirectory) -> None:
    run.path.mkdir()
    run.config.write_text("solver: {rtol: 1e-6}\ntask: {solver: {rtol: 1e-6}, own: {rtol: 1e-6}, size: 3}\n")
    assert run.read_config() == {"solver.rtol": 1e-6, "task.own.rtol": 1e-6, "task.size": 3}
    assert "task.solver.rtol" in run.read_config({"task.solver.rtol"})


def test_differences_are_those_of_the_experiment(run: RunDirectory) -> None:
    cfg = OmegaConf.create({"seed": 1, "device": "cpu", "solver": {"rtol": 1e-6}, "task": {"solver": "${solver}"}})
    assert run.differences(cfg) == ""  # nothing is there
    run.path.mkdir()
    run.begin(cfg)
    assert run.differences(cfg) == ""
    cfg.device = "cuda"
    assert run.differences(cfg) == ""
    cfg.solver.rtol, cfg.seed = 1e-3, 2
    assert run.differences(cfg) == "seed is 1 there and 2 here; solver.rtol is 1e-06 there and 0.001 here"
    run.config.write_text("a: [")
    with pytest.raises(UnreadableError):
        run.differences(cfg)


def test_a_run_begins_without_what_a_try_before_has_left(run: RunDirectory) -> None:
    run.checkpoints.mkdir(parents=True)
    run.failed.write_text("Traceback")
    for path in (run.path / ".a.1.tmp", run.checkpoints / ".last.pt.1.tmp"):
        path.write_text("half")
    run.begin(OmegaConf.create({"seed": 1, "hydra": {"x": 1}}))
    assert sorted(path.name for path in run.path.rglob("*")) == ["checkpoints", "config.yaml"]
    assert run.config.read_text() == "seed: 1\n"


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"status": "completed", "metrics": 3}'])
def test_a_summary_that_is_none(run: RunDirectory, text: str | None) -> None:
    run.path.mkdir()
    if text is not None:
        run.summary.write_text(text)
    with pytest.raises(FileNotFoundError if text is None else UnreadableError):
        run.read_summary()
    assert or_empty(run.read_summary) == {}


# The keys

EVERYWHERE = {"resume", "repeat", "overrides", "hparams", "group"}
TABLE = {
    # key -> purposes that it does not count for, evaluation aside
    "paths.data": EVERYWHERE,
    "hydra.run.dir": EVERYWHERE,
    "resume": EVERYWHERE,
    "mode": EVERYWHERE,
    "ckpt_path": EVERYWHERE - {"repeat"},
    "device": EVERYWHERE - {"hparams"},
    "threads": EVERYWHERE - {"hparams"},
    "name": {"resume", "repeat", "group"},
    "compile": {"resume", "repeat"},
    "trainer.max_steps": {"resume"},
    "trainer.monitor": {"resume"},
    "tracker.mode": EVERYWHERE,
    "seed": {"group"},
    "dataset.root": {"resume", "repeat", "hparams"},
    "dataset.download": {"resume", "repeat", "hparams"},
    "task.dataset.root": {"resume", "repeat", "hparams"},
    "dataset": set(),
    "dataset.name": set(),
    "solver.rtol": set(),
    "task/cell": set(),
    "optimizer.lr": set(),
    "modes": set(),
    "paths_of_mine": set(),
}


@pytest.mark.parametrize("key", TABLE)
def test_what_a_key_counts_for(key: str) -> None:
    assert {purpose for purpose in EVERYWHERE if not counts(key, purpose)} == TABLE[key]  # pyright: ignore[reportArgumentType]
    data_or_model = key.split(".")[0] in ("seed", "dataset", "task") or key == "task/cell"
    assert counts(key, "evaluate") == (data_or_model and not key.endswith((".root", ".download")))


def test_the_table_knows_the_keys_of_the_config_and_the_purposes_alone() -> None:
    assert set(DO_NOT_COUNT) <= {*KEYS, "hydra"}
    assert {purpose for found in DO_NOT_COUNT.values() for purpose in found} <= set(get_args(Purpose))


def test_many_differences_are_counted() -> None:
    said = differences({}, flatten(OmegaConf.create({f"k{k:02}": k for k in range(25)})))
    assert said.startswith("k00 is None there and 0 here; ") and said.endswith("; and 5 more")
