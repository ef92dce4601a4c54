"""Hypergradients of ridge regression, whose solution and derivative are known in closed form."""

from __future__ import annotations

import pytest
import torch

import hyperopt
from hyperopt import CG, GMRES, Dense, GradientDescent, Implicit, Neumann, NormalCG
from hyperopt.status import Status


class Ridge:
    """``L = |X w - y|^2 / 2n + sum_j exp(lam_j) w_j^2 / 2``, ``E = |X' w - y'|^2 / 2n``, all of it in closed form."""

    def __init__(self, rows=40, features=8, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.x, self.xv = (torch.randn(rows, features, generator=draw, dtype=torch.float64) for _ in range(2))
        true = torch.randn(features, generator=draw, dtype=torch.float64)
        noise = [0.3 * torch.randn(rows, generator=draw, dtype=torch.float64) for _ in range(2)]
        self.y, self.yv = self.x @ true + noise[0], self.xv @ true + noise[1]
        self.lam = 0.3 * torch.randn(features, generator=draw, dtype=torch.float64) - 1.0
        self.problem = hyperopt.BilevelProblem(self.inner, self.outer)

    def inner(self, w, lam, batch):
        return (self.x @ w - self.y).square().sum() / (2 * len(self.y)) + (lam.exp() * w.square()).sum() / 2

    def outer(self, w, lam, batch):
        return (self.xv @ w - self.yv).square().sum() / (2 * len(self.yv))

    def hessian(self, lam):
        return self.x.T @ self.x / len(self.y) + torch.diag(lam.exp())

    def solution(self, lam):
        return torch.linalg.solve(self.hessian(lam), self.x.T @ self.y / len(self.y))

    def hypergradient(self, lam):
        lam = lam.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.outer(self.solution(lam), lam, None), lam)
        return found


EXACT = {
    "cg": Implicit(CG(rtol=1e-13)),
    "gmres": Implicit(GMRES(rtol=1e-13)),
    "neumann": Implicit(Neumann(rtol=1e-13, max_steps=5000)),
    "normal_cg": Implicit(NormalCG(rtol=1e-13)),
    "dense": Implicit(Dense()),
}


@pytest.mark.parametrize("name", EXACT)
def test_ridge(name):
    ridge = Ridge()
    found = hyperopt.hypergradient(ridge.problem, ridge.solution(ridge.lam), ridge.lam, adjoint=EXACT[name])
    torch.testing.assert_close(found.grad, ridge.hypergradient(ridge.lam), rtol=1e-10, atol=1e-13)
    assert found.status == Status.converged


@pytest.mark.parametrize("name", EXACT)
def test_ridge_from_training(name):
    ridge = Ridge()
    inner = GradientDescent(step_size=0.3, max_steps=3000, rtol=1e-14)
    bilevel = hyperopt.Bilevel(ridge.problem, torch.zeros(8, dtype=torch.float64), inner=inner, adjoint=EXACT[name])
    first = bilevel.step(ridge.lam)
    torch.testing.assert_close(first.grad, ridge.hypergradient(ridge.lam), rtol=1e-10, atol=1e-13)
    again = bilevel.step(ridge.lam)
    assert again.inner is not None and int(again.inner.iterations) == 1
    assert again.cost.hessian_products < max(first.cost.hessian_products, 9)
