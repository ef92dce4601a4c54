"""The sweeps of ``configs/sweep``, and launchers and sweepers chosen where Hydra would not heed them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launcher import Launcher
from omegaconf import OmegaConf

SWEEPS = Path(__file__).resolve().parents[2] / "configs" / "sweep"
JOBS = {"five_seeds": 5, "solver_adjoint": 9, "adjoint_steps": 6, "hybrid": 20}
OWN = "# @package _global_\nhydra:\n  launcher:\n    _target_: mine.Launcher\n"


def test_every_ready_sweep_is_tested() -> None:
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == set(JOBS)


@pytest.mark.cases(quick=0, slow=2)
@pytest.mark.parametrize("name", JOBS)
def test_a_ready_sweep_needs_no_other_word(name: str, launch: Launcher) -> None:
    done = launch(f"sweep={name}", "hydra.sweep.dir=mine")
    assert done.status == 0, done.err
    assert len(done.runs) == JOBS[name] == json.loads(Path("mine/sweep.json").read_text())["counts"]["completed"]
    found = [cfg for cfg, _ in done.runs]
    if name == "five_seeds":
        assert [cfg.seed for cfg in found] == [0, 1, 2, 3, 4]
        (Path("mine") / "3" / "summary.json").unlink()  # it is resumed as any other
        assert [cfg.seed for cfg, _ in launch(f"sweep={name}", "hydra.sweep.dir=mine", "resume=auto").runs] == [3]
    elif name == "hybrid":
        assert {cfg.optimizer._target_ for cfg in found} == {"torch.optim.SGD", "torch.optim.Adam"}
        assert all(0.003 <= cfg.optimizer.lr <= 0.3 for cfg in found) and len({cfg.optimizer.lr for cfg in found}) == 20
    elif name == "solver_adjoint":
        pairs = {(cfg.solver._target_, cfg.adjoint.linear_solver._target_) for cfg in found}
        assert len(pairs) == 9 and all(cfg.task.solver == cfg.solver for cfg in found)
    else:
        assert [cfg.task.adjoint.linear_solver.max_steps for cfg in found] == [1, 2, 5, 10, 20, 50]
        assert {cfg.task.adjoint.linear_solver.rtol for cfg in found} == {0.0}


@pytest.mark.manual
def test_a_ready_sweep_for_real(command: Launcher) -> None:
    small = ["dataset.train=20", "dataset.val=20", "dataset.test=20", "dataset.features=2"]
    done = command("sweep=five_seeds", "experiment=l2_logistic", "debug=default", *small, "hydra.sweep.dir=mine")
    index = json.loads(Path("mine/sweep.json").read_text())
    assert done.status == 0 and index["counts"] == {"completed": 5}
    assert len({job["metrics"]["val/loss"] for job in index["jobs"]}) == 5 and {job["steps"] for job in index["jobs"]} == {2}


def test_a_key_both_in_the_sweep_and_on_the_command_line_is_refused(launch: Launcher) -> None:
    refused = launch("sweep=five_seeds", "seed=7", "hydra.sweep.dir=mine")
    assert refused.status == 1 and not refused.runs and not Path("mine").exists()
    assert "seed=7 and hydra.sweeper.params.seed=0,1,2,3,4 are both given; drop one" in refused.err


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("argv", [["experiment=own,l2_ridge"], ["experiment=l2_ridge,own", "seed=1,2"]])
def test_a_launcher_chosen_inside_what_is_swept_is_refused(argv: list[str], launch: Launcher, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(OWN)
    refused = launch("-m", *argv, f"hydra.searchpath=[file://{tmp_path}/conf]", "hydra.sweep.dir=mine")
    assert refused.status == 1 and not refused.runs and not Path("mine").exists()
    assert "experiment=own" in refused.err and "sets hydra.launcher (mine.Launcher)" in refused.err
    assert "hydra/launcher=" in refused.err


@pytest.mark.cases(quick=0)
@pytest.mark.parametrize("argv", [[], ["-m"], ["hydra/sweeper=optuna"]])
def test_a_ready_sweep_chooses_its_sweeper(argv: list[str], launch: Launcher) -> None:
    done = launch("sweep=hybrid", "hydra.sweeper.n_trials=1", "hydra.sweep.dir=mine", *argv)
    assert done.status == 0 and len(done.runs) == 1, done.err
    saved = OmegaConf.load("mine/multirun.yaml").hydra.sweeper
    assert saved._target_.endswith("OptunaSweeper") and saved.warm_start == "best"


def test_a_grid_of_a_ready_search_is_refused(launch: Launcher) -> None:
    refused = launch("sweep=hybrid", "hydra/sweeper=grid", "hydra.sweep.dir=mine")
    assert refused.status == 1 and not refused.runs and not Path("mine").exists()
    assert "hydra.sweeper.warm_start belongs to hydra/sweeper=optuna" in refused.err and refused.err.count("\n") == 1


def test_two_ready_sweeps_in_one_are_refused(launch: Launcher) -> None:
    refused = launch("-m", "sweep=five_seeds,adjoint_steps", "hydra.sweep.dir=mine")
    assert refused.status == 1 and "job 0 (sweep=five_seeds) sets hydra.sweeper" in refused.err
