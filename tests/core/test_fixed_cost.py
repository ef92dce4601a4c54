"""What one hypergradient costs beside its arithmetic, by counts, and the short ways that keep it low."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hyperopt
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.core.contents import Generator
from hyperopt.core.graph_modes import KeepsGraph
from hyperopt.core.jacobian import pull
from hyperopt.core.places import Places

DOUBLE = torch.float64


def graph() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, unused = (torch.randn(3, dtype=DOUBLE).requires_grad_() for _ in range(3))
    return (x.exp() * y).cumsum(0), x, y, unused


# ---- products by the engine


def test_a_product_is_that_of_autograd_and_keeps_the_graph():
    out, x, y, unused = graph()
    v = torch.randn(3, dtype=DOUBLE)
    expected = torch.autograd.grad(out, (x, y, unused), v, retain_graph=True, allow_unused=True)
    for _ in range(2):
        found = pull([out], [x, y, unused], [v])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] is None
        assert not found[0].requires_grad


def test_the_products_of_several_outputs_are_added():
    out, x, y, _ = graph()
    v, u = torch.randn(3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    found = pull([out, x * y], [x, y], [v, u])
    slope = v.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(found[0], slope * x.exp() * y + u * y)
    torch.testing.assert_close(found[1], slope * x.exp() + u * x)


def test_a_product_with_a_graph_can_be_differentiated():
    out, x, y, _ = graph()
    (found,) = pull([out], [x], [torch.ones(3, dtype=DOUBLE)], create_graph=True)
    weight = torch.tensor([3.0, 2.0, 1.0], dtype=DOUBLE)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), y)[0], weight * x.exp().detach())


def test_a_graph_that_is_not_kept_is_freed():
    out, x, _, _ = graph()
    pull([out], [x], [torch.ones(3, dtype=DOUBLE)], keep=False)
    with pytest.raises(RuntimeError, match="second time"):
        pull([out], [x], [torch.ones(3, dtype=DOUBLE)])


def test_a_mode_of_torch_functions_sees_the_product():
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    out, x, _, _ = graph()
    with Seeing():
        pull([out], [x], [torch.ones(3, dtype=DOUBLE)])
    assert torch.autograd.grad in seen


def test_a_cotangent_of_another_shape_is_refused():
    out, x, _, _ = graph()
    with pytest.raises(RuntimeError, match=r"shape|invalid gradient"):
        pull([out], [x], [torch.ones(4, dtype=DOUBLE)])


# ---- an unrolled training looks at its loss once


def unrolled(inner, outer=lambda w, lam, batch: (w - 1).square().sum(), steps: int = 6, lam: float = 0.5):
    problem = hyperopt.BilevelProblem(inner, outer)
    solver = hyperopt.GradientDescent(step_size=0.1, max_steps=steps)
    w, at = torch.zeros(3, dtype=DOUBLE), torch.tensor(lam, dtype=DOUBLE)
    return hyperopt.hypergradient(problem, w, at, inner=solver, adjoint=hyperopt.Unrolled())


def quadratic(w: Tensor, lam: Tensor, batch: object) -> Tensor:
    return (w - 2).square().sum() / 2 + lam * w.square().sum() / 2


def test_an_unrolled_training_searches_its_loss_once_for_all_steps(monkeypatch):
    counts = []
    for steps in (3, 12):
        found, plain = [], Places.of
        monkeypatch.setattr(
            Places, "of", staticmethod(lambda *args, f=found, of=plain, **kwargs: f.append(1) or of(*args, **kwargs))
        )
        unrolled(quadratic, steps=steps)
        monkeypatch.undo()
        counts.append(len(found))
    assert counts[0] == counts[1]


def test_an_unrolled_training_reads_the_generators_as_often_for_many_steps_as_for_few(monkeypatch):
    counts = []
    for steps in (3, 12):
        found, plain = [], Generator.take
        monkeypatch.setattr(Generator, "take", lambda self, f=found, take=plain: f.append(1) or take(self))
        unrolled(quadratic, steps=steps)
        monkeypatch.undo()
        counts.append(len(found))
    assert counts[0] == counts[1]


def test_every_step_of_an_unrolled_training_draws_from_python_anew():
    drawn = []

    def inner(w, lam, batch):
        drawn.append(random.random())
        return (w - drawn[-1]).square().sum() / 2 + lam * w.square().sum() / 2

    random.seed(3)
    found = unrolled(inner)
    random.seed(3)
    expected = [random.random() for _ in range(6)]
    assert list(dict.fromkeys(drawn))[:6] == expected

    def value(lam: Tensor) -> Tensor:
        w = torch.zeros(3, dtype=DOUBLE)
        for c in expected:
            w = w - 0.1 * ((w - c) + lam * w)
        return (w - 1).square().sum()

    lam = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    torch.testing.assert_close(found.grad, torch.autograd.grad(value(lam), lam)[0])


def test_what_each_step_adds_to_a_container_stays_and_the_gradient_is_that_of_the_loop():
    seen = {"steps": 0}

    def inner(w, lam, batch):
        seen["steps"] += 1
        return quadratic(w, lam, batch) * (1 + 0.1 * seen["steps"])

    found = unrolled(inner)
    lam = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    w = torch.zeros(3, dtype=DOUBLE)
    for k in range(6):
        w = w - 0.1 * (1 + 0.1 * (k + 1)) * ((w - 2) + lam * w)
    assert seen["steps"] == 6
    torch.testing.assert_close(found.grad, torch.autograd.grad((w - 1).square().sum(), lam)[0])


def test_a_buffer_that_every_step_changes_is_that_of_the_step_in_the_graph():
    class Mean(nn.Module):
        mean: Tensor

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=DOUBLE))

        def forward(self, w):
            self.mean.mul_(0.5).add_(0.5 * w.detach() + 0.1)
            return (w * self.mean).sum()

    module = Mean()
    found = unrolled(lambda w, lam, batch: quadratic(w, lam, batch) + lam * module(w))
    lam = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    w, mean = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    for _ in range(6):
        mean = 0.5 * mean + 0.5 * w.detach() + 0.1
        w = w - 0.1 * ((w - 2) + lam * w + lam * mean)
    torch.testing.assert_close(module.mean, mean)
    torch.testing.assert_close(found.grad, torch.autograd.grad((w - 1).square().sum(), lam)[0])


def test_a_tensor_that_is_no_buffer_and_changes_in_place_is_right_in_every_step():
    kept = torch.ones(3, dtype=DOUBLE)

    def inner(w, lam, batch):
        kept.mul_(0.5)
        return (kept * (w - 2).square()).sum() / 2 + lam * (kept * w.square()).sum() / 2

    found = unrolled(inner)
    lam = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    w = torch.zeros(3, dtype=DOUBLE)
    for k in range(6):
        w = w - 0.1 * 0.5 ** (k + 1) * ((w - 2) + lam * w)
    torch.testing.assert_close(kept, torch.full((3,), 0.5**6, dtype=DOUBLE))
    torch.testing.assert_close(found.grad, torch.autograd.grad((w - 1).square().sum(), lam)[0])


# ---- checks cost no calls of modes, settings are read once


def test_the_checks_of_a_loss_call_no_mode_of_torch_functions(monkeypatch):
    seen, plain = [], KeepsGraph.__torch_function__

    def noting(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return plain(self, func, types, args, kwargs)

    monkeypatch.setattr(KeepsGraph, "__torch_function__", noting)
    problem = hyperopt.BilevelProblem(lambda w, lam, batch: torch.dot(w, lam), lambda w, lam, batch: torch.dot(w, lam))
    w, lam = (torch.ones(3, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    problem.outer(w, lam, {"x": torch.ones(2), "y": [torch.ones(2)]})
    assert seen == [torch.dot]
    seen.clear()
    Evaluation(problem, torch.ones(2))(w, lam)
    assert seen == [torch.dot]


def test_a_torch_optimizer_is_made_once_for_its_defaults(monkeypatch):
    made, plain = [], torch.optim.SGD.__init__

    def noting(self, *args, **kwargs):
        made.append(1)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "__init__", noting)
    solver = hyperopt.TorchOptimizer(optimizer="SGD", lr=0.1, max_steps=3, options={"weight_decay": 0.5})
    bilevel = hyperopt.Bilevel(
        hyperopt.BilevelProblem(quadratic, lambda w, lam, batch: w.sum()), torch.zeros(3, dtype=DOUBLE), inner=solver
    )
    for _ in range(4):
        bilevel.step(torch.tensor(0.5, dtype=DOUBLE))
    assert len(made) == 4 + 1


# ---- L-BFGS in the loop


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_lbfgs_ends_where_rounding_has_the_last_word_at_a_gradient_no_higher_than_before(scale: float):
    target = torch.linspace(1, 2, 5)

    def inner(w, lam, batch):  # flat to rounding near its minimum, and no gradient of it is as small as is asked for
        return scale * ((w - target).square().sum() + 1e4 + lam * w.sum() ** 2)

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, batch: (w * target).sum())
    adjoint = hyperopt.Implicit(hyperopt.Dense())
    for asked in ({"rtol": 1e-12, "max_steps": 200}, {"rtol": 0.0, "max_steps": 200}):
        found = hyperopt.hypergradient(
            problem, torch.zeros(5), torch.tensor(0.1), inner=hyperopt.InnerLBFGS(**asked), adjoint=adjoint
        )
        assert found.inner is not None and int(found.inner.iterations) < 200
        total = target.sum() / (1 + 5 * 0.1)
        torch.testing.assert_close(found.w, target - 0.1 * total, rtol=1e-4, atol=1e-4)
