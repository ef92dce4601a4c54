"""A run of outer steps that was saved and continued is, bit for bit, the one that was never stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_problems import DOUBLE, Logistic, flatten

import hyperopt
from hyperopt import (
    CG,
    T1T2,
    Checkpointed,
    FiniteDifference,
    GradientDescent,
    HeavyBall,
    Implicit,
    InnerAdam,
    InnerLBFGS,
    LinearAnderson,
    Minibatches,
    Neumann,
    Nystrom,
    OneStep,
    ProductSettings,
    TorchOptimizer,
    Unrolled,
)
from hyperopt.data.batches import Batches
from hyperopt.data.loading import Loader
from hyperopt.data.splits import Rows

GD = GradientDescent(step_size=0.5, max_steps=6)
RUNS = {
    "cg": (Implicit(CG(rtol=1e-4), policy="ignore"), GD, {}),
    "neumann, its step by power iteration": (
        Implicit(Neumann(rtol=0, max_steps=5), policy="ignore"),
        TorchOptimizer(max_steps=5),
        {},
    ),
    "anderson": (Implicit(LinearAnderson(rtol=1e-4), policy="ignore"), GD, {}),
    "nystrom": (Implicit(Nystrom(rank=4, rho=1.0)), HeavyBall(step_size=0.3, momentum=0.5, max_steps=6), {}),
    "cold": (Implicit(CG(rtol=1e-4), policy="ignore"), GD, {"warm": False}),
    "adam": (OneStep(), TorchOptimizer(lr=0.05, max_steps=6), {}),
    "sgd with momentum": (
        T1T2(),
        TorchOptimizer(optimizer="SGD", lr=0.05, options={"momentum": 0.9, "nesterov": True}, max_steps=6),
        {},
    ),
    "lbfgs": (Implicit(CG()), InnerLBFGS(rtol=1e-6), {}),
    "finite differences": (FiniteDifference(), GD, {}),
    "unrolled": (Unrolled(), GD, {}),
    "unrolled heavy ball": (Unrolled(last=3), HeavyBall(step_size=0.3, momentum=0.5, max_steps=6), {}),
    "unrolled adam": (Unrolled(), InnerAdam(lr=0.05, max_steps=6), {}),
    "checkpointed": (Checkpointed(), GD, {}),
    "tolerance": (Implicit(CG()), GradientDescent(step_size=0.5, rtol=1e-2, max_steps=500), {}),
    "soba": (hyperopt.SOBA(step_size=0.3, decay=0.5), None, {}),
    "saba": (hyperopt.SABA(step_size=0.1, seed=3), None, {}),
    "stocbio": (hyperopt.StocBiO(step_size=0.3, steps=3, terms=4), None, {}),
    "f2sa": (hyperopt.F2SA(step_size=0.3, steps=3, growth=0.5), None, {}),
    "v_pbgd": (hyperopt.VPBGD(step_size=0.3, steps=1, ramp=4), None, {}),
    "resampled": (Implicit(Neumann(rtol=0, max_steps=4), policy="ignore"), GD, {"resample": True}),
}
WHOLE = ("lbfgs", "tolerance", "cg", "anderson")  # of all rows: their products must be of one function


class Run:
    def __init__(self, name):
        adjoint, inner, products = RUNS[name]
        logistic = Logistic()
        size = None if name in WHOLE else 16
        problem = hyperopt.BilevelProblem(
            logistic.problem.inner_loss,
            logistic.problem.outer_loss,
            Minibatches(logistic.data[0], size, seed=1),
            Minibatches(logistic.data[1], size, seed=2, last="drop"),
        )
        w = {name: tensor.clone() for name, tensor in logistic.w0.items()}
        self.bilevel = hyperopt.Bilevel(problem, w, inner=inner, adjoint=adjoint, products=ProductSettings(**products))
        self.lam = {name: tensor.clone().requires_grad_() for name, tensor in logistic.lam.items()}
        self.optimizer = torch.optim.Adam(list(self.lam.values()), lr=0.1)

    def steps(self, count):
        found = []
        for _ in range(count):
            self.optimizer.zero_grad()
            estimate = self.bilevel.step(self.lam)
            estimate.backward(self.lam)
            self.optimizer.step()
            found.append((estimate.loss, flatten(estimate.grad).clone(), flatten(self.bilevel.w).clone(), vars(estimate.cost)))
        return found


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("name", RUNS)
def test_resume_bit_for_bit(name, tmp_path):
    straight = Run(name).steps(5)
    first = Run(name)
    head = first.steps(2)
    state = {"bilevel": first.bilevel.state_dict(), "lam": first.lam, "optimizer": first.optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    first.steps(1)  # what the first does after that must not reach the state
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run(name)
    places = [leaf.data_ptr() for leaf in second.bilevel.w.values()]
    second.bilevel.load_state_dict(loaded["bilevel"])
    assert places == [leaf.data_ptr() for leaf in second.bilevel.w.values()]
    with torch.no_grad():
        for key, leaf in second.lam.items():
            leaf.copy_(loaded["lam"][key])
    second.optimizer.load_state_dict(loaded["optimizer"])
    for one, two in zip(straight, head + second.steps(3), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1]) and torch.equal(one[2], two[2]) and one[3] == two[3]


def test_the_state_is_forgotten_at_ones_own_risk():
    """The test above can fail: without the adjoint's and the optimizer's memory the numbers differ."""
    for name in ("cg", "adam"):
        straight = Run(name).steps(4)
        run = Run(name)
        run.steps(2)
        run.bilevel.state.memory.clear()
        assert not torch.equal(straight[-1][2], run.steps(2)[-1][2]) or straight[2][3] != run.steps(1)[0][3]


def test_the_order_of_batches_is_the_seeds_alone():
    x = torch.arange(10, dtype=DOUBLE)[:, None]
    orders = []
    for noise in (0, 5):
        torch.manual_seed(noise)
        torch.rand(noise + 1)
        source = Minibatches((x, x[:, 0]), size=4, seed=7)
        drawn = [source.draw() for _ in range(7)]
        assert all(torch.equal(a[:, 0], b) for a, b in drawn)
        orders.append([b.tolist() for _, b in drawn])
    assert orders[0] == orders[1]
    assert sorted(row for rows in orders[0][:3] for row in rows) == list(range(10))  # an epoch has every row once
    assert [len(rows) for rows in orders[0][:4]] == [4, 4, 2, 4]
    other = Minibatches((x, x[:, 0]), size=4, seed=8)
    assert [other.draw()[1].tolist() for _ in range(7)] != orders[0]


class FromLoader:
    """Batches that worker processes make, as a problem takes them."""

    def __init__(self, data: tuple[torch.Tensor, torch.Tensor], workers: int) -> None:
        x, y = data
        rows = Rows(x, y, torch.arange(len(y)))
        self.loader = Loader(rows, (x.shape[1],), Batches(len(y), 16, seed=1), seed=1, workers=workers)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loader.take()[1:]

    def state_dict(self) -> dict[str, Any]:
        return self.loader.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.batches.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_a_run_is_the_same_however_many_workers_make_its_batches():
    """Minibatches in memory have no workers; a source of batches that has is one of the tasks of images."""
    logistic, found = Logistic(), {}
    for source in ("memory", 0, 1, 3):
        rows = Minibatches(logistic.data[0], 16, seed=1) if source == "memory" else FromLoader(logistic.data[0], int(source))
        problem = hyperopt.BilevelProblem(
            logistic.problem.inner_loss, logistic.problem.outer_loss, rows, Minibatches(logistic.data[1])
        )
        w = {name: tensor.clone() for name, tensor in logistic.w0.items()}
        bilevel = hyperopt.Bilevel(problem, w, inner=GD, adjoint=Unrolled())
        grads = [flatten(bilevel.step(logistic.lam).grad)]
        state = bilevel.state_dict()["inner_batches"].copy()
        again = problem.inner_batches.draw()[1]  # a look ahead, which is put back
        problem.inner_batches.load_state_dict(state)
        grads += [flatten(bilevel.step(logistic.lam).grad) for _ in range(2)]
        found[source] = [*grads, flatten(bilevel.w), again.double()]
    for source in (0, 1, 3):
        assert all(torch.equal(a, b) for a, b in zip(found["memory"], found[source], strict=True))
    assert not torch.equal(found[0][0], found[0][1])
