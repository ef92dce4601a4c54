"""``adjoint="auto"`` where the inner loss is another function each time it is drawn: minibatches and random layers."""

from __future__ import annotations

import copy

import pytest
import torch
from bilevel_problems import DOUBLE
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import hyperopt
from hyperopt import Functional, GradientDescent, Minibatches, TorchOptimizer

# ---- random layers in training mode, by the defaults

NETWORKS = {
    "hidden": lambda: nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)),
    "relu, half of it": lambda: nn.Sequential(nn.Linear(9, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 3)),
    "inputs": lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3)),
    "channels": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 6, 2), nn.Tanh(), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(24, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(9, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 3)),
}


def network(name, size=None, dtype=DOUBLE, rows=40):
    """Wrong labels in the training rows, dropout in training and none in validation, a decay and a weight for each row."""
    draw = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(rows, 9, generator=draw, dtype=DOUBLE).to(dtype) for _ in range(2))
    true = torch.randn(9, 3, generator=draw, dtype=DOUBLE).to(dtype)
    y, yv = (torch.tanh(x) @ true).argmax(1), (torch.tanh(xv) @ true).argmax(1)
    y = torch.where(torch.rand(rows, generator=draw) < 0.25, (y + 1) % 3, y)
    torch.manual_seed(0)
    module = NETWORKS[name]().to(dtype)
    model, still = Functional(module), Functional(copy.deepcopy(module).eval())

    def inner(w, lam, batch):
        x, y, row = batch
        losses = functional.cross_entropy(model(w, x), y, reduction="none")
        decay = torch.stack([p.square().sum() for p in w.values()]).sum()
        return (lam["weights"][row] * losses).mean() + lam["decay"].exp() * decay / 2

    problem = hyperopt.BilevelProblem(
        inner,
        lambda w, lam, batch: functional.cross_entropy(still(w, xv), yv),
        inner_batches=Minibatches((x, y, torch.arange(rows)), size, seed=3),
    )
    return problem, model, {"decay": torch.tensor(-6.0, dtype=dtype), "weights": torch.ones(rows, dtype=dtype)}


KINDS = [(None, DOUBLE), (None, torch.float32), (10, DOUBLE)]
DRAWN = [(name, *kind) for kind in KINDS for name in NETWORKS]
SLOW = [(name, 10, DOUBLE) for name in [*NETWORKS][::2]]


@pytest.mark.cases(slow=1)
@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else pytest.mark.manual) for case in DRAWN],
)
def test_the_defaults_tune_a_network_with_dropout(name, size, dtype):
    """Every hypergradient of 20 outer steps is finite, and the loss ends lower than by training on alone."""
    ends = {}
    for tuned in (True, False):
        problem, model, lam = network(name, size, dtype)
        lam = {key: value.requires_grad_() for key, value in lam.items()}
        adjoint = "auto" if tuned else hyperopt.OneStep()  # training on alone has no use for a hypergradient
        bilevel = hyperopt.Bilevel(problem, model.w, inner=TorchOptimizer(lr=0.02, max_steps=30), adjoint=adjoint)
        optimizer = torch.optim.Adam(lam.values(), lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            estimate = bilevel.step(lam)
            losses.append(estimate.loss)
            if tuned:
                assert all(bool(g.isfinite().all()) and bool(g.any()) for g in estimate.grad.values())
                assert estimate.choice is not None and not estimate.status.failed
                estimate.backward(lam)
                optimizer.step()
                with torch.no_grad():
                    lam["weights"].clamp_(0, 2)
        ends[tuned] = sum(losses[-3:]) / 3  # a loss of one draw is noisy
    assert ends[True] < 0.9 * ends[False]


# ---- the mean over draws against closed forms


def regression(size, rows=240, dim=24, keep=1.0):
    """Least squares with a decay for each weight, by batches, with dropout of the inputs; E = b w, so that only H is drawn.

    Returns:
        The problem; the w of the mean loss, lam and the exact hypergradient there.
    """
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, dim, generator=draw, dtype=DOUBLE) * torch.linspace(0.6, 1.4, dim, dtype=DOUBLE)
    y = x @ torch.randn(dim, generator=draw, dtype=DOUBLE) + torch.randn(rows, generator=draw, dtype=DOUBLE)
    b = torch.randn(dim, generator=draw, dtype=DOUBLE)
    lam = torch.full((dim,), 0.05, dtype=DOUBLE)

    def inner(w, lam, batch):
        x, y = batch
        x = functional.dropout(x, 1 - keep) if keep < 1 else x
        return (x @ w - y).square().mean() / 2 + (lam * w.square()).sum() / 2

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, batch: b @ w, inner_batches=Minibatches((x, y), size, seed=2))
    gram = x.T @ x / rows
    hessian = gram + torch.diag(lam + (1 / keep - 1) * gram.diagonal())  # E[(x m)(x m)^T] has 1 / keep on its diagonal
    w = torch.linalg.solve(hessian, x.T @ y / rows)
    return problem, w, lam, -w * torch.linalg.solve(hessian, b)


@pytest.mark.cases(slow=1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "keep", "name"),
    [
        (None, 1.0, "CG"),  # one function
        pytest.param(240, 1.0, "CG", marks=pytest.mark.manual),  # the same rows in another order
        # Fewer rows than weights: a singular Hessian, but for the decay.
        pytest.param(12, 1.0, "Neumann", marks=pytest.mark.manual),
        pytest.param(24, 1.0, "Neumann", marks=pytest.mark.slow),  # as many: the worst for the inverse of one batch
        pytest.param(60, 1.0, "Neumann", marks=pytest.mark.manual),
        pytest.param(None, 0.8, "Neumann", marks=pytest.mark.manual),  # dropout on all rows
        pytest.param(60, 0.9, "Neumann", marks=pytest.mark.slow),
    ],
)
def test_the_mean_over_draws_is_near_the_exact_hypergradient(size, keep, name):
    problem, w, lam, want = regression(size, keep=keep)
    torch.manual_seed(0)
    bilevel = hyperopt.Bilevel(problem, w.clone(), inner=TorchOptimizer(optimizer="SGD", lr=1e-300, max_steps=100))
    found = [bilevel.step(lam) for _ in range(40)]
    assert {estimate.choice.name for estimate in found if estimate.choice} == {name}
    grads = torch.stack([estimate.grad for estimate in found])
    each = (grads - want).norm(dim=1) / want.norm()
    assert float((grads.mean(0) - want).norm() / want.norm()) < (1e-5 if name == "CG" else 0.1)
    assert float(each.median()) < (1e-5 if name == "CG" else 0.6)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("size", [12, 24, 60])
def test_the_inverse_of_one_batch_would_be_far_off(size):
    """What this is for: the same systems by conjugate gradients, each on one batch."""
    problem, w, lam, want = regression(size)
    bilevel = hyperopt.Bilevel(
        problem, w.clone(), adjoint=hyperopt.Implicit(hyperopt.CG(), policy="ignore"), products=hyperopt.ProductSettings()
    )
    grads = torch.stack([bilevel.step(lam).grad for _ in range(40)])
    assert float(((grads - want).norm(dim=1) / want.norm()).median()) > 0.6
    assert float((grads.mean(0) - want).norm() / want.norm()) > 0.3


# ---- where the draws say the same, the exact solution is kept


class Copies:
    """A source that hands out new tensors of the same numbers."""

    def __init__(self, batch):
        self.batch = batch

    def draw(self):
        return tuple(x.clone() for x in self.batch)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        del state


@pytest.mark.parametrize("source", ["none", "batch", "all rows", "copies", "loader", "dataset"])
def test_the_same_rows_in_any_form_are_one_function(source):
    problem, w, lam, want = regression(None)
    batch = problem.inner_batches.draw()
    batches = {
        "none": None,
        "batch": batch,
        "all rows": Minibatches(batch),
        "copies": Copies(batch),
        "loader": DataLoader(TensorDataset(*batch), batch_size=240, shuffle=True),
        "dataset": TensorDataset(*batch),
    }[source]
    loss = problem.inner_loss if batches is not None else lambda w, lam, _: problem.inner_loss(w, lam, batch)
    found = hyperopt.hypergradient(hyperopt.BilevelProblem(loss, problem.outer_loss, inner_batches=batches), w, lam)
    assert found.choice is not None and found.choice.name == "CG" and not found.choice.resample
    torch.testing.assert_close(found.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 10.0])
def test_noise_of_the_gradient_alone_leaves_the_exact_solution(scale):
    """``noise w`` moves the gradient of a draw and not its Hessian: the solution of one draw is that of every other."""
    values = torch.tensor([3.0, 1.0, 0.2], dtype=DOUBLE)
    b = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (values * (w - lam).square()).sum() / 2 + scale * (torch.randn(3, dtype=DOUBLE) * w).sum(),
        lambda w, lam, batch: b @ w,
    )
    lam = torch.ones(3, dtype=DOUBLE)
    found = hyperopt.hypergradient(problem, lam.clone(), lam)
    assert found.choice is not None and found.choice.name == "CG" and "second draw" in found.choice.why
    torch.testing.assert_close(found.grad, b)


# ---- bookkeeping


def test_what_the_second_draw_costs_is_counted():
    """The inner loss is called once for each inner gradient, whatever was chosen."""
    for size, keep in ((None, 1.0), (240, 1.0), (24, 1.0), (None, 0.8)):
        problem, w, lam, _ = regression(size, keep=keep)
        calls = []

        def loss(w, lam, batch, inner=problem.inner_loss, calls=calls):
            calls.append(batch)
            return inner(w, lam, batch)

        counted = hyperopt.BilevelProblem(loss, problem.outer_loss, inner_batches=problem.inner_batches)
        estimate = hyperopt.hypergradient(counted, w, lam)
        compared = 2 if size else 0  # two values of the loss, to see whether they differ; the first is a replay
        assert len(calls) == estimate.cost.inner_gradients + compared
        assert estimate.adjoint is not None and estimate.cost.hessian_products >= int(estimate.adjoint.iterations)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("size", [10, 30])
def test_a_run_on_minibatches_that_is_taken_up_again_gives_the_same_numbers(size):
    def made():
        problem, w, lam, _ = regression(size)
        return hyperopt.Bilevel(problem, torch.zeros_like(w), inner=GradientDescent(step_size=0.05, max_steps=20)), lam

    whole, lam = made()
    want = [whole.step(lam).grad for _ in range(7)]
    first, _ = made()
    for _ in range(3):
        first.step(lam)
    second, _ = made()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for grad in want[3:]:
        assert torch.equal(second.step(lam).grad, grad)
