"""What a trained problem is refused for, and what a solve that fails says: a status and a message, never a wrong number."""

from __future__ import annotations

import pytest
import torch
from bilevel_problems import DOUBLE, Ridge

import hyperopt
from hyperopt import (
    CG,
    GMRES,
    T1T2,
    BilevelProblem,
    Broyden,
    Checkpointed,
    Composite,
    GradientDescent,
    HeavyBall,
    Implicit,
    InnerAdam,
    InnerConstants,
    InnerLBFGS,
    Minibatches,
    Neumann,
    OneStep,
    Shine,
    SolveError,
    SolveWarning,
    TorchOptimizer,
    Unrolled,
)
from hyperopt.core.policy import reset_warnings
from hyperopt.core.status import Status

W = torch.ones(3, dtype=DOUBLE)
LAM = torch.tensor(0.5, dtype=DOUBLE)
GD = GradientDescent(step_size=0.1, max_steps=5)


def inner(w, lam, batch):
    return (w - 1).square().sum() + lam * w.square().sum()


def outer(w, lam, batch):
    return w.square().sum()


REFUSED = {
    "inner without w": (lambda w, lam, b: lam**2, outer, ValueError, "the inner loss does not depend on w"),
    "inner with a detached w": (
        lambda w, lam, b: inner(w.detach(), lam, b),
        outer,
        ValueError,
        "the inner loss does not depend on w",
    ),
    "inner a number": (lambda w, lam, b: 1.0, outer, TypeError, "inner_loss returned a float"),
    "inner a vector": (
        lambda w, lam, b: w * lam,
        outer,
        ValueError,
        r"inner_loss returned a tensor of shape \(3,\).*mean or its sum",
    ),
    "outer a vector": (inner, lambda w, lam, b: w, ValueError, r"outer_loss returned a tensor of shape \(3,\)"),
    "outer a constant": (inner, lambda w, lam, b: torch.ones(()), ValueError, "the outer loss depends neither on w nor on lam"),
}


@pytest.mark.parametrize("solver", [None, GD], ids=["trained", "training"])
@pytest.mark.parametrize("adjoint", [Implicit(CG()), OneStep(), hyperopt.FiniteDifference()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", REFUSED)
def test_losses(name, adjoint, solver):
    lower, upper, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        hyperopt.hypergradient(BilevelProblem(lower, upper), W, LAM, adjoint=adjoint, inner=solver)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", ["inner without w", "inner a number", "inner a vector", "outer a vector"])
def test_losses_through_training(name, adjoint):
    lower, upper, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        hyperopt.hypergradient(BilevelProblem(lower, upper), W, LAM, adjoint=adjoint, inner=GD)


@pytest.mark.parametrize("adjoint", [Implicit(CG()), T1T2(), hyperopt.FiniteDifference()], ids=lambda a: type(a).__name__)
def test_an_inner_loss_without_lam(adjoint):
    for lower in (lambda w, lam, b: (w - 1).square().sum(), lambda w, lam, b: (w - 1).square().sum() + lam["a"]):
        if isinstance(adjoint, hyperopt.FiniteDifference) and lower(W, {"a": LAM}, None) != 0:
            continue  # a difference of zero is all that it sees of a constant
        with pytest.raises(ValueError, match=r"does not depend on lam\['a'\], lam\['b'\].*learning rate or momentum.*Unrolled"):
            hyperopt.hypergradient(BilevelProblem(lower, outer), W, {"a": LAM, "b": LAM}, adjoint=adjoint, inner=GD)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=lambda a: type(a).__name__)
def test_an_inner_loss_without_lam_through_training(adjoint):
    with pytest.raises(ValueError, match="the outer loss does not depend on lam, neither directly nor through w"):
        hyperopt.hypergradient(BilevelProblem(lambda w, lam, b: (w - 1).square().sum(), outer), W, LAM, adjoint=adjoint, inner=GD)


def test_a_buffer_in_w():
    w = {"weight": W, "running_mean": W.clone()}
    lower = lambda w, lam, b: inner(w["weight"], lam, b)  # noqa: E731
    with pytest.raises(ValueError, match=r"depends on w\['running_mean'\], but the inner loss does not.*take it out of w"):
        hyperopt.hypergradient(BilevelProblem(lower, lambda w, lam, b: (w["weight"] * w["running_mean"]).sum()), w, LAM)
    found = hyperopt.hypergradient(BilevelProblem(lower, lambda w, lam, b: outer(w["weight"], lam, b)), w, LAM)
    torch.testing.assert_close(
        found.grad, hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM).grad
    )  # harmless if unused


@pytest.mark.parametrize(
    ("w", "lam", "error", "message"),
    [
        ({"a": W, "count": torch.tensor(3)}, LAM, TypeError, r"w\['count'\] has dtype torch.int64"),
        ({"a": W, "b": 2.0}, LAM, TypeError, r"w\['b'\] is a float"),
        (W, [LAM, torch.tensor(1)], TypeError, r"lam\[1\] has dtype torch.int64"),
        (W, {}, ValueError, "lam has no tensors"),
        ({}, LAM, ValueError, "w has no tensors"),
    ],
)
def test_trees(w, lam, error, message):
    with pytest.raises(error, match=message):
        hyperopt.hypergradient(BilevelProblem(inner, outer), w, lam)


def saddle(w, lam, batch):
    """Curvatures 2, 2 and -1."""
    return w[0] ** 2 + w[1] ** 2 - w[2] ** 2 / 2 + lam * w.sum()


def test_negative_curvature_gives_a_status_and_a_message_and_no_number():
    problem = BilevelProblem(saddle, lambda w, lam, b: w.sum())
    with pytest.warns(SolveWarning, match="negative curvature was met.*MINRES.*gauss_newton"):
        found = hyperopt.hypergradient(problem, torch.zeros(3, dtype=DOUBLE), LAM, adjoint=Implicit(CG()))
    assert found.status == Status.indefinite and bool(found.grad.isnan())
    with pytest.raises(SolveError, match="negative curvature was met"):
        hyperopt.hypergradient(problem, torch.zeros(3, dtype=DOUBLE), LAM, adjoint=Implicit(CG(), policy="raise"))
    # The saddle's own hypergradient exists, and other methods find it: -(1/2 + 1/2 - 1).
    for adjoint in (Implicit(GMRES()), Implicit(CG(), policy="fallback")):
        found = hyperopt.hypergradient(problem, torch.zeros(3, dtype=DOUBLE), LAM, adjoint=adjoint)
        assert found.status == Status.converged and float(found.grad) == pytest.approx(0.0, abs=1e-9)
    assert found.adjoint is not None and found.adjoint.fallbacks == ("CG",)


def test_a_series_at_negative_curvature_has_no_number_either():
    problem = BilevelProblem(saddle, lambda w, lam, b: w.sum())
    w = torch.zeros(3, dtype=DOUBLE)
    for solver in (Neumann(max_steps=500), Neumann(rtol=0, max_steps=60), hyperopt.Nystrom(rank=1, rho=1e-3)):
        reset_warnings()
        with pytest.warns(SolveWarning, match="the residual grew"):
            step = 0.3 if solver.iterates else None
            found = hyperopt.hypergradient(problem, w, LAM, adjoint=Implicit(solver), step=step)
        assert found.status == Status.diverged and bool(found.grad.isnan()) and found.note
    # One who asks for K terms and to hear nothing of how good they are gets them.
    for solver in (Neumann(rtol=0, max_steps=60), hyperopt.Nystrom(rank=1, rho=1e-3)):
        step = 0.3 if solver.iterates else None
        found = hyperopt.hypergradient(problem, w, LAM, adjoint=Implicit(solver, policy="ignore"), step=step)
        assert found.status == Status.diverged and bool(found.grad.isfinite()) and not found.note
    found = hyperopt.hypergradient(problem, w, LAM, adjoint=Implicit(Neumann(max_steps=500), policy="ignore"), step=0.3)
    assert bool(found.grad.isnan())  # a tolerance was asked for, and not met


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Failures are counted in a run: every test is one."""
    reset_warnings()


@pytest.mark.filterwarnings("ignore::hyperopt.core.policy.SolveWarning")
@pytest.mark.parametrize("solver", [Neumann(max_steps=500), Neumann(rtol=0, max_steps=60)], ids=["tolerance", "fixed"])
def test_a_step_at_which_the_adjoint_diverges_is_named_with_the_largest_stable_one(solver, caplog):
    ridge = Ridge()
    largest = float(torch.linalg.eigvalsh(ridge.hessian(ridge.lam))[-1])
    found = hyperopt.hypergradient(ridge.problem, ridge.solution(ridge.lam), ridge.lam, adjoint=Implicit(solver), step=1.2)
    assert bool(found.grad.isnan().all()) and found.status == Status.diverged
    assert [record.message for record in caplog.records] == [found.note]
    assert "step=1.2;" in found.note and float(found.note.split("largest stable step is ")[1].split()[0]) == pytest.approx(
        2 / largest, rel=0.05
    )


@pytest.mark.cases(slow=4, among={"step": [1.2]})
@pytest.mark.parametrize("adjoint", [Implicit(CG()), Unrolled(), Checkpointed()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("step", [1.2, 50.0, 1e200])
def test_a_training_that_diverges_names_its_step_and_the_largest_stable_one(adjoint, step):
    ridge = Ridge()
    solver = GradientDescent(step_size=step, max_steps=400)
    with pytest.raises(SolveError, match=r"GradientDescent diverged.*lower step_size=") as raised:
        hyperopt.hypergradient(ridge.problem, torch.zeros(8, dtype=DOUBLE), ridge.lam, adjoint=adjoint, inner=solver)
    if step < 1e100:
        largest = float(torch.linalg.eigvalsh(ridge.hessian(ridge.lam))[-1])
        named = float(str(raised.value).split("gradient descent here is ")[1].split()[0])
        assert named == pytest.approx(2 / largest, rel=0.05)


@pytest.mark.parametrize("step", [0.95, 0.99])
def test_just_below_and_just_above_the_largest_stable_step(step):
    """2 / L = 0.9406: a step above it ends in the message within some thousand steps, one below it in the minimum."""
    ridge = Ridge()
    stable = 2 / float(torch.linalg.eigvalsh(ridge.hessian(ridge.lam))[-1])
    w0 = torch.zeros(8, dtype=DOUBLE)
    found = hyperopt.hypergradient(
        ridge.problem, w0, ridge.lam, inner=GradientDescent(step_size=step * stable, rtol=1e-8, max_steps=5000)
    )
    assert found.inner is not None and found.inner.status == Status.converged
    with pytest.raises(SolveError, match="diverged"):
        inner = GradientDescent(step_size=(2 - step) * stable, rtol=1e-8, max_steps=5000)
        hyperopt.hypergradient(ridge.problem, w0, ridge.lam, inner=inner)


def test_other_trainings_that_diverge():
    ridge = Ridge()
    w0 = torch.zeros(8, dtype=DOUBLE)
    for solver, message in (
        (HeavyBall(step_size=4.0, max_steps=400), r"HeavyBall diverged.*lower step_size=4 of HeavyBall .*momentum=0\.9"),
        (InnerAdam(lr=1e4, max_steps=400), r"InnerAdam diverged.*lower lr=10000 of InnerAdam"),
        (
            TorchOptimizer(optimizer="SGD", lr=4.0, max_steps=400),
            r"TorchOptimizer diverged.*lower lr=4 of TorchOptimizer \(SGD\)",
        ),
    ):
        with pytest.raises(SolveError, match=message):
            hyperopt.hypergradient(ridge.problem, w0, ridge.lam, inner=solver)
    unbounded = BilevelProblem(lambda w, lam, b: lam * torch.where(w < 3, w, torch.nan).sum() - w.pow(3).sum(), outer)
    with pytest.raises(SolveError, match="InnerLBFGS diverged"):
        hyperopt.hypergradient(unbounded, W, LAM, inner=InnerLBFGS())


def test_an_empty_set_and_batches_that_do_not_fit():
    empty = torch.empty(0, 3, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"\[0\] rows.*is the validation set empty"):
        Minibatches((empty, empty))
    with pytest.raises(ValueError, match=r"\[3, 4\] rows"):
        Minibatches((torch.ones(3), torch.ones(4)))
    with pytest.raises(ValueError, match="a batch cannot have 5 rows of a data set of 4"):
        Minibatches(torch.ones(4, 2), size=5)

    class Nothing(Minibatches):
        def draw(self):
            return empty

    source = Nothing(torch.ones(4, 3, dtype=DOUBLE))
    problem = BilevelProblem(inner, lambda w, lam, batch: (batch @ w).square().mean(), outer_batches=source)
    with pytest.raises(ValueError, match=r"outer_loss: the batch has no rows.*validation set empty"):
        hyperopt.hypergradient(problem, W, LAM)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, adjoint=Unrolled()),
            ValueError,
            "there is no inner sol",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, adjoint=Checkpointed(), inner=InnerLBFGS()),
            ValueError,
            "InnerLBFGS cannot be differentiated through; give inner=GradientDescent",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, adjoint=Shine()),
            TypeError,
            "not an adjoint of a trained",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, adjoint=CG()),  # pyright: ignore[reportArgumentType]
            TypeError,
            "not an adjoint of a trained",
        ),  # pyright: ignore[reportArgumentType]
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, curvature="gauss_newton"),
            TypeError,
            r"inner_loss=Composite\(model, criterion\)",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, curvature="fisher"),
            ValueError,
            "curvature='fisher' is not one of hessian, gauss_newton, finite_differences",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, inner=GradientDescent(step_size="lr")),
            ValueError,
            "GradientDescent: step_size='lr' names a hyperparameter, but lam is a Tensor",
        ),
        (
            lambda: hyperopt.hypergradient(
                BilevelProblem(lambda w, lam, b: inner(w, lam["a"], b), outer),
                W,
                {"a": LAM},
                inner=GradientDescent(step_size="lr"),
            ),
            ValueError,
            "GradientDescent: step_size='lr' names a hyperparameter, but lam has the names a",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, inner=TorchOptimizer(optimizer="Adma")),
            ValueError,
            "torch.optim has no optimizer 'Adma'; change optimizer",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, inner=TorchOptimizer(options={"beta": 1})),
            ValueError,
            "Adam refuses.*change options",
        ),
        (
            lambda: hyperopt.hypergradient(BilevelProblem(inner, outer), W, LAM, inner=TorchOptimizer(optimizer="LBFGS")),
            ValueError,
            "use InnerLBFGS",
        ),
        (lambda: GradientDescent(step_size=0.0), ValueError, r"step_size=0\.0 is not in \(0\.0, inf\)"),
        (lambda: HeavyBall(momentum=1.0), ValueError, r"momentum=1 is not in \[0, 1\)"),
        (lambda: InnerAdam(betas=(0.9, 1.0)), ValueError, r"betas=\(0\.9, 1\.0\) is not in \[0, 1\); change betas"),
        (lambda: InnerAdam(lr=-1.0), ValueError, r"lr=-1\.0 is not in"),
        (lambda: TorchOptimizer(optimizer=3), TypeError, "TorchOptimizer: optimizer=3 is not a str; change optimizer"),  # type: ignore
        (lambda: hyperopt.ProductSettings(power=30), TypeError, "ProductSettings: power=30 is not a PowerSettings"),  # type: ignore
        (lambda: hyperopt.ProductSettings(power=None), TypeError, "power=None is not a PowerSettings; change power"),  # type: ignore
        (lambda: hyperopt.ProductSettings(step=0.0), ValueError, r"step=0\.0 is not in \(0\.0, inf\); change step"),
        (lambda: hyperopt.SABA(seed=-1), ValueError, "SABA: seed=-1 must be a whole number >= 0"),
        (lambda: hyperopt.SOBA(step_size=0.0), ValueError, r"SOBA: step_size=0\.0 is not in"),
        (lambda: hyperopt.VPBGD(ramp=0), ValueError, "VPBGD: ramp=0 must be a whole number >= 1"),
        (lambda: hyperopt.Auto(terms=0), ValueError, "Auto: terms=0 must be a whole number >= 1"),
        (lambda: hyperopt.FiniteDifference(length=0), ValueError, "FiniteDifference: length=0 is not in"),
        (lambda: TorchOptimizer(options=None), TypeError, "options=None is not a dict; change options"),  # type: ignore
        (lambda: hyperopt.Nystrom(rank=0), ValueError, "rank=0 must be a whole number >= 1"),
        (lambda: hyperopt.Nystrom(rho=0.0), ValueError, r"rho=0\.0 is not in \(0\.0"),
        (lambda: InnerConstants(2.0, 1.0, 1.0), ValueError, "strong_convexity=2.0 is above smoothness=1.0"),
        (lambda: InnerConstants(0.0, 1.0, 1.0), ValueError, "strong_convexity=0.0 is not in"),
        (
            lambda: (
                hyperopt.fixed_point(lambda w: w / 2 + LAM.requires_grad_(), W, solver=Broyden(), adjoint=T1T2())
                .value.sum()
                .backward()
            ),
            ValueError,
            r"adjoint=T1T2\(\) is for trained inner problems",
        ),
    ],
)
def test_settings_and_combinations(made, error, message):
    with pytest.raises(error, match=message):
        made()


def test_a_model_that_is_linear_in_its_output_has_no_curvature_to_share():
    problem = BilevelProblem(Composite(lambda w, lam, b: w * lam, lambda z, w, lam, b: z.sum() + w.square().sum()), outer)
    found = hyperopt.hypergradient(problem, W, LAM, curvature="gauss_newton")
    torch.testing.assert_close(found.grad, hyperopt.hypergradient(problem, W, LAM).grad)
