"""Sparse features: the same numbers as dense ones, to second order, without ever being dense."""

from __future__ import annotations

import pytest
import scipy.sparse
import torch
from bilevel_problems import DOUBLE
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import hyperopt
from hyperopt import CG, Checkpointed, GradientDescent, Implicit, Minibatches, SparseRows, Unrolled
from hyperopt.core.memory import peak_memory


def matrix(rows=12, features=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, features, generator=draw, dtype=DOUBLE)
    return torch.where(torch.rand(rows, features, generator=draw) < 0.3, dense, 0.0)


@pytest.mark.parametrize("kind", ["coo", "csr", "scipy"])
def test_products_to_second_order(kind):
    dense = matrix()
    given = {"coo": dense.to_sparse, "csr": dense.to_sparse().coalesce, "scipy": lambda: scipy.sparse.csr_matrix(dense.numpy())}[
        kind
    ]()
    sparse = SparseRows(given)
    assert len(sparse) == 12 and sparse.shape == (12, 7)
    for shape in ((7, 3), (7,)):
        w = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.testing.assert_close(sparse @ w, dense @ w)
        assert torch.equal(sparse(w), sparse @ w)
        assert gradcheck(lambda w: (sparse @ w).tanh(), (w,)) and gradgradcheck(lambda w: (sparse @ w).tanh(), (w,))


def losses(x):
    y = torch.arange(12) % 3

    def inner(w, lam, batch):
        return functional.cross_entropy(x @ w, y) + (lam.exp()[:, None] * w.square()).sum() / 2

    return hyperopt.BilevelProblem(inner, lambda w, lam, batch: functional.cross_entropy(x @ w, y))


@pytest.mark.parametrize("adjoint", [Implicit(CG(rtol=1e-12)), Unrolled(), Checkpointed()], ids=lambda a: type(a).__name__)
def test_the_hypergradient_is_that_of_dense_features(adjoint):
    lam, w0 = torch.full((7,), -2.0, dtype=DOUBLE), torch.zeros(7, 3, dtype=DOUBLE)
    inner = GradientDescent(step_size=0.5, max_steps=30)
    found = [
        hyperopt.hypergradient(losses(x), w0, lam, adjoint=adjoint, inner=inner).grad
        for x in (SparseRows(matrix().to_sparse()), matrix())
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_minibatches_of_sparse_rows():
    dense = matrix()
    source = Minibatches((SparseRows(dense.to_sparse()), torch.arange(12)), size=5, seed=3)
    w = torch.eye(7, dtype=DOUBLE)
    for _ in range(4):
        x, places = source.draw()
        torch.testing.assert_close(x @ w, dense[places])


def test_features_stay_sparse():
    """A hypergradient with 20,000 features for 300 rows takes the memory of some weight matrices, not of the dense features."""
    draw = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randint(0, 300, (3000,), generator=draw), torch.randint(0, 20_000, (3000,), generator=draw)])
    x = SparseRows(torch.sparse_coo_tensor(places, torch.ones(3000), (300, 20_000), check_invariants=True))
    y = torch.arange(300) % 2

    def inner(w, lam, batch):
        return functional.cross_entropy(x @ w, y) + (lam.exp()[:, None] * w.square()).sum() / 2

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, batch: functional.cross_entropy(x @ w, y))
    with peak_memory("cpu") as memory:
        hyperopt.hypergradient(problem, torch.zeros(20_000, 2), torch.full((20_000,), -3.0), inner=GradientDescent(max_steps=5))
    assert memory.peak < 0.25 * 300 * 20_000 * 4
