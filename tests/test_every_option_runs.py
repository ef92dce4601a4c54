"""Every option of every group takes two steps of the real command, and every experiment does so on its real data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hyperopt.run import run
from hyperopt.schema import SCHEMA, register

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = ("task", "solver", "adjoint", "optimizer")
NEEDS = {"adjoint=shine": ["solver=broyden"]}  # it shares that solver's inverse estimate
TRAINED = ("adjoint/t1t2", "adjoint/finite_difference")  # of trained problems only
OPTIONS = ["=".join(option.rsplit("/", 1)) for option in SCHEMA if option.split("/")[0] in GROUPS and option not in TRAINED]
FOLDERS = {  # of the datasets that lie in files
    "mnist": ["MNIST/raw"],
    "fashion_mnist": ["FashionMNIST/raw"],
    "cifar10": ["cifar-10-batches-py", "cifar-10-batches-bin"],
}
ROWS = ("dataset.train=100", "dataset.val=50", "dataset.test=50")
SMALL = {"task=equilibrium": [*ROWS, "task.state_size=20"], "task=coupled": ["task.rows=20"]}  # by task
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def two_steps(out: Path, *overrides: str) -> list[dict[str, float]]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["debug=default", "device=cpu", *overrides])
    run(cfg, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((out / "summary.json").read_text())["status"] == "completed"
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["outer/loss"]) and row["hypergrad/norm"] > 0 for row in rows)
    return rows


@pytest.mark.filterwarnings("ignore::hyperopt.policy.SolveWarning")  # a line search may try points that are hard to solve at
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option(option: str, tmp_path: Path) -> None:
    first, last = two_steps(tmp_path, option, *NEEDS.get(option, []), *SMALL.get(option, SMALL["task=equilibrium"]))
    assert last["outer/loss"] < 1.5 * first["outer/loss"]


def test_cifar10_which_no_experiment_has(tmp_path: Path, real_root: Any) -> None:
    root = real_root(*FOLDERS["cifar10"])
    data = ["dataset=cifar10", f"paths.data={root}", "dataset.download=false"]
    two_steps(tmp_path, *data, "optimizer.lr=0.01", *SMALL["task=equilibrium"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_on_its_data(name: str, tmp_path: Path, real_root: Any) -> None:
    overrides = [f"experiment={name}"]
    dataset = re.search(r"override /dataset: (\w+)", (CONFIGS / "experiment" / f"{name}.yaml").read_text())
    if dataset and dataset[1] in FOLDERS:
        overrides += ["dataset.train=300", "dataset.val=100", "dataset.test=100"]
        overrides += [f"paths.data={real_root(*FOLDERS[dataset[1]])}", "dataset.download=false"]
    first, last = two_steps(tmp_path, *overrides)
    assert last["outer/loss"] < 1.5 * first["outer/loss"]
