"""Two problems: strengths of a linear model, and decays of a network, each with a structure that has no derivative.

A way of searching gives a ``Task`` by ``task(structure)``, and moves hyperparameters by ``Task.values`` and ``Task.set_values``,
which is what ``init_from`` of the command does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import hyperopt
from hyperopt.bilevel.implicit import ProductSettings
from hyperopt.bilevel.inner.gradient_descent import GradientDescent
from hyperopt.bilevel.inner.heavy_ball import HeavyBall
from hyperopt.bilevel.inner.lbfgs import InnerLBFGS
from hyperopt.bilevel.inner.torch_optimizer import TorchOptimizer
from hyperopt.data.digits import Digits
from hyperopt.data.splits import Rows, Splits
from hyperopt.tasks.base import Environment
from hyperopt.tasks.bilevel import BilevelTask
from hyperopt.tasks.linear import L2Task
from hyperopt.tasks.network import WeightDecayTask

Structure = Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows and of columns of noise."""

    train: int = 200
    val: int = 400
    test: int = 1000
    noise: int = 64


@dataclass
class Loaded:
    """A dataset in memory, so that no trial reads it again."""

    splits: Splits

    def load(self, dtype: torch.dtype, device: Any) -> Splits:
        """Return the rows."""
        return self.splits


def digits(sizes: Sizes, seed: int, noise: int = 0) -> Loaded:
    """scikit-learn's digits, other rows in every seed, with columns of normal numbers that say nothing."""
    splits = Digits(train=sizes.train, val=sizes.val, test=sizes.test, seed=seed).load()
    if not noise:
        return Loaded(splits)
    random = torch.Generator().manual_seed(seed)

    def wider(rows: Rows) -> Rows:
        return Rows(torch.cat([rows.x, torch.randn(len(rows), noise, generator=random)], 1), rows.y, rows.index)

    train, val, test = map(wider, (splits.train, splits.val, splits.test))
    shape = (splits.train.x.shape[1] + noise,)
    return Loaded(Splits(train, val, test, splits.num_classes, shape, "digits with noise", splits.checksums))


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        task: returns the task of a structure, before ``setup``.
        structure: asks Optuna for a structure.
        default: the structure that is tried first.
        low: least value of a hyperparameter in a search without hypergradients.
        high: largest value.
        lr: step size of Adam on the hyperparameters, where it is not searched.
        outer: most outer steps of a trial of the hybrid search.
    """

    task: Callable[[Structure, Loaded], BilevelTask]
    structure: Callable[[Any], Structure]
    default: Structure
    low: float
    high: float
    lr: float = 0.1
    outer: int = 10
    noise: int = 0

    def start(self, structure: Structure, data: Loaded, seed: int) -> BilevelTask:
        """A task that is set up."""
        task = self.task(structure, data)
        generator = torch.Generator().manual_seed(seed)
        task.setup(Environment(torch.device("cpu"), torch.float32, seed, False, generator))
        return task


def strengths(structure: Structure, data: Loaded) -> BilevelTask:
    """A linear classifier with an L2 strength for each of its inputs, of which half are noise."""
    steps, size = int(structure["steps"]), float(structure["size"])
    inner = {
        "gradient_descent": lambda: GradientDescent(max_steps=steps, step_size=size),
        "heavy_ball": lambda: HeavyBall(max_steps=steps, step_size=size),
        "lbfgs": lambda: InnerLBFGS(max_steps=steps),
    }[structure["inner"]]()
    adjoint = hyperopt.Implicit(hyperopt.CG(rtol=0.0, max_steps=20))
    return L2Task(inner=inner, adjoint=adjoint, dataset=data, l2=hyperopt.Positive(1e-2, per="element"))


def decays(structure: Structure, data: Loaded) -> BilevelTask:
    """A perceptron with a decay for each weight matrix and bias."""
    lr, steps = float(structure["lr"]), int(structure["steps"])
    inner = TorchOptimizer(max_steps=steps, optimizer=structure["optimizer"], lr=lr)
    hidden = (int(structure["width"]),) * int(structure["layers"])
    adjoint, products = hyperopt.Implicit(hyperopt.Neumann(rtol=0.0, max_steps=20)), ProductSettings(curvature="gauss_newton")
    decay = hyperopt.Positive(1e-3, per="tensor")
    return WeightDecayTask(inner=inner, adjoint=adjoint, products=products, dataset=data, hidden=hidden, decay=decay)


PROBLEMS = {
    "strengths": Problem(
        strengths,
        lambda trial: {
            "inner": trial.suggest_categorical("inner", ["gradient_descent", "heavy_ball", "lbfgs"]),
            "steps": trial.suggest_int("steps", 10, 100, log=True),
            "size": trial.suggest_float("size", 0.02, 1.0, log=True),
        },
        {"inner": "gradient_descent", "steps": 50, "size": 0.1},
        low=1e-5,
        high=10.0,
        noise=64,
    ),
    "decays": Problem(
        decays,
        lambda trial: {
            "width": trial.suggest_int("width", 4, 128, log=True),
            "layers": trial.suggest_int("layers", 1, 2),
            "optimizer": trial.suggest_categorical("optimizer", ["Adam", "SGD"]),
            "lr": trial.suggest_float("lr", 1e-3, 0.3, log=True),
            "steps": trial.suggest_int("steps", 10, 100, log=True),
        },
        {"width": 20, "layers": 1, "optimizer": "Adam", "lr": 0.01, "steps": 50},
        low=1e-6,
        high=1.0,
    ),
}
