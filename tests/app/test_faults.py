"""Full disks, directories that vanish, clocks that go back, second runs in one directory: said clearly, and nothing is lost."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from event_files import scalars, walls
from launcher import snapshot
from toy_task import Killed, Toy, config, go, raise_at, rows, signal_at, summary, uninterrupted

from hyperopt.app import checkpoint
from hyperopt.app.checkpoint import CheckpointError
from hyperopt.app.files import WriteError, write_text
from hyperopt.app.lock import RunDirectoryError, release_all
from hyperopt.app.run_directory import RunDirectory
from hyperopt.tasks.base import HypergradientError

ROOT = Path(__file__).resolve().parents[2]


def whole_again(out: Path, whole: Path) -> None:
    """Resume, and compare with a run that nothing stopped."""
    go(config(resume="auto"), out)
    assert rows(out) == rows(whole)
    assert scalars(out) == scalars(whole)
    assert summary(out)["status"] == "completed" and not (out / "FAILED").exists()
    assert not list(out.rglob("*.tmp"))


def fail_writes(monkeypatch: pytest.MonkeyPatch, pattern: str, skip: int, number: int = errno.ENOSPC) -> None:
    """Let half a write succeed and the rest fail, to files that match, from the ``skip``-th write on."""
    write, count = os.write, 0

    def full(handle: int, data: Any) -> int:
        nonlocal count
        if re.search(pattern, os.readlink(f"/proc/self/fd/{handle}")):
            count += 1
            if count == skip + 1:
                return write(handle, memoryview(data)[: len(data) // 2])
            if count > skip + 1:
                raise OSError(number, os.strerror(number))
        return write(handle, data)

    monkeypatch.setattr(os, "write", full)


FULL = [
    (r"metrics\.jsonl", 0, 0),
    (r"metrics\.jsonl", 7, 7),
    (r"out\.tfevents", 2, 0),
    (r"out\.tfevents", 15, 6),  # of a row, the line comes first
    (r"\.best\.pt\.", 0, 0),
    (r"\.last\.pt\.", 0, 0),
    (r"\.last\.pt\.", 2, 7),
    (r"residual\.png", 0, 12),
    (r"config\.yaml", 0, 0),
    (r"summary\.json", 0, 0),
    (r"summary\.json", 1, 12),
]


@pytest.mark.cases(quick=1, slow=4)
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the fault is injected by a file's name, which /proc gives")
@pytest.mark.parametrize(("pattern", "skip", "written"), FULL, ids=lambda value: str(value).replace("\\", ""))
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, skip: int, written: int) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_writes(patch, pattern, skip)
        with pytest.raises(WriteError, match=r"No space left .*free space there, .* hydra\.run\.dir .*resume=auto") as told:
            go(config(), out)
    assert told.value.errno == errno.ENOSPC
    [named] = re.findall(r"cannot write (\S+):", str(told.value))
    assert Path(named).parent.is_relative_to(out) and re.search(pattern, f".{Path(named).name}.")
    if (out / "metrics.jsonl").exists():
        assert rows(out) == want[:written]  # whole lines only
    if written > 0:
        assert checkpoint.load(out / "checkpoints" / "last.pt")["state"]["step"] <= written + 1  # it comes before its row
    if pattern != r"summary\.json":
        assert "WriteError" in (out / "FAILED").read_text() and summary(out)["status"] == "failed"
    assert not list(out.rglob("*.tmp"))
    whole_again(out, tmp_path / "whole")


def test_a_disk_too_full_for_the_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch, r"metrics\.jsonl|tfevents|\.pt\.|\.json\.|FAILED", 10)  # FAILED cannot be written either
    with pytest.raises(WriteError):
        go(config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert checkpoint.load_last(tmp_path / "checkpoints") is not None


@pytest.mark.slow
def test_a_directory_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted(tmp_path / "whole", config())
    out, opened = tmp_path / "run", os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(out)) and task.calls[5:]:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *args, **kwargs)

    task = Toy()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(WriteError, match=r"cannot write .*\.pt: Read-only file system; make the directory writable"):
            go(config(), out, task)
    assert checkpoint.load(out / "checkpoints" / "last.pt")["state"]["step"] == 4
    assert not (out / "FAILED").exists() and summary(out)["status"] == "running"  # it could not be told there
    whole_again(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_directory_that_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    want = uninterrupted(tmp_path / "whole", config())
    out = tmp_path / "run"

    def remove(k: int, task: Toy) -> None:
        if k == 6:
            shutil.rmtree(out)

    with pytest.raises(WriteError, match=r"metrics\.jsonl: No such file .*was removed or moved while the run wrote to it"):
        go(config(), out, Toy(remove))
    assert "rows and the state after 7 steps are there again" in caplog.text
    assert rows(out) == want[:6]
    whole_again(out, tmp_path / "whole")


def test_a_directory_that_is_moved_away(tmp_path: Path) -> None:
    uninterrupted(tmp_path / "whole", config())
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def move(k: int, task: Toy) -> None:
        if k == 6:
            out.rename(elsewhere)

    with pytest.raises(WriteError, match=r"set hydra\.run\.dir to where it is"):
        go(config(), out, Toy(move))
    assert not (out / "checkpoints").exists()  # nothing of the run is in two places
    whole_again(elsewhere, tmp_path / "whole")


@pytest.mark.cases(quick=0)
@pytest.mark.parametrize("back", [3600.0, 1e9])
def test_a_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: float) -> None:
    uninterrupted(tmp_path / "whole", config())
    out, now, shift = tmp_path / "run", time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: now() - shift)

    def set_back(k: int, task: Toy) -> None:
        nonlocal shift
        if k == 3:
            shift = back

    with pytest.raises(Killed):
        go(config(), out, Toy(set_back, killed_at=6))
    shift = 2 * back
    with pytest.raises(SystemExit):  # another machine, whose clock is behind
        go(config(resume="auto"), out, signal_at(9, signal.SIGTERM))
    whole_again(out, tmp_path / "whole")
    found = walls(out)
    assert len(found) > 12 and found == sorted(found)
    assert 0 < summary(out)["seconds"] < 600
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert 0 <= float(re.findall(r'"time/step_seconds": ([^,}]+)', line)[0]) < 600


def test_a_damaged_run_json_does_not_stop_a_resume(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        go(config(), tmp_path, signal_at(5, signal.SIGTERM))
    (tmp_path / "run.json").write_text('{"argv": [')
    go(config(resume="auto"), tmp_path)
    assert '"after_steps": 6' in (tmp_path / "run.json").read_text()


def test_nan_in_the_fitted_rows_stops_the_run_and_is_never_saved(tmp_path: Path) -> None:
    class Spoilt(Toy):
        def setup(self, env: Any) -> None:
            super().setup(env)
            self.x[2, 1] = math.nan

    with pytest.raises(HypergradientError, match=r"step 0: .*check the data"):
        go(config(), tmp_path, Spoilt())
    assert "HypergradientError" in (tmp_path / "FAILED").read_text()
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        assert torch.isfinite(checkpoint.load(path)["task"]["a"]).all()


def test_nan_in_the_rows_selected_on_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Spoilt(Toy):
        def setup(self, env: Any) -> None:
            super().setup(env)
            self.x[12, 1] = math.nan

    with caplog.at_level(logging.WARNING):
        assert math.isnan(go(config(), tmp_path, Spoilt()))
    assert [record.getMessage() for record in caplog.records] == [
        "step 0: val/loss is nan, which is never the best; check its rows, or lower optimizer.lr"
    ]


def hostile(last: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "state": Path("x")}, last)


def foreign(last: Path) -> None:
    content = checkpoint.load(last)
    content["config"]["seed"] = 99
    checkpoint.save(last, content)


def old_format(last: Path) -> None:
    torch.save({"format": 1}, last)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("spoil", [hostile, foreign, old_format])
def test_a_refused_checkpoint_leaves_the_run_as_it_was(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    go(config(), tmp_path)
    spoil(tmp_path / "checkpoints" / "last.pt")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError):
        go(config(resume="auto"), tmp_path)
    assert snapshot(tmp_path) == before and summary(tmp_path)["status"] == "completed"


def test_a_refused_checkpoint_fails_a_new_run(tmp_path: Path) -> None:
    go(config(), tmp_path / "one")
    with pytest.raises(CheckpointError, match="seed is 3 there and 4 here"):
        go(config(seed=4, ckpt_path=str(tmp_path / "one" / "checkpoints" / "last.pt")), tmp_path / "two")
    assert "CheckpointError" in (tmp_path / "two" / "FAILED").read_text() and summary(tmp_path / "two")["status"] == "failed"


HOLD = "import sys; from pathlib import Path; from hyperopt.app import run_directory as r\n"
HOLD += "sys.stdin.readline()\n"
HOLD += "try: print(r.RunDirectory(Path(sys.argv[1])).acquire(), flush=True)\n"
HOLD += "except r.RunDirectoryError as error: print(error, flush=True)\n"
HOLD += "sys.stdin.read()\n"


def holder(where: Path) -> subprocess.Popen[str]:
    """Start a process that takes the lock of ``where`` when it reads a line, and keeps it until its input ends."""
    command = [sys.executable, "-c", HOLD, str(where)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def tell(process: subprocess.Popen[str]) -> None:
    """Send a process its line."""
    assert process.stdin is not None
    process.stdin.write("now\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    """Return the next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and close its pipes."""
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_directory_in_use_is_refused_untouched_until_its_process_is_gone(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    uninterrupted(whole, config())
    out = tmp_path / "run"
    with pytest.raises(Killed):
        go(config(), out, raise_at(6, Killed()))
    other = holder(out)
    try:
        tell(other)
        assert heard(other) == "True\n"
        before = snapshot(out)
        for attempt in range(2):  # a refusal does not take the lock away
            with pytest.raises(RunDirectoryError, match=rf"in use by process {other.pid} on .* left untouched.*hydra\.run\.dir"):
                go(config(resume="auto"), out)
            assert snapshot(out) == before, attempt
    finally:
        end(other)
    whole_again(out, whole)


def test_of_many_at_the_same_moment_one_gets_the_directory(tmp_path: Path) -> None:
    processes = [holder(tmp_path / "new") for _ in range(4)]
    try:
        time.sleep(0.5)
        for process in processes:
            tell(process)
        answers = [heard(process) for process in processes]
    finally:
        for process in processes:
            end(process)
    assert sum(answer == "True\n" for answer in answers) == 1
    assert sum("is in use by" in answer for answer in answers) == 3


def test_the_lock_follows_the_directory_and_not_its_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    directory = RunDirectory(out)
    assert directory.acquire() and not directory.acquire()
    shutil.rmtree(out)
    assert directory.acquire()  # a new directory: what was held is gone
    directory.release()
    assert directory.acquire()
    release_all()


def test_a_small_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
        with pytest.raises(WriteError, match=r"a\.txt: Input/output error; mend this"):
            write_text(path, "new")
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["a.txt"]
