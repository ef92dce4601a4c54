"""Runs on several ranks: the numbers of one rank, checkpoints for any number of ranks, and failures of one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from composing import composed
from rank_runs import CASES, COMMON, run_cases
from ranks import run_ranks

from hyperopt.app.run import run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # PyTorch's own, on the first jvp
RUNS = Path(__file__).parents[1].joinpath("rank_runs.py")
ONE_RANK = ("cost/", "time/", "inner/", "adjoint/", "running/inner", "running/adjoint", "hypergrad/error", "hypergrad/is_bound")
"""Costs are those of all ranks together; residuals are what is left at the tolerance."""


FOUR = ["equilibrium", "coupled", "trained, implicit", "tuned, images"]


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def compare(expected: list[dict[str, float]], found: list[dict[str, float]], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected) == 6
    for one, other in zip(expected, found, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            if not name.startswith(ONE_RANK):
                rounding = 1e-9 if name == "stn/response_error" else tolerance  # a quotient of small differences
                assert other[name] == pytest.approx(value, rel=rounding, abs=1e-14), (one["step"], name)


@pytest.fixture(scope="module")
def names(request):
    """The cases that the tests of this session ask for."""
    parameters = [
        item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")
    ]
    return [name for name in CASES if any(each.get("name") == name for each in parameters)]


@pytest.fixture(scope="module")
def one(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("one")
    run_cases(folder, names)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(RUNS, 2, folder, *names)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("four")
    run_ranks(RUNS, 4, folder, *FOUR)
    return folder


@pytest.mark.cases(quick=1, slow=4)
@pytest.mark.parametrize("name", CASES)
def test_one_and_two_ranks_agree_after_some_steps(one, two, name):
    expected = rows(one / name)
    assert expected[-1]["outer/step_loss"] != expected[0]["outer/step_loss"]
    compare(expected, rows(two / "0" / name))


@pytest.mark.cases(quick=1, slow=4)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_same_numbers(two, name):
    first, second = ([{k: v for k, v in row.items() if k[:5] != "time/"} for row in rows(two / r / name)] for r in "01")
    assert first == second


def test_a_nan_in_one_share_stops_all_ranks_and_a_slow_one_none(two):
    first, second = (json.loads((two / rank / "said.json").read_text()) for rank in "01")
    assert first == second and first["slow"] == ""
    for name in ("nan, equilibrium", "nan, trained"):
        assert "nan" in first[name] or "not finite" in first[name], first[name]
        assert json.loads((two / "0" / name / "summary.json").read_text())["status"] == "failed"
    assert len(rows(two / "0" / "slow")) == 3


@pytest.mark.manual
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_agree(one, four, name):
    compare(rows(one / name), rows(four / "0" / name))


@pytest.mark.cases(quick=1, slow=4)
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_ranks_goes_on_on_one(one, two, tmp_path, name):
    checkpoint = two / "0" / name / "checkpoints" / "last.prev.pt"
    run(composed(*COMMON, *CASES[name], f"ckpt_path='{checkpoint}'"), tmp_path)
    found = rows(tmp_path)
    begun = int(found[0]["step"])
    assert begun in (0, 2)
    compare(rows(one / name), rows(one / name)[:begun] + found)


# ---- the command line under torchrun

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hyperopt.app.cli"]
SMALL = ["precision=float64", "dataset.train=60", "dataset.val=30", "task.state_size=10", "trainer.progress=false", "device=cpu"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HYPEROPT_RANK_TIMEOUT": "30"}


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    folder = tmp_path / "run"
    command = [*TORCHRUN, *SMALL, "trainer.max_steps=3", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(rows(folder)) == 3 and done.stdout.count("ended by trainer.max_steps") == 1
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_a_refused_launch_ends_all_ranks(tmp_path):
    command = [*TORCHRUN, *SMALL, "solver=andersen", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "did you mean anderson?" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.manual
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        *(pytest.param(number, marks=pytest.mark.manual) for number in (signal.SIGSTOP, signal.SIGTERM)),
    ],
)
def test_one_rank_that_dies_stops_the_others_and_the_run_goes_on(tmp_path, number):
    folder = tmp_path / "run"
    command = [*TORCHRUN, *SMALL, "trainer.checkpoint_every=5", f"hydra.run.dir={folder}"]
    process = subprocess.Popen([*command, "trainer.max_steps=100000"], env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    victim = followers(process.pid)
    assert len(victim) == 1
    os.kill(victim[0], number)
    assert process.wait(timeout=150) != 0
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    again = [*command, f"trainer.max_steps={steps + 5}", "resume=auto"]
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(folder)] == list(range(steps + 5))


def followers(parent: int) -> list[int]:
    """Processes that ``parent`` started as another rank than the first."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and f"PPid:\t{parent}\n" in (path / "status").read_text():
                if b"\0RANK=1\0" in b"\0" + (path / "environ").read_bytes():
                    found.append(int(path.name))
        except OSError:
            continue
    return found
