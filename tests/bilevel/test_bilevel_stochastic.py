"""SOBA, SABA, stocBiO, F2SA and V-PBGD: right in their limits, honest about what they cost, and refused where they diverge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_problems import DOUBLE, Logistic, Ridge, central_differences, flatten

import hyperopt
from hyperopt import F2SA, SABA, SOBA, VPBGD, Bilevel, BilevelProblem, Minibatches, StocBiO

PENALTY = 1e5  # the bias of a penalty method is about one part in so many
METHODS: dict[str, tuple[Any, int, float]] = {  # the method, outer steps at one lam, tolerance
    "soba": (SOBA(step_size=0.3), 400, 1e-9),
    "saba": (SABA(step_size=0.3), 400, 1e-9),
    "stocbio": (StocBiO(step_size=0.3, steps=60, terms=200), 4, 1e-9),
    "f2sa": (F2SA(step_size=0.3, steps=50, multiplier=PENALTY, growth=1e-3), 5, 1e-4),
    "v_pbgd": (VPBGD(step_size=0.3, steps=1, start=PENALTY, end=PENALTY + 1, ramp=1), 400, 1e-4),
}
FIRST_ORDER = ("f2sa", "v_pbgd")


@pytest.mark.cases(quick=0, slow=2)
@pytest.mark.parametrize("name", ["saba", "f2sa", *(name for name in METHODS if name not in ("saba", "f2sa"))])
def test_the_limit_at_fixed_hyperparameters_is_the_closed_form(name):
    ridge, (method, steps, tolerance) = Ridge(), METHODS[name]
    bilevel = Bilevel(ridge.problem, torch.zeros(8, dtype=DOUBLE), adjoint=method)
    for _ in range(steps):
        found = bilevel.step(ridge.lam)
    exact = ridge.hypergradient(ridge.lam)
    assert float((found.grad - exact).norm() / exact.norm()) < tolerance
    torch.testing.assert_close(bilevel.w, ridge.solution(ridge.lam), rtol=1e-7, atol=1e-9)
    assert found.loss == pytest.approx(float(ridge.outer(bilevel.w, ridge.lam, None)), rel=1e-6)


@pytest.mark.cases(quick=1, slow=1)
@pytest.mark.parametrize("name", ["soba", "f2sa", *(name for name in METHODS if name not in ("soba", "f2sa"))])
def test_the_limit_agrees_with_finite_differences(name):
    """On logistic regression, whose Hessian moves with the weights, with an outer loss that depends on ``lam`` itself too."""
    problem, (method, _, tolerance) = Logistic(strength=-1.0), METHODS[name]

    def outer(w, lam, batch):
        return problem.problem.outer_loss(w, lam, batch) + 0.01 * lam["weight"].square().sum()

    whole = BilevelProblem(
        problem.problem.inner_loss, outer, Minibatches(problem.data[0]), outer_batches=Minibatches(problem.data[1])
    )
    bilevel = Bilevel(whole, {key: leaf.clone() for key, leaf in problem.w0.items()}, adjoint=method)
    for _ in range(300 if method.__class__ in (SOBA, SABA, VPBGD) else 6):
        found = bilevel.step(problem.lam)

    near = problem.minimum(problem.lam)

    def objective(lam):
        return outer(problem.minimum(lam, near, steps=3), lam, problem.data[1])

    exact = flatten(central_differences(objective, problem.lam))
    assert float((flatten(found.grad) - exact).norm() / exact.norm()) < max(tolerance, 1e-7)


def sampled(ridge: Ridge, size: int) -> BilevelProblem:
    """The same problem, whose losses are means over rows of a batch."""

    def inner(w, lam, batch):
        return (batch[0] @ w - batch[1]).square().mean() / 2 + (lam.exp() * w.square()).sum() / 2

    def outer(w, lam, batch):
        return (batch[0] @ w - batch[1]).square().mean() / 2

    return BilevelProblem(
        inner, outer, Minibatches((ridge.x, ridge.y), size, seed=1), Minibatches((ridge.xv, ridge.yv), size, seed=2)
    )


@pytest.mark.manual
def test_variance_reduction_makes_minibatches_exact():
    """SABA converges at constant steps; SOBA, with the same batches and steps, stays where their noise keeps it."""
    ridge, errors = Ridge(), {}
    exact = ridge.hypergradient(ridge.lam)
    for name, method in {"saba": SABA(step_size=0.1), "soba": SOBA(step_size=0.1)}.items():
        bilevel = Bilevel(sampled(ridge, 9), torch.zeros(8, dtype=DOUBLE), adjoint=method)  # the last piece has four rows
        for _ in range(700):
            found = bilevel.step(ridge.lam)
        errors[name] = float((found.grad - exact).norm() / exact.norm())
    assert errors["saba"] < 1e-6 and errors["soba"] > 1e-3


def test_a_neumann_series_of_few_terms_is_its_formula():
    ridge, w = Ridge(), torch.ones(8, dtype=DOUBLE)
    step = 0.2
    found = Bilevel(ridge.problem, w.clone(), adjoint=StocBiO(step_size=step, steps=2, terms=3)).step(ridge.lam)
    h, target = ridge.hessian(ridge.lam), ridge.x.T @ ridge.y / 40
    for _ in range(2):
        w = w - step * (h @ w - target)
    b = ridge.outer_slope(w)
    powers = [torch.linalg.matrix_power(torch.eye(8, dtype=DOUBLE) - step * h, q) for q in range(4)]
    u = step * torch.stack([p @ b for p in powers]).sum(0)
    torch.testing.assert_close(found.grad, -ridge.mixed(w, ridge.lam).T @ u)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_the_bias_of_a_penalty_falls_as_one_over_it(name):
    ridge, errors = Ridge(), []
    exact = ridge.hypergradient(ridge.lam)
    for penalty in (100.0, 1000.0):
        method = (
            F2SA(step_size=0.3, steps=50, multiplier=penalty, growth=1e-9)
            if name == "f2sa"
            else VPBGD(step_size=0.3, start=penalty, end=penalty + 1e-6)
        )
        bilevel = Bilevel(ridge.problem, torch.zeros(8, dtype=DOUBLE), adjoint=method)
        for _ in range(5 if name == "f2sa" else 250):
            found = bilevel.step(ridge.lam)
        errors.append(float((found.grad - exact).norm()))
    assert 8 < errors[0] / errors[1] < 12


@pytest.mark.slow
def test_the_penalty_does_not_multiply_the_noise_of_batches():
    """At penalty 100 and one ``lam``, the mean over batches of epochs is the hypergradient on all rows, but for a tenth.

    With a batch of its own for the penalised copy it was 2.8 times the hypergradient away.
    """
    ridge, method = Ridge(), VPBGD(step_size=0.1, start=100.0, end=100.0 + 1e-9, ramp=1)
    batches = Bilevel(sampled(ridge, 6), torch.zeros(8, dtype=DOUBLE), adjoint=method)
    found = torch.stack([batches.step(ridge.lam).grad for _ in range(1000)])[250:].mean(0)
    exact = ridge.hypergradient(ridge.lam)
    assert float((found - exact).norm() / exact.norm()) < 0.15


def test_several_steps_in_batches_of_epochs_are_refused():
    bilevel = Bilevel(sampled(Ridge(), 6), torch.zeros(8, dtype=DOUBLE), adjoint=VPBGD(steps=3))
    with pytest.raises(ValueError, match=r"VPBGD: steps=3 with 7 batches an epoch"):
        bilevel.step(Ridge().lam)
    assert not bilevel.w.any()


class Once(torch.autograd.Function):
    """The square, whose gradient refuses to be part of a graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("asked for a second derivative")
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("name", METHODS)
def test_first_order_methods_never_take_a_second_derivative(name):
    lam = torch.tensor([0.5], dtype=DOUBLE)
    problem = BilevelProblem(lambda w, lam, batch: (Once.apply(w - 1) + lam * w).sum(), lambda w, lam, batch: (w * w).sum())
    bilevel = Bilevel(problem, torch.zeros(1, dtype=DOUBLE), adjoint=METHODS[name][0])
    if name in FIRST_ORDER:
        found = bilevel.step(lam)
        assert found.cost.hessian_products == found.cost.mixed_products == 0
    else:
        with pytest.raises(RuntimeError, match="second derivative"):
            bilevel.step(lam)


class Counter:
    """Counts the batches of a source."""

    def __init__(self, source):
        self.source, self.drawn = source, 0

    def draw(self):
        self.drawn += 1
        return self.source.draw()

    def state_dict(self):
        return self.source.state_dict()

    def load_state_dict(self, state):
        self.source.load_state_dict(state)


COSTS = {  # gradients of the inner loss, of the outer loss, Hessian and mixed products of one step; batches drawn of each loss
    "soba": (SOBA(), (1, 1, 1, 1), (1, 1)),
    "stocbio": (StocBiO(steps=3, terms=5), (3 + 1 + 5 + 1, 1, 5, 1), (3 + 1 + 5 + 1, 1)),
    "f2sa": (F2SA(steps=3), (8, 4, 0, 0), (4, 4)),
    "v_pbgd": (VPBGD(), (2, 1, 0, 0), (1, 1)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_counted(name):
    ridge, (method, cost, draws) = Ridge(), COSTS[name]
    problem = sampled(ridge, 10)
    sources = Counter(problem.inner_batches), Counter(problem.outer_batches)
    counted = BilevelProblem(problem.inner_loss, problem.outer_loss, *sources)  # type: ignore[arg-type]
    estimate = Bilevel(counted, torch.zeros(8, dtype=DOUBLE), adjoint=method).step(ridge.lam)
    spent = estimate.cost
    assert (spent.inner_gradients, spent.outer_gradients, spent.hessian_products, spent.mixed_products) == cost
    assert (sources[0].drawn, sources[1].drawn) == draws


def test_tables_cost_a_pass_at_first_and_one_batch_then():
    ridge = Ridge()
    bilevel = Bilevel(sampled(ridge, 10), torch.zeros(8, dtype=DOUBLE), adjoint=SABA())
    first, second = (vars(bilevel.step(ridge.lam).cost) for _ in range(2))
    assert first == {
        "inner_gradients": 4,
        "outer_gradients": 4,
        "hessian_products": 4,
        "mixed_products": 4,
        "transposed_products": 0,
    }
    assert second == dict.fromkeys(first, 1) | {"transposed_products": 0}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_at_which_a_method_diverges_is_named_and_the_last_good_state_kept(name):
    """The step is stable at first, and too long at another lam."""
    ridge = Ridge()
    settings: dict[str, Any] = {"step_size": 0.3, **({"steps": 5} if name in ("f2sa", "stocbio") else {})}
    bilevel = Bilevel(ridge.problem, torch.zeros(8, dtype=DOUBLE), adjoint=type(METHODS[name][0])(**settings))
    for _ in range(3):
        bilevel.step(ridge.lam)
    sharp = ridge.lam + 6
    with pytest.raises(hyperopt.SolveError, match=r"(diverged|nonfinite).*Lower step_size=0\.3 of "):
        for _ in range(60):
            before = {"w": bilevel.w.clone(), "memory": flat_memory(bilevel.state.memory)}
            bilevel.step(sharp)
    assert torch.equal(bilevel.w, before["w"]) and bilevel.w.isfinite().all()
    assert flat_memory(bilevel.state.memory) == before["memory"]


def flat_memory(memory: Any) -> Any:
    if isinstance(memory, dict):
        return {key: flat_memory(value) for key, value in memory.items() if key != "first"}
    if isinstance(memory, list | tuple):
        return [flat_memory(value) for value in memory]
    return memory.tolist() if isinstance(memory, torch.Tensor) else memory


@pytest.mark.parametrize("growth", [0.0, -0.1, float("nan")])
def test_a_penalty_that_does_not_grow_is_refused(growth):
    with pytest.raises(ValueError, match="growth"):
        F2SA(growth=growth)


@pytest.mark.parametrize(("start", "end"), [(2.0, 2.0), (2.0, 1.0)])
def test_a_ramp_that_does_not_grow_is_refused(start, end):
    with pytest.raises(ValueError, match=r"end=.*: the penalty does not grow, from start"):
        VPBGD(start=start, end=end)


def test_schedules():
    assert [VPBGD(start=1, end=5, ramp=4).penalty(t) for t in (0, 1, 4, 9)] == [1, 2, 5, 5]
    assert F2SA(multiplier=2, growth=0.5).penalty(3) == 3.5
    assert SOBA(decay=1.0, horizon=10).factor(30) == 0.25


def test_batches_that_cannot_be_visited_again_have_no_table():
    ridge = Ridge()
    problem = BilevelProblem(ridge.problem.inner_loss, ridge.problem.outer_loss, Counter(None))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="or the method SOBA"):
        Bilevel(problem, torch.zeros(8, dtype=DOUBLE), adjoint=SABA()).step(ridge.lam)


def test_one_call_leaves_the_weights_of_the_caller_alone():
    ridge, w = Ridge(), torch.zeros(8, dtype=DOUBLE)
    hyperopt.hypergradient(ridge.problem, w, ridge.lam, adjoint=SOBA())
    assert not w.any()


@pytest.mark.parametrize("name", ["f2sa", "vpbgd"])
def test_hyperparameters_that_no_loss_uses_are_refused_or_named(name):
    method = hyperopt.F2SA(step_size=0.1) if name == "f2sa" else hyperopt.VPBGD(step_size=0.1)
    w, one = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def problem(inner, outer):
        return hyperopt.BilevelProblem(
            lambda w, lam, batch: (w - inner(lam)).square().sum(), lambda w, lam, batch: (w * outer(lam)).square().sum()
        )

    nothing = problem(lambda lam: 1.0, lambda lam: 1.0)
    with pytest.raises(ValueError, match=r"the outer loss does not depend on lam\['a'\], lam\['b'\]"):
        hyperopt.hypergradient(nothing, w, {"a": one, "b": one}, adjoint=method)
    for some in (problem(lambda lam: lam["a"], lambda lam: 1.0), problem(lambda lam: 1.0, lambda lam: lam["a"])):
        found = hyperopt.hypergradient(some, w, {"a": one, "b": one}, adjoint=method)
        assert found.unused == ("lam['b']",)
        assert float(found.grad["b"]) == 0
    assert float(found.grad["a"].abs()) > 0


@pytest.mark.parametrize("method", [F2SA(step_size=0.1, steps=2), VPBGD(step_size=0.1)], ids=repr)
def test_an_outer_loss_with_a_sparse_gradient(method):
    rows, start = torch.tensor([0, 2, 2]), torch.arange(8.0).view(4, 2)

    def found(sparse):
        problem = hyperopt.BilevelProblem(
            inner_loss=lambda w, lam, batch: (w - lam).square().sum(),
            outer_loss=lambda w, lam, batch: torch.nn.functional.embedding(rows, w, sparse=sparse).square().sum(),
        )
        return hyperopt.Bilevel(problem, start.clone(), adjoint=method).step(torch.ones(2)).grad

    torch.testing.assert_close(found(True), found(False), rtol=0, atol=0)
