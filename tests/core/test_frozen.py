"""Trap 11 solved: a DEQ may have dropout, batch statistics and power iterations inside; they stand still for a solve."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hyperopt import Anderson, Checkpointed, Implicit, LinearAnderson, Picard, SolveError, Unrolled, fixed_point
from hyperopt.core.replay import FrozenMap
from hyperopt.nn import DEQ

CPU = torch.device("cpu")
TIGHT = Implicit(LinearAnderson(1e-12, max_steps=300), policy="raise")


pytestmark = pytest.mark.usefixtures("float64")


class Noise(nn.Module):
    """Random numbers through no module that is known for them."""

    def forward(self, z):
        return z + 0.1 * torch.rand_like(z)


class Cell(nn.Module):
    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(3, 3), nn.Sequential(*extra)
        with torch.no_grad():
            self.linear.weight.mul_(0.2)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.extra(self.linear(z)) + x)


EXTRA: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.4),
    "noise": Noise,
    "batchnorm": lambda: nn.BatchNorm1d(3),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(3, 3), n_power_iterations=1),
    "both": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.4)),
}


def layer(name: str, **others: Any) -> DEQ:
    given = {"drop_rows": False, "policy": "raise", **others}
    return DEQ(Cell(EXTRA[name]()), Anderson(1e-12, max_steps=200), TIGHT, **given)


def buffers(module: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in module.buffers()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("adjoint", [TIGHT, Unrolled()], ids=["implicit", "unrolled"])
def test_11_a_forward_leaves_what_one_call_of_the_cell_at_the_solution_leaves(name, adjoint):
    deq, x = layer(name), torch.randn(5, 3)
    deq.adjoint = adjoint
    other = Cell(EXTRA[name]())
    other.load_state_dict(deq.cell.state_dict())
    torch.manual_seed(1)
    z = deq(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = other(z, x)
    torch.testing.assert_close(again, z)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(deq.cell.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    z.sum().backward()
    assert torch.equal(torch.get_rng_state(), state) and same(buffers(deq.cell), buffers(deq.cell))


@pytest.mark.cases(quick=2, among={"name": [name for name in EXTRA if name != "both"]})
@pytest.mark.parametrize("name", EXTRA)
def test_11_first_and_second_derivatives_are_those_of_the_frozen_map(name):
    deq, x = layer(name), torch.randn(4, 3, requires_grad=True)
    start = buffers(deq)

    def again(x, w):
        torch.manual_seed(2)
        for buffer, value in zip(deq.buffers(), start, strict=True):
            buffer.copy_(value)
        return torch.func.functional_call(deq, {"cell.linear.weight": w}, (x,))

    w = deq.cell.get_parameter("linear.weight")
    if name == "spectral":  # its vectors count as constants in a derivative, so only x can be checked by finite differences
        assert torch.autograd.gradcheck(lambda x: again(x, w), x)
    else:
        assert torch.autograd.gradcheck(again, (x, w))
    assert torch.autograd.gradgradcheck(lambda x: again(x, w), x, fast_mode=True)
    implicit = torch.autograd.grad(again(x, w).square().sum(), [*deq.parameters()])
    deq.solver = Picard(1e-13)
    for adjoint in (Unrolled(), Checkpointed()):
        deq.adjoint = adjoint
        value = again(x, w)
        torch.rand(5)
        for a, b in zip(implicit, torch.autograd.grad(value.square().sum(), [*deq.parameters()]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", EXTRA)
def test_11_in_eval_mode_nothing_moves(name):
    deq, x = layer(name).eval(), torch.randn(5, 3)
    if name == "noise":
        pytest.skip("a module of that kind has no eval mode")
    before, state = buffers(deq), torch.get_rng_state()
    torch.testing.assert_close(deq(x), deq(x), rtol=0, atol=0)
    assert same(before, buffers(deq)) and torch.equal(torch.get_rng_state(), state)


def test_11_a_new_mask_every_forward_and_one_for_each_row():
    deq, x = layer("dropout"), torch.ones(64, 3)
    first, second = deq(x), deq(x)
    assert not torch.allclose(first, second)
    assert len(first.detach().unique(dim=0)) > 4  # 8 masks of 3 entries


def test_11_replays_after_the_forward_leave_no_trace():
    deq, x = layer("both"), torch.randn(6, 3, requires_grad=True)
    z = deq(x)
    deq.eval()  # a backward must not mind the mode into which the network has gone since
    state, before = torch.get_rng_state(), buffers(deq)
    (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)
    assert torch.equal(torch.get_rng_state(), state) and same(before, buffers(deq))
    assert not any(m.training for m in deq.modules())


def test_11_a_solve_that_fails_leaves_the_module_as_it_was():
    deq, x = layer("both"), torch.randn(6, 3)
    deq.solver = Picard(1e-12, max_steps=2)
    before = buffers(deq)
    with pytest.raises(SolveError):
        deq(x)
    assert same(before, buffers(deq))


def test_batchnorm_couples_the_rows_which_is_found_or_refused():
    deq, x = layer("batchnorm"), torch.randn(5, 3)
    deq(x)
    assert deq.solution is not None and deq.solution.rows == 1
    deq.eval()(x)
    assert deq.solution.rows == 5
    with pytest.raises(ValueError, match=r"rows='batch', but cell\.extra\.0 = BatchNorm1d.*set rows='joint'"):
        layer("batchnorm", rows="batch")(x)
    running = Cell(nn.BatchNorm1d(3, track_running_stats=False)).eval()  # takes the statistics of its batch in eval mode too
    with pytest.raises(ValueError, match="rows='batch'"):
        DEQ(running, rows="batch")(x)


def test_17_statistics_over_all_processes_are_refused():
    with pytest.raises(ValueError, match=r"cell\.extra\.0 = SyncBatchNorm.*waits for all processes"):
        DEQ(Cell(nn.SyncBatchNorm(3)))(torch.randn(5, 3))


def test_batchnorm_around_the_layer():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), layer("dropout"), nn.BatchNorm1d(3))
    net(torch.randn(5, 3)).square().sum().backward()
    assert [int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm1d)] == [1, 1]  # pyright: ignore[reportArgumentType]


def test_rows_are_dropped_where_that_changes_nothing_and_not_with_masks():
    class Counting(Cell):
        def forward(self, z, x):
            seen.append(len(z))
            return 0.9 * super().forward(z, x)

    x = torch.cat([torch.zeros(8, 3), torch.full((1, 3), 1e3)])
    seen: list[int] = []
    for extra, dropped in ((nn.Identity(), True), (nn.Dropout(0.5), False)):
        seen.clear()
        deq = DEQ(Counting(extra), Picard(1e-9), policy="raise")
        nn.init.zeros_(deq.cell.get_parameter("linear.bias"))
        nn.init.eye_(deq.cell.get_parameter("linear.weight"))
        deq(x)
        assert (min(seen) < 9) is dropped and seen[-1] == 9
        deq.drop_rows = False
        seen.clear()
        deq(x)
        assert set(seen) == {9}

    class Gate(Noise):
        def forward(self, z, x):  # pyright: ignore[reportIncompatibleMethodOverride]
            return x * 0.5 * super().forward(z)

    with pytest.raises(ValueError, match="drop_rows=False"):  # random numbers that no module tells of
        DEQ(Gate(), Picard(1e-9), policy="raise")((x > 0).double())
    DEQ(Gate(), Picard(1e-9), policy="raise", drop_rows=False)((x > 0).double())


def test_a_map_is_put_back_to_what_it_was_when_it_was_frozen():
    cell, x = Cell(nn.Dropout(0.5)), torch.randn(4, 3)
    z = torch.randn(4, 3)
    frozen = FrozenMap(cell, [cell], CPU)
    first = frozen(z, x)
    parameter = cell.linear.weight
    cell.linear.weight = nn.Parameter(torch.zeros(3, 3))
    torch.rand(7)
    cell.eval()
    assert torch.equal(frozen(z, x), first) and frozen.random
    assert not cell.training and cell.linear.weight is not parameter  # what is there now is left there


def test_a_buffer_that_is_replaced_and_one_that_is_not_touched():
    class Counter(nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("table", torch.ones(3))
            self.register_buffer("absent", None)

        def forward(self, z):
            self.count = self.count + 1
            return z * self.get_buffer("table") / self.count

    counter = Counter()
    deq = DEQ(Cell(counter), Picard(1e-10), policy="raise")
    for k in range(1, 4):
        table = counter.get_buffer("table")
        with torch.inference_mode(k == 2):
            deq(torch.randn(2, 3))
        assert int(counter.count) == k and counter.get_buffer("table") is table


def test_nested_layers_commit_once():
    inner = layer("batchnorm")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z, x):
            return 0.3 * self.inner(z + x)

    deq = DEQ(Outer(), Picard(1e-10), TIGHT, policy="raise")
    deq(torch.randn(4, 3)).sum().backward()
    assert int(inner.cell.get_buffer("extra.0.num_batches_tracked")) == 1


def test_a_frozen_map_is_welcome_in_the_primitive():
    cell, x = Cell(nn.Dropout(0.5)), torch.randn(4, 3)
    frozen = FrozenMap(cell, [cell], CPU)
    torch.manual_seed(4)
    cell(torch.zeros(4, 3), x)
    once = torch.get_rng_state()
    torch.manual_seed(4)
    solution = fixed_point(frozen, torch.zeros(4, 3), (x,), policy="raise")
    assert torch.equal(torch.get_rng_state(), once)  # as one call of the cell moves it, whatever the number of evaluations
    frozen.commit()
    frozen.commit()
    assert torch.equal(torch.get_rng_state(), once)
    torch.testing.assert_close(frozen(solution.value, x), solution.value, rtol=1e-4, atol=1e-4)


def test_14_autocast_reaches_the_cell_and_its_replays_but_not_the_states():
    torch.set_default_dtype(torch.float32)
    seen = []

    class Seeing(Cell):
        def forward(self, z, x):
            seen.append((z.dtype, self.linear(z).dtype))
            return super().forward(z, x)

    adjoint = Implicit(LinearAnderson(1e-2))
    deq = DEQ(Seeing(), Picard(1e-2), adjoint)
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        low = nn.Linear(3, 3)(x)  # what a layer before hands on
        assert low.dtype == torch.bfloat16
        z = deq(low)
    assert z.dtype == torch.float32 and set(seen) == {(torch.float32, torch.bfloat16)}
    calls = len(seen)
    (g,) = torch.autograd.grad(z.square().sum(), deq.cell.get_parameter("linear.weight"), create_graph=True)
    g.sum().backward()
    assert len(seen) > calls and set(seen) == {(torch.float32, torch.bfloat16)} and g.dtype == torch.float32
    seen.clear()
    assert deq(x).dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}


def test_a_view_made_without_gradients_inside_the_map_is_no_tensor_from_outside():
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)

    def phi(z):
        with torch.no_grad():
            scale = 1 / (4 * w.T.abs().sum())
        return torch.tanh(z @ w) * scale + x

    value = fixed_point(phi, torch.zeros(2, 3), solver=Picard(1e-12), adjoint=TIGHT).value
    (g,) = torch.autograd.grad(value.square().sum(), w, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(g.square().sum(), w)[0]).all()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_masks_under_vmap(randomness):
    deq, x = layer("dropout"), torch.randn(4, 3)
    names = [name for name, _ in deq.named_parameters()]
    parameters = [p.detach() for p in deq.parameters()]

    def loss(given, x):
        return torch.func.functional_call(deq, dict(zip(names, given, strict=True)), (x,)).square().sum()

    torch.manual_seed(3)
    each = torch.vmap(torch.func.grad(lambda given, one: loss(given, one[None])), (None, 0), randomness=randomness)(parameters, x)
    want = []
    for rows in x.split(1 if randomness == "same" else 4):  # every row draws the first row's mask, or its own of the batch
        torch.manual_seed(3)
        want.append(torch.func.grad(loss)(parameters, rows))
    for i, got in enumerate(each):
        torch.testing.assert_close(got.sum(0), sum(g[i] for g in want))
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(lambda one: loss(parameters, one[None]))(x)


def test_a_compiled_cell_gives_the_same():
    deq, x = layer("dropout"), torch.randn(4, 3, requires_grad=True)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        z = deq(x)
        found.append((z, *torch.autograd.grad(z.square().sum(), [x, *deq.parameters()])))
        deq.cell.compile(backend="eager")
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
