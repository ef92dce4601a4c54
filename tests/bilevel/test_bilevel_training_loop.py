"""Inner solvers run in the loop of all iterative methods: what they read, how many steps they take, when they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_problems import DOUBLE, Ridge
from counting import Counter

from hyperopt import BilevelProblem, GradientDescent, HeavyBall, InnerAdam, SolveError, TorchOptimizer
from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.inner.training import PROBE
from hyperopt.core.loop import LONGEST
from hyperopt.core.memory import peak_memory
from hyperopt.core.status import Status

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gradient descent": (GradientDescent, {"step_size": 0.2}),
    "heavy ball": (HeavyBall, {"step_size": 0.1, "momentum": 0.5}),
    "adam": (InnerAdam, {"lr": 0.01}),
    "torch sgd": (TorchOptimizer, {"optimizer": "SGD", "lr": 0.2}),
}


def gradients(ridge, w, lam):
    """The gradient of the inner loss of the problem."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(ridge.problem.inner(w, lam, None), w)[0]


@pytest.mark.cases(quick=1, among={"name": list(SOLVERS)[:2]})
@pytest.mark.parametrize("name", SOLVERS)
def test_a_fixed_number_of_steps_hardly_reads(name):
    kind, rates = SOLVERS[name]
    for steps, most in ((10, 4), (100, 6), (300, 6 + 300 // LONGEST)):
        ridge = Ridge()
        state = State(torch.zeros(8, dtype=DOUBLE))
        for lam in (ridge.lam, ridge.lam + 0.1):
            with Counter() as count:
                stats = kind(max_steps=steps, **rates).solve(ridge.problem, lam, state)
            assert count.reads <= most, (steps, count.reads)
            assert stats.status == Status.fixed_steps and stats.evaluations == steps == int(stats.iterations)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_training_to_a_tolerance_reads_at_predicted_steps(name):
    kind, rates = SOLVERS[name]
    ridge = Ridge()
    with Counter() as count:
        stats = kind(rtol=1e-12, max_steps=100, **rates).solve(ridge.problem, ridge.lam, State(torch.zeros(8, dtype=DOUBLE)))
    assert stats.status.failed and int(stats.iterations) == 100 and count.reads <= 20, count.reads


@pytest.mark.parametrize("name", ["gradient descent", "heavy ball", "adam"])
@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65, 130])
def test_a_fixed_number_of_steps_is_that_many_updates_to_the_bit(name, steps):
    kind, rates = SOLVERS[name]
    ridge, solver = Ridge(), kind(max_steps=steps, **rates)
    state = State(torch.zeros(8, dtype=DOUBLE))
    solver.solve(ridge.problem, ridge.lam, state)
    w = torch.zeros(8, dtype=DOUBLE)
    work = solver.begin([w], ridge.lam, {})
    for _ in range(steps):
        g = gradients(ridge, w, ridge.lam)
        with torch.no_grad():
            solver.update([w], [g], ridge.lam, work)
    assert torch.equal(state.w, w)


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("name", ["gradient descent", "heavy ball", "torch sgd"])
def test_a_training_stops_near_the_first_step_that_meets_the_tolerance(name, rtol):
    kind, rates = SOLVERS[name]
    ridge = Ridge()
    state = State(torch.zeros(8, dtype=DOUBLE))
    stats = kind(rtol=rtol, max_steps=5000, **rates).solve(ridge.problem, ridge.lam, state)
    left = float(gradients(ridge, state.w, ridge.lam).norm() / stats.scale)
    assert stats.status == Status.converged and left <= rtol and left == pytest.approx(float(stats.residual))
    least, low, high = int(stats.iterations), 1, int(stats.iterations)
    while low <= high:  # the least budget that is enough, from the same start
        middle = (low + high) // 2
        again = State(torch.zeros(8, dtype=DOUBLE))
        kind(max_steps=middle, **rates).solve(ridge.problem, ridge.lam, again)
        if float(gradients(ridge, again.w, ridge.lam).norm() / stats.scale) <= rtol:
            least, high = middle, middle - 1
        else:
            low = middle + 1
    assert int(stats.iterations) <= least + 1 + max(1, 0.05 * least)


@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_a_training_that_diverges_is_refused_within_a_block(rtol):
    ridge = Ridge()
    with pytest.raises(SolveError, match=r"diverged.*lower step_size=2 of GradientDescent"):
        GradientDescent(step_size=2.0, rtol=rtol, max_steps=100_000).solve(
            ridge.problem, ridge.lam, State(torch.zeros(8, dtype=DOUBLE))
        )
    assert len(ridge.evaluations) <= LONGEST + 3


@pytest.mark.parametrize("after", [1, 2, PROBE, 3 * PROBE, 99])
def test_a_gradient_that_was_beyond_all_bounds_for_one_step_is_refused(after):
    """It has come back by the time that the host looks, but the weights are not those of a training any more."""
    taken = [0]

    def inner(w, lam, batch):
        taken[0] += 1
        return (w - lam).square().sum() * (1e5 if taken[0] == after + 1 else 1.0)

    problem = BilevelProblem(inner, lambda w, lam, batch: w.sum())
    solver = GradientDescent(step_size=1e-9, max_steps=100)
    with pytest.raises(SolveError, match=r"grew 1e\+05 times"):
        solver.solve(problem, torch.ones(2, dtype=DOUBLE), State(torch.zeros(2, dtype=DOUBLE)))


@pytest.mark.parametrize("rtol", [0.0, 1e-30])
def test_a_scale_that_is_raised_on_the_way_costs_no_step(rtol):
    """From a saddle the gradient grows far beyond the first, up to what the curvature and the weights allow."""
    w0 = torch.tensor([5.0, 1e-7], dtype=DOUBLE)
    problem = BilevelProblem(lambda w, lam, b: (w[1] ** 2 - 1) ** 2 + 0 * w[0] * lam.sum(), lambda w, lam, b: w.square().sum())
    state = State(w0.clone())
    stats = GradientDescent(step_size=0.02, rtol=rtol, max_steps=400).solve(problem, torch.ones(1, dtype=DOUBLE), state)
    w = w0.clone()
    for _ in range(400 if rtol == 0 else int(stats.iterations)):
        w[1] -= 0.02 * 4 * w[1] * (w[1] ** 2 - 1)
    assert abs(float(state.w[1])) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(state.w, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("atol", [0.0, 1e-5])
def test_no_copy_of_the_weights_is_kept(atol):
    w0 = torch.zeros(1_000_000)
    problem = BilevelProblem(lambda w, lam, b: (w - lam).square().sum() / 2, lambda w, lam, b: w.sum())
    state, size = State(w0), w0.numel() * w0.element_size()
    with peak_memory("cpu") as seen:
        GradientDescent(step_size=0.5, atol=atol, max_steps=40).solve(problem, torch.ones(1), state)
    assert seen.peak <= 4.5 * size, seen.peak / size  # the gradient, and what the loss and its backward make
