"""A recomputation is a replay: random numbers and states of losses and maps, in every method that evaluates again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_users_property import LAYERS, Scaled
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import hyperopt
from hyperopt import CG, SOBA, Checkpointed, FiniteDifference, GradientDescent, Implicit, ImpureMapError, OneStep, Unrolled
from hyperopt.core.places import Places
from hyperopt.core.replay import Replay
from hyperopt.nn import DEQ

D = torch.float64


def data(rows: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=draw, dtype=D)
    return x, x.sum(1, keepdim=True).sin() + torch.randn(rows, 1, generator=draw, dtype=D)


def network(layer: str) -> tuple[nn.Module, hyperopt.BilevelProblem, hyperopt.Functional]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), LAYERS[layer](), nn.Tanh(), nn.Linear(6, 1)).double()
    model, (x, y), (xv, yv) = hyperopt.Functional(net), data(), data(seed=1)
    return (
        net,
        hyperopt.BilevelProblem(
            lambda w, lam, b: (
                (lam[:, None] * (model(w, x) - y).square()).mean() + 0.1 * sum(p.square().sum() for p in w.values())
            ),
            lambda w, lam, b: (model(w, xv) - yv).square().mean(),
        ),
        model,
    )


@pytest.mark.cases(quick=4)
@pytest.mark.parametrize("layer", LAYERS)
def test_products_by_finite_differences_are_those_by_autograd(layer):
    """Both see the numbers that the first evaluation draws."""
    found = []
    for adjoint, curvature in (
        (OneStep(), "hessian"),
        (FiniteDifference(), "hessian"),
        (Implicit(hyperopt.Neumann(rtol=0, max_steps=3), policy="ignore"), "hessian"),
        (Implicit(hyperopt.Neumann(rtol=0, max_steps=3), policy="ignore"), "finite_differences"),
    ):
        net, problem, model = network(layer)
        before = [b.clone() for b in net.buffers()]
        torch.manual_seed(1)
        lam = torch.ones(30, dtype=D)
        found.append(hyperopt.hypergradient(problem, model.w, lam, adjoint=adjoint, curvature=curvature, step=0.1).grad)
        outer = network(layer)[0]  # the inner loss is differentiated, which is not a step: only the outer loss moves the state
        for b, kept in zip(outer.buffers(), before, strict=True):
            b.copy_(kept)
        outer(data(seed=1)[0])
        if not any(isinstance(m, nn.Dropout | nn.RReLU) for m in net.modules()):
            for got, want in zip(net.buffers(), outer.buffers(), strict=True):
                torch.testing.assert_close(got, want)
    assert float(found[0].norm()) > 0 and float(found[2].norm()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[3], found[2], rtol=1e-4, atol=1e-8)


def test_gauss_newton_sees_the_numbers_of_the_gradient():
    """For a model that is linear in ``w`` it is the Hessian."""
    x, y = data()
    loss = hyperopt.Composite(
        lambda w, lam, b: functional.dropout(x, 0.5) @ w, lambda z, w, lam, b: (lam[:, None] * (z - y).square()).mean()
    )
    problem = hyperopt.BilevelProblem(loss, lambda w, lam, b: (x @ w - y.flip(0)).square().mean())
    found = []
    for curvature in ("hessian", "gauss_newton"):
        torch.manual_seed(0)
        lam = torch.ones(30, dtype=D)
        w = torch.zeros(6, 1, dtype=D)
        found.append(hyperopt.hypergradient(problem, w, lam, adjoint=Implicit(CG(1e-12)), curvature=curvature).grad)
    torch.testing.assert_close(found[1], found[0])


class Sampled:
    """Losses that keep a state outside of modules: rebinding, in place, or a number."""

    def __init__(self, kind: str) -> None:
        self.kind, self.x, self.y = kind, *data()
        self.average, self.number = torch.ones((), dtype=D), 0
        self.kept: dict[str, Any] = {"average": torch.ones((), dtype=D), "calls": 0}
        self.list = [1.0]

    def factor(self) -> Any:
        if self.kind == "attribute in place":
            self.average.mul_(0.9)
            return self.average
        if self.kind == "attribute replaced":
            self.average = 0.9 * self.average
            return self.average
        if self.kind == "number":
            self.number += 1
            return 1 / self.number
        if self.kind == "dict in place":
            self.kept["average"].mul_(0.9)
            return self.kept["average"]
        if self.kind == "dict replaced":
            self.kept["calls"] += 1
            self.kept["average"] = self.kept["average"] * 0.9
            return self.kept["average"] / self.kept["calls"]
        if self.kind == "list":
            self.list[0] *= 0.9
            return self.list[0]
        return 1 + torch.rand((), dtype=D)

    def inner(self, w: torch.Tensor, lam: torch.Tensor, batch: Any) -> torch.Tensor:
        return self.factor() * (lam[:, None] * (torch.tanh(self.x @ w) - self.y).square()).mean()


@pytest.mark.cases(quick=7)
@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), Checkpointed(segment=3)], ids=str)
@pytest.mark.parametrize(
    "kind", ["attribute in place", "attribute replaced", "number", "dict in place", "dict replaced", "list", "random"]
)
def test_a_state_outside_of_modules(kind, adjoint):
    def run(lam: torch.Tensor) -> Any:
        sampled = Sampled(kind)
        torch.manual_seed(3)
        problem = hyperopt.BilevelProblem(
            lambda w, lam, b: sampled.inner(w, lam, b), lambda w, lam, b: (sampled.x @ w - sampled.y.flip(0)).square().mean()
        )
        inner = GradientDescent(step_size=0.3, max_steps=7)
        return hyperopt.hypergradient(problem, torch.zeros(6, 1, dtype=D), lam, inner=inner, adjoint=adjoint)

    lam, d = torch.ones(30, dtype=D), data(seed=4)[1].flatten()
    want = (run(lam + 1e-5 * d).loss - run(lam - 1e-5 * d).loss) / 2e-5
    assert float(run(lam).grad @ d) == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_a_closed_over_counter_and_a_global_one():
    calls = 0

    def inner(w: torch.Tensor, lam: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (w - lam / calls).square().sum()

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, b: w.square().sum())
    lam, steps = torch.tensor([0.5], dtype=D), 4
    for adjoint in (Unrolled(), Checkpointed()):
        calls = 0
        found = hyperopt.hypergradient(
            problem, torch.zeros(1, dtype=D), lam, inner=GradientDescent(step_size=0.1, max_steps=steps), adjoint=adjoint
        )
        assert calls == steps
        slope = sum(0.2 / (k + 1) * 0.8 ** (steps - 1 - k) for k in range(steps))
        torch.testing.assert_close(found.grad, 2 * slope**2 * lam)


def test_another_thread_keeps_its_own_numbers():
    """Its numbers do not repeat, and no solve takes them for its map's."""
    drawn: list[torch.Tensor] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            drawn.append(torch.rand(20, dtype=D))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        deq = DEQ(Cell(nn.Dropout(0.3)))
        for _ in range(10):
            deq(torch.randn(4, 6, dtype=D)).sum().backward()
            hyperopt.fixed_point(lambda w: 0.5 * torch.cos(w), torch.zeros(3, 2, dtype=D))
    finally:
        stop.set()
        thread.join()
    numbers = torch.cat(drawn)
    assert len(numbers.unique()) == len(numbers)


class Cell(nn.Module):
    def __init__(self, *extra: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.extra, self.checkpointed = nn.Linear(6, 6).double(), nn.Sequential(*extra).double(), checkpointed
        self.calls: list[int] = []

    def part(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.extra(0.3 * self.linear(z) + x)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        part = checkpoint(self.part, z, x, use_reentrant=False) if self.checkpointed else self.part(z, x)
        assert isinstance(part, torch.Tensor)
        return 0.3 * torch.tanh(part)


@pytest.mark.parametrize(
    "adjoint", [Implicit(hyperopt.GMRES(1e-12)), Unrolled(), Checkpointed(), OneStep()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("extra", ["batch norm", "dropout", "both", "average", "plain"])
def test_a_checkpoint_inside_of_a_cell(extra, adjoint):
    made: dict[str, Callable[[], list[nn.Module]]] = {
        "batch norm": lambda: [nn.BatchNorm1d(6)],
        "dropout": lambda: [nn.Dropout(0.4)],
        "both": lambda: [nn.BatchNorm1d(6), nn.Dropout(0.4)],
        "average": lambda: [Scaled(True)],
        "plain": lambda: [nn.Tanh()],
    }
    found = []
    for checkpointed in (False, True):
        cell = Cell(*made[extra](), checkpointed=checkpointed)
        deq = DEQ(cell, hyperopt.Picard(1e-12), adjoint, drop_rows=False)
        x = data()[0].clone().requires_grad_()
        torch.manual_seed(5)
        value = deq(x)
        value.square().sum().backward()
        found.append([value, x.grad, *(p.grad for p in cell.parameters()), *cell.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        lambda w: torch.empty_like(w).exponential_(),
        lambda w: torch.bernoulli(torch.full_like(w, 0.5)),
        lambda w: torch.randint(0, 5, w.shape).to(w),
        lambda w: torch.normal(w, 1.0),
        lambda w: w[torch.randperm(len(w))],
        lambda w: functional.gumbel_softmax(w, dim=-1),
        lambda w: functional.scaled_dot_product_attention(w[None], w[None], w[None], dropout_p=0.5)[0],
    ],
)
def test_a_random_map_is_refused_whatever_draws(draw):
    with pytest.raises(ImpureMapError, match="random numbers"):
        hyperopt.fixed_point(lambda w: 0.1 * draw(w), torch.ones(4, 3, dtype=D))


def test_attention_without_dropout_is_no_random_map():
    w = data()[0]
    hyperopt.fixed_point(
        lambda z: 0.1 * functional.scaled_dot_product_attention(z[None], w[None], w[None])[0], torch.zeros(30, 6, dtype=D)
    )


@pytest.mark.parametrize("layer", ["dropout", "batch norm", "counting buffer", "average replaced"])
@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (SOBA(step_size=0.01), 1),
        (hyperopt.F2SA(step_size=0.01, steps=3), 3),
        (hyperopt.VPBGD(step_size=0.01, steps=2), 2),
        (hyperopt.StocBiO(step_size=0.01, steps=2, terms=3), 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_single_loop_methods_move_a_state_once_a_step(layer, method, steps):
    net, problem, model = network(layer)
    evaluated: list[None] = []

    def outer(w: Any, lam: Any, batch: Any) -> torch.Tensor:
        net.eval()
        loss = torch.stack([p.square().sum() for p in w.values()]).sum()
        net.train()
        return loss

    def inner(w: Any, lam: Any, batch: Any) -> torch.Tensor:
        evaluated.append(None)
        return problem.inner_loss(w, lam, batch)

    hyperopt.Bilevel(hyperopt.BilevelProblem(inner, outer), model.w, adjoint=method).step(torch.ones(30, dtype=D))
    moved = [b for name, b in net.named_buffers() if name.endswith(("calls", "num_batches_tracked"))]
    assert all(int(b) == steps for b in moved)
    if layer == "average replaced":
        average = 1.0
        for _ in range(steps):
            average = 0.9 * average + 0.2
        assert float(net[1].average) == pytest.approx(average)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert len(evaluated) >= steps


@pytest.mark.parametrize(
    "method", [hyperopt.F2SA(step_size=0.01, steps=2), hyperopt.VPBGD(step_size=0.01)], ids=lambda x: type(x).__name__
)
def test_both_copies_of_a_penalty_method_see_the_same_noise(method):
    masks: list[torch.Tensor] = []
    x, y = data()

    def inner(w: torch.Tensor, lam: torch.Tensor, batch: Any) -> torch.Tensor:
        masks.append(torch.rand(30, dtype=D))
        return (lam[:, None] * (x @ w - y).square() * masks[-1][:, None]).mean()

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, b: (x @ w - y.flip(0)).square().mean())
    hyperopt.Bilevel(problem, torch.zeros(6, 1, dtype=D), adjoint=method).step(torch.ones(30, dtype=D))
    pairs = [masks[i : i + 2] for i in range(0, len(masks), 2)]
    assert all(torch.equal(*pair) for pair in pairs)
    assert len({float(m[0]) for m in masks}) == len(pairs)


def test_a_line_search_sees_one_function():
    x, y = data()
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (functional.dropout(x, 0.5) @ w - y).square().mean() + lam * w.square().sum(),
        lambda w, lam, b: (x @ w - y).square().mean(),
    )
    found = hyperopt.hypergradient(
        problem, torch.zeros(6, 1, dtype=D), torch.tensor(0.1, dtype=D), inner=hyperopt.InnerLBFGS(rtol=1e-10), adjoint=OneStep()
    )
    assert found.inner is not None and not found.inner.status.failed


def test_different_steps_draw_different_numbers():
    drawn: list[float] = []

    def inner(w: torch.Tensor, lam: torch.Tensor, batch: Any) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return (w - lam).square().sum()

    problem = hyperopt.BilevelProblem(inner, lambda w, lam, b: w.square().sum())
    inner_solver = GradientDescent(step_size=0.1, max_steps=6)
    hyperopt.hypergradient(problem, torch.zeros(1), torch.ones(1), inner=inner_solver, adjoint=Checkpointed(segment=2))
    assert len(set(drawn[:6])) == 6
    assert len(drawn) > 12 and len(set(drawn)) <= 9  # the measurements of the gradient draw their own


def test_a_replay_that_cannot_be_is_refused():
    calls: list[None] = []

    def changing(w: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return w * torch.rand(len(calls), dtype=w.dtype).sum()

    replay = Replay(Places())
    replay(changing, torch.ones(2))
    with pytest.raises(ImpureMapError, match="drew other random numbers"):
        replay(changing, torch.ones(2))
    gamma = Replay(Places())
    gamma(torch.ops.aten._standard_gamma, torch.ones(2))
    with pytest.raises(ImpureMapError, match="depend on what is differentiated"):
        gamma(torch.ops.aten._standard_gamma, torch.full((2,), 2.0))
    with pytest.raises(ImpureMapError, match="in place"):
        Replay(Places())(lambda w: w.add_(1), torch.ones(2))


def test_a_replay_after_a_commit_starts_where_the_first_call_did():
    scaled = Scaled(True)
    for module in (scaled, Scaled(False)):
        replay = Replay(Places.of_modules([module]))
        first = replay(module, torch.ones(2))
        replay.commit()
        assert float(module.average) != 1
        assert torch.equal(replay(module, torch.ones(2)), first) and torch.equal(replay(module, torch.ones(2)), first)
        assert torch.equal(module(torch.ones(2)) == first, torch.zeros(2, dtype=torch.bool))


def test_a_map_that_seeds_its_own_generator_is_no_random_map():
    def phi(w: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(3), dtype=D)
        return 0.3 * torch.cos(w) + noise + torch.rand((), generator=torch.Generator().manual_seed(1))

    found = hyperopt.fixed_point(phi, torch.zeros(4, 3, dtype=D), solver=hyperopt.Picard(1e-12)).value
    torch.testing.assert_close(phi(found), found)
    used = torch.Generator().manual_seed(0)
    torch.rand(3, generator=used)
    with pytest.raises(ImpureMapError, match="random numbers"):
        hyperopt.fixed_point(lambda w: 0.3 * w + torch.rand(w.shape, generator=used, dtype=D), torch.zeros(4, 3, dtype=D))
