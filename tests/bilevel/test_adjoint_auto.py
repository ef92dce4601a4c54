"""``adjoint="auto"``: what is chosen where, that it is finite and useful on networks, and that it resumes bit for bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math

import pytest
import torch
from bilevel_problems import DOUBLE, Logistic, Ridge, flatten
from torch import nn
from torch.nn import functional

import hyperopt
from hyperopt import CG, Auto, Composite, Functional, GradientDescent, Implicit, InnerLBFGS, Neumann, TorchOptimizer
from hyperopt.bilevel.step_map import StepMap, series
from hyperopt.core.operator import Complement
from hyperopt.core.policy import reset_warnings

ROWS = 40


class Masked(nn.Module):
    """Dropout with one mask for each row, which stays the same."""

    def __init__(self, width, rows=ROWS):
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.register_buffer("mask", (torch.rand(rows, width, generator=draw) < 0.8).double() / 0.8)

    def forward(self, x):
        return x * self.mask.to(x) if self.training else x


NETWORKS = {
    "two layers": lambda: nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3)),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(9, 12), nn.Tanh(), Masked(12), nn.Linear(12, 3)),
}


def classes(name, dtype=DOUBLE, seed=0, composite=False, flipped=0.25):
    """A network, wrong labels in its training rows, and hyperparameters of four kinds."""
    draw = torch.Generator().manual_seed(seed)
    x, xv = (torch.randn(ROWS, 9, generator=draw, dtype=DOUBLE) for _ in range(2))
    true = torch.randn(9, 3, generator=draw, dtype=DOUBLE)
    y, yv = (torch.tanh(x) @ true).argmax(1), (torch.tanh(xv) @ true).argmax(1)
    y = torch.where(torch.rand(ROWS, generator=draw) < flipped, (y + 1) % 3, y)
    torch.manual_seed(seed)
    model = Functional(NETWORKS[name]().to(dtype))
    x, xv = x.to(dtype), xv.to(dtype)

    def criterion(z, w, lam, batch):
        target = (1 - lam["smoothing"]) * functional.one_hot(y, 3) + lam["smoothing"] / 3
        losses = -(target * z.log_softmax(1)).sum(1)
        decay = torch.stack([p.square().sum() for p in w.values()]).sum()
        return (lam["weights"] * losses).mean() + lam["decay"].exp() * decay / 2

    def inner(w, lam, batch):
        return criterion(model(w, x), w, lam, batch)

    loss = Composite(lambda w, lam, batch: model(w, x), criterion) if composite else inner
    problem = hyperopt.BilevelProblem(loss, lambda w, lam, batch: functional.cross_entropy(model(w, xv), yv))
    lam = {"decay": torch.tensor(-6.0), "weights": torch.ones(ROWS), "smoothing": torch.tensor(0.05)}
    return problem, model, {key: value.to(dtype) for key, value in lam.items()}


def finite(estimate):
    return all(bool(g.isfinite().all()) and bool(g.any()) for g in estimate.grad.values())


# ---- networks by the defaults


@pytest.mark.cases(slow=2, among={"dtype": [torch.float32], "name": ["two layers"]})
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_defaults_tune_a_network(name, dtype):
    """15 outer steps end at a lower outer loss than training on alone does."""
    ends = {}
    for tuned in (True, False):
        problem, model, lam = classes(name, dtype)
        lam = {key: value.requires_grad_() for key, value in lam.items()}
        adjoint = "auto" if tuned else hyperopt.OneStep()  # training on alone has no use for a hypergradient
        bilevel = hyperopt.Bilevel(problem, model.w, inner=TorchOptimizer(lr=0.02, max_steps=30), adjoint=adjoint)
        optimizer = torch.optim.Adam(lam.values(), lr=0.1)
        for _ in range(15):
            optimizer.zero_grad()
            estimate = bilevel.step(lam)
            if tuned:
                assert finite(estimate) and estimate.choice is not None and not estimate.status.failed
                estimate.backward(lam)
                optimizer.step()
                with torch.no_grad():
                    lam["weights"].clamp_(0, 2)
                    lam["smoothing"].clamp_(0, 0.5)
        ends[tuned] = estimate.loss
    assert ends[True] < 0.85 * ends[False]


@pytest.mark.cases(quick=3, slow=5)
@pytest.mark.parametrize("steps", [0, 50, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_from_any_weights_the_hypergradient_is_a_number(name, steps):
    problem, model, lam = classes(name, torch.float32 if steps == 50 else DOUBLE)
    w = {key: leaf.clone() for key, leaf in model.w.items()}
    if steps:
        inner = TorchOptimizer(lr=0.01, max_steps=steps)
        w = hyperopt.hypergradient(problem, w, lam, inner=inner).w
    for inner in (None, TorchOptimizer(lr=0.01, max_steps=10), GradientDescent(step_size=0.05, max_steps=10)):
        estimate = hyperopt.hypergradient(problem, w, lam, inner=inner)
        assert finite(estimate) and not estimate.status.failed
        assert estimate.choice is not None and repr(estimate).count(estimate.choice.why) == 1
        assert estimate.metrics()["adjoint/choice"] in (0.0, 1.0, 2.0, 3.0)


@pytest.mark.manual
@pytest.mark.parametrize(
    "name", [pytest.param("convolutional", marks=pytest.mark.slow), pytest.param("dropout", marks=pytest.mark.manual)]
)
def test_it_agrees_with_a_long_training_in_sign_and_roughly_in_size(name):
    """Along the gradient itself, and for the decay, against a central difference of 1500 steps, of networks that are smooth."""
    problem, model, lam = classes(name)
    lam["decay"] = torch.tensor(-3.5, dtype=DOUBLE)
    inner = TorchOptimizer(lr=0.01, max_steps=1500)
    grad = hyperopt.hypergradient(problem, model.w, lam, inner=inner).grad
    for direction in ({"weights": grad["weights"]}, {"decay": torch.ones((), dtype=DOUBLE)}):
        losses = []
        for sign in (1, -1):
            moved = {**lam, **{key: lam[key] + sign * 1e-4 * move for key, move in direction.items()}}
            losses.append(hyperopt.hypergradient(problem, model.w, moved, inner=inner, adjoint=hyperopt.OneStep()).loss)
        want = (losses[0] - losses[1]) / 2e-4
        found = sum(float((grad[key] * move).sum()) for key, move in direction.items())
        assert 0.3 < found / want < 3


def test_conjugate_gradients_alone_refuse_what_the_default_does():
    """What this is for: a two-layer network on its way has an indefinite Hessian."""
    problem, model, lam = classes("two layers")
    inner = TorchOptimizer(lr=0.01, max_steps=50)
    refused = hyperopt.hypergradient(problem, model.w, lam, inner=inner, adjoint=Implicit(CG(), policy="ignore"))
    assert refused.status.name == "negative_curvature" and not refused.grad["decay"].isfinite()
    found = hyperopt.hypergradient(problem, model.w, lam, inner=inner)
    assert found.choice is not None and found.choice.name == "Neumann" and "negative curvature" in found.choice.why
    assert math.isnan(found.certificate.error) and not found.certificate.is_bound  # nothing is known of the exact one


# ---- which choice


@pytest.mark.parametrize("inner", [None, InnerLBFGS(), GradientDescent(step_size=0.3, max_steps=300)])
def test_a_convex_problem_is_solved_exactly(inner):
    ridge = Ridge()
    w = ridge.solution(ridge.lam) if inner is None else torch.zeros(8, dtype=DOUBLE)
    found = hyperopt.hypergradient(ridge.problem, w, ridge.lam, inner=inner)
    assert found.choice is not None and found.choice.name == "CG"
    torch.testing.assert_close(found.grad, ridge.hypergradient(ridge.lam), rtol=1e-4, atol=1e-7)


def test_declared_constants_choose_cg_and_a_wrong_declaration_is_refused():
    reset_warnings()  # other tests may have met the same kind of failure

    def constants(w, lam):
        return hyperopt.InnerConstants(strong_convexity=0.5, smoothness=10.0, mixed_norm=10.0)

    for scale, right in (((1.0, 4.0), True), ((1.0, -4.0), False)):
        diagonal = torch.tensor(scale, dtype=DOUBLE)
        problem = hyperopt.BilevelProblem(
            lambda w, lam, batch, d=diagonal: (d * w.square()).sum() / 2 - (lam * w).sum(),
            lambda w, lam, batch: (w - 1).square().sum(),
            constants=constants,
        )
        lam = torch.tensor([2.0, 3.0], dtype=DOUBLE)
        with contextlib.nullcontext() if right else pytest.warns(hyperopt.SolveWarning, match="negative curvature"):
            found = hyperopt.hypergradient(problem, lam / diagonal, lam)
        assert found.choice is not None and found.choice.name == "CG" and "declares" in found.choice.why
        if right:
            torch.testing.assert_close(found.grad, 2 * (lam / diagonal - 1) / diagonal)
        else:
            assert found.status.name == "negative_curvature" and "constants" in found.note and bool(found.grad.isnan().all())


def test_a_saddle_is_differentiated_as_one():
    """``L = w0^2 / 2 - w1^2 / 2 - lam w`` is stationary at ``(lam0, -lam1)``, whose derivative exists."""
    signs = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (signs * w.square()).sum() / 2 - (lam * w).sum(), lambda w, lam, batch: (w - 3).square().sum()
    )
    lam = torch.tensor([2.0, 5.0], dtype=DOUBLE)
    found = hyperopt.hypergradient(problem, signs * lam, lam)
    assert found.choice is not None and found.choice.name == "MINRES"
    torch.testing.assert_close(found.grad, 2 * (signs * lam - 3) * signs)
    away = hyperopt.hypergradient(problem, signs * lam + 0.1, lam)
    assert away.choice is not None and away.choice.name == "Neumann"


def quadratic(values, b):
    """An inner loss of this spectrum around ``lam``, and ``E = b w``."""
    values, b = (torch.tensor(x, dtype=DOUBLE) for x in (values, b))
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (values * (w - lam).square()).sum() / 2, lambda w, lam, batch: (b * w).sum()
    )
    return problem, values, b


@pytest.mark.parametrize("steps", [20, 57, 100])
def test_after_gradient_descent_that_is_not_done_it_is_the_derivative_of_the_training(steps):
    """The same numbers as unrolling it, since the Hessian is constant."""
    problem, *_ = quadratic([1.0, 0.3, 1e-3, 1e-5], [1.0, -1.0, 2.0, 1.0])
    inner, lam = GradientDescent(step_size=0.5, max_steps=steps), torch.ones(4, dtype=DOUBLE)
    w = torch.zeros(4, dtype=DOUBLE)
    found = hyperopt.hypergradient(problem, w, lam, inner=inner)
    want = hyperopt.hypergradient(problem, w, lam, inner=inner, adjoint=hyperopt.Unrolled())
    assert found.choice is not None and found.choice.name == "Neumann" and found.choice.step == pytest.approx(0.5)
    torch.testing.assert_close(found.grad, want.grad, rtol=1e-9, atol=1e-12)


def test_flat_directions_count_for_no_more_than_the_steps_taken():
    """A singular Hessian, as of data cleaning without decay; the outer gradient has a part along which there is no curvature."""
    problem, *_ = quadratic([1.0, 0.5, 0.0], [1.0, 1.0, 1.0])
    lam = torch.zeros(3, dtype=DOUBLE)
    found = hyperopt.hypergradient(problem, torch.ones(3, dtype=DOUBLE), lam, inner=TorchOptimizer(lr=0.01, max_steps=30))
    assert found.choice is not None and found.choice.name == "Neumann"
    torch.testing.assert_close(found.grad, torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("negative", [-0.02, -0.2, -0.9])
def test_negative_curvature_ends_the_series_before_it_is_amplified(negative):
    problem, values, b = quadratic([1.0, 0.2, negative], [1.0, 1.0, 0.1])
    lam, w = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    found = hyperopt.hypergradient(problem, w, lam, inner=TorchOptimizer(lr=1e-3, max_steps=100))
    assert found.adjoint is not None and found.choice is not None and found.choice.name == "Neumann"
    terms = int(found.adjoint.iterations)
    u = found.grad / values  # grad = values u
    assert bool((u * b > 0).all())  # a descent direction in every direction, be its curvature negative or not
    assert 1 <= terms < 100 and float(found.adjoint.residual) <= 1
    step = found.choice.step
    assert step is not None
    want = step * sum((1 - step * values) ** k for k in range(terms)) * b
    torch.testing.assert_close(u, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("most", [1, 7, 100])
def test_the_series_stops_where_its_residual_is_least(most):
    values = torch.tensor([1.0, 0.6, 0.1, -0.05], dtype=DOUBLE)
    matrix = hyperopt.MatrixOperator(torch.diag(values))
    b = torch.tensor([[1.0, 1.0, 1.0, 0.2]], dtype=DOUBLE)

    class Map(StepMap):
        def __init__(self):
            self.largest = torch.tensor(1.0)
            Complement.__init__(self, matrix, 1.0)
            self.step = 1.0

    u, stats, rose = series(Map(), b, most, 1e-12)
    residuals = [float(((1 - values) ** k * b).norm() / b.norm()) for k in range(most + 1)]
    best = min(range(1, most + 1), key=residuals.__getitem__)
    assert int(stats.iterations) == best and rose == (best < most)
    torch.testing.assert_close(u, sum((1 - values) ** k for k in range(best)) * b)
    assert float(stats.residual) == pytest.approx(residuals[best])


def test_gauss_newton_takes_over_where_negative_curvature_is_strong():
    """At the first weights of a network with a ``Composite`` loss; never without one."""
    names = {}
    for composite in (True, False):
        problem, model, lam = classes("convolutional", composite=composite)
        estimate = hyperopt.hypergradient(
            problem, model.w, lam, inner=TorchOptimizer(lr=1e-6, max_steps=1), adjoint=Auto(terms=60)
        )
        assert finite(estimate) and estimate.choice is not None
        names[composite] = estimate.choice.name, estimate.choice.curvature
    assert names == {True: ("Neumann, Gauss-Newton", "gauss_newton"), False: ("Neumann", "hessian")}


def test_products_on_batches_of_their_own_are_not_given_to_cg():
    problem = Logistic(strength=-1.0)
    sampled = hyperopt.BilevelProblem(
        problem.problem.inner_loss,
        problem.problem.outer_loss,
        inner_batches=hyperopt.Minibatches(problem.data[0], 20, seed=1),
        outer_batches=hyperopt.Minibatches(problem.data[1]),
    )
    found = hyperopt.hypergradient(sampled, problem.minimum(problem.lam), problem.lam, resample=True)
    exact = hyperopt.hypergradient(problem.problem, problem.minimum(problem.lam), problem.lam)
    assert found.choice is not None and found.choice.name.startswith("Neumann") and "batch of its own" in found.choice.why
    assert float(functional.cosine_similarity(flatten(found.grad), flatten(exact.grad), dim=0)) > 0.9


def test_the_choice_can_be_made_by_hand():
    """``choice.adjoint``, ``step`` and ``curvature`` give the same hypergradient."""
    for name, composite in itertools.product(("two layers", "convolutional"), (True, False)):
        problem, model, lam = classes(name, composite=composite)
        w = hyperopt.hypergradient(problem, model.w, lam, inner=TorchOptimizer(lr=0.01, max_steps=30)).w
        found = hyperopt.hypergradient(problem, w, lam)
        choice = found.choice
        assert choice is not None
        again = hyperopt.hypergradient(problem, w, lam, adjoint=choice.adjoint, step=choice.step, curvature=choice.curvature)
        torch.testing.assert_close(flatten(again.grad), flatten(found.grad), rtol=1e-8, atol=1e-12)


# ---- what cannot be done is refused


def test_products_that_are_not_finite_and_a_hessian_of_zero_are_refused():
    linear = hyperopt.BilevelProblem(lambda w, lam, batch: (lam * w).sum(), lambda w, lam, batch: (w - 1).square().sum())
    found = hyperopt.hypergradient(linear, torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE))
    assert found.status.name == "breakdown" and "zero along" in found.note and bool(found.grad.isnan().all())
    broken = hyperopt.BilevelProblem(
        lambda w, lam, batch: (w.abs().sqrt() * lam).sum(), lambda w, lam, batch: (w - 1).square().sum()
    )
    found = hyperopt.hypergradient(broken, torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE))
    assert found.status.failed and found.note and bool(found.grad.isnan().all())


def test_an_unknown_name_is_refused():
    ridge = Ridge()
    with pytest.raises(TypeError, match=r"adjoint='best' is not an adjoint of a trained problem; give \"auto\", Implicit"):
        hyperopt.Bilevel(ridge.problem, torch.zeros(8, dtype=DOUBLE), adjoint="best")
    for wrong in ({"rtol": 0.0}, {"max_steps": 0}, {"terms": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Auto(**wrong)  # pyright: ignore[reportArgumentType]


# ---- memory


def moving(name="two layers"):
    problem, model, lam = classes(name, composite=True)
    return hyperopt.Bilevel(problem, model.w, inner=TorchOptimizer(lr=0.02, max_steps=20)), lam


@pytest.mark.cases(quick=0, slow=1)
@pytest.mark.parametrize("name", ["two layers", "convolutional"])
def test_a_run_that_is_taken_up_again_makes_the_same_choices(name):
    def run(bilevel, lam, steps):
        return [(e.choice.name, e.cost.hessian_products, flatten(e.grad)) for e in (bilevel.step(lam) for _ in range(steps))]

    whole, lam = moving(name)
    want = run(whole, lam, 12)
    first, _ = moving(name)
    run(first, lam, 5)
    kept = copy.deepcopy(first.state_dict())
    second, _ = moving(name)
    second.load_state_dict(kept)
    for (a, n, x), (b, m, y) in zip(want[5:], run(second, lam, 7), strict=True):
        assert (a, n) == (b, m) and torch.equal(x, y)


def test_cg_that_failed_is_not_paid_for_in_every_outer_step(caplog):
    bilevel, lam = moving()
    with caplog.at_level(logging.INFO, logger="hyperopt.bilevel.auto"):
        choices, tried = [], []
        for _ in range(16):
            before = bilevel.state.memory.get("auto", {}).get("again", 0)
            choice = bilevel.step(lam).choice
            assert choice is not None
            choices.append(choice.name)
            tried.append(bilevel.state.memory["auto"]["again"] != before)
    assert set(choices) == {"Neumann"} or "Neumann, Gauss-Newton" in choices
    assert tried == [k in (0, 2, 5, 10) for k in range(16)]
    changes = 1 + sum(a != b for a, b in itertools.pairwise(choices))
    assert sum("uses" in record.message for record in caplog.records) == changes


def test_auto_is_also_the_adjoint_of_a_fixed_point():
    """There it is CG, MINRES or GMRES, whichever can: symmetric and definite, symmetric, neither."""
    torch.manual_seed(0)
    half = torch.randn(4, 4, dtype=DOUBLE) / 6
    for matrix in (half + half.T, 2 * torch.eye(4, dtype=DOUBLE).flip(0), half):
        inverse = torch.linalg.inv(torch.eye(4, dtype=DOUBLE) - matrix)
        c = torch.ones(4, dtype=DOUBLE, requires_grad=True)
        start = (inverse @ c).detach()
        value = hyperopt.fixed_point(
            lambda w, c, m=matrix: m @ w + c, start, args=(c,), rows="joint", adjoint=Auto(rtol=1e-12), policy="ignore"
        ).value
        (found,) = torch.autograd.grad(value[0], c)
        torch.testing.assert_close(found, inverse[0], rtol=1e-8, atol=1e-10)


@pytest.mark.manual
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_as_good_as_the_fixed_series_over_seeds(name):
    """After 30 outer steps the loss is at most 1.1 times that of 20 terms in the geometric mean of six seeds.

    One seed says less: with batch norm the two methods end at .78 to 1.28 times each other's loss, whichever is ahead, since
    two trainings whose hyperparameters differ a little end in different minima.
    """
    logs = []
    for seed in range(6):
        auto, series = (searched(name, seed, way) for way in ("auto", Implicit(Neumann(rtol=0, max_steps=20), policy="ignore")))
        logs.append(math.log(auto / series))
    assert sum(logs) / len(logs) < math.log(1.1)
    assert max(logs) < math.log(1.5)


def searched(name, seed, adjoint):
    """The outer loss after 30 outer steps."""
    problem, model, lam = classes(name, seed=seed)
    lam = {key: value.requires_grad_() for key, value in lam.items()}
    bilevel = hyperopt.Bilevel(problem, model.w, inner=TorchOptimizer(lr=0.01, max_steps=50), adjoint=adjoint)
    optimizer = torch.optim.Adam(lam.values(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        estimate = bilevel.step(lam)
        estimate.backward(lam)
        optimizer.step()
        with torch.no_grad():
            lam["weights"].clamp_(0, 2)
            lam["smoothing"].clamp_(0, 0.5)
    return estimate.loss
