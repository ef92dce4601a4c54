"""Autograd Functions of a user's own, whose backward is differentiated once more."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hyperopt
from hyperopt import CG, FiniteDifference, Implicit, Unrolled


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


@pytest.mark.cases(quick=4)
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
    given = {"curvature": "finite_differences"}
    found = estimate(own("saved"), Implicit(CG(1e-7)), torch.float64, **given)
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
