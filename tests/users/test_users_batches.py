"""Loaders and datasets of ``torch.utils.data`` as sources of batches: the same ones in the same order, resumed or looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import hyperopt as ho
from hyperopt.bilevel.batches import SameBatch, source_of
from hyperopt.bilevel.loaders import LoaderBatches

D: dict[str, Any] = {"dtype": torch.float64}
X = torch.arange(23.0, **D)[:, None] + torch.tensor([0.0, 0.5], **D)
Y = X.sum(1, keepdim=True)
DATA = TensorDataset(X, Y)
LR = ho.GradientDescent(step_size=1e-4, max_steps=3)


class Named(Dataset[dict[str, Any]]):
    """Rows that are dicts, with a number, a word and an array."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], "y": Y[i].numpy(), "name": f"row {i}", "number": i}


class Stream(IterableDataset[Tensor]):
    """Rows one after the other; ``noise`` adds what is drawn anew every time it is walked."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(10):
            yield X[i] + (torch.rand(()) if self.noise else 0)


class Augmented(Dataset[Tensor]):
    """Rows with random numbers of the process that reads them, of all three kinds."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return X[i] + torch.rand((), **D) + random.random() + np.random.rand()


class OwnOrder(Sampler[int]):
    """A sampler whose order comes from numbers that nobody else sees."""

    def __init__(self) -> None:
        self.numbers = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        yield from self.numbers.sample(range(20), 20)

    def __len__(self) -> int:
        return 20


class WithGenerator(OwnOrder):
    """The same with a generator that is seen."""

    def __init__(self) -> None:
        self.generator = None

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(20, generator=self.generator).tolist()


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reversed_rows(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([x for x, _ in reversed(rows)])


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(DATA, 5),
    "drop_last": lambda: DataLoader(DATA, 5, drop_last=True, shuffle=True),
    "shuffled": lambda: DataLoader(DATA, 5, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(DATA, 5, shuffle=True, generator=seeded()),
    "collate_fn": lambda: DataLoader(DATA, 4, shuffle=True, collate_fn=reversed_rows),
    "subset": lambda: DataLoader(Subset(DATA, range(3, 17)), 4, shuffle=True),
    "dicts": lambda: DataLoader(Named(), 6, shuffle=True),
    "with replacement": lambda: DataLoader(DATA, 5, sampler=RandomSampler(DATA, replacement=True, num_samples=40)),
    "a sampler's generator": lambda: DataLoader(DATA, 5, sampler=RandomSampler(DATA, generator=seeded(3)), generator=seeded(4)),
    "weighted": lambda: DataLoader(DATA, 5, sampler=WeightedRandomSampler([1.0, 2.0, 3.0] * 7, 21)),
    "subset sampler": lambda: DataLoader(DATA, 3, sampler=SubsetRandomSampler(range(11))),
    "batch_sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 7, drop_last=False)),
    "batches listed": lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2], [3, 4, 5]]),
    "distributed": lambda: DataLoader(DATA, 4, sampler=DistributedSampler(DATA, num_replicas=2, rank=1, seed=1)),
    "own sampler": lambda: DataLoader(DATA, 6, sampler=WithGenerator()),
    "no batches": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
    "iterable": lambda: DataLoader(Stream(), 4),
    "iterable in workers": lambda: DataLoader(Stream(), 4, num_workers=1),
    "workers": lambda: DataLoader(Augmented(), 3, shuffle=True, num_workers=2),
}


def drawn(source: Any, count: int) -> list[Any]:
    return [source.draw() for _ in range(count)]


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


@pytest.mark.cases(quick=3, slow=32, among={"before": [3]})
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("before", [0, 2, 3, 7])
def test_a_resumed_source_goes_on_with_the_same_batches(kind: str, before: int) -> None:
    """From the start, the middle of an epoch, and later epochs, in a process whose generators stand elsewhere."""
    torch.manual_seed(1)
    source = source_of(LOADERS[kind](), "inner_batches")
    drawn(source, before)
    state = source.state_dict()
    rest = drawn(source, 9)
    torch.manual_seed(2)
    again = source_of(LOADERS[kind](), "inner_batches")
    drawn(again, 1)
    again.load_state_dict(state)
    assert equal(drawn(again, 9), rest)


@pytest.mark.cases(quick=4)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_look_at_the_next_batch_neither_loses_nor_repeats_one(kind: str) -> None:
    torch.manual_seed(1)
    plain = drawn(source_of(LOADERS[kind](), "outer_batches"), 9)
    problem = ho.BilevelProblem(lambda w, lam, batch: w, lambda w, lam, batch: w, outer_batches=LOADERS[kind]())
    for batch in plain:
        for _ in range(2):
            assert equal(problem.at_next_batch().outer_batches.draw(), batch)
        assert equal(problem.outer_batches.draw(), batch)


def test_the_order_is_the_loaders_own_where_it_has_a_generator() -> None:
    loader, source = LOADERS["shuffled by a generator"](), source_of(LOADERS["shuffled by a generator"](), "inner_batches")
    assert equal(drawn(source, 15), [batch for _ in range(3) for batch in loader])


def test_epochs_are_whole_and_differ() -> None:
    source = source_of(DataLoader(DATA, 5, shuffle=True), "inner_batches")
    epochs = [torch.cat([x for x, _ in drawn(source, 5)]) for _ in range(3)]
    assert all(torch.equal(epoch[epoch[:, 0].argsort()], X) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_the_order_follows_the_seed_and_differs_between_the_two_losses() -> None:
    def orders(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        loader = DataLoader(DATA, 23, shuffle=True)
        problem = ho.BilevelProblem(lambda w, lam, b: w, lambda w, lam, b: w, inner_batches=loader, outer_batches=loader)
        return problem.inner_batches.draw()[0], problem.outer_batches.draw()[0]

    one, two, other = orders(0), orders(0), orders(1)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if "workers" not in kind])
def test_no_number_is_taken_from_the_process_wide_generator(kind: str) -> None:
    loader = LOADERS[kind]()
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    source = source_of(loader, "inner_batches")
    drawn(source, 8)
    source.load_state_dict(source.state_dict())
    assert torch.equal(torch.rand(4), expected)


def test_the_users_loader_is_left_alone() -> None:
    """Its generator has not moved, and it may be walked in between."""
    generator = seeded()
    loader = DataLoader(DATA, 5, shuffle=True, generator=generator)
    state, source = generator.get_state(), source_of(loader, "inner_batches")
    first = drawn(source, 2)
    assert torch.equal(generator.get_state(), state)
    between = list(loader)
    assert equal(first, between[:2])
    assert equal(drawn(source, 3), between[2:])


def test_the_random_numbers_of_workers_are_replayed() -> None:
    """Each of an epoch's batches has numbers of its own, and a resume in its middle finds them again."""
    source = source_of(LOADERS["workers"](), "inner_batches")
    whole = drawn(source, 6)
    assert not torch.equal(whole[0].sort(0).values[:2] % 1, whole[3].sort(0).values[:2] % 1)


# ---- in training


def problem(inner: Any, outer: Any) -> ho.BilevelProblem:
    def loss(w: Tensor, lam: Tensor, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return (x @ w - y).square().mean() + lam * w.square().sum()

    return ho.BilevelProblem(loss, loss, inner_batches=inner, outer_batches=outer)


@pytest.mark.parametrize("adjoint", [ho.Unrolled(), ho.Checkpointed()], ids=repr)
def test_training_on_a_loader_is_training_on_its_batches(adjoint: Any) -> None:
    """The iterates and the hypergradient of a loop over the loader, written out, over two epochs and a half."""
    lam, steps = torch.tensor(0.3, **D, requires_grad=True), 12
    found = ho.hypergradient(
        problem(DataLoader(DATA, 5, shuffle=True, generator=seeded()), DataLoader(Named(), 23)),
        torch.zeros(2, 1, **D),
        lam,
        inner=ho.GradientDescent(step_size=1e-4, max_steps=steps),
        adjoint=adjoint,
    )
    w, loader = torch.zeros(2, 1, **D), DataLoader(DATA, 5, shuffle=True, generator=seeded())
    for x, y in [batch for _ in range(3) for batch in loader][:steps]:
        w = w - 1e-4 * (2 * x.T @ (x @ w - y) / len(x) + 2 * lam * w)
    loss = (X @ w - Y).square().mean() + lam * w.square().sum()
    assert torch.allclose(found.w, w, rtol=1e-12)
    assert torch.allclose(found.grad, torch.autograd.grad(loss, lam)[0], rtol=1e-10)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("kind", ["shuffled", "dicts", "iterable"])
def test_a_run_that_was_stopped_gives_the_same_numbers(kind: str) -> None:
    class Both(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(X, Y, strict=True)

    def made() -> ho.Bilevel:
        loader = DataLoader(Both(), 4) if kind == "iterable" else LOADERS[kind]()
        return ho.Bilevel(problem(loader, DataLoader(DATA, 9, shuffle=True)), torch.zeros(2, 1, **D), inner=LR)

    torch.manual_seed(0)
    run = made()
    found = [float(run.step(torch.tensor(0.1 * i, **D)).grad) for i in range(6)]
    torch.manual_seed(0)
    run = made()
    for i in range(3):
        run.step(torch.tensor(0.1 * i, **D))
    state = run.state_dict()
    torch.manual_seed(9)
    again = made()
    again.load_state_dict(state)
    assert [float(again.step(torch.tensor(0.1 * i, **D)).grad) for i in range(3, 6)] == found[3:]


METHODS = [ho.SOBA(step_size=1e-4), ho.StocBiO(step_size=1e-4), ho.F2SA(step_size=1e-4), ho.T1T2(), ho.OneStep()]


@pytest.mark.parametrize("adjoint", METHODS, ids=lambda adjoint: type(adjoint).__name__)
def test_every_method_takes_a_loader(adjoint: Any) -> None:
    run = ho.Bilevel(
        problem(DataLoader(DATA, 5, shuffle=True), DataLoader(DATA, 23)),
        torch.zeros(2, 1, **D),
        inner=LR if isinstance(adjoint, ho.OneStep | ho.T1T2) else None,
        adjoint=adjoint,
    )
    assert torch.isfinite(run.step(torch.tensor(0.1, **D)).grad)


# ---- one batch


@pytest.mark.parametrize(
    "given",
    [
        DATA,
        Named(),
        Subset(DATA, range(23)),
        (X, Y),
        {"x": X, "y": Y},
        (X.numpy(), Y.numpy()),
        {"x": X.numpy(), "y": Y},
        ho.Minibatches((X.numpy(), Y.numpy())),
        DataLoader(DATA, 23),
        SameBatch((X, Y)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_one_batch_in_every_form_gives_the_same_hypergradient(given: Any) -> None:
    lam, w = torch.tensor(0.3, **D), torch.ones(2, 1, **D)
    found = ho.hypergradient(problem(given, given), w, lam, adjoint=ho.Implicit(ho.CG(rtol=1e-13)))
    H = 2 * (X.T @ X / 23 + 0.3 * torch.eye(2, **D))
    g = 2 * X.T @ (X @ w - Y) / 23 + 0.6 * w
    assert torch.allclose(found.grad, w.square().sum() - (2 * w * torch.linalg.solve(H, g)).sum(), rtol=1e-9)


def test_a_vector_is_a_batch() -> None:
    found = ho.hypergradient(
        ho.BilevelProblem(
            lambda w, lam, batch: (w - lam * batch).square().sum() / 2,
            lambda w, lam, batch: (w * batch).sum(),
            inner_batches=X[:, 0],
            outer_batches=np.ones(23),
        ),
        torch.zeros(23, **D),
        torch.tensor(1.0, **D),
    )
    assert float(found.grad) == pytest.approx(float(X[:, 0].sum()))


# ---- refused, when the problem is made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (DataLoader(TensorDataset(X[:0]), 4), "without batches"),
        (DataLoader(TensorDataset(X[:3]), 4, drop_last=True), "drop_last=True"),
        (DataLoader(type("Nothing", (IterableDataset,), {"__iter__": lambda self: iter(())})(), 2), "without batches"),
        (TensorDataset(X[:0]), "without rows"),
        (Stream(), "without a length"),
        ([(X, Y), (X, Y)], "list could be one batch or several"),
        ([X, Y], "list could be one batch or several"),
        ((X, [Y]), "not a source of batches"),
        (iter(DataLoader(DATA, 4)), "not a source of batches"),
        (lambda: (X, Y), "not a source of batches"),
        (ho.Minibatches, "not a source of batches"),
        ((), "not a source of batches"),
        ((X, "words"), "not a source of batches"),
        (X[:0], "no rows"),
        (type("Half", (), {"draw": lambda self: X})(), "state_dict"),
    ],
)
@pytest.mark.parametrize("which", ["inner_batches", "outer_batches"])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_what_is_no_source_is_refused_when_the_problem_is_made(given: Any, words: str, which: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words) as error:
        ho.BilevelProblem(lambda w, lam, b: w, lambda w, lam, b: w, **{which: given})
    assert which in str(error.value)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda: DataLoader(DATA, 6, shuffle=True), "5 batches an epoch|4 batches an epoch"),
        (lambda: DataLoader(TensorDataset(X[:21], Y[:21]), 5, shuffle=True), "21 rows"),
        (lambda: DataLoader(DATA, 5, sampler=RandomSampler(DATA, generator=seeded())), "other samplers"),
        (lambda: DataLoader(DATA, 5), "not those of the saved run"),
    ],
)
def test_the_state_of_another_loader_is_refused(loader: Callable[[], DataLoader[Any]], words: str) -> None:
    source = source_of(DataLoader(DATA, 5, shuffle=True), "inner_batches")
    drawn(source, 7)
    with pytest.raises(ValueError, match=words):
        source_of(loader(), "inner_batches").load_state_dict(source.state_dict())


@pytest.mark.parametrize("loader", [lambda: DataLoader(Stream(noise=True), 3), lambda: DataLoader(DATA, 3, sampler=OwnOrder())])
def test_a_place_that_cannot_be_taken_back_is_refused(loader: Callable[[], DataLoader[Any]]) -> None:
    source = source_of(loader(), "inner_batches")
    drawn(source, 9)
    again = source_of(loader(), "inner_batches")
    with pytest.raises(ValueError, match="random numbers that the DataLoader does not own"):
        again.load_state_dict(source.state_dict())


def test_a_stream_that_has_become_shorter_or_ends_for_good_is_refused() -> None:
    class Once(IterableDataset[Tensor]):
        def __init__(self, rows: int) -> None:
            self.rows = iter(X[:rows])

        def __iter__(self) -> Iterator[Tensor]:
            return self.rows

    source = source_of(DataLoader(Once(9), 3), "inner_batches")
    drawn(source, 2)
    state, last = source.state_dict(), source.draw()
    again = source_of(DataLoader(Once(9), 3), "inner_batches")
    again.load_state_dict(state)  # ahead of where a new one stands: it can be walked there
    assert torch.equal(again.draw(), last)
    with pytest.raises(ValueError, match="gives only 1 now"):
        source_of(DataLoader(Once(3), 3), "inner_batches").load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="can be iterated only once"):
        source.draw()


def test_the_state_of_another_kind_of_source_is_refused() -> None:
    source = source_of(DataLoader(DATA, 5), "inner_batches")
    assert isinstance(source, LoaderBatches)
    with pytest.raises(ValueError, match="belongs to another source"):
        source.load_state_dict(ho.Minibatches((X, Y), 5).state_dict())
