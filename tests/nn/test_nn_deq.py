"""``DEQ``: any cell as a layer; what it promises inside an ordinary network."""

import copy
import gc
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hyperopt.nn
from hyperopt import Anderson, Dense, Implicit, LinearAnderson, Neumann, Newton, Picard, SolveError, Unrolled
from hyperopt.nn import DEQ, TanhFixedPoint
from hyperopt.nn.contractive import ProjectedMatrix
from hyperopt.nn.equilibrium import EquilibriumCell
from hyperopt.tasks.warm import WarmStore

TIGHT = Implicit(LinearAnderson(1e-12, max_steps=200), policy="raise")


pytestmark = pytest.mark.usefixtures("float64")


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
    deq, x = tiny(), images(1)
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


@pytest.mark.slow
def test_memory_does_not_grow_without_a_backward():
    deq, x = DEQ(TinyCell(), Picard(1e-2)), images()

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


def test_warm_starts_by_example():
    deq, data = tiny(), torch.randn(6, 2, 3, 3)
    store = WarmStore(6, 18, torch.float64)
    for step, index in enumerate((torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([1, 2, 4]))):
        start = store.start(index, step)
        given = [None if near is None else near.reshape(3, 2, 3, 3) for near in (start.state, start.adjoint)]
        value = deq(data[index], *given)
        value.square().mean(dim=(1, 2, 3)).mean().backward()
        solution = deq.solution
        assert solution is not None and solution.adjoint is not None
        store.keep(index, step, solution.layout.matrix(solution.value), solution.box.v)
        if step == 2:
            assert int(solution.forward.iterations.max()) == 1 and int(solution.adjoint.iterations.max()) <= 2
        else:
            assert int(solution.forward.iterations.min()) > 5


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # torch's own forward-mode rules still use it
def test_under_torch_func():
    deq, x = tiny(), images().detach()
    parameters = dict(deq.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(deq, parameters, (x,)).square().sum()

    want: Any = torch.autograd.grad(loss(parameters, x), [*parameters.values()])
    for a, b in zip(torch.func.grad(loss)(parameters, x).values(), want, strict=True):
        torch.testing.assert_close(a, b)
    each = torch.vmap(torch.func.grad(lambda p, one: loss(p, one[None])), in_dims=(None, 0))(parameters, x)
    for a, b in zip(each.values(), want, strict=True):
        torch.testing.assert_close(a.sum(0), b)
    tangent = torch.randn_like(x)
    forward: Any = torch.func.jvp(lambda x: loss(parameters, x), (x,), (tangent,))[1]
    torch.testing.assert_close(forward, (torch.func.grad(loss, 1)(parameters, x) * tangent).sum())


def test_in_an_autocast_network():
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Conv2d(2, 2, 1), DEQ(TinyCell(), Anderson(1e-2), Implicit(LinearAnderson(1e-2))), nn.Conv2d(2, 2, 1))
    x = torch.randn(3, 2, 3, 3)
    full = torch.autograd.grad(net(x).square().sum(), [*net.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    low = torch.autograd.grad(out.float().square().sum(), [*net.parameters()])
    for a, b in zip(low, full, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))
    half = DEQ(TinyCell().bfloat16(), Anderson(3e-2))  # a network that lives in bfloat16 has states in bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_every_adjoint_and_the_policies_reach_the_primitive():
    deq, x = tiny(), images()
    want = torch.autograd.grad(deq(x).square().sum(), x)[0]
    deq.solver = Picard(1e-13, max_steps=500)
    for adjoint in (Unrolled(), Implicit(Neumann(1e-13, max_steps=500))):
        deq.adjoint = adjoint
        torch.testing.assert_close(torch.autograd.grad(deq(x).square().sum(), x)[0], want)
    deq.solver = Picard(1e-12, max_steps=3)
    with pytest.raises(SolveError, match="raise max_steps"):
        deq(x)
    deq.policy, deq.fallback = "fallback", (Anderson(1e-12, max_steps=200),)
    value = deq(x, trace=True)
    assert deq.solution is not None and deq.solution.forward.fallbacks == ("Picard",) and deq.solution.forward.trace.numel() > 3
    torch.testing.assert_close(deq.cell(value, x), value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpointed_part_of_a_network(reentrant):
    deq, x = tiny(nn.Dropout(0.3)), images()
    torch.manual_seed(1)
    deq(x).square().sum().backward()
    want, x.grad = x.grad, None
    torch.manual_seed(1)
    checkpoint(deq, x, use_reentrant=reentrant).square().sum().backward()  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(x.grad, want)


def test_an_equilibrium_cell_is_a_cell_of_a_layer():
    model = EquilibriumCell(4, 3, ProjectedMatrix(3, 0.9, 0.2))
    x = torch.randn(5, 4)
    deq = DEQ(model, Picard(1e-12, max_steps=500), TIGHT)
    value = deq(x)
    torch.testing.assert_close(value, torch.tanh(value @ model.recurrent.A + x @ model.B.T + model.c))  # pyright: ignore[reportArgumentType, reportCallIssue]


class Wrong(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, z, x):
        return self.change(0.5 * z + x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda z: z[:, :1],
            ValueError,
            r"shape of leaf 0 of the state: got \(3, 1, 3, 3\), expected \(3, 2, 3, 3\)",
        ),
        (lambda z: (z, z), ValueError, "changed the structure of the state"),
        (lambda z: z.float(), TypeError, "changed the dtype of leaf 0"),
        (lambda z: None, ValueError, "changed the structure of the state"),
    ],
)
def test_a_cell_that_does_not_return_a_state(change, error, message):
    with pytest.raises(error, match=message):
        DEQ(Wrong(change))(images())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cell": torch.tanh}, TypeError, "cell is a builtin_function_or_method; give a module"),
        ({"solver": Neumann()}, TypeError, r"solver=Neumann.* is not a FixedPointSolver"),
        ({"adjoint": Neumann()}, TypeError, r"adjoint=Neumann.* is not an Adjoint"),
        ({"fallback": (Neumann(),)}, TypeError, r"fallback\[0\]=Neumann.* is not a FixedPointSolver"),
        ({"rows": "each"}, ValueError, "rows='each' is not one of auto, batch, joint"),
        ({"policy": "hope"}, ValueError, "policy='hope' is not one of raise, warn, fallback, ignore"),
        ({"initial": 0}, TypeError, "initial=0 must be a function of x"),
        ({"tolerance": 1e-3}, TypeError, "tolerance"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        DEQ(**{"cell": TinyCell(), **arguments})


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="x is a dict, which does not tell the shape of a state; set initial"):
        tiny()({"a": images()})
    with pytest.raises(TypeError, match="must be floating-point"):
        tiny()(torch.zeros(3, 2, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="changed the shape"):
        tiny()(images(), z0=torch.zeros(1, 2, 3, 3))


def test_the_package_names_its_parts_and_imports_no_torch():
    code = "import sys, hyperopt.nn; dir(hyperopt.nn); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert {"DEQ", "ResNetCell", "MDEQCell", "TanhFixedPoint", "Stabilise", "mdeq_network"} <= set(dir(hyperopt.nn))
    assert all(callable(getattr(hyperopt.nn, name)) for name in hyperopt.nn.__all__)
    with pytest.raises(AttributeError, match=r"module 'hyperopt\.nn' has no attribute 'Deq'; it has DEQ, TanhFixedPoint"):
        hyperopt.nn.Deq  # noqa: B018
