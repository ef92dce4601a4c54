"""The problems of the comparison, and what every way of choosing hyperparameters does with one: see run.py.

Cost is counted in gradients of the inner loss over all training rows. A gradient of the outer loss counts 1 too; a product with a
Hessian or with the mixed derivative is one backward through the graph of a gradient, and counts 2. Where one backward gives both
products of a step (unrolling), it is counted once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared

from hyperopt import InnerLBFGS
from hyperopt.bilevel.estimate import State
from hyperopt.tasks.bilevel import BilevelTask

PRODUCT = 2.0  # gradients that a product is counted as
FLAT = ("inner=gradient_descent", "adjoint=unrolled")  # the way in which unrolling trains, beside its steps
Row = shared.Row


@dataclass(frozen=True)
class Problem:
    """One problem at one number of hyperparameters.

    Attributes:
        overrides: of the configs.
        low, high: of the search, in the hyperparameters' own units.
        log: whether it is uniform in the logarithm.
        budget: gradients that every method may spend.
        methods: overrides of each method by gradients, after those of the problem; a search has those of the implicit one.
        reference: most steps of the training behind every number that is shown; it is not counted.
        rtol: its tolerance.
        points: of a curve.
        black_box: the searches.
    """

    overrides: tuple[str, ...]
    low: float
    high: float
    budget: int
    methods: Mapping[str, tuple[str, ...]]
    log: bool = True
    reference: int = 500
    rtol: float = 1e-8
    points: int = 14
    black_box: tuple[str, ...] = ("random search", "TPE")


def small(step: float, lr: float, single_lr: float) -> dict[str, tuple[str, ...]]:
    """The methods by gradients on a problem of a few weights.

    Args:
        step: of gradient descent.
        lr: of Adam in the hyperparameters, where the inner problem is solved in every step.
        single_lr: where it is not.
    """
    single = (f"adjoint.step_size={step}", f"optimizer.lr={single_lr}")
    return {
        "implicit, CG": (f"optimizer.lr={lr}",),
        "unrolled": (*FLAT, f"inner.step_size={step}", "inner.max_steps=50", f"optimizer.lr={lr}"),
        "SOBA": ("adjoint=soba", *single),
        "V-PBGD": ("adjoint=v_pbgd", *single, "adjoint.end=100", "adjoint.ramp=200"),
    }


RIDGE = ("experiment=l2_ridge", "inner.rtol=1e-6")
LOGISTIC = ("experiment=l2_logistic", "task.l2.init=0.1")
NEWS = ("experiment=l2_20newsgroups", "task.retrain=false", "task.selection_rows=0", "dataset.download=false")
CLEANING = (
    "task=data_cleaning",
    "dataset=mnist",
    "dataset.train=1000",
    "dataset.download=false",
    "task.decay=1e-3",
    "optimizer=adam",
)
ONE = ("task.l2.per=tensor",)
LARGE = {
    "implicit, CG": ("optimizer.lr=0.1",),
    "unrolled": (*FLAT, "inner.step_size=20", "inner.max_steps=20", "optimizer.lr=0.1"),
    "SOBA": ("adjoint=soba", "adjoint.step_size=20", "optimizer.lr=0.03"),
    "V-PBGD": ("adjoint=v_pbgd", "adjoint.step_size=20", "adjoint.end=100", "adjoint.ramp=200", "optimizer.lr=0.03"),
}
SHARED = {"implicit, CG": ("optimizer.lr=0.3",)}
WEIGHTS = {
    "implicit, CG": ("inner=lbfgs", "inner.rtol=1e-2", "inner.max_steps=50", "adjoint=cg_rough", "optimizer.lr=0.3"),
    "unrolled": (*FLAT, "inner.step_size=0.3", "inner.max_steps=20", "optimizer.lr=0.3"),
    "SOBA": ("adjoint=soba", "adjoint.step_size=0.3", "optimizer.lr=0.1"),
    "V-PBGD": ("adjoint=v_pbgd", "adjoint.step_size=0.3", "adjoint.ramp=100", "optimizer.lr=0.1"),
}
PROBLEMS = {
    "ridge, 1": Problem((*RIDGE, *ONE), 1e-4, 1e2, 2000, small(0.1, 1.0, 0.2)),
    "ridge, 10": Problem(RIDGE, 1e-4, 1e2, 2000, small(0.1, 0.3, 0.06)),
    "logistic, 1": Problem((*LOGISTIC, *ONE), 1e-6, 1e1, 2000, small(1.0, 1.0, 0.06)),
    "logistic, 20": Problem(LOGISTIC, 1e-6, 1e1, 2000, small(1.0, 1.0, 0.06)),
    "cleaning, 1000": Problem(CLEANING, 0.0, 1.0, 2000, WEIGHTS, log=False, rtol=1e-5),
    "20 newsgroups, 1": Problem((*NEWS, *ONE), 1e-7, 1e-3, 300, SHARED, reference=25, rtol=1e-3, points=4),
    "20 newsgroups, 101631": Problem(
        NEWS, 1e-7, 1e-3, 300, LARGE, reference=25, rtol=1e-3, points=4, black_box=("random search",)
    ),
}


def price(metrics: Mapping[str, float], shared_pass: bool) -> float:
    """What an outer step has cost, from the counts that it logs."""
    products = [metrics["cost/hessian_products"], metrics["cost/mixed_products"]]
    each = max(products) if shared_pass else sum(products)
    return metrics["cost/inner_gradients"] + metrics["cost/outer_gradients"] + PRODUCT * each


def built(problem: Problem, method: str, seed: int) -> shared.Row:
    """The task of a cell and its outer optimizer."""
    overrides = (*problem.overrides, *problem.methods.get(method, problem.methods["implicit, CG"]), f"seed={seed}", "device=cpu")
    made = shared.built(*overrides)
    assert isinstance(made.task, BilevelTask)
    return {"task": made.task, "optimizer": made.optimizer.build(made.task.groups())}


@torch.no_grad()
def put(task: BilevelTask, values: Tensor) -> None:
    """Give the hyperparameters these values, in their own units."""
    ((name, (leaf,)),) = task.groups().items()
    space = task.hyper.spaces[name]
    value = values.to(leaf).reshape(leaf.shape)
    leaf.copy_(space.transform().inv(value) if space.by == "reparametrisation" else value)


@torch.no_grad()
def get(task: BilevelTask) -> Tensor:
    """The hyperparameters in their own units, flat."""
    ((_, value),) = task.hyper.read().items()
    return value.reshape(-1).clone()


def reference(task: BilevelTask, problem: Problem, lam: Tensor) -> Row:
    """Validation and test of the model trained at ``lam`` to the reference tolerance; counts nothing, changes nothing."""
    before = get(task)
    put(task, lam)
    state = State(copy.deepcopy(task.bilevel.w))
    InnerLBFGS(rtol=problem.rtol, max_steps=problem.reference).solve(task.built.problem, task.hyper.read(), state)
    found = task.measure(state.w)
    put(task, before)
    shown = ("val/loss", "test/loss", "val/accuracy", "test/accuracy", "clean/f1")
    return {key: found[key] for key in shown if key in found}
