"""Batch normalisation and activations with lean second derivatives: PyTorch's numbers, the right derivatives of every order."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hyperopt.core.memory import peak_memory
from hyperopt.core.norms import lean


class LeanBatchNorm(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return lean(func)(*args, **(kwargs or {}))


pytestmark = pytest.mark.usefixtures("float64")


def without_bias(module: nn.Module) -> nn.Module:
    module.register_parameter("bias", None)
    return module


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "batch 1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "batch 1d, length": (lambda: nn.BatchNorm1d(3, affine=False), (5, 3, 2)),
    "batch 2d": (lambda: nn.BatchNorm2d(3, momentum=0.3), (4, 3, 2, 2)),
    "batch, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "batch, no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    "batch, no bias": (lambda: without_bias(nn.BatchNorm2d(3)), (4, 3, 2, 2)),
    "batch 3d": (lambda: nn.BatchNorm3d(2), (3, 2, 2, 2, 2)),
    "silu": (nn.SiLU, (7, 2)),
    "mish": (nn.Mish, (7, 2)),
    "tanh": (nn.Tanh, (7, 2)),
    "sigmoid": (nn.Sigmoid, (7, 2)),
}


def made(name: str) -> tuple[nn.Module, Any, list[Tensor]]:
    """The module, its form as a function, and inputs of it."""
    make, shape = CASES[name]
    module = make()
    for p in module.parameters():
        nn.init.normal_(p)
    names = [n for n, _ in module.named_parameters()]

    def form(x: Tensor, *p: Tensor) -> Tensor:
        with LeanBatchNorm():
            return functional_call(module, dict(zip(names, p, strict=True)), (x,))

    return (
        module,
        form,
        [torch.randn(shape, requires_grad=True), *(p.detach().clone().requires_grad_() for p in module.parameters())],
    )


@pytest.mark.parametrize("name", CASES)
def test_values_and_running_statistics_are_those_of_pytorch(name: str) -> None:
    module, form, inputs = made(name)
    plain = copy.deepcopy(module)
    for _ in range(2):
        torch.testing.assert_close(form(*inputs), plain(inputs[0]), rtol=1e-12, atol=1e-12)
    for one, other in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    module.eval()
    plain.eval()
    torch.testing.assert_close(form(*inputs), plain(inputs[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives(name: str) -> None:
    _, form, inputs = made(name)
    assert torch.autograd.gradcheck(form, inputs)
    assert torch.autograd.gradgradcheck(form, inputs)


@pytest.mark.parametrize("name", ["batch 1d", "batch 2d", "silu", "mish", "tanh", "sigmoid"])
def test_third_derivatives(name: str) -> None:
    _, form, inputs = made(name)

    def gradient(*given: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(*given).sin().sum(), given, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, inputs)


def test_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    with LeanBatchNorm(), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))


@pytest.mark.parametrize("call", [torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, nn.functional.tanh])
def test_tanh_and_sigmoid_are_lean_however_they_are_called(call: Any) -> None:
    """At large inputs too, where the value is exactly 1, and where PyTorch's own form is left: complex numbers and ``out``."""
    x = torch.tensor([-800.0, -30.0, -0.5, 0.0, 0.5, 30.0, 800.0], requires_grad=True)

    def second(lean_form: bool) -> tuple[Tensor, str]:
        with LeanBatchNorm() if lean_form else contextlib.nullcontext():
            y = call(x)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return torch.autograd.grad(g, x, torch.arange(7.0))[0], type(y.grad_fn).__name__

    (found, name), (wanted, _) = second(True), second(False)
    assert name == "_SmoothBackward"
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    with LeanBatchNorm():
        assert type(call(1j + x).grad_fn).__name__ != "_SmoothBackward"
        given = torch.empty(7)
        assert torch.tanh(x.detach(), out=given) is given


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # PyTorch's own, on the first jvp
def test_transforms_take_the_form_of_pytorch() -> None:
    module = nn.BatchNorm1d(5, track_running_stats=False)
    x, v = torch.randn(4, 5), torch.randn(4, 5)
    with LeanBatchNorm():
        found = torch.func.jvp(module, (x,), (v,))[1]
    torch.testing.assert_close(found, torch.func.jvp(module, (x,), (v,))[1])


def test_a_second_derivative_takes_less_memory() -> None:
    module, x = nn.BatchNorm2d(8), torch.randn(16, 8, 16, 16, requires_grad=True)

    def second() -> int:
        with peak_memory("cpu") as found:
            (g,) = torch.autograd.grad(module(x).relu().sum(), x, create_graph=True)
            torch.autograd.grad(g, x, x.detach())
        return found.peak

    plain = second()
    with LeanBatchNorm():
        found = second()
    assert found < 0.75 * plain
