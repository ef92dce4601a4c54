"""``DEQ``: any cell as a layer; what it promises inside an ordinary network."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hyperopt import Anderson, Dense, Implicit, LinearAnderson, Neumann, Newton, Picard
from hyperopt.nn import DEQ, TanhFixedPoint
from hyperopt.policy import reset_warnings

TIGHT = Implicit(LinearAnderson(1e-12, max_steps=200), policy="raise")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    reset_warnings()
    yield
    torch.set_default_dtype(torch.float32)


class TinyCell(nn.Module):
    """A convolution with input injection on 2 channels; other modules come after it."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), *extra)
        with torch.no_grad():
            self.inner[0].weight.mul_(0.5)  # pyright: ignore[reportCallIssue]

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(z) + x)


def tiny(*extra: nn.Module, **others: Any) -> DEQ:
    return DEQ(TinyCell(*extra), Anderson(1e-12, max_steps=200), TIGHT, policy="raise", **others)


def images(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, 3, 3, requires_grad=True)


def test_first_and_second_derivatives_of_a_tiny_cell():
    deq, x = tiny(), images(2)
    parameters = dict(deq.named_parameters())

    def layer(x, *given):
        return torch.func.functional_call(deq, dict(zip(parameters, given, strict=True)), (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


def test_first_and_second_derivatives_of_the_newton_layer():
    layer = TanhFixedPoint(5, Newton(1e-10), Implicit(Dense(1e-10)), policy="raise")
    x = torch.randn(3, 5, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"cell.weight": w}, (x,)), layer.weight)


def test_newton_and_picard_reach_the_same_state_and_gradient():
    found = []
    x = torch.randn(4, 6, requires_grad=True)
    layer = TanhFixedPoint(6, init_scale=0.3)
    for solver, adjoint in ((Newton(1e-12), Implicit(Dense())), (Picard(1e-13, max_steps=500), Implicit(Neumann(1e-13)))):
        layer.solver, layer.adjoint, layer.policy = solver, adjoint, "raise"
        z = layer(x)
        torch.testing.assert_close(z, torch.tanh(z @ layer.weight.T + x))
        found.append((z, *torch.autograd.grad(z.square().sum(), [x, layer.weight])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_two_in_a_network_called_twice_before_a_backward_and_backward_twice():
    net = nn.Sequential(tiny(), nn.Conv2d(2, 2, 1), tiny(), nn.Flatten(), nn.Linear(18, 2))
    x, y = images(), images()
    alone = [torch.autograd.grad(net(v).square().sum(), [*net.parameters()]) for v in (x, y)]
    both = net(x).square().sum() + net(y).square().sum()
    for _ in range(2):
        together = torch.autograd.grad(both, [*net.parameters()], retain_graph=True)
        for a, b, c in zip(*alone, together, strict=True):
            torch.testing.assert_close(a + b, c)


def test_without_gradients_in_eval_and_with_an_input_that_needs_none():
    deq, x = tiny(), images()
    value = deq(x)
    with torch.no_grad():
        plain = deq(x)
    with torch.inference_mode():
        inferred = deq(x.detach())
    assert not plain.requires_grad and not inferred.requires_grad
    for other in (plain, inferred, deq.eval()(x), deq(x.detach())):
        torch.testing.assert_close(other, value)
    deq(x.detach()).sum().backward()
    assert x.grad is None and all(p.grad is not None for p in deq.parameters())


def test_the_solution_has_statistics_and_no_graph_and_stays_out_of_copies():
    deq, x = tiny(), images()
    value = deq(x)
    assert deq.solution is not None and not deq.solution.value.requires_grad and deq.solution.adjoint is None
    value.sum().backward()
    assert deq.solution.adjoint is not None and deq.solution.rows == 3
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert other.solution is None and deq.solution is not None
        torch.testing.assert_close(other(x), value)
    fresh = tiny()
    fresh.load_state_dict(deq.state_dict())
    torch.testing.assert_close(fresh(x), value)


def test_memory_does_not_grow_without_a_backward():
    deq, x = tiny(), images()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    deq(x)
    before = alive()
    for _ in range(200):
        deq(x)
    assert alive() <= before


def test_a_start_from_the_caller_and_a_state_of_another_shape():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

        def initial(self, x):
            return x.new_zeros(len(x), 2), x.new_zeros(len(x), 4)

        def forward(self, z, x):
            return 0.5 * torch.tanh(self.a(z[1]) + x), 0.5 * torch.tanh(self.b(z[0]))

    deq, x = DEQ(Two(), Anderson(1e-12), TIGHT), torch.randn(5, 2, requires_grad=True)
    first, second = deq(x)
    assert first.shape == (5, 2) and second.shape == (5, 4) and deq.solution is not None
    deq(x, z0=deq.solution.value)
    assert int(deq.solution.forward.iterations.max()) == 1
    given = DEQ(deq.cell, Anderson(1e-12), TIGHT, initial=lambda x: (x, torch.cat([x, x], dim=1)))
    torch.testing.assert_close(given(x), (first, second))
    assert torch.autograd.gradcheck(deq, x)
