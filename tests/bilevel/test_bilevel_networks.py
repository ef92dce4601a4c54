"""Modules as functions of their parameters: nothing copied, batch normalisation, frozen and tied parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import hyperopt
from hyperopt import GMRES, Checkpointed, GradientDescent, Implicit, NormalCG, TorchOptimizer, Unrolled

DOUBLE = torch.float64


def normalised(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    draw = torch.Generator().manual_seed(seed)
    x, xv = (torch.randn(40, 4, generator=draw, dtype=DOUBLE) for _ in range(2))
    y, yv = x[:, :3].argmax(1), xv[:, :3].argmax(1)
    model = hyperopt.Functional(module)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (
            functional.cross_entropy(model(w, batch), y) + lam.exp() * torch.stack([p.square().sum() for p in w.values()]).sum()
        ),
        lambda w, lam, batch: functional.cross_entropy(model(w, batch), yv),
        inner_batches=hyperopt.Minibatches(x),
        outer_batches=hyperopt.Minibatches(xv),
        refresh=lambda w, lam, batch: model.refresh(w, batch),
    )
    return module, model, problem


WAYS = {
    "implicit": (Implicit(NormalCG(rtol=1e-4, max_steps=500)), TorchOptimizer(lr=0.01, max_steps=20)),
    "unrolled": (Unrolled(), GradientDescent(step_size=0.1, max_steps=20)),
    "checkpointed": (Checkpointed(), GradientDescent(step_size=0.1, max_steps=20)),
}


@pytest.mark.parametrize("way", WAYS)
def test_batch_normalisation_moves_its_statistics_as_in_a_loop_of_ones_own(way):
    (module, model, problem), (twin, _, other) = normalised(), normalised()
    lam, (adjoint, inner) = torch.tensor(-4.0, dtype=DOUBLE), WAYS[way]
    estimate = hyperopt.Bilevel(problem, model.w, inner=inner, adjoint=adjoint).step(lam)
    assert torch.isfinite(estimate.grad) and float(estimate.grad) != 0
    given = dict(twin.named_parameters())
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01) if way == "implicit" else torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        other.inner_loss(given, lam, other.inner_batches.draw()).backward()
        optimizer.step()
    sources = [other.outer_batches, other.inner_batches]  # the outer loss, and the refresh that this problem asks for
    for source in reversed(sources) if way == "implicit" else sources:
        twin(source.draw())
    for (name, got), (_, want) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_the_hypergradient_of_a_normalised_network_is_right():
    _, model, problem = normalised()
    inner = GradientDescent(step_size=0.05, max_steps=6)
    lam = torch.tensor(-3.0, dtype=DOUBLE)
    found = hyperopt.hypergradient(problem, model.w, lam, adjoint=Unrolled(), inner=inner)

    def objective(lam):
        w = hyperopt.hypergradient(problem, model.w, lam, adjoint=Implicit(GMRES(max_steps=1), policy="ignore"), inner=inner).w
        return problem.outer(w, lam, problem.outer_batches.draw())

    h = 1e-5
    want = (objective(lam + h) - objective(lam - h)) / (2 * h)
    torch.testing.assert_close(found.grad, want.detach(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_the_module_itself_is_trained_and_no_parameter_is_copied(way):
    module, model, problem = normalised()
    places = {name: p.data_ptr() for name, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    adjoint, inner = WAYS[way]
    bilevel = hyperopt.Bilevel(problem, model.w, inner=inner, adjoint=adjoint)
    bilevel.step(torch.tensor(-4.0, dtype=DOUBLE))
    for name, p in module.named_parameters():
        assert p.data_ptr() == places[name] == bilevel.w[name].data_ptr()
        assert torch.equal(p, bilevel.w[name]) and p.grad is None and p.requires_grad
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters() if "0.bias" not in name)


def test_frozen_and_tied_parameters():
    torch.manual_seed(0)
    first, second, third = (nn.Linear(3, width).double() for width in (3, 3, 1))
    second.weight = first.weight  # tied
    third.weight.requires_grad_(False)
    module = nn.Sequential(first, second, third)
    model = hyperopt.Functional(module)
    assert set(model.w) == {"0.weight", "0.bias", "1.bias", "2.bias"}
    x = torch.randn(5, 3, dtype=DOUBLE)
    moved = {name: p + 0.1 for name, p in model.w.items()}
    with torch.no_grad():
        weight = first.weight + 0.1
        hidden = (x @ weight.T + moved["0.bias"]) @ weight.T + moved["1.bias"]
        want = hidden @ third.weight.T + moved["2.bias"]
    torch.testing.assert_close(model(moved, x), want)


def test_statistics_in_evaluation_mode_are_those_of_the_module():
    module, model, _ = normalised()
    x = torch.randn(7, 4, dtype=DOUBLE)
    model.refresh(model.w, x)
    module.eval()
    torch.testing.assert_close(model(model.w, x), module(x))


def test_a_module_with_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter of Linear requires grad"):
        hyperopt.Functional(nn.Linear(2, 1).requires_grad_(False))


def test_float32_follows_float64():
    grads = []
    for dtype in (torch.float32, DOUBLE):
        module, model, problem = normalised()
        module.to(dtype)
        model = hyperopt.Functional(module)
        x, xv = (source.draw().to(dtype) for source in (problem.inner_batches, problem.outer_batches))
        y, yv = x[:, :3].argmax(1), xv[:, :3].argmax(1)
        single = hyperopt.BilevelProblem(
            lambda w, lam, b, m=model, x=x, y=y: (
                functional.cross_entropy(m(w, x), y) + lam * torch.stack([p.square().sum() for p in w.values()]).sum()
            ),
            lambda w, lam, b, m=model, x=xv, y=yv: functional.cross_entropy(m(w, x), y),
        )
        lam = torch.tensor(0.02, dtype=dtype)
        inner = GradientDescent(step_size=0.2, max_steps=50)
        estimate = hyperopt.hypergradient(single, model.w, lam, inner=inner, adjoint=Unrolled())
        assert estimate.grad.dtype == dtype
        grads.append(estimate.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
