"""SIGKILL at random moments and at every write: what is resumed equals what nothing stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.manual
def test_killed_at_every_write(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(ROOT / "tests" / "kill_often.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and found["kills"] > 50


def measure() -> ModuleType:
    """Load the script that measures the faults of real ``hyperopt`` processes."""
    spec = importlib.util.spec_from_file_location("faults", ROOT / "experiments" / "faults" / "measure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.manual
def test_fifty_kills_of_the_real_command(tmp_path: Path) -> None:
    found = measure().kills(tmp_path, seed=0, count=50)
    assert sum(case["signals"] for case in found.values()) == 60  # a SIGTERM and a SIGINT for each optimizer as well
    assert [case["differences"] for case in found.values()] == [[]] * 5


@pytest.mark.manual
def test_two_launches_at_the_same_moment(tmp_path: Path) -> None:
    found = measure().together(tmp_path, seed=0, count=20)
    assert found["exit statuses and refusals"]["[0, 1]"] == 4 and found["runs with a number that is not theirs"] == 0


@pytest.mark.manual
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    found = measure().disk(tmp_path, seed=0, count=50)
    assert found["torn lines"] == found["rows differ"] == 0 and found["differences"] == []


@pytest.mark.manual
@pytest.mark.skipif(os.geteuid() != 0, reason="chattr takes root")
def test_a_directory_that_is_removed_moved_or_locked(tmp_path: Path) -> None:
    found = measure().directory(tmp_path, seed=0, count=50)
    assert [each["differences"] for each in found.values()] == [[]] * 3


@pytest.mark.manual
def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    found = measure().long(tmp_path, seed=0, count=50)
    early, *_, late = found["marks"].values()
    assert found["steps"] == 100_000 and late["resident MiB"] < 1.02 * early["resident MiB"]
    assert late["bytes"]["checkpoints/last.pt"] < 1.1 * early["bytes"]["checkpoints/last.pt"]
    assert found["bytes a step"]["metrics.jsonl"] < 600 and found["bytes a step"]["tb/*"] < 600 and found["files"] < 20
