"""The hypergradient of a self-tuning network beside the implicit one, at five points of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import adam, sgd
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from hyperopt.stn import STN, Bounded, Draw, HyperSpace, Positive, SelfTuning, SelfTuningSettings, convert
from hyperopt.tasks.base import Environment
from hyperopt.tasks.stn import SelfTuningOptions
from hyperopt.tasks.stn_ridge import StnRidgeTask

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level

DOUBLE = torch.float64
DRAWS, ROWS = 20, 30


def learned(tuning: SelfTuning, batch: Any) -> Tensor:
    """The hypergradient in R that the response gives, at the hyperparameters themselves."""
    draw = tuning.space.draw(tuning.rows(batch), perturb=False)
    with tuning.model.at(draw.without_h()):
        loss = tuning.valid_loss(tuning.model, batch, None)
        return torch.autograd.grad(loss, tuning.space.u)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.cases(among={"mode": ["centred"]})
@pytest.mark.parametrize("mode", ["centred", "delta"])
def test_on_ridge(mode: str) -> None:
    """There is one hyperparameter, so that the sizes are compared too."""
    options = SelfTuningOptions(mode=mode, weights=adam(lr=0.03), train_steps=1)
    task = StnRidgeTask(stn=options, decay=Positive(0.3, scale=0.05), features=8, rows=40, noise=2.0)
    task.setup(Environment(torch.device("cpu"), DOUBLE, 0, False, torch.Generator().manual_seed(0)))
    values = torch.optim.SGD([task.model.space.u], 0.02)
    train, valid = task.built.train.draw, task.built.valid.draw
    for _ in range(500):
        task.tuning.weight_step(train())
    for _ in range(5):
        for _ in range(20):
            task.tuning.round(train, valid, values)
        strength = float(task.model.space.u.detach().exp())
        w, _ = task.response()
        curvature = task.ridge.x.T @ task.ridge.x / task.rows + strength * torch.eye(8, dtype=DOUBLE)
        exact = -strength * torch.linalg.solve(curvature, w) @ task.ridge.slope(w)
        found = learned(task.tuning, valid())
        assert cosine(found, exact[None]) > 0.95 and float(found) == pytest.approx(float(exact), rel=0.15)


X, X_VAL = (torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) for seed in (1, 2))


def target(x: Tensor) -> Tensor:
    return (x[..., :1] * 1.5).sin() + 0.5 * x[..., 1:2] * x[..., 2:]


def plain_loss(net: nn.Module, w: dict[str, Tensor], m: Tensor, space: HyperSpace) -> Tensor:
    """The training loss of plain weights: decay, and two hyperparameters of the data."""
    decay, tilt, gain = (each.value(m[i]) for i, each in enumerate(space.declared.values()))
    y = target(X) * (1 + gain) + tilt * X[:, 1:2]
    squares = sum(p.square().sum() for p in w.values() if p.dim() > 1)
    return (functional_call(net, w, (X,)) - y).square().mean() / 2 + decay * squares / 2


def implicit(net: nn.Module, space: HyperSpace) -> Tensor:
    """``-(d_lam grad_w L)^T H^-1 grad_w E`` with the dense Hessian, at the weights where they are."""
    w = {name: p.detach() for name, p in net.named_parameters()}
    shapes = [p.shape for p in w.values()]

    def tree(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(w, parts, shapes, strict=True)}

    flat = torch.cat([p.flatten() for p in w.values()])
    u = space.u.detach()
    curvature = hessian(lambda f: plain_loss(net, tree(f), u, space))(flat)
    mixed = jacrev(lambda m: torch.func.grad(lambda f: plain_loss(net, tree(f), m, space))(flat))(u)
    slope = torch.func.grad(lambda f: (functional_call(net, tree(f), (X_VAL,)) - target(X_VAL)).square().mean() / 2)(flat)
    return -mixed.T @ torch.linalg.solve(curvature, slope)


@pytest.mark.cases(quick=0, slow=1)
@pytest.mark.parametrize("mode", ["centred", "delta"])
def test_on_a_small_network(mode: str) -> None:
    torch.manual_seed(0)
    shifted = Bounded(0.3, -1.0, 1.0, scale=0.1)
    declared = {"decay": Positive(0.05, scale=0.1), "tilt": shifted, "gain": shifted}
    space = HyperSpace(declared, dtype=DOUBLE)
    stn = convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), space)
    batch = X.expand(DRAWS, -1, -1)

    def train_loss(model: STN, batch: Tensor, draw: Draw) -> Tensor:
        decay, tilt, gain = (draw.h[name].detach()[:, None, None] for name in declared)
        y = target(batch) * (1 + gain) + tilt * batch[..., 1:2]
        return (model(batch, draw) - y).square().mean() / 2 + (decay[:, 0, 0] * model.squared_norm(draw)).mean() / 2

    def valid_loss(model: STN, batch: Tensor, draw: Draw | None) -> Tensor:
        return (model(batch) - target(batch)).square().mean() / 2

    settings = SelfTuningSettings(mode=mode, train_steps=10, check_every=0)
    tuning = SelfTuning(stn, train_loss, valid_loss, settings, weights=adam(lr=0.01), values=sgd(lr=0.05))
    for _ in range(1200):
        tuning.weight_step(batch)
    cosines = []
    for _ in range(5):
        for _ in range(10):
            tuning.round(lambda: batch, lambda: X_VAL.expand(DRAWS, -1, -1))
        cosines.append(cosine(learned(tuning, X_VAL.expand(DRAWS, -1, -1)), implicit(stn.collapse(), space)))
    assert min(cosines) > 0.95, cosines
