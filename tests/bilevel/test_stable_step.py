"""The step of the gradient-step map is stable although its curvature is remembered from another problem, or differenced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuner_reference import DOUBLE

import hyperopt
from hyperopt.bilevel.curvature import Hessian
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.finite_difference import FiniteDifferences
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.step_map import Known, PowerSettings, largest_curvature

SIZE = 40
NEUMANN = hyperopt.Implicit(hyperopt.Neumann(rtol=1e-10, max_steps=2000), policy="raise")
DAMPED = hyperopt.Damped(damping=0.01, linear_solver=NEUMANN.linear_solver, policy="raise")
FEW_TERMS = hyperopt.Implicit(hyperopt.Neumann(rtol=0.0, max_steps=12), policy="ignore")


def quadratic(scale: Tensor) -> hyperopt.BilevelProblem:
    """``L = sum scale_i w_i^2 / 2 - lam w_i``, whose Hessian is diagonal, and ``E = |w - 1|^2 / 2``."""
    return hyperopt.BilevelProblem(
        lambda w, lam, batch: (scale * w.square()).sum() / 2 - lam * w.sum(), lambda w, lam, batch: (w - 1).square().sum() / 2
    )


def scales(first: float, second: float) -> Tensor:
    scale = torch.linspace(0.5, 1.0, SIZE, dtype=DOUBLE)
    scale[0], scale[1] = first, second
    return scale


@pytest.mark.parametrize("adjoint", [NEUMANN, DAMPED, FEW_TERMS], ids=["to a tolerance", "damped", "few terms"])
def test_an_eigenvector_that_is_remembered_is_not_believed(adjoint: Any) -> None:
    """The second problem has the first one's direction as an eigenvector, with a sixth of the largest curvature."""
    lam, w = torch.tensor(1.0, dtype=DOUBLE), torch.zeros(SIZE, dtype=DOUBLE)
    bilevel = hyperopt.Bilevel(quadratic(scales(5.0, 1.0)), w, adjoint=adjoint)
    bilevel.step(lam)
    power = bilevel.state.memory["power"]
    power["direction"] = torch.eye(SIZE, dtype=DOUBLE)[:1]
    power["size"] = 5.0
    now = scales(5.0, 30.0)
    bilevel.problem = quadratic(now)
    found = bilevel.step(lam)
    assert found.adjoint is not None and found.adjoint.status < hyperopt.Status.diverged
    assert bilevel.state.memory["power"]["size"] == pytest.approx(30, rel=0.02)
    if adjoint is NEUMANN:
        torch.testing.assert_close(found.grad, -(1 / now).sum(), rtol=1e-8, atol=0)
    if adjoint is DAMPED:  # in the units of step times the Hessian, where the step is 1 / 30 to the two digits above
        torch.testing.assert_close(found.grad, -(1 / (now + 0.3)).sum(), rtol=0.02, atol=0)


def test_the_remembered_curvature_takes_one_product_where_it_holds() -> None:
    lam, w = torch.tensor(1.0, dtype=DOUBLE), torch.zeros(SIZE, dtype=DOUBLE)
    products = hyperopt.ProductSettings(power=PowerSettings(rtol=0.25))
    bilevel = hyperopt.Bilevel(quadratic(scales(5.0, 1.0)), w, adjoint=hyperopt.OneStep(), products=products)
    first = bilevel.step(lam).cost.hessian_products
    assert first > 3
    for factor in (1.0, 1.1, 0.95):
        bilevel.problem = quadratic(factor * scales(5.0, 1.0))
        assert bilevel.step(lam).cost.hessian_products == 1
        assert bilevel.state.memory["power"]["size"] == pytest.approx(5 * factor, rel=0.25)  # the tolerance
    bilevel.problem = quadratic(4 * scales(5.0, 1.0))  # more than the tolerance away
    assert bilevel.step(lam).cost.hessian_products == 2
    assert bilevel.state.memory["power"]["size"] == pytest.approx(20, rel=0.1)


def test_each_start_has_another_random_part() -> None:
    evaluation = Evaluation(quadratic(scales(5.0, 5.0)), None)
    hessian = Hessian(evaluation, *leaves())
    direction = torch.eye(SIZE, dtype=DOUBLE)[:1]
    found = [largest_curvature(hessian, PowerSettings(rtol=0.25), Known(5.0, direction, count))[1] for count in (1, 2)]
    assert abs(float((found[0] * found[1]).sum())) < 1 - 1e-6
    assert all(float((each * direction).sum()) > 0.99 for each in found)


def leaves() -> tuple[Leaves, Leaves]:
    w = torch.linspace(-1, 1, SIZE, dtype=DOUBLE)
    return Leaves.of(w, "w"), Leaves.of(torch.tensor(1.0, dtype=DOUBLE), "lam")


def test_a_rough_product_of_differences_takes_one_gradient_and_is_right() -> None:
    """Against the closed form; the third derivative of the loss makes one-sided differences inexact."""
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (w.exp() + lam * w.square()).sum(), lambda w, lam, batch: w.square().sum()
    )
    w, lam = leaves()
    differences = FiniteDifferences(Evaluation(problem, None), w, lam)
    assert differences.gradients == 1
    v = torch.sin(torch.arange(SIZE, dtype=DOUBLE))[None]
    expected = v * (w.flat[0].detach().exp() + 2)
    torch.testing.assert_close(differences.rough(v), expected, rtol=1e-4, atol=1e-6)
    assert (differences.gradients, differences.matvecs) == (2, 1)
    torch.testing.assert_close(differences.matvec(v), expected, rtol=1e-8, atol=1e-9)
    assert (differences.gradients, differences.matvecs) == (4, 2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.mark.parametrize("small", [True, False], ids=["a small graph", "a large graph"])
def test_the_graph_is_kept_if_it_is_small_or_its_share_is(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways give the same numbers; only the number of gradients differs."""
    from hyperopt.bilevel import curvature

    if not small:
        monkeypatch.setattr(curvature, "SMALL_GRAPH", 0)
    model = hyperopt.Functional(network())
    x = torch.randn(3, 4, dtype=DOUBLE)  # few rows: the weights are most of the memory, and the vectors exceed the bound
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: model(w, x).square().mean() + lam * sum(p.square().sum() for p in w.values()),
        lambda w, lam, batch: (model(w, x) - 1).square().mean(),
    )
    lam = torch.tensor(0.3, dtype=DOUBLE)
    adjoint = hyperopt.Implicit(hyperopt.CG(max_steps=5, rtol=0.0), policy="ignore")
    found = {
        keep: hyperopt.Bilevel(problem, dict(model.w), adjoint=adjoint, products=hyperopt.ProductSettings(keep=keep)).step(lam)
        for keep in (True, False, None)
    }
    for keep, other in ((True, False), (True, None)):
        torch.testing.assert_close(found[keep].grad, found[other].grad, rtol=1e-10, atol=0)
    assert found[True].cost.inner_gradients == 1
    assert found[False].cost.inner_gradients > 5
    assert found[None].cost.inner_gradients == found[small].cost.inner_gradients
