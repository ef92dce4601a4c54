"""What users give by mistake, and what has no second derivative: each is refused in one clear message, or right."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hyperopt
from hyperopt import CG, Bilevel, FiniteDifference, GradientDescent, Implicit, OneStep, SolveError, TorchOptimizer, Unrolled

D = torch.float64
DRAW = torch.Generator().manual_seed(0)
X, XV = (torch.randn(24, 4, generator=DRAW, dtype=D) for _ in range(2))
Y, YV = X.sum(1, keepdim=True).sin(), XV.sum(1, keepdim=True).sin() + 0.1
START, LAM = torch.zeros(4, 1, dtype=D), torch.tensor(-1.0, dtype=D)
INNER = GradientDescent(step_size=0.1, max_steps=6)


def ridge() -> hyperopt.BilevelProblem:
    return hyperopt.BilevelProblem(
        lambda w, lam, b: (X @ w - Y).square().mean() + lam.exp() * w.square().sum(),
        lambda w, lam, b: (XV @ w - YV).square().mean(),
    )


@pytest.mark.parametrize(
    ("lam", "error", "words"),
    [
        (-1.0, TypeError, "lam is a float"),
        (np.float64(-1.0), TypeError, "lam is a float64"),
        (None, ValueError, "lam has no tensors"),
        ({}, ValueError, "lam has no tensors"),
        (torch.tensor(1j), TypeError, "lam has dtype torch.complex64"),
        (hyperopt.Hyperparameters({"l2": hyperopt.Positive(0.3)}), TypeError, r"Hyperparameters their values\(\)"),
        (LAM * torch.nan, SolveError, "lam has entries that are not finite"),
    ],
)
@pytest.mark.parametrize("adjoint", ["auto", Unrolled()], ids=str)
def test_a_lam_that_is_none_is_named(lam, error, words, adjoint):
    with pytest.raises(error, match=words):
        hyperopt.hypergradient(ridge(), START, lam, inner=INNER, adjoint=adjoint)
    with pytest.raises(error, match=words):
        Bilevel(ridge(), START.clone(), inner=INNER, adjoint=adjoint).step(lam)


@pytest.mark.parametrize(
    ("w", "words"),
    [
        (nn.Linear(4, 1), r"hyperopt.Functional\(module\).w"),
        (torch.zeros(1, 1, dtype=D).expand(4, 1), "expanded or unfolded tensor"),
        ({"a": [torch.zeros(1, dtype=D).expand(4)]}, r"w\['a'\]\[0\] is an expanded or unfolded tensor"),
        (iter([START]), "every leaf must be a tensor"),
        ([START, torch.zeros((), dtype=torch.int64)], "floating-point"),
    ],
)
def test_weights_that_cannot_be_trained_are_named(w, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Bilevel(ridge(), w, inner=INNER)


@pytest.mark.parametrize(
    "inner",
    ["sgd", GradientDescent, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), OneStep(), 0.1],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_inner_solver_is_refused_when_it_is_given(inner):
    with pytest.raises(TypeError, match="is not an inner solver: give GradientDescent"):
        Bilevel(ridge(), START.clone(), inner=inner)


@pytest.mark.parametrize(
    "loss",
    [lambda w, lam: w.sum(), lambda: torch.zeros(()), lambda w, lam, b, extra: w.sum(), 3.0, None],
    ids=["2", "0", "4", "3.0", "None"],
)
def test_a_loss_of_other_arguments_is_refused_when_the_problem_is_made(loss):
    for given in ((loss, ridge().outer_loss), (ridge().inner_loss, loss)):
        with pytest.raises(TypeError, match=r"_loss\(w, lam, batch\)"):
            hyperopt.BilevelProblem(*given)  # pyright: ignore[reportCallIssue, reportArgumentType]
    hyperopt.BilevelProblem(lambda *given: given[0].sum(), lambda w, lam, batch=None, scale=2.0: w.sum())


def test_inference_mode_and_its_tensors_are_named():
    with torch.inference_mode():
        made = START.clone()
        with pytest.raises(RuntimeError, match=r"inference_mode.*call it outside"):
            hyperopt.hypergradient(ridge(), START, LAM, inner=INNER)
    for w, lam in ((made, LAM), (START, made)):
        with pytest.raises(ValueError, match=r"inference_mode\(\) and cannot be differentiated"):
            hyperopt.hypergradient(ridge(), w, lam, inner=INNER)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace", "inside"])
def test_modules_of_jit_are_named(how):
    net: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    made = torch.jit.trace(net, X) if how == "trace" else torch.jit.script(net)
    with pytest.raises(ValueError, match=r"torch.jit.*give the module that it was made from"):
        hyperopt.Functional(nn.Sequential(made) if how == "inside" else made)  # pyright: ignore


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * g


def partly(function: Any) -> hyperopt.BilevelProblem:
    """Another part of the loss depends on lam too, so that the derivative would be a wrong number and not zero."""
    return hyperopt.BilevelProblem(
        lambda w, lam, b: (lam[:, None] * function(X @ w - Y)).mean() + lam.mean() * w.square().sum(),
        lambda w, lam, b: (XV @ w - YV).square().mean(),
    )


@pytest.mark.parametrize("adjoint", [Unrolled(), OneStep(), Implicit(CG()), "auto"], ids=lambda a: type(a).__name__)
def test_an_operator_that_is_differentiable_once_is_not_taken_for_a_constant(adjoint):
    problem = partly(Once.apply)
    with pytest.raises(RuntimeError, match=r"no second derivative in PyTorch.*FiniteDifference"):
        hyperopt.hypergradient(problem, START, torch.ones(24, dtype=D), inner=INNER, adjoint=adjoint)
    one, two = (
        hyperopt.hypergradient(partly(f), START + 0.1, torch.ones(24, dtype=D), adjoint=a, step=0.1).grad
        for f, a in ((Once.apply, FiniteDifference()), (torch.square, OneStep()))
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


class Outside(torch.autograd.Function):
    """``x ** 2``, whose backward computes outside of autograd and does not say so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, way: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.way = way
        return x.detach() ** 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        if ctx.way == "numpy":
            return torch.from_numpy(2 * x.detach().numpy() * g.detach().numpy()), None
        if ctx.way == "data":
            return 2 * x.data * g.data, None
        with torch.set_grad_enabled(ctx.way == "operators"):
            return 2 * x * g, None


@pytest.mark.parametrize("adjoint", [Unrolled(), OneStep(), Implicit(CG())], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("way", ["numpy", "data", "no_grad"])
def test_a_backward_outside_of_autograd_is_not_taken_for_a_constant(way, adjoint):
    lam = torch.ones(24, dtype=D)
    for problem in (partly(lambda x: Outside.apply(x, way)), partly(lambda x: Outside.apply(x, way).sum() / 24 + 0 * x)):
        with pytest.raises(RuntimeError, match=r"uses Outside, which has no second derivative in PyTorch.*FiniteDifference"):
            hyperopt.hypergradient(problem, START, lam, inner=INNER, adjoint=adjoint)
    one, two = (
        hyperopt.hypergradient(partly(f), START, lam, inner=INNER, adjoint=adjoint).grad
        for f in (lambda x: Outside.apply(x, "operators"), torch.square)
    )
    torch.testing.assert_close(one, two)


def test_a_second_derivative_of_a_map_with_a_backward_outside_of_autograd():
    def second(way: str) -> torch.Tensor:
        a = torch.tensor(0.3, dtype=D, requires_grad=True)
        value = hyperopt.fixed_point(
            lambda w, a: a * Outside.apply(w, way) + 0.5 * a, torch.zeros(2, 1, dtype=D), args=(a,),  # pyright: ignore
            solver=hyperopt.Newton(rtol=1e-13), adjoint=Implicit(hyperopt.GMRES(1e-12)),
        ).value.sum()  # fmt: skip
        return torch.autograd.grad(torch.autograd.grad(value, a, create_graph=True)[0], a)[0]

    a = torch.tensor(0.3, dtype=D, requires_grad=True)  # w = a w^2 + a / 2, twice
    (g,) = torch.autograd.grad((1 - (1 - 2 * a.square()).sqrt()) / a, a, create_graph=True)
    torch.testing.assert_close(second("operators"), torch.autograd.grad(g, a)[0])
    with pytest.raises(RuntimeError, match=r"Outside does not support double backward.*operators of PyTorch"):
        second("numpy")


class Constant(torch.autograd.Function):
    """The sign, whose derivative is zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros_like(g)


def test_a_function_of_derivative_zero_is_no_such_one():
    lam = torch.ones(24, dtype=D)
    one, two = (
        hyperopt.hypergradient(partly(lambda x, f=f: x.square() + f(x)), START + 0.1, lam, adjoint=OneStep(), step=0.1).grad
        for f in (Constant.apply, torch.sign)
    )
    torch.testing.assert_close(one, two)


def test_a_map_that_is_differentiable_once_has_a_first_derivative_and_no_second():
    a = torch.tensor(0.3, dtype=D, requires_grad=True)

    def value(square: Any) -> torch.Tensor:
        return hyperopt.fixed_point(
            lambda w, a: a * square(w) + 0.5 * a, torch.zeros(2, 1, dtype=D), args=(a,), solver=hyperopt.Newton(rtol=1e-13),
            adjoint=Implicit(hyperopt.GMRES(1e-12)),
        ).value.sum()  # fmt: skip

    (one,), (two,) = (torch.autograd.grad(value(f), a) for f in (Once.apply, torch.square))
    torch.testing.assert_close(one, two)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (g,) = torch.autograd.grad(value(Once.apply), a, create_graph=True)
        torch.autograd.grad(g, a)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_compiled_code_has_no_second_derivative():
    net = torch.compile(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), backend="aot_eager")
    problem, w = of(net)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="_orig_mod"):
        hyperopt.hypergradient(problem, w, torch.ones(24, dtype=D), inner=INNER, adjoint=Unrolled())
    found = hyperopt.hypergradient(problem, w, torch.ones(24, dtype=D), adjoint=FiniteDifference(), step=0.1)
    want = hyperopt.hypergradient(*of(net._orig_mod), torch.ones(24, dtype=D), adjoint=OneStep(), step=0.1)
    torch.testing.assert_close(found.grad, want.grad, rtol=1e-5, atol=1e-9)


def of(net: nn.Module) -> tuple[hyperopt.BilevelProblem, Any]:
    f = hyperopt.Functional(net)
    return hyperopt.BilevelProblem(
        lambda w, lam, b: (lam[:, None] * (f(w, X) - Y).square()).mean(), lambda w, lam, b: (f(w, XV) - YV).square().mean()
    ), f.w


@pytest.mark.parametrize("adjoint", [OneStep(), Unrolled(), Implicit(CG()), "auto"], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpoints_are_named_also_where_they_would_hide_weights(first, adjoint):
    """As the first layer it is not part of the graph of the weights, which would not be trained."""
    layers = [Reentrant(first), nn.Linear(4, 1).double()]
    problem, w = of(nn.Sequential(*layers if first else [nn.Linear(4, 4).double(), *layers]))
    inner = None if isinstance(adjoint, OneStep) else INNER
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        hyperopt.hypergradient(problem, w, torch.ones(24, dtype=D), inner=inner, adjoint=adjoint)


class Reentrant(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(4, 4).double(), first

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.linear, x.clone().requires_grad_() if self.first else x, use_reentrant=True)


class Deep(nn.Module):
    """Skips a layer at random."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x: torch.Tensor, keep: bool | None = None) -> torch.Tensor:
        keep = bool(torch.rand(()) < 0.5) if keep is None else keep
        return self.two(x + torch.tanh(self.one(x)) if keep else x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("adjoint", [OneStep(), FiniteDifference()], ids=lambda a: type(a).__name__)
def test_a_layer_that_is_skipped_at_random(adjoint, seed):
    """The draw says which loss it is; the weights of a skipped layer stay where they are."""
    model = hyperopt.Functional(Deep())

    def problem(keep: bool | None) -> hyperopt.BilevelProblem:
        penalty = 0.0 if keep is None or keep else 1e-300  # so that the fixed loss depends on all of w
        return hyperopt.BilevelProblem(
            lambda w, lam, b: (
                (lam[:, None] * (model(w, X, keep) - Y).square()).mean() + penalty * sum(p.square().sum() for p in w.values())
            ),
            lambda w, lam, b: (model(w, XV, True) - YV).square().mean(),
        )

    lam = torch.ones(24, dtype=D)
    torch.manual_seed(seed)
    keep = bool(torch.rand(()) < 0.5)
    torch.manual_seed(seed)
    found = hyperopt.hypergradient(problem(None), model.w, lam, adjoint=adjoint, step=0.1).grad
    want = hyperopt.hypergradient(problem(keep), model.w, lam, adjoint=OneStep(), step=0.1).grad
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-9)


def test_a_layer_that_is_skipped_at_random_by_a_generator_of_python():
    model, lam = hyperopt.Functional(Deep()), torch.ones(24, dtype=D)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (lam[:, None] * (model(w, X, random.random() < 0.5) - Y).square()).mean(),
        lambda w, lam, b: (model(w, XV, True) - YV).square().mean(),
    )
    for seed in range(4):
        found = []
        for adjoint in (OneStep(), FiniteDifference()):
            random.seed(seed)
            found.append(hyperopt.hypergradient(problem, model.w, lam, adjoint=adjoint, step=0.1).grad)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-9)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize(
    ("optimizer", "lr", "options", "decay"),
    [
        ("SGD", 0.1, {"weight_decay": 0.3}, 0.3),
        ("SGD", 0.05, {"weight_decay": 0.3, "momentum": 0.9, "nesterov": True}, 0.3),
        ("Adam", 1e-3, {"weight_decay": 0.3, "amsgrad": True}, 0.3),
        ("ASGD", 0.1, {"lambd": 0.0}, 0.0),
        ("Muon", None, {}, None),
        ("NAdam", None, {"weight_decay": 0.2, "decoupled_weight_decay": True}, None),
    ],
)
def test_an_optimizer_with_its_decay_has_the_closed_form_or_is_refused(optimizer, lr, options, decay):
    inner = TorchOptimizer(optimizer=optimizer, lr=lr or 0.02, options=options, max_steps=3000 if optimizer == "Adam" else 600)
    if decay is None:
        with pytest.raises(ValueError, match="shrinks the weights"):
            hyperopt.hypergradient(ridge(), START, LAM, inner=inner)
        return
    found = hyperopt.hypergradient(ridge(), START, LAM, inner=inner, adjoint=Implicit(CG(1e-12)))
    h = 2 * X.T @ X / 24 + (2 * LAM.exp() + decay) * torch.eye(4, dtype=D)
    w = torch.linalg.solve(h, 2 * X.T @ Y / 24)
    outer = 2 * XV.T @ (XV @ w - YV) / 24
    want = -(torch.linalg.solve(h, outer) * 2 * LAM.exp() * w).sum()
    assert float(found.grad) == pytest.approx(float(want), rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_tracers_that_would_record_one_solve_are_refused():
    def value(a: torch.Tensor) -> torch.Tensor:
        return hyperopt.fixed_point(lambda w, a: 0.5 * torch.tanh(a * w + 1), torch.zeros(1, 2, dtype=D), args=(a,)).value

    with pytest.raises(RuntimeError, match=r"torch.func.jvp"):
        torch.func.linearize(value, LAM)
    torch.testing.assert_close(
        torch.func.jvp(value, (LAM,), (LAM,))[1], LAM * torch.func.jacrev(value)(LAM), rtol=1e-4, atol=1e-6
    )


class Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.name = "square"  # hides the method of that name of the graph's node
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize(("function", "plain"), [(Named.apply, torch.square), (nn.functional.silu, silu)], ids=["own", "SiLU"])
@pytest.mark.parametrize("adjoint", [OneStep(), Implicit(CG()), "auto"], ids=lambda a: type(a).__name__)
def test_a_function_may_keep_a_name(function, plain, adjoint):
    one, two = (
        hyperopt.hypergradient(partly(f), START, torch.ones(24, dtype=D), inner=INNER, adjoint=adjoint).grad
        for f in (lambda x: x * x + (1 + function(x).square()).sqrt(), lambda x: x * x + (1 + plain(x).square()).sqrt())
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert one.abs().max() > 1e-3


@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
def test_a_complex_loss_is_named(which):
    losses: dict[str, Any] = {"inner_loss": lambda w, lam, b: (w - lam).square().sum(), "outer_loss": lambda w, lam, b: w.sum()}
    losses[which] = lambda w, lam, b: torch.complex((w - lam).square().sum(), w.sum())
    with pytest.raises(ValueError, match=f"{which} returned a complex number"):
        hyperopt.hypergradient(hyperopt.BilevelProblem(**losses), torch.ones(2), torch.ones(2), adjoint=OneStep(), step=0.1)
