"""Autograd Functions of a user's own, whose backward is differentiated once more."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hyperopt
from hyperopt import CG, FiniteDifference, Implicit, OneStep, Unrolled


def kept_by_save(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    ctx.save_for_backward(x, torch.cosh(x))  # the second is neither an input nor an output
    return torch.tanh(x)


def kept_as_attribute(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    ctx.slope = 1 / torch.cosh(x) ** 2
    return torch.tanh(x)


def kept_output(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.tanh(x)
    ctx.save_for_backward(out)
    return out


def rounded(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    return (x * 8).round() / 8


FORWARDS = {
    "saved": (kept_by_save, lambda ctx, g: g / ctx.saved_tensors[1] ** 2),
    "attribute": (kept_as_attribute, lambda ctx, g: g * ctx.slope),
    "output": (kept_output, lambda ctx, g: g * (1 - ctx.saved_tensors[0] ** 2)),
    "straight through": (rounded, lambda ctx, g: g),
}


def own(name: str) -> Any:
    """A new Function class, so that no other test has checked it."""
    forward, backward = FORWARDS[name]
    return type("Own", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply


def estimate(function: Any, adjoint: Any, dtype: torch.dtype, start: float = 0.0, **given: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=draw, dtype=dtype), torch.randn(40, 1, generator=draw, dtype=dtype)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (function(x @ w) - y).square().mean() + lam.exp() * w.square().sum(),
        lambda w, lam, b: (x[:20] @ w - 1).square().mean(),
    )
    w = torch.full((4, 1), start, dtype=dtype)
    lam = torch.tensor(-1.0, dtype=dtype)
    inner = hyperopt.GradientDescent(max_steps=300, rtol=1e-4)
    return hyperopt.hypergradient(problem, w, lam, inner=inner, adjoint=adjoint, **given).grad


@pytest.mark.cases(quick=4, slow=5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("adjoint", [Implicit(CG()), Unrolled(), "auto"], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", ["saved", "attribute"])
def test_a_tensor_kept_without_a_graph_is_found(name, adjoint, dtype):
    function = own(name)
    with pytest.warns(hyperopt.SolveWarning, match=r"second derivative through Own.*differences.*curvature='finite_differences'"):
        found = estimate(function, adjoint, dtype)
    exact = estimate(own("output"), adjoint, dtype)
    assert abs(found - exact) > 0.03 * abs(exact)  # it matters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = estimate(function, adjoint, dtype)  # said once for each Function
    assert torch.equal(found, again)


@pytest.mark.cases(quick=6)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("adjoint", [Implicit(CG()), Unrolled(), "auto", FiniteDifference()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", ["output", "straight through"])
def test_what_is_right_or_meant_is_left_alone(name, adjoint, dtype):
    estimate(own(name), adjoint, dtype, start=0.1)  # a warning is an error here


def test_what_the_message_recommends_is_right():
    found = estimate(own("saved"), Implicit(CG(1e-7)), torch.float64, curvature="finite_differences")
    torch.testing.assert_close(found, estimate(own("output"), Implicit(CG(1e-7)), torch.float64), rtol=1e-4, atol=0)


def test_the_check_leaves_random_numbers_and_statistics_alone():
    bias, net = torch.nn.BatchNorm1d(1, dtype=torch.float64), own("output")

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return net(torch.nn.functional.dropout(bias(x), 0.3))

    torch.manual_seed(0)
    first = estimate(noisy, Unrolled(), torch.float64), torch.rand(()), bias.running_mean
    bias.reset_running_stats()
    torch.manual_seed(0)
    second = estimate(noisy, Unrolled(), torch.float64), torch.rand(()), bias.running_mean  # not checked again
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # pyright: ignore


@pytest.mark.parametrize("name", ["saved", "output"])
def test_the_second_derivative_of_a_fixed_point(name):
    function, a = own(name), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)

    def gradient(function: Any) -> torch.Tensor:
        solve: dict[str, Any] = {"solver": hyperopt.Newton(rtol=1e-12), "adjoint": Implicit(hyperopt.GMRES(rtol=1e-12))}
        value = hyperopt.fixed_point(lambda w: function(a * w + shift), torch.zeros_like(shift), **solve).value
        return torch.autograd.grad(value.square().sum(), a, create_graph=True)[0]

    torch.testing.assert_close(gradient(function), gradient(torch.tanh))  # the first derivative is right
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (second,) = torch.autograd.grad(gradient(function), a)
    (exact,) = torch.autograd.grad(gradient(torch.tanh), a)
    if name == "output":
        torch.testing.assert_close(second, exact)
    assert [str(each.message)[:33] for each in said] == ["the second derivative through Own"] * (name == "saved")


def test_a_loss_that_is_not_defined_near_the_point_is_checked_at_the_point():
    """A scale that moves along a random direction becomes negative, which a distribution refuses, and of which a log is NaN."""
    scale, w = torch.tensor(0.02, dtype=torch.float64), torch.full((4, 1), 3.0, dtype=torch.float64)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(function: Any, fit: Any) -> None:
        problem = hyperopt.BilevelProblem(lambda w, lam, b: fit(function(x @ w), lam), lambda w, lam, b: w.square().sum())
        hyperopt.hypergradient(problem, w, scale, adjoint=OneStep(), step=0.01)

    for fit in (
        lambda out, lam: -torch.distributions.Normal(out, lam).log_prob(torch.zeros_like(out)).mean(),
        lambda out, lam: (out.square() / lam.sqrt()).mean(),
    ):
        run(own("output"), fit)
        with pytest.warns(hyperopt.SolveWarning, match="second derivative through Own"):
            run(own("attribute"), fit)


def test_a_function_is_checked_in_the_first_precision_in_which_it_can_be():
    function = own("saved")
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: function(x.to(w) @ w).float().square().mean() + lam * w.float().square().sum(),
        lambda w, lam, b: w.float().sum(),
    )
    for dtype, count in ((torch.bfloat16, 0), (torch.float32, 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            w = torch.full((4, 1), 0.3, dtype=dtype)
            hyperopt.hypergradient(problem, w, torch.tensor(0.1), adjoint=OneStep(), step=0.1)
        assert sum("second derivative through Own" in str(each.message) for each in said) == count


def test_an_operator_of_torch_library_is_a_function():
    @torch.library.custom_op("hyperopt_tests::tanh_and_slope", mutates_args=())
    def operator(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(x), 1 / torch.cosh(x) ** 2]

    operator.register_autograd(
        lambda ctx, g: g[0] * ctx.saved_tensors[0],  # which takes no gradient of its second output
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
    )
    with pytest.warns(hyperopt.SolveWarning, match="second derivative through hyperopt_tests_tanh_and_slope"):
        estimate(lambda x: operator(x)[0], Implicit(CG()), torch.float64)
