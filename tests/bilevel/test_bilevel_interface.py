"""What a task or a method of one's own builds on: custom estimators, the check of a hypergradient, and the public names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
import pytest
import torch
from bilevel_problems import DOUBLE, Logistic, Ridge, flatten

import hyperopt
from hyperopt import CG, Estimate, Estimator, GradientDescent, Implicit, Minibatches, Unrolled
from hyperopt.bilevel.curvature import Hessian
from hyperopt.bilevel.estimate import Cost, State
from hyperopt.bilevel.evaluation import Evaluation
from hyperopt.bilevel.leaves import Leaves
from hyperopt.bilevel.problem import outer_gradient
from hyperopt.core.certificate import Certificate
from hyperopt.core.tree import tree_norm


@dataclass(frozen=True)
class SingleLoop(Estimator):
    """One step of w, one of u and one hypergradient at a time, each on a batch of its own (SOBA, arXiv 2201.13409)."""

    step: float = 0.3

    def estimate(self, problem: hyperopt.BilevelProblem, lam: Any, state: State) -> Estimate:
        w, hyper = Leaves.of(state.w, "w"), Leaves.of(lam, "lam")
        loss, g_w, g_lam = outer_gradient(problem, w, hyper, problem.outer_batches.draw())
        curvature = Hessian(Evaluation(problem, problem.inner_batches.draw()), w, hyper)
        b = w.matrix(g_w)
        u = state.memory.setdefault("u", torch.zeros_like(b))
        mixed = [torch.zeros_like(leaf) if m is None else m for leaf, m in zip(hyper.flat, curvature.mixed(u), strict=True)]
        grad = hyper.like([-m if g is None else g - m for g, m in zip(g_lam, mixed, strict=True)])
        moved = u - self.step * (curvature.matvec(u) - b)
        with torch.no_grad():
            for leaf, slope in zip(w.flat, w.parts(curvature.gradient), strict=True):
                leaf.sub_(slope, alpha=self.step)
        state.memory["u"] = moved
        return Estimate(grad, Certificate(tree_norm(grad), False, 0.0), float(loss), state.w, None, None, Cost(1, 1, 1, 1))


def test_a_single_loop_method_fits_and_finds_the_hypergradient():
    ridge = Ridge()
    bilevel = hyperopt.Bilevel(ridge.problem, torch.zeros(8, dtype=DOUBLE), adjoint=SingleLoop())
    for _ in range(150):
        estimate = bilevel.step(ridge.lam)
    torch.testing.assert_close(estimate.grad, ridge.hypergradient(ridge.lam), rtol=1e-6, atol=1e-9)
    assert set(bilevel.state_dict()["memory"]) == {"u"}


def test_a_hypergradient_of_a_trained_problem_can_be_checked():
    problem = Logistic(strength=-1.0)
    lam = {name: leaf.requires_grad_() for name, leaf in problem.lam.items()}
    batches = [Minibatches(data, 40, seed=1) for data in problem.data]
    sampled = hyperopt.BilevelProblem(problem.problem.inner_loss, problem.problem.outer_loss, batches[0], batches[1])
    bilevel = hyperopt.Bilevel(sampled, problem.w0)
    before = [source.state_dict() for source in batches]

    def objective(solver, adjoint):
        return bilevel.objective(lam, solver, adjoint)

    found = hyperopt.check_hypergradient(
        objective, list(lam.values()), adjoint=Implicit(CG(rtol=1e-10)), solver=hyperopt.Picard(1e-12)
    )
    assert found.passed and max(row.error for row in found.rows) < 1e-6
    assert [source.state_dict() for source in batches] == before and not problem.w0["weight"].any()


ONE, TWO, THREE = (torch.tensor(values, dtype=DOUBLE) for values in ([0.5, 0.2], [0.1, 0.3], [0.4, -1.0]))
TIED = {
    "a dict": {"a": ONE, "b": ONE, "c": TWO},
    "a list with another in between": [ONE, TWO, ONE],
    "one tensor alone": (ONE, ONE),
    "a nested tree": {"x": [ONE, TWO], "y": {"z": (TWO, THREE, ONE)}},
    "two pairs": [ONE, TWO, TWO, ONE],
    "none tied": {"a": ONE, "b": TWO},
}


@pytest.mark.parametrize("w", TIED.values(), ids=TIED)
def test_the_objective_of_tied_weights(w: Any) -> None:
    """``L = sum_i a_i |w_i - i lam|^2`` over the places i: a tensor at some of them ends at their weighted mean."""
    places = [id(leaf) for leaf in optree.tree_leaves(w)]
    weights = [1.0 + 0.5 * i for i in range(len(places))]

    def inner(w: Any, lam: Any, batch: Any) -> torch.Tensor:
        return sum(
            a * (x - (i + 1) * lam).square().sum() for i, (a, x) in enumerate(zip(weights, optree.tree_leaves(w), strict=True))
        )  # type: ignore

    def outer(w: Any, lam: Any, batch: Any) -> torch.Tensor:
        return sum((i + 1) * x.square().sum() for i, x in enumerate(optree.tree_leaves(w)))  # type: ignore

    of = {key: [i for i, place in enumerate(places) if place == key] for key in places}
    ends = {key: sum(weights[i] * (i + 1) for i in at) / sum(weights[i] for i in at) for key, at in of.items()}
    factor = sum((i + 1) * ends[place] ** 2 for i, place in enumerate(places))
    lam = torch.tensor([0.7, -0.4], dtype=DOUBLE, requires_grad=True)
    before = [leaf.clone() for leaf in optree.tree_leaves(w)]
    bilevel = hyperopt.Bilevel(hyperopt.BilevelProblem(inner, outer), w)
    loss, _ = bilevel.objective(lam, hyperopt.Picard(rtol=1e-13, max_steps=2000), Implicit(CG(rtol=1e-13)))
    (grad,) = torch.autograd.grad(loss, lam)
    torch.testing.assert_close(loss.detach(), factor * lam.detach().square().sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, 2 * factor * lam.detach(), rtol=1e-9, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(optree.tree_leaves(w), before, strict=True))


@pytest.mark.parametrize(
    ("loss", "largest"),
    [
        (lambda w, lam: (w * lam).sum(), "0"),
        (lambda w, lam: (w * lam).abs().sum(), "0"),
        (lambda w, lam: (lam - 5 * w).relu().sum(), "0"),
        (lambda w, lam: ((w - w.detach()) * lam).square().sum() * float("inf"), "nan"),
        (lambda w, lam: (w * lam).square().sum() * 1e308 * 1e308, "inf"),
    ],
    ids=["linear", "absolute values", "a kink", "not a number", "infinite"],
)
@pytest.mark.filterwarnings("ignore")
def test_an_objective_without_a_stable_step_is_refused(loss: Any, largest: str) -> None:
    problem = hyperopt.BilevelProblem(lambda w, lam, batch: loss(w, lam), lambda w, lam, batch: w.square().sum())
    lam = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    bilevel = hyperopt.Bilevel(problem, torch.full((2,), 0.1, dtype=DOUBLE))
    with pytest.raises(ValueError, match=f"largest curvature of the inner loss is (nan|inf|{largest}) .*no stable step"):
        bilevel.objective(lam, hyperopt.Picard(), Implicit(CG()))


def test_backward_adds_to_the_leaves_and_passes_constants_by():
    ridge = Ridge()
    w = ridge.solution(ridge.lam)
    leaf = ridge.lam.clone().requires_grad_()
    estimate = hyperopt.hypergradient(ridge.problem, w, leaf)
    estimate.backward(leaf)
    estimate.backward(leaf)
    torch.testing.assert_close(leaf.grad, 2 * estimate.grad)
    fixed = {"a": ridge.lam[:4], "b": ridge.lam[4:].clone().requires_grad_()}
    problem = hyperopt.BilevelProblem(lambda w, lam, batch: ridge.inner(w, torch.cat([lam["a"], lam["b"]]), batch), ridge.outer)
    found = hyperopt.hypergradient(problem, w, fixed)
    found.backward(fixed)
    torch.testing.assert_close(fixed["b"].grad, estimate.grad[4:])
    with pytest.raises(ValueError, match="no tensor in lam requires grad"):
        hyperopt.hypergradient(ridge.problem, w, ridge.lam).backward(ridge.lam)


def test_an_outer_loop_lowers_the_validation_loss():
    """Twenty lines of a user, on logistic regression with a strength for each weight."""
    problem = Logistic()
    hyper = hyperopt.Hyperparameters(
        {"weight": hyperopt.Positive(0.05, per="element"), "bias": hyperopt.Positive(0.1)}, {"weight": (4, 3)}, dtype=DOUBLE
    )
    losses = {}
    for name, adjoint in {"implicit": Implicit(CG(rtol=1e-3)), "unrolled": Unrolled()}.items():
        bilevel = hyperopt.Bilevel(
            problem.problem,
            {key: leaf.clone() for key, leaf in problem.w0.items()},
            inner=GradientDescent(step_size=0.5, max_steps=25),
            adjoint=adjoint,
        )
        optimizer = torch.optim.Adam([leaf for group in hyper.groups().values() for leaf in group], lr=0.1)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            lam = {key: value.log() for key, value in hyper.values().items()}
            estimate = bilevel.step(lam)
            estimate.backward(lam)
            optimizer.step()
            found.append(estimate.loss)
        losses[name] = found
        hyper.load_state_dict(
            {"weight": [torch.full((4, 3), 0.05, dtype=DOUBLE).log()], "bias": [torch.tensor(0.1, dtype=DOUBLE).log()]}
        )
    assert losses["implicit"][-1] < 0.98 * losses["implicit"][0]
    assert losses["implicit"][-1] == pytest.approx(losses["unrolled"][-1], rel=0.02)


def test_the_primitive_is_right_to_second_order():
    """The derivative of the hypergradient of a problem that is not quadratic."""
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (lam * w).exp().sum() + w.square().sum() + (lam * w.roll(1)).sum(), lambda w, lam, batch: w.sum()
    )
    phi = hyperopt.GradientMap(problem, GradientDescent(step_size=0.2))
    solver = hyperopt.Picard(rtol=1e-13, max_steps=1000)
    adjoint = Implicit(hyperopt.GMRES(rtol=1e-12))

    def solved(lam):
        w0 = torch.zeros(3, dtype=DOUBLE)
        return hyperopt.fixed_point(phi, w0, args=(lam,), rows="joint", solver=solver, adjoint=adjoint).value

    lam = torch.tensor([0.4, -0.3, 0.8], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(solved, (lam,))
    assert torch.autograd.gradgradcheck(solved, (lam,))


def test_no_grad_outside_changes_nothing():
    ridge = Ridge()
    inner = GradientDescent(step_size=0.3, max_steps=20)
    for adjoint in (Implicit(CG()), Unrolled(), hyperopt.Checkpointed(), hyperopt.FiniteDifference()):
        found = hyperopt.hypergradient(ridge.problem, torch.zeros(8, dtype=DOUBLE), ridge.lam, adjoint=adjoint, inner=inner)
        with torch.no_grad():
            again = hyperopt.hypergradient(ridge.problem, torch.zeros(8, dtype=DOUBLE), ridge.lam, adjoint=adjoint, inner=inner)
        assert torch.equal(flatten(found.grad), flatten(again.grad)) and not again.grad.requires_grad
        assert not again.w.requires_grad
