"""Every option of every group takes two steps of the real command, and every experiment does so on its real data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from composing import CONFIGS, composed
from omegaconf import OmegaConf

from hyperopt.app.building import build
from hyperopt.app.options import own
from hyperopt.app.run import run

GROUPS = ("task", "solver", "adjoint", "optimizer")
FEW = ["task.batch_size=10", "dataset.train=20", "dataset.val=10", "dataset.test=10"]  # for cells of convolutions
NEEDS = {
    "adjoint=shine": ["solver=broyden"],  # it shares that solver's inverse estimate
    "task/network=deq_resnet": [*FEW, "task.network.channels=8", "task.network.inner=8"],
    # The adjoint iteration of an MDEQ does not contract at first.
    "task/network=mdeq": [*FEW, "task.network.channels=[8,8]", "solver=anderson", "adjoint=gmres", "optimizer.lr=0.05"],
}
STOCHASTIC = tuple(f"adjoint/{name}" for name in ("soba", "saba", "stocbio", "f2sa", "v_pbgd"))
TRAINED = ("adjoint/t1t2", "adjoint/finite_difference", *STOCHASTIC)  # of trained problems only
SPACES = ("task/space/", "task/tuned/")  # those of one setting each: see the tests of the spaces
OPTIONS = [
    "=".join(option.rsplit("/", 1))
    for option in own()
    if option.split("/")[0] in GROUPS and option not in TRAINED and not option.startswith(SPACES)
]
FOLDERS = {  # of the datasets that lie in files
    "mnist": ["MNIST/raw"],
    "fashion_mnist": ["FashionMNIST/raw"],
    "cifar10": ["cifar-10-batches-py", "cifar-10-batches-bin"],
    "omniglot": ["omniglot-py"],
}
FILES = {"newsgroups": "20news-bydate_py3.pkz"}  # and in one file
ROWS = ("dataset.train=100", "dataset.val=50", "dataset.test=50")
SMALL = {"task=equilibrium": [*ROWS, "task.state_size=20"], "task=coupled": ["task.rows=20"], "task=implicit": [*ROWS]}  # by task
OWNER = {
    "task/network": "task=implicit",
    "task/augment": "task=implicit",
    "task/classifier": "task=stn_images",
}  # of the groups that not every task has
SMALL_EXPERIMENT = {  # where 300 images are too many
    "deq_cifar10": ["dataset.train=16", "dataset.test=8", "task.batch_size=8", "task.network.channels=8", "task.network.inner=8"],
    "mdeq_cifar10": ["dataset.train=16", "dataset.test=8", "task.batch_size=8", "task.network.channels=[8,8]"],
}
SMALL |= {f"task={name}": [*ROWS, "inner.max_steps=5"] for name in ("l2", "data_distillation")}
SMALL |= {
    f"task={name}": [*ROWS, "inner.max_steps=5", "task.hidden=[10]"]
    for name in ("weight_decay", "weight_net", "augmentation", "data_cleaning")
}
SMALL |= {f"task={name}": ["optimizer=adam", "optimizer.lr=0.01"] for name in ("stn_quadratic", "stn_ridge")}
SMALL["task=stn_images"] = [*ROWS, "optimizer=adam", "optimizer.lr=0.01", "task.batch_size=50", "task.val_batch_size=50"]
SMALL["task=quadratic"] = ["task.rows=200", "task.val_rows=100", "inner.max_steps=5", "optimizer.lr=0.05"]
SMALL["task=few_shot"] = ["inner.max_steps=1", "task.val_tasks=10", "task.test_tasks=10", "optimizer.lr=1e-3"]
SMALL["task=sinusoid"] = ["inner.step_size=0.01", "inner.max_steps=1", "optimizer.lr=1e-3"]
SMALL["task=bias_regularization"] = ["dataset=diabetes", "inner.max_steps=5"]
WARM = {path.stem: ["stn.warmup=0"] for path in (CONFIGS / "experiment").glob("stn_*.yaml")}  # the hyperparameters move at once
IMAGES = ["dataset.train=300", "dataset.val=100", "dataset.test=100"]
PERCEPTRON = [*IMAGES, "task.hidden=[20]", "task.batch_size=50", "task.val_batch_size=50", "inner.max_steps=5"]
SMALL_EXPERIMENT |= {  # of experiments whose batches are larger than the rows here
    "weight_decay_per_parameter_mnist": [*PERCEPTRON, "task.selection_rows=20"],
    "augmentation_mnist": PERCEPTRON,
    "data_cleaning_mnist": IMAGES,
    "weight_net_mnist": IMAGES,
    "few_shot_omniglot": ["dataset.size=small", "dataset.train=5", "task.tasks=2", "task.val_tasks=2", "task.test_tasks=2"],
    "data_distillation_mnist": [*IMAGES, "task.batch_size=50"],
    **{name: [*IMAGES, "task.val_batch_size=50"] for name in ("stn_mnist_mlp", "stn_fashion_cnn")},
    "stn_cifar10": [
        *("dataset.train=40", "dataset.val=20", "dataset.test=20", "task.batch_size=10", "task.val_batch_size=10"),
        *("task.classifier.channels=[8,8,8,8,8]", "task.classifier.dense=[32,32]"),
    ],
}
MADE = ("benchopt_ijcnn1",)  # whose files nobody can fetch here; tests/data/test_libsvm.py makes such files
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if path.stem not in MADE)

# Every option is built and checked in ``test_every_option_is_right.py``: few need the whole loop in the quick run too.
QUICK = ("solver=anderson", "adjoint=unrolled", "task=coupled", "task=l2", "optimizer=adam", "inner=adam")
QUICK_EXPERIMENTS = (
    "equilibrium_mnist",
    "l2_logistic",
    "bias_regularization",
    "coupled_fixed_point",
    "stn_ridge",
    "maml_sinusoid",
)
START_AT_ZERO = ("SOBA", "SABA", "VPBGD")  # the adjoint variable, or the way between the two copies


def two_steps(out: Path, *overrides: str) -> list[dict[str, float]]:
    cfg = composed("debug=default", "device=cpu", *overrides)
    run(cfg, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((out / "summary.json").read_text())["status"] == "completed"
    assert [row["step"] for row in rows] == [0, 1]
    zero = OmegaConf.select(cfg, "adjoint._target_", default="").rpartition(".")[2] in START_AT_ZERO
    assert all(math.isfinite(row["outer/loss"]) for row in rows) and all(row["hypergrad/norm"] > 0 for row in rows[zero:])
    return rows


@pytest.mark.cases(quick=2, slow=4, among={"option": QUICK})
@pytest.mark.filterwarnings("ignore::hyperopt.core.policy.SolveWarning")  # a line search may try points that are hard to solve at
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option(option: str, tmp_path: Path) -> None:
    task = OWNER.get(option.partition("=")[0], option if option in SMALL else "task=equilibrium")
    first, last = two_steps(tmp_path, task, option, *SMALL[task], *NEEDS.get(option, []))
    assert last["outer/loss"] < 1.5 * first["outer/loss"]


def test_cifar10_with_the_default_task(tmp_path: Path, real_root: Any) -> None:
    root = real_root(*FOLDERS["cifar10"])
    data = ["dataset=cifar10", f"paths.data={root}", "dataset.download=false"]
    two_steps(tmp_path, *data, "optimizer.lr=0.01", *SMALL["task=equilibrium"])


@pytest.mark.cases(quick=2, slow=6, among={"name": QUICK_EXPERIMENTS})
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_on_its_data(name: str, tmp_path: Path, real_root: Any) -> None:
    overrides = [f"experiment={name}", *WARM.get(name, [])]
    dataset = re.search(r"override /dataset: (\w+)", (CONFIGS / "experiment" / f"{name}.yaml").read_text())
    if dataset and dataset[1] in FOLDERS:
        overrides += SMALL_EXPERIMENT.get(name, IMAGES)
        overrides += [f"paths.data={real_root(*FOLDERS[dataset[1]])}", "dataset.download=false"]
    if dataset and dataset[1] in FILES:
        overrides += [*IMAGES, "task.selection_rows=20", f"paths.data={real_root(FILES[dataset[1]])}", "dataset.download=false"]
    first, last = two_steps(tmp_path, *overrides)
    assert last["outer/loss"] < 1.5 * first["outer/loss"]


BILEVEL = {  # every way through a trained problem, on rows that need no files
    "inner": ["gradient_descent", "heavy_ball", "adam", "torch_optimizer", "lbfgs"],
    "adjoint": [option.partition("/")[2] for option in own() if option.startswith("adjoint/") and option != "adjoint/shine"],
}


@pytest.mark.cases(quick=1, slow=3, among={"option": QUICK})
@pytest.mark.filterwarnings("ignore::hyperopt.core.policy.SolveWarning")  # five steps of training leave much to every solver
@pytest.mark.parametrize("option", [f"{group}={name}" for group, names in BILEVEL.items() for name in names])
def test_an_option_of_a_trained_problem(option: str, tmp_path: Path) -> None:
    base = ["experiment=l2_logistic", "dataset.train=50", "dataset.val=50", "dataset.test=50", "inner.max_steps=20"]
    trained = [] if option.startswith("inner") else ["inner=gradient_descent"]
    first, last = two_steps(tmp_path, *base, *trained, option)
    assert last["outer/loss"] < 1.5 * first["outer/loss"]


TRAINS = re.compile(r"override /task: (l2|bias_regularization|weight_decay|augmentation|data_cleaning|data_distillation)$", re.M)


@pytest.mark.cases(quick=0, slow=4)
@pytest.mark.parametrize("name", [e for e in EXPERIMENTS if TRAINS.search((CONFIGS / "experiment" / f"{e}.yaml").read_text())])
def test_estimators_and_inner_solvers_are_swapped_by_one_override(name: str) -> None:
    # Options that share few keys: an experiment that sets a key of its own method could not be composed with another.
    for option in ("adjoint=unrolled", "adjoint=t1t2", "inner=gradient_descent", "inner=lbfgs"):
        build(composed(f"experiment={name}", option))
