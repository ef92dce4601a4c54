"""Hypergradients of ridge regression, whose solution and derivative are known in closed form, by every estimator."""

from __future__ import annotations

import pytest
import torch
from bilevel_problems import DOUBLE, Ridge

import hyperopt
from hyperopt import (
    CG,
    GMRES,
    T1T2,
    BiCGStab,
    Checkpointed,
    Dense,
    FiniteDifference,
    GradientDescent,
    HeavyBall,
    Implicit,
    InnerAdam,
    InnerLBFGS,
    LinearAnderson,
    Neumann,
    NormalCG,
    Nystrom,
    OneStep,
    Phantom,
    TorchOptimizer,
    Unrolled,
)
from hyperopt.core.status import Status

STEP = 0.3  # of gradient descent; the largest stable one is 0.94
EXACT = {
    "cg": Implicit(CG(rtol=1e-13)),
    "gmres": Implicit(GMRES(rtol=1e-13)),
    "bicgstab": Implicit(BiCGStab(rtol=1e-13)),
    "neumann": Implicit(Neumann(rtol=1e-13, max_steps=5000)),
    "anderson": Implicit(LinearAnderson(rtol=1e-13)),
    "normal_cg": Implicit(NormalCG(rtol=1e-13)),
    "dense": Implicit(Dense()),
    "nystrom": Implicit(Nystrom(rank=8, rho=1e-4, rtol=1e-13, max_steps=20)),
}
TRAINED = {
    "gradient_descent": GradientDescent(step_size=STEP, max_steps=3000, rtol=1e-14),
    "heavy_ball": HeavyBall(step_size=STEP, momentum=0.5, max_steps=3000, rtol=1e-14),
    "adam": InnerAdam(lr=0.05, max_steps=3000, rtol=1e-14),
    "torch_optimizer": TorchOptimizer(lr=0.05, max_steps=3000, rtol=1e-14),
    "lbfgs": InnerLBFGS(rtol=1e-13),
}
THROUGH = {
    "unrolled": Unrolled(),
    "checkpointed": Checkpointed(),
    "checkpointed, segments of 7": Checkpointed(segment=7),
    "truncated": Unrolled(last=250),
}


def close(got, want, rtol=1e-10, atol=1e-13):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", EXACT)
def test_every_exact_estimator_at_the_solution(name):
    ridge = Ridge()
    found = hyperopt.hypergradient(ridge.problem, ridge.solution(ridge.lam), ridge.lam, adjoint=EXACT[name])
    close(found.grad, ridge.hypergradient(ridge.lam))
    assert found.status == Status.converged
    # One evaluation of the loss, whatever the number of products: none builds the graph anew.
    assert len(ridge.evaluations) == found.cost.inner_gradients == 1
    assert (
        found.adjoint is not None
        and found.adjoint.vjps + found.adjoint.jvps == found.cost.hessian_products > 0
        and found.cost.mixed_products == 1
    )


@pytest.mark.parametrize("inner", TRAINED)
def test_every_inner_solver_from_a_cold_start(inner):
    ridge = Ridge()
    w0 = torch.zeros(8, dtype=DOUBLE)
    found = hyperopt.hypergradient(ridge.problem, w0, ridge.lam, inner=TRAINED[inner], adjoint=EXACT["cg"])
    close(found.grad, ridge.hypergradient(ridge.lam))
    close(found.w, ridge.solution(ridge.lam), rtol=1e-8)
    assert not w0.any() and found.inner is not None and found.inner.status == Status.converged
    assert len(ridge.evaluations) == found.cost.inner_gradients == found.inner.evaluations + 1


@pytest.mark.cases(quick=1, slow=4, among={"inner": ["heavy_ball"], "name": ["unrolled", "checkpointed", "truncated"]})
@pytest.mark.parametrize("inner", ["gradient_descent", "heavy_ball"])
@pytest.mark.parametrize("name", THROUGH)
def test_every_estimator_through_training(name, inner):
    ridge = Ridge()
    solver = TRAINED[inner]
    solver = type(solver)(**{**vars(solver), "max_steps": 400, "rtol": 0.0})
    ridge.evaluations.clear()
    found = hyperopt.hypergradient(ridge.problem, torch.zeros(8, dtype=DOUBLE), ridge.lam, inner=solver, adjoint=THROUGH[name])
    close(found.grad, ridge.hypergradient(ridge.lam))
    assert len(ridge.evaluations) == found.cost.inner_gradients
    steps = 250 if name == "truncated" else 400
    assert found.cost.hessian_products == found.cost.mixed_products == steps


FEW = {  # seven steps of each method whose step can be differentiated through
    "gradient_descent": GradientDescent(step_size=STEP, max_steps=7),
    "heavy_ball": HeavyBall(step_size=STEP, momentum=0.5, max_steps=7),
    "adam": InnerAdam(lr=STEP, betas=(0.8, 0.95), eps=1e-3, max_steps=7),
}
LAST = {"unrolled": (Unrolled(), 7), "checkpointed": (Checkpointed(segment=3), 7), "truncated": (Unrolled(last=3), 3)}


def plain_steps(name, grad, w, last):
    """Seven steps in the words of the papers, the last ones with their graph."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 8):
        if t == 8 - last:
            w, m, v = w.detach(), m.detach(), v.detach()
        g = grad(w)
        if name == "adam":
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            w = w - STEP * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-3)
        else:
            m = (0.5 if name == "heavy_ball" else 0.0) * m + g
            w = w - STEP * m
    return w


@pytest.mark.parametrize("adjoint", LAST)
@pytest.mark.parametrize("name", FEW)
def test_a_few_steps_are_those_of_a_plain_loop(name, adjoint):
    ridge, solver, (adjoint, last) = Ridge(), FEW[name], LAST[adjoint]
    lam, ones = ridge.lam.clone().requires_grad_(), torch.ones(8, dtype=DOUBLE)
    w = plain_steps(name, lambda w: ridge.x.T @ (ridge.x @ w - ridge.y) / len(ridge.y) + lam.exp() * w, ones, last)
    (want,) = torch.autograd.grad(ridge.outer(w, lam, None), lam)
    found = hyperopt.hypergradient(ridge.problem, torch.ones(8, dtype=DOUBLE), ridge.lam, inner=solver, adjoint=adjoint)
    close(found.grad, want)
    close(found.w, w.detach())
    # Training in place takes the same steps.
    trained = hyperopt.Bilevel(ridge.problem, torch.ones(8, dtype=DOUBLE), inner=solver)
    trained.step(ridge.lam)
    close(trained.w, w.detach())


def series(ridge, w, terms):
    """``- mixed^T step sum_{k < terms} (I - step H)^k g``."""
    v = term = ridge.outer_slope(w)
    for _ in range(terms - 1):
        term = term - STEP * ridge.hessian(ridge.lam) @ term
        v = v + term
    return -ridge.mixed(w, ridge.lam).T @ (STEP * v)


INEXACT = {
    "one_step": (OneStep(), lambda ridge, w: series(ridge, w, 1)),
    "neumann, K = 5": (Implicit(Neumann(rtol=0, max_steps=5)), lambda ridge, w: series(ridge, w, 6)),
    "t1t2": (T1T2(), lambda ridge, w: series(ridge, w, 1) / STEP),
    "phantom, undamped": (Phantom(steps=4, damping=1.0), lambda ridge, w: series(ridge, w, 4)),
    "truncated, 6 steps": (Unrolled(last=6), lambda ridge, w: series(ridge, w, 6)),  # at the minimum they are the same
}


@pytest.mark.parametrize("name", INEXACT)
def test_every_inexact_estimator_is_what_it_says(name):
    ridge = Ridge()
    adjoint, formula = INEXACT[name]
    inner = GradientDescent(step_size=STEP, max_steps=400)
    found = hyperopt.hypergradient(ridge.problem, torch.zeros(8, dtype=DOUBLE), ridge.lam, adjoint=adjoint, inner=inner)
    close(found.grad, formula(ridge, found.w))
    assert not torch.allclose(found.grad, ridge.hypergradient(ridge.lam), rtol=1e-2)


@pytest.mark.parametrize("length", [None, 0.01])
def test_finite_differences_are_one_step_differentiation(length):
    ridge = Ridge()
    inner = GradientDescent(step_size=STEP, max_steps=400)
    w0 = torch.zeros(8, dtype=DOUBLE)
    found = hyperopt.hypergradient(ridge.problem, w0, ridge.lam, adjoint=FiniteDifference(length=length), inner=inner)
    close(found.grad, series(ridge, found.w, 1), rtol=1e-8)
    assert (found.cost.hessian_products, found.cost.mixed_products) == (0, 1)
    assert found.cost.inner_gradients == 400 + 3  # one at w, two for the mixed product


def test_nystrom_is_its_formula():
    ridge = Ridge()
    w, rank, rho = ridge.solution(ridge.lam), 3, 2.0
    h = ridge.hessian(ridge.lam)
    drawn = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:rank]
    sketch = h[:, drawn] @ torch.linalg.inv(h[drawn][:, drawn]) @ h[drawn]
    u = torch.linalg.solve(sketch + rho * torch.eye(8, dtype=DOUBLE), ridge.outer_slope(w))
    found = hyperopt.hypergradient(ridge.problem, w, ridge.lam, adjoint=Implicit(Nystrom(rank=rank, rho=rho)))
    close(found.grad, -ridge.mixed(w, ridge.lam).T @ u)
    assert found.cost.hessian_products == rank + 1  # the last measures the residual
    assert found.adjoint is not None
    close(found.adjoint.residual, (h @ u - ridge.outer_slope(w)).norm()[None] / ridge.outer_slope(w).norm())


@pytest.mark.parametrize("adjoint", [EXACT["cg"], Implicit(Dense())], ids=["cg", "dense"])
def test_the_primitive_on_the_gradient_step_is_the_same(adjoint):
    ridge = Ridge()
    phi = hyperopt.GradientMap(ridge.problem, GradientDescent(step_size=STEP))
    lam = ridge.lam.clone().requires_grad_()
    w0 = torch.zeros(8, dtype=DOUBLE)
    solver = hyperopt.Picard(rtol=1e-14, max_steps=5000)
    solution = hyperopt.fixed_point(phi, w0, args=(lam,), rows="joint", solver=solver, adjoint=adjoint)
    (grad,) = torch.autograd.grad(ridge.outer(solution.value, lam, None), lam)
    close(grad, ridge.hypergradient(ridge.lam))


def test_warm_starts_spend_less_each_step():
    ridge = Ridge(features=30, rows=60)
    inner = GradientDescent(step_size=0.1, max_steps=3000, rtol=1e-10)
    bilevel = hyperopt.Bilevel(ridge.problem, torch.zeros(30, dtype=DOUBLE), inner=inner, adjoint=Implicit(CG(rtol=1e-6)))
    first = bilevel.step(ridge.lam)
    second = bilevel.step(ridge.lam + 1e-4)
    cold = hyperopt.hypergradient(ridge.problem, bilevel.w, ridge.lam + 1e-4, adjoint=Implicit(CG(rtol=1e-6)))
    assert second.inner is not None and first.inner is not None
    assert int(second.inner.iterations) < 0.7 * int(first.inner.iterations)
    assert second.cost.hessian_products < cold.cost.hessian_products
    close(second.grad, ridge.hypergradient(ridge.lam + 1e-4), rtol=1e-4)


@pytest.mark.parametrize("name", ["neumann", "cg"])
def test_a_loss_of_any_scale_gives_the_same(name):
    ridge = Ridge()
    scaled = hyperopt.BilevelProblem(lambda *a: 1e-9 * ridge.inner(*a), lambda *a: 1e9 * ridge.outer(*a))
    found = hyperopt.hypergradient(scaled, ridge.solution(ridge.lam), ridge.lam, adjoint=EXACT[name])
    close(found.grad / 1e9, ridge.hypergradient(ridge.lam))


@pytest.mark.parametrize("seed", range(4))
def test_lbfgs_goes_on_to_rounding_where_its_line_search_ends(seed):
    """The line search compares losses, which tells nothing below a gradient of about the root of eps."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 16, generator=draw, dtype=DOUBLE), torch.randint(0, 5, (12,), generator=draw)
    problem = hyperopt.BilevelProblem(
        inner_loss=lambda w, lam, batch: torch.nn.functional.cross_entropy(x @ w, y) + lam * w.square().sum() / 2,
        outer_loss=lambda w, lam, batch: w.sum(),
    )
    for l2 in (0.5, 0.1, 0.02):
        lam = torch.tensor(l2, dtype=DOUBLE, requires_grad=True)
        inner = InnerLBFGS(rtol=1e-11, max_steps=500)
        found = hyperopt.hypergradient(problem, torch.zeros(16, 5, dtype=DOUBLE), lam, inner=inner)
        assert found.inner is not None and found.inner.status == Status.converged
        assert found.inner.iterations.item() < 60
