"""A start at a solution is not called divergence, a step that is too long is, and tolerances know the rounding of products."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from bilevel_problems import DOUBLE, Ridge
from torch import nn

import hyperopt
from hyperopt import (
    F2SA,
    GMRES,
    SABA,
    SOBA,
    VPBGD,
    Anderson,
    BiCGStab,
    Bilevel,
    BilevelProblem,
    GradientDescent,
    HeavyBall,
    Implicit,
    InnerAdam,
    InnerLBFGS,
    LinearAnderson,
    Neumann,
    Picard,
    SolveError,
    StocBiO,
    TorchOptimizer,
    Unrolled,
)
from hyperopt.core.loop import rounding_floor
from hyperopt.core.status import Status

SINGLE_LOOP: dict[str, Any] = {
    "soba": SOBA(step_size=0.1),
    "saba": SABA(step_size=0.1),
    "stocbio": StocBiO(step_size=0.1, steps=5, terms=30),
    "f2sa": F2SA(step_size=0.1, steps=10, multiplier=1e3, growth=1e-3),
    "v_pbgd": VPBGD(step_size=0.1, start=1e2, end=1e2 + 1e-3),
}


def following(dtype=DOUBLE) -> BilevelProblem:
    """The weights follow the hyperparameters, which are best at 3: ``w* = lam``, ``dE/dlam = lam - 3``."""
    return BilevelProblem(lambda w, lam, batch: (w - lam).square().sum() / 2, lambda w, lam, batch: (w - 3).square().sum() / 2)


SHORT = [name for name in SINGLE_LOOP if name not in ("stocbio", "f2sa")]  # these train ten times as long in each outer step
AWAY = [(name, away) for name in SINGLE_LOOP for away in (0.0, 1e-15, 1e-12, 1e-6) if name in SHORT or away == 0]


@pytest.mark.cases(quick=1, slow=4, among={"name": SHORT, "away": [1e-15]})
@pytest.mark.parametrize(("name", "away"), AWAY)
def test_single_loop_from_trained_weights(name, away):
    lam = torch.tensor([0.1, 0.2], dtype=DOUBLE)
    bilevel = Bilevel(following(), lam + away, adjoint=SINGLE_LOOP[name])
    for _ in range(300):
        lam = lam - 0.03 * bilevel.step(lam).grad
    assert float((lam - 3).abs().max()) < 0.1


@pytest.mark.cases(quick=1, slow=1, among={"name": SHORT})
@pytest.mark.parametrize("name", SINGLE_LOOP)
def test_single_loop_from_trained_weights_in_float32_and_at_zero(name):
    lam = torch.zeros(2)
    bilevel = Bilevel(following(), lam.clone(), adjoint=SINGLE_LOOP[name])
    for _ in range(300):
        lam = lam - 0.03 * bilevel.step(lam).grad
    assert float((lam - 3).abs().max()) < 0.1


@pytest.mark.parametrize("name", SINGLE_LOOP)
def test_a_step_that_is_too_long_is_refused_from_trained_weights_too(name):
    lam = torch.tensor([0.1, 0.2], dtype=DOUBLE)
    bilevel = Bilevel(following(), lam + 1e-12, adjoint=type(SINGLE_LOOP[name])(step_size=2.5))
    with pytest.raises(SolveError, match=rf"diverged.*Lower step_size=2\.5 of {type(SINGLE_LOOP[name]).__name__}"):
        for _ in range(300):
            lam = lam - 1e-3 * bilevel.step(lam).grad.clamp(-1, 1)
    assert bool(bilevel.w.isfinite().all())


def test_the_adjoint_step_of_a_single_loop_is_told_from_that_of_the_weights():
    lam = torch.tensor([0.1, 0.2], dtype=DOUBLE)
    bilevel = Bilevel(following(), lam + 1e-12, adjoint=SOBA(step_size=0.1, adjoint_step=2.5))
    with pytest.raises(SolveError, match=r"its adjoint variable.*Lower adjoint_step=2\.5 of SOBA"):
        for _ in range(200):
            bilevel.step(lam)


INNER: dict[str, Any] = {
    "lbfgs": InnerLBFGS(),
    "gradient descent": GradientDescent(step_size=0.2, max_steps=300),
    "gradient descent to a tolerance": GradientDescent(step_size=0.2, rtol=1e-6, max_steps=2000),
    "heavy ball to a tolerance": HeavyBall(step_size=0.1, momentum=0.5, rtol=1e-6, max_steps=2000),
    "heavy ball": HeavyBall(step_size=0.1, momentum=0.5, max_steps=300),
    "adam": InnerAdam(lr=0.01, max_steps=300),
    "torch adam": TorchOptimizer(lr=0.01, max_steps=300),
    "torch sgd to a tolerance": TorchOptimizer(optimizer="SGD", lr=0.2, rtol=1e-6, max_steps=2000),
}


@pytest.mark.cases(quick=2, slow=8, among={"name": ["gradient descent", "heavy ball to a tolerance", "torch adam"]})
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", INNER)
def test_pretrained_start(name, dtype):
    """Trained weights are accepted, also in a second outer step after the hyperparameters have moved."""
    ridge = Ridge()
    for data in ("x", "xv", "y", "yv"):
        setattr(ridge, data, getattr(ridge, data).to(dtype))
    lam = ridge.lam.to(dtype)
    trained = ridge.solution(lam)
    bilevel = Bilevel(ridge.problem, trained.clone(), inner=INNER[name])
    tolerance = 1e-4 if dtype == DOUBLE and "adam" not in name else 2e-2
    for at in (lam, lam + 0.3, lam - 0.3):
        found = bilevel.step(at)
        assert found.inner is not None and not found.inner.status.failed
        exact = ridge.hypergradient(at)
        assert float((found.grad - exact).norm() / exact.norm()) < tolerance


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("name", ["gradient descent", "heavy ball", "adam"])
def test_pretrained_start_by_unrolling(name):
    ridge = Ridge()
    bilevel = Bilevel(ridge.problem, ridge.solution(ridge.lam), inner=INNER[name], adjoint=Unrolled())
    for at in (ridge.lam, ridge.lam + 0.3):
        found = bilevel.step(at)
        exact = ridge.hypergradient(at)
        if name == "adam":  # at a gradient of 0 the derivative of its step is lr / eps
            assert found.inner is not None and not found.inner.status.failed and bool(found.grad.isfinite().all())
        else:
            assert float((found.grad - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize(
    "inner",
    [
        GradientDescent(step_size=2.0, max_steps=400),
        GradientDescent(step_size=2.0, rtol=1e-6, max_steps=400),
        HeavyBall(step_size=4.0, max_steps=400),
        TorchOptimizer(optimizer="SGD", lr=2.0, max_steps=400),
        InnerAdam(lr=1e4, max_steps=400),
        TorchOptimizer(lr=1e4, max_steps=400),
    ],
    ids=lambda inner: f"{type(inner).__name__} {inner.rtol}",
)
def test_a_training_that_diverges_is_refused_from_trained_weights_too(inner):
    ridge = Ridge()
    bilevel = Bilevel(ridge.problem, ridge.solution(ridge.lam), inner=inner)
    with pytest.raises(SolveError, match=rf"diverged.*lower .* of {type(inner).__name__}"):
        for at in (ridge.lam, ridge.lam + 0.1):
            bilevel.step(at)


def test_a_solution_at_exactly_zero_needs_no_scale():
    problem = BilevelProblem(lambda w, lam, b: (w - lam).square().sum(), lambda w, lam, b: (w - 1).square().sum())
    for inner in INNER.values():
        bilevel = Bilevel(problem, torch.zeros(2, dtype=DOUBLE), inner=inner)
        for at in (0.0, 0.0, 0.5):
            lam = torch.full((2,), at, dtype=DOUBLE)
            found = bilevel.step(lam)
        assert not found.status.failed  # pyright: ignore[reportPossiblyUnboundVariable]
        assert torch.allclose(found.grad, 2 * (lam - 1), atol=0.1)  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("name", INNER)
def test_a_step_at_hyperparameters_that_are_not_finite_spoils_none_after_it(name):
    ridge = Ridge()
    bilevel = Bilevel(ridge.problem, ridge.solution(ridge.lam), inner=INNER[name])
    with pytest.raises(SolveError, match="diverged"):
        bilevel.step(ridge.lam * torch.nan)
    found = bilevel.step(ridge.lam)
    exact = ridge.hypergradient(ridge.lam)
    assert float((found.grad - exact).norm() / exact.norm()) < 2e-2


def test_a_loss_without_second_derivative_is_trained_from_trained_weights():
    """The scale cannot be measured there, and the gradient at the start has to do."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            if torch.is_grad_enabled():
                raise RuntimeError("asked for a second derivative")
            return 2 * ctx.saved_tensors[0] * grad

    problem = BilevelProblem(lambda w, lam, b: Once.apply(w - lam).sum(), lambda w, lam, b: w.sum())
    state = Bilevel(problem, torch.ones(2, dtype=DOUBLE)).state
    stats = GradientDescent(step_size=0.1, rtol=1e-6, max_steps=200).solve(problem, torch.zeros(2, dtype=DOUBLE), state)
    assert stats.status == Status.converged and float(state.w.abs().max()) < 1e-5


def test_the_evaluations_for_a_scale_are_counted():
    ridge = Ridge()
    for rtol, extra in ((0.0, 0), (1e-3, 1)):
        ridge.evaluations.clear()
        state = Bilevel(ridge.problem, torch.zeros(8, dtype=DOUBLE)).state
        stats = GradientDescent(step_size=0.1, rtol=rtol, max_steps=20).solve(ridge.problem, ridge.lam, state)
        assert stats.evaluations == len(ridge.evaluations) and stats.vjps == extra


# ---- the precision of products


class Cell(nn.Module):
    def __init__(self, size: int = 32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inside, self.outside = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, z, x):
        return torch.tanh(0.4 * self.inside(z) + self.outside(x))


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


def quiet(make):
    """What ``make`` returns, if nothing is said in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=lambda s: s.name)
def test_a_solve_under_autocast_meets_the_tolerance_that_its_products_allow(solver, dtype):
    cell = Cell()

    def solve():
        with torch.autocast("cpu", dtype):
            return hyperopt.fixed_point(lambda z: cell(z, X).float(), torch.zeros(16, 32), solver=solver)

    low = quiet(solve)
    exact = hyperopt.fixed_point(lambda z: cell(z, X), torch.zeros(16, 32), solver=Picard(rtol=1e-5)).value
    assert low.status == Status.converged and low.forward.worst_residual() < torch.finfo(dtype).eps
    assert float((low.value - exact).norm().detach() / exact.norm().detach()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("linear", [Neumann(), GMRES(), LinearAnderson(), BiCGStab()], ids=lambda s: s.name)
def test_an_adjoint_of_a_solve_under_autocast_knows_its_graph(linear, inside):
    """Its products are in bfloat16 though autocast is over: the graph tells."""
    grads = {}
    for low in (False, True):
        deq = hyperopt.nn.DEQ(Cell(), adjoint=Implicit(linear))

        def run(deq=deq, low=low):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = deq(X).float().square().mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()

        quiet(run)
        grads[low] = torch.cat([p.grad.flatten() for p in deq.parameters() if p.grad is not None])
    assert float((grads[True] - grads[False]).norm() / grads[False].norm()) < 0.02


def test_a_network_in_bfloat16_has_a_floor_of_its_own():
    deq = hyperopt.nn.DEQ(Cell().bfloat16())
    quiet(lambda: deq(X.bfloat16()).float().square().mean().backward())


@pytest.mark.parametrize("solver", [Picard(), Anderson(), hyperopt.Broyden(), hyperopt.Newton()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["no product", "a product without autocast"])
def test_a_map_of_which_autocast_lowers_nothing_is_solved_as_without_it(name, solver):
    cell = Cell()

    def phi(z):
        if name == "no product":
            return torch.cos(z + 0.1 * X) / 2
        with torch.autocast("cpu", enabled=False):
            return cell(z, X)

    def solve():
        with torch.no_grad():
            return hyperopt.fixed_point(phi, torch.zeros(16, 32), solver=solver)

    exact = solve()
    with torch.autocast("cpu", torch.bfloat16):
        low = solve()
    assert low.forward.worst_residual() < 2e-5
    # Newton's products with the Jacobian are made under autocast, which lowers them, and leads another way to the solution.
    assert torch.allclose(low.value, exact.value, rtol=0, atol=1e-4 if solver.name == "Newton" else 0)


def test_float64_is_left_alone_by_autocast_and_by_low_products():
    cell, x = Cell().double(), X.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = hyperopt.fixed_point(lambda z: cell(z, x), torch.zeros(16, 32, dtype=DOUBLE), solver=Picard(rtol=1e-12))
    assert found.status == Status.converged and found.forward.worst_residual() < 1e-11


def test_the_floor_asks_torch_for_the_precision_of_products():
    cpu, least = torch.device("cpu"), 16 * torch.finfo(torch.float32).eps
    assert rounding_floor(torch.float32) == rounding_floor(torch.float32, cpu) == least
    with torch.autocast("cpu", torch.bfloat16):
        assert rounding_floor(torch.float32, cpu) == 2**-8
        assert rounding_floor(DOUBLE, cpu) == 16 * torch.finfo(DOUBLE).eps
        with torch.autocast("cpu", enabled=False):
            assert rounding_floor(torch.float32, cpu) == least
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert rounding_floor(torch.float32, cpu) == 2**-8 and rounding_floor(DOUBLE, cpu) < 1e-14
    finally:
        torch.set_float32_matmul_precision(before)
