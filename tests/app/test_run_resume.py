"""A run stopped in any way goes on bit for bit."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from event_files import given as overridden
from event_files import scalars, session_starts
from toy_task import (
    SCHEDULERS,
    SMALL,
    Killed,
    Toy,
    config,
    go,
    raise_at,
    rows,
    signal_at,
    summary,
    uninterrupted,
)

from hyperopt.app import checkpoint

# What either keeps is kept apart from the other: every optimizer and every schedule once, all pairs with the slow tests.
ONCE = set(zip([*SMALL, *SMALL], SCHEDULERS, strict=False))
PAIRS = [(optimizer, scheduler) for optimizer in SMALL for scheduler in SCHEDULERS]


@pytest.mark.cases(quick=1, slow=4)
@pytest.mark.parametrize(
    ("optimizer", "scheduler"), [pytest.param(*pair, marks=() if pair in ONCE else pytest.mark.slow) for pair in PAIRS]
)
def test_resume_equals_uninterrupted(tmp_path: Path, optimizer: str, scheduler: str) -> None:
    want = uninterrupted(tmp_path / "whole", config(optimizer, scheduler))
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stop:
        go(config(optimizer, scheduler), out, signal_at(5, signal.SIGTERM))
    assert stop.value.code == 143
    assert rows(out) == want[:6]
    with pytest.raises(Killed):
        go(config(optimizer, scheduler, resume="auto"), out, raise_at(9, Killed()))  # back to the checkpoint after 8 steps
    go(config(optimizer, scheduler, resume="auto"), out)
    assert rows(out) == want
    assert summary(out)["best"]["metrics"]["val/loss"] == summary(tmp_path / "whole")["best"]["metrics"]["val/loss"]


def stop_by_length(out: Path) -> None:
    go(config(trainer={"max_steps": 6}), out)  # its last step, 5, gets an evaluation that a longer run does not make


def stop_by_time(out: Path) -> None:
    go(config(trainer={"max_seconds": 1e-9}), out)
    assert summary(out)["steps"] == 1 and summary(out)["reason"] == "trainer.max_seconds"


def stop_by_failure(out: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        go(config(), out, raise_at(6, RuntimeError("broken")))


def stop_by_sigint(out: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        go(config(), out, signal_at(4, signal.SIGINT))
    assert stop.value.code == 130
    assert summary(out)["status"] == "interrupted" and summary(out)["steps"] == 5


@pytest.mark.parametrize(("job", "way"), [(False, "hydra.run.dir="), (True, "on the sweep's command line")])
def test_an_interrupted_run_says_how_it_goes_on(tmp_path, caplog, job, way):
    if job:
        (tmp_path / "job.json").write_text("{}")
    with pytest.raises(SystemExit):
        go(config(), tmp_path, signal_at(1, signal.SIGINT))
    assert f"interrupted after 2 steps; continue with resume=auto {way}" in caplog.text


def stop_before_first_checkpoint(out: Path) -> None:
    with pytest.raises(Killed):
        go(config(), out, raise_at(0, Killed()))


def stop_twice_at_the_end(out: Path) -> None:
    go(config(), out)
    go(config(resume="auto"), out)  # a finished run has nothing left to do and must change nothing


STOPS = (stop_by_length, stop_by_time, stop_by_failure, stop_by_sigint, stop_before_first_checkpoint, stop_twice_at_the_end)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("stop", STOPS)
def test_resume_after_every_kind_of_stop(tmp_path: Path, stop: Callable[[Path], None]) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    stop(tmp_path / "stopped")
    go(config(resume="auto"), tmp_path / "stopped")
    assert rows(tmp_path / "stopped") == want
    assert summary(tmp_path / "stopped")["status"] == "completed"
    assert not (tmp_path / "stopped" / "FAILED").exists()


@pytest.mark.cases(quick=1, slow=3)
@pytest.mark.parametrize("write", range(1, 8))
def test_killed_while_a_checkpoint_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out, count, replace = tmp_path / "stopped", 0, os.replace

    def flaky(source: Any, target: Any) -> None:
        nonlocal count
        if str(target).endswith(".pt"):
            count += 1
            if count == write:
                raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(Killed):
        go(config(), out)
    monkeypatch.setattr(os, "replace", replace)
    go(config(resume="auto"), out)
    assert rows(out) == want


def test_goes_on_in_another_directory(tmp_path: Path) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    with pytest.raises(SystemExit):
        go(config(), tmp_path / "first", signal_at(5, signal.SIGTERM))
    go(config(ckpt_path=str(tmp_path / "first" / "checkpoints" / "last.pt")), tmp_path / "second")
    assert rows(tmp_path / "second") == want[5:]


def test_truncated_checkpoint_falls_back_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        go(config(), out, signal_at(9, signal.SIGTERM))
    last = out / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        go(config(resume="auto"), out)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "truncated" in said[0] and "after 8 steps" in said[0]
    assert rows(out) == want


def test_a_damaged_checkpoint_never_replaces_the_good_one_before_it(tmp_path: Path) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        go(config(), out, signal_at(9, signal.SIGTERM))
    last, previous = out / "checkpoints" / "last.pt", out / "checkpoints" / "last.prev.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(Killed):
        go(config(resume="auto"), out, raise_at(8, Killed()))
    for path in (last, previous):
        assert checkpoint.load(path)["state"]["step"] == 8
    go(config(resume="auto"), out)
    assert rows(out) == want


@pytest.mark.cases(quick=0)
@pytest.mark.parametrize("killed", [None, 3])
def test_goes_back_to_an_own_earlier_checkpoint(tmp_path: Path, killed: int | None) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    go(config(), out)
    best = out / "checkpoints" / "best.pt"
    assert checkpoint.load(best)["state"]["step"] == 3  # so all rows from step 2 on are written anew
    if killed is not None:
        with pytest.raises(Killed):
            go(config(ckpt_path=str(best)), out, raise_at(killed, Killed()))
        assert rows(out) == want[:killed] and not (out / "checkpoints" / "last.prev.pt").exists()
        go(config(resume="auto"), out)
    else:
        go(config(ckpt_path=str(best)), out)
    assert rows(out) == want and scalars(out) == scalars(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_begun_from_a_checkpoint_is_resumed_even_if_killed_at_once(tmp_path: Path) -> None:
    overridden(tmp_path / "second", "optimizer.lr=0.05")  # so that it has a row of HParams
    want = uninterrupted(tmp_path / "whole", config())
    with pytest.raises(SystemExit):
        go(config(), tmp_path / "first", signal_at(5, signal.SIGTERM))
    given: dict[str, Any] = {"ckpt_path": str(tmp_path / "first" / "checkpoints" / "last.pt")}
    out = tmp_path / "second"
    with pytest.raises(Killed):
        go(config(**given), out, raise_at(6, Killed()))
    task = Toy()
    go(config(resume="auto", **given), out, task)
    assert len(task.calls) == 6  # from its own checkpoint, made as it began
    assert rows(out) == want[5:] and session_starts(out) == 1


@pytest.mark.slow
def test_extending_a_finished_run_equals_a_longer_one(tmp_path: Path) -> None:
    for name in ("whole", "run"):
        overridden(tmp_path / name, "optimizer.lr=0.05")
    want = uninterrupted(tmp_path / "whole", config("adam", "plateau"))
    for steps in (3, 4, 9, 12):  # 3: its last step is evaluated anyway; 4: it gets an evaluation of its own
        go(config("adam", "plateau", trainer={"max_steps": steps}, resume="auto"), tmp_path / "run")
    assert rows(tmp_path / "run") == want and scalars(tmp_path / "run") == scalars(tmp_path / "whole")
    assert session_starts(tmp_path / "run") == 1


@pytest.mark.slow
def test_stopped_over_and_over_the_event_files_hold_every_number_once(tmp_path: Path) -> None:
    for name in ("whole", "run"):
        overridden(tmp_path / name, "optimizer.lr=0.05")
    uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    for step in (0, 0, 1, 1, 2, 4, 4, 7, 8, 11):
        with pytest.raises(Killed):
            go(config(resume="auto"), out, Toy(killed_at=step))
        assert session_starts(out) <= 1
    go(config(resume="auto"), out)
    assert scalars(out) == scalars(tmp_path / "whole") and session_starts(out) == 1


@pytest.mark.slow
def test_lines_cut_off_by_hand_are_said_and_leave_whole_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        go(config(), out, signal_at(9, signal.SIGTERM))
    metrics = out / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[: metrics.stat().st_size // 2])
    go(config(resume="auto", accept_lost_rows=True), out)
    assert "has lost its rows of steps 4 to 8; going on without them" in caplog.text
    assert rows(out) == [*want[:4], *want[9:]] and summary(out)["lost_rows"] == [[4, 8]]
    go(config(resume="auto", trainer={"max_steps": 14}), out)  # it is whole again, as far as a checkpoint knows
    assert [row["step"] for row in rows(out)][-5:] == [9, 10, 11, 12, 13] and summary(out)["lost_rows"] == [[4, 8]]
