"""The Jacobian penalty and the corrected states, against closed forms and the Jacobian itself."""

from typing import Any

import pytest
import torch
from torch import nn

from hyperopt import GMRES, Anderson, Implicit, Picard, Unrolled
from hyperopt.nn import DEQ, Stabilise, TanhFixedPoint

pytestmark = pytest.mark.usefixtures("float64")


TIGHT = Implicit(GMRES(1e-12, max_steps=100), policy="raise")


def tanh_layer(width: int = 4) -> TanhFixedPoint:
    return TanhFixedPoint(width, Picard(1e-12, max_steps=500), TIGHT, init_scale=0.3, policy="raise")


def frobenius(layer: TanhFixedPoint, x: torch.Tensor) -> torch.Tensor:
    """``|J|_F^2 / (rows dim)`` at the solution, held fixed: ``J = diag(1 - z^2) W``."""
    z = layer(x).detach()
    slope = 1 - torch.tanh(z @ layer.weight.T + x).square()
    return (slope[:, :, None] * layer.weight).square().sum() / z.numel()


@pytest.mark.slow
def test_the_jacobian_penalty_and_its_gradient_tend_to_the_frobenius_norm():
    layer, x = tanh_layer(), torch.randn(3, 4, requires_grad=True)
    with Stabilise(layer, jacobian=4000) as extra:
        layer(x)
    want = frobenius(layer, x)
    torch.testing.assert_close(extra.jacobian, want, rtol=0.03, atol=0)
    got = torch.autograd.grad(extra.jacobian, [x, layer.weight])
    for a, b in zip(got, torch.autograd.grad(want, [x, layer.weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.03 * float(b.abs().max()))


def test_for_a_diagonal_jacobian_one_sample_is_exact_and_is_differentiated_exactly():
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([0.1, 0.5, 0.8]))

        def forward(self, z, x):
            return self.a * z + x

    layer = DEQ(Diagonal(), Picard(1e-10, max_steps=500), TIGHT)
    a = layer.cell.get_parameter("a")
    with Stabilise(layer, jacobian=1) as extra:
        layer(torch.randn(5, 3))
    torch.testing.assert_close(extra.jacobian, a.square().mean())
    torch.testing.assert_close(torch.autograd.grad(extra.jacobian, a)[0], 2 * a.detach() / 3)


def test_a_penalty_makes_a_layer_contract():
    layer, x = tanh_layer(6), 0.1 * torch.randn(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    before = frobenius(layer, x)
    for _ in range(30):
        optimizer.zero_grad()
        with Stabilise(layer, jacobian=1) as extra:
            layer(x)
        extra.jacobian.backward()
        optimizer.step()
    assert float(frobenius(layer, x).detach()) < 0.2 * float(before.detach())


@pytest.mark.parametrize("adjoint", [TIGHT, Unrolled()], ids=["implicit", "unrolled"])
def test_chosen_states_are_one_step_after_the_iterates_and_carry_one_step_gradients(adjoint):
    layer, x = tanh_layer(), torch.randn(3, 4, requires_grad=True)
    layer.adjoint = adjoint
    with Stabilise(layer, steps=(0, 2, 10_000)) as extra:
        layer(x)
    iterates = [torch.zeros(3, 4)]
    for _ in range(2):
        iterates.append(torch.tanh(iterates[-1] @ layer.weight.T + x).detach())
    assert len(extra.states) == 2
    for got, at in zip(extra.states, (iterates[0], iterates[2]), strict=True):
        want = torch.tanh(at @ layer.weight.T + x)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(z.square().sum(), [x, layer.weight], retain_graph=True) for z in (got, want)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_drawn_states_are_a_uniform_sample_without_the_last_iterate():
    class Counter(nn.Module):
        """Its k-th iterate is k."""

        def forward(self, z, x):
            return z + 1 + 0 * x

    layer = DEQ(Counter(), Picard(0, 0, 6))
    counts = torch.zeros(8)
    for _ in range(300):
        with Stabilise(layer, states=2) as extra:
            layer(torch.zeros(1, 1))
        found = [int(z) - 1 for z in extra.states]
        assert len(set(found)) == 2 and found == sorted(found)
        counts[found] += 1
    assert counts[5:].sum() == 0  # evaluated at 0, ..., 5
    assert ((counts[:5] - 120).abs() < 45).all()  # 5 standard deviations
    with Stabilise(layer, states=50) as extra:
        layer(torch.zeros(1, 1))
    assert [int(z) for z in extra.states] == [1, 2, 3, 4, 5]


def test_masks_are_those_of_the_solve():
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

        def forward(self, z, x):
            return torch.tanh(0.3 * self.inner(z) + x)

    layer, x = DEQ(Cell(), Picard(0, 0, 40), TIGHT), torch.randn(3, 4)
    with Stabilise(layer, states=100) as extra:
        value = layer(x)
    torch.testing.assert_close(extra.states[-1], value)  # the fixed point of the same masks
    state = torch.get_rng_state()
    with Stabilise(layer, steps=(3,)) as extra:
        layer(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    layer(x)
    assert torch.equal(after, torch.get_rng_state())  # no numbers beside those of the masks


def test_several_layers_add_up_and_nothing_is_kept_after_the_block():
    net, x = nn.Sequential(tanh_layer(), nn.Linear(4, 4), tanh_layer()), torch.randn(3, 4)
    with Stabilise(net, jacobian=2, states=1) as extra:
        net(x)
        net(x)
    assert len(extra.states) == 4 and extra.jacobian.requires_grad
    assert all(layer.observer is None for layer in extra.layers)
    net(x)
    assert len(extra.states) == 4
    with torch.no_grad(), Stabilise(net, jacobian=2, states=1) as extra:
        net(x)
    assert not extra.states and not extra.jacobian.requires_grad
    with pytest.raises(ZeroDivisionError), Stabilise(net, jacobian=1) as extra:
        raise ZeroDivisionError
    assert all(layer.observer is None for layer in extra.layers)


def test_a_tree_of_states():
    class Two(nn.Module):
        def initial(self, x):
            return {"a": x.new_zeros(len(x), 2), "b": x.new_zeros(len(x), 3)}

        def forward(self, z, x):
            return {"a": 0.5 * z["a"] + x[:, :2], "b": 0.25 * z["b"] + x}

    layer = DEQ(Two(), Anderson(1e-10), TIGHT)
    with Stabilise(layer, jacobian=1, steps=(1,)) as extra:
        layer(torch.randn(4, 3, requires_grad=True))
    torch.testing.assert_close(extra.jacobian, torch.tensor((2 * 0.25 + 3 * 0.0625) / 5))
    assert [z.keys() for z in extra.states] == [{"a", "b"}]


def test_what_is_refused():
    with pytest.raises(ValueError, match="Linear has no DEQ layer"):
        Stabilise(nn.Linear(2, 2), jacobian=1)
    bads: list[dict[str, Any]] = [{"jacobian": -1}, {"states": 1.5}, {"steps": (-2,)}]
    for bad in bads:
        with pytest.raises(ValueError, match="must be a whole number >= 0"):
            Stabilise(tanh_layer(), **bad)
    layer = tanh_layer()
    with Stabilise(layer), pytest.raises(RuntimeError, match="inside of another"), Stabilise(layer):
        pass
