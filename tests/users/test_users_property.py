"""Small problems drawn at random: a hypergradient is that of a finite difference of the whole training, or it is refused.

Drawn are the network, a layer that draws random numbers or keeps a state, the inner optimizer, the adjoint, where the
hyperparameters enter, the batches and the dtype. The finite difference trains anew from the same weights, the same state and the
same seed at ``lam + h d`` and ``lam - h d``. At most a tenth may be refused, each with a reason.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hyperopt
from hyperopt import CG, Checkpointed, GradientDescent, HeavyBall, Implicit, InnerAdam, TorchOptimizer, Unrolled


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * torch.randn_like(x)


class Gumbel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * nn.functional.gumbel_softmax(torch.zeros_like(x), dim=-1)


class Scaled(nn.Module):
    """Divides by a moving average of its input's size, which it replaces or changes in place."""

    average: torch.Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("average", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.average.mul_(0.9).add_(0.2)
        else:
            self.average = 0.9 * self.average + 0.2
        return x * self.average


class Counting(nn.Module):
    """Fades its input with the number of calls, a buffer or a plain number."""

    calls: torch.Tensor

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.number, self.plain = 0, plain
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.number += 1
        self.calls += 1
        return x / (1 + 0.1 * (self.number if self.plain else self.calls))


class Again(nn.Module):
    """A layer that a backward evaluates again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = checkpoint(self.layer, x, use_reentrant=False)
        assert isinstance(found, torch.Tensor)
        return found


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.2),
    "rrelu": nn.RReLU,
    "noise": Noise,
    "gumbel": Gumbel,
    "average in place": lambda: Scaled(True),
    "average replaced": lambda: Scaled(False),
    "counting buffer": lambda: Counting(False),
    "counting number": lambda: Counting(True),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm and dropout": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)),
    "checkpoint": lambda: Again(nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
    "checkpoint, batch norm": lambda: Again(nn.BatchNorm1d(6)),
    "lstm": lambda: Recurrent(),
    "attention": lambda: Attending(),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, 2, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(x.unflatten(1, (3, 2)))
        return out[:, -2:].flatten(1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.unflatten(1, (3, 2))
        return self.attention(rows, rows, rows, need_weights=False)[0].flatten(1)


INNER = {
    "gradient descent": lambda: GradientDescent(step_size=0.1, max_steps=6),
    "heavy ball": lambda: HeavyBall(step_size=0.05, momentum=0.7, max_steps=6),
    "adam": lambda: InnerAdam(lr=0.02, max_steps=6),
    "rate": lambda: GradientDescent(step_size="rate", max_steps=5),
}
ADJOINTS = {"unrolled": Unrolled(), "checkpointed": Checkpointed(), "segments": Checkpointed(segment=2)}


class Drawn:
    """One problem."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.layer = draw.choice(list(LAYERS))
        self.inner_name, self.adjoint_name = draw.choice(list(INNER)), draw.choice(list(ADJOINTS))
        # Adam's first steps are nearly the sign of the gradient: a finite difference in single precision says nothing of them.
        self.dtype = draw.choice([torch.float64, torch.float64, torch.float32]) if self.inner_name != "adam" else torch.float64
        self.hyper = draw.choice(["decay", "weights of rows", "shift"])
        self.batches = draw.choice([None, 10, 25])
        self.width = draw.choice([0, 1])
        self.eval_outer = draw.choice([True, False]) and "norm" not in self.layer
        torch.manual_seed(seed)
        hidden = [nn.Linear(6, 6), nn.Tanh()] * self.width
        self.net = nn.Sequential(nn.Linear(4, 6), *copy.deepcopy(hidden), LAYERS[self.layer](), nn.Tanh(), nn.Linear(6, 1)).to(
            self.dtype
        )
        self.seed = seed
        x, xv = (torch.randn(40, 4, dtype=self.dtype) for _ in range(2))
        self.data = x, x.sum(1, keepdim=True).sin(), torch.arange(40)
        self.valid = xv, xv.sum(1, keepdim=True).sin()
        self.lam = {"rate": torch.tensor(0.1, dtype=self.dtype)} if self.inner_name == "rate" else {}
        self.lam["main"] = {
            "decay": torch.tensor(-3.0, dtype=self.dtype),
            "weights of rows": 0.1 * torch.randn(40, dtype=self.dtype),
            "shift": 0.1 * torch.randn(4, dtype=self.dtype),
        }[self.hyper]

    def __str__(self) -> str:
        return ", ".join(
            str(x)
            for x in (self.layer, self.inner_name, self.adjoint_name, self.dtype, self.hyper, self.batches, self.eval_outer)
        )

    def hypergradient(self, lam: dict[str, torch.Tensor]) -> Any:
        """From the same weights, state and seed."""
        net = copy.deepcopy(self.net)
        model = hyperopt.Functional(net)

        def inner(w: Any, lam: Any, batch: Any) -> torch.Tensor:
            x, y, rows = batch
            if self.hyper == "shift":
                x = x + lam["main"]
            losses = (model(w, x) - y).square().flatten()
            if self.hyper == "weights of rows":
                losses = losses * lam["main"][rows].exp()
            penalty = sum(p.square().sum() for p in w.values())
            return losses.mean() + (lam["main"].exp() if self.hyper == "decay" else 1e-2) * penalty

        def outer(w: Any, lam: Any, batch: Any) -> torch.Tensor:
            net.train(not self.eval_outer)
            x, y = batch
            loss = (model(w, x) - y).square().mean()
            net.train()
            return loss

        problem = hyperopt.BilevelProblem(
            inner, outer, hyperopt.Minibatches(self.data, self.batches, seed=3), hyperopt.Minibatches(self.valid)
        )
        torch.manual_seed(self.seed + 1)
        found = hyperopt.hypergradient(problem, model.w, lam, inner=INNER[self.inner_name](), adjoint=ADJOINTS[self.adjoint_name])
        self.buffers = [b.clone() for b in net.buffers()]
        return found

    def check(self) -> str:
        """``right``, ``wrong: ...`` or ``refused: ...``."""
        try:
            found = self.hypergradient(self.lam)
        except (RuntimeError, ValueError) as error:
            return f"refused: {error}"
        draw = torch.Generator().manual_seed(self.seed)
        d = {k: torch.randn(v.shape, generator=draw, dtype=torch.float64).to(v) for k, v in self.lam.items()}
        if "rate" in d:
            d["rate"] = 0.05 * d["rate"]
        got = float(sum((found.grad[k] * d[k]).sum() for k in d))
        h, rtol = (1e-5, 1e-4) if self.dtype == torch.float64 else (1e-2, 5e-2)
        losses = [self.hypergradient({k: v + s * h * d[k] for k, v in self.lam.items()}).loss for s in (1, -1)]
        want = (losses[0] - losses[1]) / (2 * h)
        floor = 1e-7 if self.dtype == torch.float64 else 5e-4
        return "right" if abs(got - want) <= rtol * abs(want) + floor else f"wrong: {got} instead of {want}"


def check_all(seeds: range) -> None:
    outcomes = {f"{seed}: {problem}": problem.check() for seed in seeds for problem in (Drawn(seed),)}
    wrong = {k: v for k, v in outcomes.items() if v.startswith("wrong")}
    refused = {k: v for k, v in outcomes.items() if v.startswith("refused")}
    assert not wrong, wrong
    assert len(refused) <= len(outcomes) / 10, refused


@pytest.mark.slow
def test_20_drawn_problems():
    check_all(range(20))


@pytest.mark.manual
def test_200_drawn_problems():
    check_all(range(100, 300))


def test_the_check_finds_a_wrong_number(monkeypatch):
    problem = Drawn(1)
    true = problem.hypergradient

    def negated(lam: Any) -> Any:
        found = true(lam)
        found.grad = {k: -g for k, g in found.grad.items()}
        return found

    monkeypatch.setattr(problem, "hypergradient", negated)
    assert problem.check().startswith("wrong")


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_state_moves_once_a_step_with_every_adjoint(layer):
    """Buffers after a hypergradient are those that a plain training leaves."""
    left = []
    for adjoint in ADJOINTS:
        problem = Drawn(0)
        problem.layer, problem.inner_name, problem.adjoint_name = layer, "gradient descent", adjoint
        problem.lam = {"main": problem.lam["main"]}
        torch.manual_seed(0)
        problem.net[-3] = LAYERS[layer]().to(problem.dtype)
        problem.hypergradient(problem.lam)
        left.append(problem.buffers)
    for other in left[1:]:
        for a, b in zip(left[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def drawn_implicit(seed: int) -> tuple[float, float]:
    """The directional derivative of a trained minimum and its finite difference."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    x, xv = (torch.randn(30, 4, generator=torch_draw, dtype=torch.float64) for _ in range(2))
    y, yv = (a.sum(1, keepdim=True) + torch.randn(30, 1, generator=torch_draw, dtype=torch.float64) for a in (x, xv))
    lam = torch.randn(30, generator=torch_draw, dtype=torch.float64) * 0.1
    decay = draw.choice([0.0, 0.3])
    inner = draw.choice(
        [
            lambda: TorchOptimizer(optimizer="SGD", lr=0.1, options={"weight_decay": decay}, max_steps=800),
            lambda: TorchOptimizer(optimizer="SGD", lr=0.05, options={"weight_decay": decay, "momentum": 0.8}, max_steps=600),
            lambda: GradientDescent(step_size=0.1, max_steps=800),
            lambda: hyperopt.InnerLBFGS(rtol=1e-11),
        ]
    )
    curvature = draw.choice(["hessian", "finite_differences"])
    rtol = 1e-12 if curvature == "hessian" else 1e-7
    exact = Implicit(CG(rtol=rtol, max_steps=100)), Implicit(hyperopt.Neumann(rtol=rtol, max_steps=5000))
    adjoint = draw.choice([*exact, "auto"])
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (lam.exp()[:, None] * (x @ w - y).square()).mean() + 0.05 * w.square().sum(),
        lambda w, lam, b: (xv @ w - yv).square().mean(),
    )

    def at(lam: torch.Tensor) -> Any:
        return hyperopt.hypergradient(
            problem, torch.zeros(4, 1, dtype=torch.float64), lam, inner=inner(), adjoint=adjoint, curvature=curvature
        )

    d = torch.randn(30, generator=torch_draw, dtype=torch.float64)
    return float(at(lam).grad @ d), (at(lam + 1e-4 * d).loss - at(lam - 1e-4 * d).loss) / 2e-4


@pytest.mark.cases(quick=1, slow=3)
@pytest.mark.parametrize("seed", range(8))
def test_drawn_minima_by_implicit_adjoints(seed):
    got, want = drawn_implicit(seed)
    assert got == pytest.approx(want, rel=2e-4, abs=1e-7)
