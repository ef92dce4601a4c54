"""Trained inner problems for the tests, with references that share nothing with the library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import hyperopt

DOUBLE = torch.float64


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


class Ridge:
    """``L = |X w - y|^2 / 2n + sum_j exp(lam_j) w_j^2 / 2``, ``E = |X' w - y'|^2 / 2n``: all of it in closed form."""

    def __init__(self, rows=40, features=8, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.x, self.xv = normal(draw, rows, features), normal(draw, rows, features)
        true = normal(draw, features)
        self.y, self.yv = self.x @ true + 0.3 * normal(draw, rows), self.xv @ true + 0.3 * normal(draw, rows)
        self.lam = 0.3 * normal(draw, features) - 1.0
        self.evaluations: list[None] = []  # a number would be put back after a replay
        self.problem = hyperopt.BilevelProblem(self.inner, self.outer)

    def inner(self, w, lam, batch):
        self.evaluations.append(None)
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

    def outer_slope(self, w):
        return self.xv.T @ (self.xv @ w - self.yv) / len(self.yv)

    def mixed(self, w, lam):
        """``d_lam grad_w L``, rows for w."""
        return torch.diag(lam.exp() * w)


class Logistic:
    """Softmax regression with an L2 strength for each weight, and one for the bias; the losses take batches."""

    def __init__(self, rows=60, features=4, classes=3, seed=0, strength=-3.0):
        draw = torch.Generator().manual_seed(seed)
        true = normal(draw, features, classes)
        self.data = []
        for _ in range(2):
            x = normal(draw, rows, features)
            self.data.append((x, (x @ true + normal(draw, rows, classes)).argmax(1)))
        self.lam = {"weight": 0.2 * normal(draw, features, classes) + strength, "bias": torch.tensor(-2.0, dtype=DOUBLE)}
        self.w0 = {"weight": torch.zeros(features, classes, dtype=DOUBLE), "bias": torch.zeros(classes, dtype=DOUBLE)}
        self.problem = hyperopt.BilevelProblem(
            hyperopt.Composite(self.model, self.criterion),
            lambda w, lam, batch: functional.cross_entropy(self.model(w, lam, batch), batch[1]),
            inner_batches=hyperopt.Minibatches(self.data[0]),
            outer_batches=hyperopt.Minibatches(self.data[1]),
        )

    def model(self, w, lam, batch):
        return batch[0] @ w["weight"] + w["bias"]

    def criterion(self, z, w, lam, batch):
        penalty = (lam["weight"].exp() * w["weight"].square()).sum() + lam["bias"].exp() * w["bias"].square().sum()
        return functional.cross_entropy(z, batch[1]) + penalty / 2

    def minimum(self, lam, start=None, steps=10):
        """By Newton steps with dense Hessians."""
        return newton(lambda w: self.problem.inner(w, lam, self.data[0]), start or self.w0, steps)

    def objective(self, lam, near):
        """The outer loss at the minimum, given one near by."""
        return self.problem.outer(self.minimum(lam, near, steps=3), lam, self.data[1])


def flatten(tree):
    return torch.cat([leaf.reshape(-1) for leaf in (tree.values() if isinstance(tree, dict) else [tree])])


def unflatten(vector, like):
    parts = vector.split([leaf.numel() for leaf in like.values()])
    return {name: part.view_as(leaf) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def hessian(function):
    """By two reverse modes; ``torch.func.hessian`` warns of its own internals."""
    return torch.func.jacrev(torch.func.grad(function))


def newton(loss, w0, steps):
    w = flatten(w0)
    for _ in range(steps):
        slope, curvature = (make(lambda v: loss(unflatten(v, w0)))(w) for make in (torch.func.grad, hessian))
        w = (w - torch.linalg.solve(curvature, slope)).detach()
    return unflatten(w, w0)


def central_differences(function, lam: dict[str, Tensor], h=1e-5):
    """The gradient of ``function(lam)``, entry by entry."""
    found = {}
    for name, leaf in lam.items():
        grad = torch.zeros_like(leaf).reshape(-1)
        for i in range(leaf.numel()):
            values = []
            for sign in (1, -1):
                moved = leaf.clone().reshape(-1)
                moved[i] += sign * h
                values.append(float(function({**lam, name: moved.view_as(leaf)})))
            grad[i] = (values[0] - values[1]) / (2 * h)
        found[name] = grad.view_as(leaf)
    return found
