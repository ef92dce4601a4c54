"""Trap 11, and what is like it: a map that is random, or keeps a state of its own, is refused with the name of its module."""

import functools

import pytest
import torch
from torch import nn

from hyperopt import Implicit, ImpureMapError, Neumann, Picard, Unrolled, check_map, fixed_point


class Net(nn.Module):
    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), *extra)
        with torch.no_grad():
            self.inner[0].weight.mul_(0.3)  # pyright: ignore[reportCallIssue]

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(w))

    def method(self, w: torch.Tensor) -> torch.Tensor:
        return self(w)


GLOBAL = Net(nn.Dropout(0.5))


def ways(net: Net):
    """The ways in which a map may come to its module."""
    return {
        "module": (net, ()),
        "closure": (lambda w: net(w), ()),
        "method": (net.method, ()),
        "partial": (functools.partial(lambda n, w: n(w), net), ()),
        "argument": (lambda w, n: n(w), (net,)),
    }


W0 = torch.zeros(4, 3)


@pytest.mark.parametrize("way", ways(Net()))
@pytest.mark.parametrize("adjoint", [None, Unrolled()])
@pytest.mark.parametrize("grad", [True, False])
def test_11_dropout_is_found_and_named(way, adjoint, grad):
    phi, args = ways(Net(nn.Dropout(0.5)))[way]
    with torch.set_grad_enabled(grad), pytest.raises(ImpureMapError, match=r"random numbers.*inner\.1"):
        fixed_point(phi, W0, args, adjoint=adjoint, policy="ignore")


@pytest.mark.parametrize("way", ways(Net()))
def test_11_batch_statistics_are_refused_before_anything_is_updated(way):
    net = Net(nn.BatchNorm1d(3))
    phi, args = ways(net)[way]
    with pytest.raises(ImpureMapError, match=r"inner\.1 = BatchNorm1d.*running"):
        fixed_point(phi, W0, args)
    assert int(net.inner[1].num_batches_tracked) == 0  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_11_a_global_module_and_bare_random_numbers():
    with pytest.raises(ImpureMapError, match=r"GLOBAL\.inner\.1"):
        fixed_point(lambda w: GLOBAL(w), W0, policy="ignore")
    with pytest.raises(ImpureMapError, match="somewhere"):
        fixed_point(lambda w: 0.5 * w + torch.rand(4, 3), W0, policy="ignore")


@pytest.mark.parametrize("extra", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_11_in_eval_mode_the_same_maps_are_welcome(extra):
    net = Net(extra).eval()
    fixed_point(net, W0, policy="raise").value.sum().backward()
    check_map(net, W0)


@pytest.mark.parametrize("extra", [nn.Dropout(0.0), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3)])
def test_11_what_only_looks_random_is_welcome(extra):
    check_map(Net(extra), W0)


def test_a_solve_leaves_the_generators_alone():
    net, before = Net(), torch.get_rng_state()
    fixed_point(net, W0, solver=Picard())
    assert torch.equal(torch.get_rng_state(), before)


def test_two_calls_find_a_counter():
    calls = []

    def phi(w):
        calls.append(1)
        return 0.5 * w + 1.0 / len(calls)

    with pytest.raises(ImpureMapError, match="two calls of the map"):
        check_map(phi, W0)
    with pytest.raises(ImpureMapError, match="in place"):
        check_map(lambda w: w.add_(1), W0)
    with pytest.raises(ImpureMapError, match="random numbers"):
        check_map(lambda w: w + torch.rand(()), W0)
    check_map(lambda w: w * float("nan"), W0)  # the same NaN twice
    check_map(lambda w: (w[0] + 1, w[1]), (W0, W0[:, :1]))


def test_14_autocast_lowers_the_map_but_not_the_state_or_the_hypergradient():
    net = Net()
    with torch.autocast("cpu", torch.bfloat16):
        sol = fixed_point(net, W0, solver=Picard(1e-2), adjoint=Implicit(Neumann(1e-2)))  # what products in bfloat16 can meet
        assert sol.value.dtype == torch.float32 and sol.forward.residual.dtype == torch.float32
    sol.value.sum().backward()
    grad = net.inner[0].weight.grad
    assert isinstance(grad, torch.Tensor) and grad.dtype == torch.float32
    net.zero_grad()
    fixed_point(net, W0).value.sum().backward()
    torch.testing.assert_close(net.inner[0].weight.grad, grad, rtol=0.05, atol=0.02)  # bfloat16 has 8 bits
