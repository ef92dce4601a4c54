"""Hypergradients of problems without a closed form, against finite differences and against each other at their limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bilevel_problems import DOUBLE, Logistic, Ridge, central_differences, flatten, hessian
from torch import nn

import hyperopt
from hyperopt import (
    CG,
    GMRES,
    Checkpointed,
    Dense,
    GradientDescent,
    HeavyBall,
    Implicit,
    InnerAdam,
    Neumann,
    Nystrom,
    Phantom,
    TorchOptimizer,
    Unrolled,
)
from hyperopt.core.status import Status

TIGHT = hyperopt.InnerLBFGS(rtol=1e-12, max_steps=300)


def distance(one, two):
    a, b = flatten(one), flatten(two)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])  # the model is linear in w: they are the same
def test_logistic_regression_with_a_strength_for_each_weight(curvature):
    problem = Logistic()
    trained = problem.minimum(problem.lam)
    want = central_differences(lambda lam: problem.objective(lam, trained), problem.lam)
    adjoint = Implicit(CG(rtol=1e-12))
    found = hyperopt.hypergradient(problem.problem, trained, problem.lam, adjoint=adjoint, curvature=curvature)
    assert distance(found.grad, want) < 1e-7  # of central differences with h = 1e-5
    assert found.grad["bias"].shape == () and found.grad["weight"].shape == (4, 3)


# How near each method gets to the exact hypergradient of the same problem, at the limit that the theory gives it.
LIMITS = {
    "cg": (Implicit(CG(rtol=1e-12)), None, 1e-9),
    "gmres": (Implicit(GMRES(rtol=1e-12, max_steps=300)), None, 1e-9),
    "dense": (Implicit(Dense()), None, 1e-9),
    "neumann": (Implicit(Neumann(rtol=1e-12, max_steps=20_000)), None, 1e-9),
    "nystrom, all columns": (Implicit(Nystrom(rank=15, rho=1e-6)), None, 1e-4),
    "phantom, many steps": (Phantom(steps=200, damping=1.0), None, 1e-9),
    "unrolled, many steps": (Unrolled(), GradientDescent(step_size=1.0, max_steps=150), 1e-6),
    "unrolled through heavy ball": (Unrolled(), HeavyBall(step_size=1.0, momentum=0.3, max_steps=100), 1e-6),
    "unrolled through adam": (Unrolled(), InnerAdam(lr=0.05, max_steps=400), 1e-6),
    "checkpointed": (Checkpointed(), GradientDescent(step_size=1.0, max_steps=150), 1e-6),
    "truncated, long": (Unrolled(last=120), GradientDescent(step_size=1.0, max_steps=150), 1e-5),
}


@pytest.fixture(scope="module")
def at_limits():
    problem = Logistic(strength=-1.0)
    trained = problem.minimum(problem.lam)
    found = {}
    for name, (adjoint, inner, _) in LIMITS.items():
        w = trained if inner is None else problem.w0
        found[name] = hyperopt.hypergradient(problem.problem, w, problem.lam, adjoint=adjoint, inner=inner).grad
    return found


@pytest.mark.cases(quick=7)
@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(LIMITS, 2)))
def test_every_pair_agrees_at_its_limits(one, two, at_limits):
    assert distance(at_limits[one], at_limits[two]) < LIMITS[one][2] + LIMITS[two][2]


def test_unrolling_approaches_the_implicit_hypergradient_at_the_rate_of_the_map():
    ridge = Ridge()
    want = ridge.hypergradient(ridge.lam)
    values = torch.linalg.eigvalsh(ridge.hessian(ridge.lam))
    rate = float((1 - 0.3 * values).abs().max())
    errors = []
    for steps in (40, 80):
        inner = GradientDescent(step_size=0.3, max_steps=steps)
        found = hyperopt.hypergradient(ridge.problem, torch.zeros(8, dtype=DOUBLE), ridge.lam, adjoint=Unrolled(), inner=inner)
        errors.append(float((found.grad - want).norm()))
    # T q^T up to constants: 40 further steps gain q^40, give or take the factor of two from T.
    assert 0.5 < errors[1] / errors[0] / rate**40 < 4


def network(seed=0):
    """A small network with a penalty strength for each tensor, near a minimum where its Hessian is positive definite."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = hyperopt.Functional(module)
    x, xv = (torch.randn(25, 3, generator=draw, dtype=DOUBLE) for _ in range(2))
    y, yv = (t[:, :1].sin() + 0.1 * t[:, 1:2] for t in (x, xv))
    lam = {name: torch.tensor(-3.0, dtype=DOUBLE) for name in model.w}

    def criterion(z, w, lam, batch):
        return (z - y).square().mean() + sum(lam[name].exp() * w[name].square().sum() for name in w)

    problem = hyperopt.BilevelProblem(
        hyperopt.Composite(lambda w, lam, batch: model(w, x), criterion),
        lambda w, lam, batch: (model(w, xv) - yv).square().mean(),
    )
    return model, problem, lam


def test_a_network():
    model, problem, lam = network()
    start = {name: tensor.clone() for name, tensor in model.w.items()}
    trained = hyperopt.hypergradient(problem, start, lam, inner=TIGHT, adjoint=Implicit(Dense())).w

    def objective(moved):
        w = hyperopt.hypergradient(problem, trained, moved, inner=TIGHT).w
        return problem.outer(w, moved, None)

    # Training ends at the rounding floor, whose noise small steps magnify: large ones, extrapolated to 0.
    near, far = (central_differences(objective, lam, h=h) for h in (3e-3, 6e-3))
    want = {name: (4 * near[name] - far[name]) / 3 for name in near}
    for adjoint in (Implicit(CG(rtol=1e-12)), Implicit(Dense())):
        found = hyperopt.hypergradient(problem, trained, lam, adjoint=adjoint)
        assert found.status == Status.converged and distance(found.grad, want) < 1e-5  # of central differences


def test_learning_rate_and_momentum_go_through_training_and_no_other_way(caplog):
    ridge = Ridge()
    lam = {"decay": ridge.lam, "rate": torch.tensor(0.2, dtype=DOUBLE), "momentum": torch.tensor(0.6, dtype=DOUBLE)}
    problem = hyperopt.BilevelProblem(lambda w, lam, b: ridge.inner(w, lam["decay"], b), ridge.outer)
    inner = HeavyBall(step_size="rate", momentum="momentum", max_steps=12)
    w0 = torch.zeros(8, dtype=DOUBLE)

    def objective(lam):
        w, m = w0, torch.zeros(8, dtype=DOUBLE)
        for _ in range(12):
            m = lam["momentum"] * m + ridge.x.T @ (ridge.x @ w - ridge.y) / 40 + lam["decay"].exp() * w
            w = w - lam["rate"] * m
        return ridge.outer(w, lam, None)

    want = central_differences(objective, lam)
    for adjoint in (Unrolled(), Checkpointed()):
        found = hyperopt.hypergradient(problem, w0, lam, adjoint=adjoint, inner=inner)
        for name in lam:
            torch.testing.assert_close(found.grad[name], want[name], rtol=1e-6, atol=1e-9)
        assert found.unused == ()
    with caplog.at_level("INFO"):
        implicit = hyperopt.hypergradient(problem, w0, lam, adjoint=Implicit(CG()), inner=inner)
    assert float(implicit.grad["rate"]) == float(implicit.grad["momentum"]) == 0.0
    assert implicit.unused == ("lam['momentum']", "lam['rate']") and "exactly zero" in caplog.text
    assert bool(implicit.grad["decay"].all())


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("batch", [None, 16])
def test_the_learning_rate_of_adam_goes_through_training_and_no_other_way(batch):
    """Against central differences of trainings by ``torch.optim.Adam`` on the same batches."""
    logistic = Logistic()
    lam = {**logistic.lam, "rate": torch.tensor(0.07, dtype=DOUBLE)}
    steps = 15

    def problem():
        batches = hyperopt.Minibatches(logistic.data[0], batch, seed=3)
        return hyperopt.BilevelProblem(
            logistic.problem.inner_loss, logistic.problem.outer_loss, batches, logistic.problem.outer_batches
        )

    def objective(lam):
        inner = TorchOptimizer(lr=float(lam["rate"]), max_steps=steps)
        w = hyperopt.hypergradient(problem(), logistic.w0, lam, adjoint=Phantom(steps=1), inner=inner, step=1.0).w
        return logistic.problem.outer(w, lam, logistic.data[1])

    want = central_differences(objective, lam)
    inner = InnerAdam(lr="rate", max_steps=steps)
    for adjoint in (Unrolled(), Checkpointed(), Checkpointed(segment=4)):
        found = hyperopt.hypergradient(problem(), logistic.w0, lam, adjoint=adjoint, inner=inner)
        for name in lam:
            torch.testing.assert_close(found.grad[name], want[name], rtol=1e-5, atol=1e-9)
        assert found.unused == () and abs(float(found.grad["rate"])) > 0.1
    implicit = hyperopt.hypergradient(problem(), logistic.w0, lam, inner=inner)
    assert float(implicit.grad["rate"]) == 0.0 and implicit.unused == ("lam['rate']",)


def test_adam_where_a_weight_has_no_gradient_at_all():
    """The root of a mean square that is 0 has no derivative: NaN in a naive graph, and from there in the hypergradient."""
    lam = torch.tensor(0.3, dtype=DOUBLE)
    inner = InnerAdam(lr=0.1, max_steps=5)
    grads = []
    for w0 in ([1.0], [1.0, 0.0]):  # the second weight is at its minimum, whatever the strength
        problem = hyperopt.BilevelProblem(
            lambda w, lam, batch: (w[0] - lam).square() + lam * w[1:].square().sum(), lambda w, lam, batch: w.square().sum()
        )
        found = hyperopt.hypergradient(problem, torch.tensor(w0, dtype=DOUBLE), lam, adjoint=Unrolled(), inner=inner)
        assert found.w[1:].tolist() == w0[1:]
        grads.append(float(found.grad))
    assert grads[0] == grads[1] != 0


def test_an_unused_hyperparameter_and_several_groups():
    ridge = Ridge()
    lam = {
        "a": {"decay": ridge.lam[:4]},
        "b": [ridge.lam[4:], torch.ones(2, 2, dtype=DOUBLE)],
        "direct": torch.ones(3, dtype=DOUBLE),
    }

    def whole(lam):
        return torch.cat([lam["a"]["decay"], lam["b"][0]])

    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: ridge.inner(w, whole(lam), batch),
        lambda w, lam, batch: ridge.outer(w, lam, batch) + lam["direct"].square().sum(),
    )
    want = ridge.hypergradient(ridge.lam)
    inner = GradientDescent(step_size=0.3, max_steps=400)
    for adjoint in (Implicit(CG(rtol=1e-13)), Unrolled(), Checkpointed()):
        found = hyperopt.hypergradient(problem, torch.zeros(8, dtype=DOUBLE), lam, adjoint=adjoint, inner=inner)
        torch.testing.assert_close(whole(found.grad), want, rtol=1e-10, atol=1e-12)
        assert found.unused == ("lam['b'][1]",) and not found.grad["b"][1].any()
        torch.testing.assert_close(found.grad["direct"], 2 * lam["direct"])


def test_the_chain_through_a_space_and_several_optimizers():
    ridge = Ridge()
    spaces = {"low": hyperopt.Positive(0.2, per="element"), "high": hyperopt.Bounded(0.5, low=0.1, high=2.0, per="element")}
    hyper = hyperopt.Hyperparameters(spaces, {"low": (4,), "high": (4,)}, dtype=DOUBLE)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: ridge.inner(w, torch.cat([lam["low"], lam["high"]]).log(), batch), ridge.outer
    )
    bilevel = hyperopt.Bilevel(problem, torch.zeros(8, dtype=DOUBLE), inner=TIGHT, adjoint=Implicit(CG(rtol=1e-12)))
    optimizers = [torch.optim.Adam(hyper.groups()["low"], lr=0.1), torch.optim.SGD(hyper.groups()["high"], lr=1.0)]
    losses = []
    for _ in range(30):
        lam = hyper.values()
        estimate = bilevel.step(lam)
        for optimizer in optimizers:
            optimizer.zero_grad()
        estimate.backward(lam)
        if not losses:
            decay = torch.cat([hyper.values()["low"], hyper.values()["high"]]).log()
            loss = ridge.outer(ridge.solution(decay), None, None)
            raw = [hyper.raw["low"], hyper.raw["high"]]
            for leaf, want in zip(raw, torch.autograd.grad(loss, raw), strict=True):
                torch.testing.assert_close(leaf.grad, want, rtol=1e-8, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(estimate.loss)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_differences"])
def test_products(curvature):
    """Of a network, in random directions, against dense matrices; the curvature of a network is not symmetric by accident."""
    from hyperopt.bilevel.curvature import Hessian
    from hyperopt.bilevel.evaluation import Evaluation
    from hyperopt.bilevel.finite_difference import FiniteDifferences
    from hyperopt.bilevel.gauss_newton import GaussNewton
    from hyperopt.bilevel.leaves import Leaves

    model, problem, lam = network()
    w = {name: tensor.clone() for name, tensor in model.w.items()}
    names = sorted(w)  # the order of optree
    sizes = [w[name].numel() for name in names]

    def tree(vector):
        return {name: part.view_as(w[name]) for name, part in zip(names, vector.split(sizes), strict=True)}

    flat = torch.cat([w[name].reshape(-1) for name in names])
    loss = problem.inner_loss

    def penalty(v):
        return sum(lam[name].exp() * part.square().sum() for name, part in tree(v).items())

    if curvature == "gauss_newton":
        jacobian = torch.func.jacrev(lambda v: loss.model(tree(v), lam, None).reshape(-1))(flat)
        want = jacobian.T @ jacobian * 2 / len(jacobian) + hessian(penalty)(flat)
    else:
        want = hessian(lambda v: loss(tree(v), lam, None))(flat)
    made = {"hessian": Hessian, "gauss_newton": GaussNewton, "finite_differences": FiniteDifferences}[curvature](
        Evaluation(problem, None), Leaves.of(w, "w"), Leaves.of(lam, "lam")
    )
    tolerance = 1e-7 if curvature == "finite_differences" else 1e-11
    slope = torch.func.grad(lambda v: loss(tree(v), lam, None))(flat)
    torch.testing.assert_close(made.gradient[0], slope, rtol=1e-10, atol=1e-12)
    mixed = torch.func.jacrev(lambda at: torch.func.grad(lambda v: loss(tree(v), at, None))(flat))(lam)
    for seed in range(3):
        v = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        torch.testing.assert_close(made.matvec(v[None])[0], want @ v, rtol=tolerance, atol=tolerance)
        for name, found in zip(sorted(lam), made.mixed(v[None]), strict=True):
            torch.testing.assert_close(found, v @ mixed[name], rtol=tolerance, atol=tolerance)
    if curvature == "gauss_newton":
        assert (
            float(torch.linalg.eigvalsh(want)[0])
            > 0
            > float(torch.linalg.eigvalsh(hessian(lambda v: loss(tree(v), lam, None))(flat))[0])
        )


@pytest.mark.slow
def test_a_batch_of_its_own_for_each_product():
    problem = Logistic(rows=300)
    w, lam = problem.minimum(problem.lam), problem.lam
    exact = hyperopt.hypergradient(problem.problem, w, lam, adjoint=Implicit(Neumann(rtol=0, max_steps=30)), step=0.5)
    batches = hyperopt.Minibatches(problem.data[0], size=50, seed=3)
    seen = []
    draw = batches.draw
    batches.draw = lambda: seen.append(draw()) or seen[-1]  # pyright: ignore[reportAttributeAccessIssue]
    stochastic = hyperopt.BilevelProblem(
        problem.problem.inner_loss, problem.problem.outer_loss, batches, problem.problem.outer_batches
    )
    found = []
    for _ in range(20):
        estimate = hyperopt.hypergradient(
            stochastic, w, lam, adjoint=Implicit(Neumann(rtol=0, max_steps=30), policy="ignore"), step=0.5, resample=True
        )
        found.append(flatten(estimate.grad))
    products = estimate.cost.hessian_products
    assert (
        len(seen) == 20 * (products + 2) and estimate.cost.inner_gradients == products + 2
    )  # the gradient, and the mixed product
    assert all(not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(seen))
    spread = torch.stack(found)
    # Unbiased but for the products of independent noise: the mean of 20 is nearer by about the root of 20 than one is.
    single = (spread - flatten(exact.grad)).norm(dim=1).mean()
    assert float((spread.mean(0) - flatten(exact.grad)).norm()) < 0.5 * float(single)


def test_memory_and_time_of_a_product_do_not_depend_on_their_number():
    from hyperopt.core.memory import peak_memory

    problem = Logistic(rows=400, features=20, classes=10)
    w = {name: torch.zeros_like(leaf) for name, leaf in problem.w0.items()}
    peaks = []
    for steps in (5, 50):
        with peak_memory("cpu") as memory:
            hyperopt.hypergradient(
                problem.problem, w, problem.lam, adjoint=Implicit(Neumann(rtol=0, max_steps=steps), policy="ignore"), step=0.1
            )
        peaks.append(memory.peak)
    assert peaks[1] < 1.02 * peaks[0]


@pytest.mark.slow
def test_memory_of_recomputed_training_grows_like_the_root_of_the_steps():
    from hyperopt.core.memory import peak_memory

    problem = Logistic(rows=400, features=20, classes=10)
    w = {name: torch.zeros_like(leaf) for name, leaf in problem.w0.items()}
    peaks = {}
    for adjoint, steps in itertools.product((Unrolled(), Checkpointed()), (9, 81)):
        with peak_memory("cpu") as memory:
            hyperopt.hypergradient(
                problem.problem, w, problem.lam, adjoint=adjoint, inner=GradientDescent(step_size=0.1, max_steps=steps)
            )
        peaks[type(adjoint).__name__, steps] = memory.peak
    assert peaks["Unrolled", 81] > 6 * peaks["Unrolled", 9]
    assert peaks["Checkpointed", 81] < 3.5 * peaks["Checkpointed", 9]
    assert peaks["Checkpointed", 81] < peaks["Unrolled", 81] / 3
    assert not math.isnan(peaks["Checkpointed", 9])
