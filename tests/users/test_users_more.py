"""More situations of users, by kind; the right value comes from a finite difference of the whole training, or a loop by hand."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import hyperopt
from hyperopt import Checkpointed, FiniteDifference, GradientDescent, OneStep, Unrolled
from hyperopt.core.places import Places
from hyperopt.core.replay import Replay

D = torch.float64


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 4, generator=draw, dtype=D)
    return x, x.sum(1, keepdim=True).sin() + 0.3 * torch.randn(24, 1, generator=draw, dtype=D)


(X, Y), (XV, YV), WEIGHTS = data(), data(1), torch.ones(24, dtype=D)
Build = Callable[[], tuple[hyperopt.BilevelProblem, Any]]


def seeded(build: Build, lam: torch.Tensor, **how: Any) -> hyperopt.Estimate:
    problem, w = build()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    return hyperopt.hypergradient(problem, w, lam, **how)


def is_right(build: Build) -> None:
    """Of both unrolled adjoints, and of products by finite differences."""
    d = torch.randn(24, generator=torch.Generator().manual_seed(5), dtype=D)
    for adjoint in (Unrolled(), Checkpointed(segment=3)):
        how: dict[str, Any] = {"inner": GradientDescent(step_size=0.1, max_steps=6), "adjoint": adjoint}
        want = (seeded(build, WEIGHTS + 1e-5 * d, **how).loss - seeded(build, WEIGHTS - 1e-5 * d, **how).loss) / 2e-5
        assert abs(want) > 1e-4
        assert float(seeded(build, WEIGHTS, **how).grad @ d) == pytest.approx(want, rel=1e-5)
    one, two = (seeded(build, WEIGHTS, adjoint=adjoint, step=0.1).grad for adjoint in (OneStep(), FiniteDifference()))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-9)


def of(make: Callable[[], nn.Module]) -> Build:
    def build() -> tuple[hyperopt.BilevelProblem, Any]:
        torch.manual_seed(0)
        model = hyperopt.Functional(make().double())
        return hyperopt.BilevelProblem(
            lambda w, lam, b: (lam[:, None] * (model(w, X) - Y).square()).mean(),
            lambda w, lam, b: (model(w, XV) - YV).square().mean(),
        ), model.w

    return build


def factor(draw: Callable[[], float]) -> Build:
    """A linear model whose inputs are multiplied by a number."""
    return lambda: (
        hyperopt.BilevelProblem(
            lambda w, lam, b: (lam[:, None] * (X * draw() @ w - Y).square()).mean(),
            lambda w, lam, b: (XV @ w - YV).square().mean(),
        ),
        torch.zeros(4, 1, dtype=D),
    )


def mixed() -> float:
    return float(np.random.beta(0.4, 0.4)) + random.uniform(0.5, 1.5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: 0.5 + random.random(),
        lambda: 0.5 + float(np.random.rand()),
        mixed,
        lambda: float(np.random.permutation(5)[0] + 1) / 3,
        lambda: random.choice([0.5, 1.0, 1.5]) * float(torch.rand(())),
    ],
)
def test_the_generators_of_python_and_numpy_give_the_same_in_a_replay(draw):
    is_right(factor(draw))


class Own(nn.Module):
    """A model with a state or generator of its own, of each kind."""

    shared = 0
    seen: Any

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind, self._private, type(self).shared = nn.Linear(4, 1), kind, 1.0, 0
        self.states: dict[str, Any] = {
            "Random": random.Random(3),
            "RandomState": np.random.RandomState(3),
            "Generator": np.random.default_rng(3),
            "torch Generator": torch.Generator().manual_seed(3),
            "list": [],
            "list replaced": [1.0, 2.0, 3.0],
            "deque": collections.deque([1.0, 2.0], maxlen=2),
            "Counter": collections.Counter(),
            "set": set(),
            "array": np.ones(2),
            "dataclass": Counting(),
            "slots": Slots(),
            "count": itertools.count(1),
            "cycle": itertools.cycle([0.5, 1.0, 1.5]),
            "generator function": halved(),
        }

    def number(self) -> float:
        state: Any = self.states.get(self.kind)
        if self.kind in ("Random", "Generator"):
            return 0.5 + state.random()
        if self.kind == "RandomState":
            return 0.5 + state.rand()
        if self.kind == "torch Generator":
            return 0.5 + float(torch.rand((), generator=state))
        if self.kind in ("count", "cycle", "generator function"):
            return 1 + next(state) / 4
        if self.kind == "list":
            state.append(1)
            return 1 + len(state) / 4
        if self.kind == "list replaced":
            state.insert(0, state.pop())
            return state[0]
        if self.kind == "deque":
            state.append(state[0] * 1.1)
            return state[0]
        if self.kind == "Counter":
            state["calls"] += 1
            return 1 + state["calls"] / 4
        if self.kind == "set":
            state.add(len(state))
            return 1 + len(state) / 4
        if self.kind == "array":
            state *= 0.9
            return float(state.sum())
        if self.kind in ("dataclass", "slots"):
            state.calls += 1
            return 1 + state.calls / 4
        if self.kind == "class":
            type(self).shared += 1
            return 1 + self.shared / 4
        if self.kind == "new attribute":
            self.seen = getattr(self, "seen", 1.0) * 0.9
            return self.seen
        self._private *= 0.9
        return self._private

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.number()


@dataclasses.dataclass
class Counting:
    calls: float = 0.0


class Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


def halved() -> Iterator[float]:
    value = 2.0
    while True:
        value /= 2
        yield value


KINDS = [
    *("Random", "RandomState", "Generator", "torch Generator", "list", "list replaced", "deque", "Counter", "set", "array"),
    *("dataclass", "slots", "count", "cycle", "generator function", "class", "new attribute", "private attribute"),
]


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_any_kind_is_replayed(kind):
    is_right(of(lambda: Own(kind)))


def test_the_next_batch_of_a_loader_in_the_loss():
    def build() -> tuple[hyperopt.BilevelProblem, Any]:
        loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
        batches = iter(loader)

        def inner(w: torch.Tensor, lam: torch.Tensor, batch: Any) -> torch.Tensor:
            nonlocal batches
            try:
                x, y = next(batches)
            except StopIteration:
                batches = iter(loader)
                x, y = next(batches)
            return (lam[:8, None] * (x @ w - y).square()).mean()

        return hyperopt.BilevelProblem(inner, lambda w, lam, b: (XV @ w - YV).square().mean()), torch.zeros(4, 1, dtype=D)

    is_right(build)


def test_an_iterator_and_a_record_after_a_commit():
    numbers, record = iter(range(9)), []

    def function(x: torch.Tensor) -> torch.Tensor:
        record.append(len(record))
        return x * next(numbers)

    for k in range(3):
        replay = Replay(Places.of(function))
        found = [float(replay(function, torch.ones(()))) for _ in range(3)]
        assert found == [k, k, k]
        replay.commit()
    look = Replay(Places.of(function))  # without a commit, it leaves the item
    assert float(look(function, torch.ones(()))) == 3 and next(numbers) == 3 and next(numbers) == 4
    assert len(record) == 10  # all calls; each replay has seen it as the first call did


def test_another_thread_keeps_its_own_numbers_of_python():
    drawn: list[float] = []
    stop = threading.Event()
    own = random.random

    def draw() -> None:
        while not stop.is_set():
            drawn.append(own())
            time.sleep(1e-5)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        problem, w = of(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1)))()
        for _ in range(5):
            inner = GradientDescent(step_size=0.1, max_steps=6)
            hyperopt.hypergradient(problem, w, WEIGHTS, inner=inner, adjoint=Checkpointed())
    finally:
        stop.set()
        thread.join()
    assert len(set(drawn)) == len(drawn) > 10


@pytest.mark.cases(quick=2)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("old", [False, True])
def test_the_second_derivative_of_weight_normalisation(old, dim):
    """That of PyTorch's kernel takes the norms for constants."""
    wrap = nn.utils.weight_norm if old else parametrizations.weight_norm
    is_right(of(lambda: nn.Sequential(wrap(nn.Linear(4, 6), dim=dim), nn.Tanh(), nn.Linear(6, 1))))  # pyright: ignore[reportArgumentType]


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)),
    "average": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Linear(6, 1)),
    "spectral": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)),
    "spectral, old": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)),
}


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(segment=3)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", LOOPS)
def test_statistics_that_carry_no_derivative_are_those_of_a_loop(name, adjoint):
    torch.manual_seed(0)
    net = LOOPS[name]().double()
    w, lam = {key: p.detach().clone().requires_grad_() for key, p in net.named_parameters()}, WEIGHTS.clone().requires_grad_()
    torch.manual_seed(1)
    for _ in range(6):
        loss = (lam[:, None] * (functional_call(net, w, (X,)) - Y).square()).mean()
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {key: p - 0.1 * g for (key, p), g in zip(w.items(), grads, strict=True)}
    (want,) = torch.autograd.grad((functional_call(net.eval(), w, (XV,)) - YV).square().mean(), lam)
    torch.manual_seed(0)
    other = LOOPS[name]().double()
    model = hyperopt.Functional(other)

    def outer(w: Any, lam: Any, batch: Any) -> torch.Tensor:
        other.eval()
        loss = (model(w, XV) - YV).square().mean()
        other.train()
        return loss

    problem = hyperopt.BilevelProblem(lambda w, lam, b: (lam[:, None] * (model(w, X) - Y).square()).mean(), outer)
    torch.manual_seed(1)
    found = hyperopt.hypergradient(problem, model.w, WEIGHTS, inner=GradientDescent(step_size=0.1, max_steps=6), adjoint=adjoint)
    torch.testing.assert_close(found.grad, want)
    for a, b in zip(other.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class FrozenStatistics(nn.Module):
    """Puts its normalisation into evaluation mode at each call, as detection networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.calls = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.eval()
        self.calls.append(1)
        return self.last(torch.tanh(self.norm(self.first(x))))


def test_a_normalisation_that_is_put_into_evaluation_mode_by_the_network():
    is_right(of(FrozenStatistics))


def test_a_normalisation_in_evaluation_mode_changes_nothing():
    """A step that changes nothing is not evaluated again."""
    torch.manual_seed(0)
    net = FrozenStatistics().double()
    net.norm.eval()
    model = hyperopt.Functional(net)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (lam[:, None] * (model(w, X) - Y).square()).mean(), lambda w, lam, b: w["last.weight"].sum()
    )
    hyperopt.hypergradient(problem, model.w, WEIGHTS, inner=GradientDescent(step_size=0.1, max_steps=20), adjoint=Unrolled())
    assert len(net.calls) < 30


class Bag(nn.Module):
    """Words of an example are those of its positive entries; the first has none."""

    def __init__(self, form: str, mode: str, padding: int | None = None) -> None:
        super().__init__()
        self.form, self.last = form, nn.Linear(3, 1)
        self.bag = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding, include_last_offset=form == "last")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x * 2).abs().long().clamp(max=4)
        if self.form == "matrix":
            weights = x.abs() if self.bag.mode == "sum" else None
            return self.last(torch.tanh(self.bag(words, per_sample_weights=weights)))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(0, 4 * (len(x) - 1), 4)])
        offsets = torch.cat([offsets, torch.tensor([4 * len(x)])]) if self.form == "last" else offsets
        return self.last(torch.tanh(self.bag(words.flatten(), offsets)))


@pytest.mark.parametrize(
    ("form", "mode", "padding"), [("matrix", "sum", None), ("matrix", "mean", 1), ("offsets", "mean", None), ("last", "sum", -2)]
)
def test_the_second_derivative_of_a_bag_of_embeddings(form, mode, padding):
    """PyTorch's kernel has none."""
    is_right(of(lambda: Bag(form, mode, padding)))
