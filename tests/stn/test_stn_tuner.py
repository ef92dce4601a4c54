"""``SelfTuning`` by the interface of ``Tuner``: data as a user has them, a loop of one's own, records, resume."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, SubsetRandomSampler, TensorDataset, random_split

import hyperopt
from hyperopt.bilevel.batches import Minibatches
from hyperopt.stn import STN, Bounded, Discrete, Draw, HyperSpace, Positive, Round, SelfTuning, SelfTuningSettings, convert

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level

DOUBLE = torch.float64
MODES = ("classic", "centred", "delta", "delta_linear")
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
Y = X.square().sum(1, keepdim=True)
TRAIN, VAL = (X[:22], Y[:22]), (X[22:], Y[22:])


def train_loss(model: STN, batch: Any, draw: Draw) -> Tensor:
    x, y = batch
    x = x + draw.h["noise"].detach()[:, None] * x.cos()
    return (model(x, draw) - y).square().mean() + (draw.h["decay"].detach() * model.squared_norm(draw)).mean() / 2


def val_loss(model: STN, batch: Any, draw: Draw | None) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def made(mode: str = "centred", std: float = 0.3, dropout: bool = False, **how: Any) -> SelfTuning:
    torch.manual_seed(0)
    space = HyperSpace({"noise": Bounded(0.2, 0.0, 1.0, scale=0.6), "decay": Positive(0.01, per="batch")}, dtype=DOUBLE)
    middle = nn.Dropout(0.3) if dropout else nn.Tanh()
    plain = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 1)).double()
    return SelfTuning(convert(plain, space, std=std), train_loss, val_loss, SelfTuningSettings(mode=mode, **how))


def loaders(workers: int = 0) -> tuple[DataLoader[Any], DataLoader[Any]]:
    order = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sets = TensorDataset(*TRAIN), TensorDataset(*VAL)
    train, val = (DataLoader(each, 8, shuffle=True, generator=one) for each, one in zip(sets, order, strict=True))
    return train, val


def same(one: SelfTuning, two: SelfTuning) -> bool:
    pair = one.model.state_dict(), two.model.state_dict()
    return all(torch.equal(a, b) for a, b in zip(*(each.values() for each in pair), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_a_round_on_the_same_batches(mode: str) -> None:
    one, two = made(mode, train_steps=3, valid_steps=2), made(mode, train_steps=3, valid_steps=2)
    sources = [[Minibatches(data, 8, seed=seed) for seed, data in enumerate((TRAIN, VAL))] for _ in range(2)]
    for _ in range(3):
        a, b = one.round(sources[0][0].draw, sources[0][1].draw), two.step(*sources[1])
        assert a == b and a.step == b.step
    assert same(one, two)


def data(kind: str) -> tuple[Any, Any]:
    match kind:
        case "one batch":
            return TRAIN, VAL
        case "a list of batches":
            return [TRAIN, TRAIN], [VAL]
        case "iterators":
            return iter([TRAIN] * 2), iter([VAL])
        case "datasets":
            return TensorDataset(*TRAIN), TensorDataset(*VAL)
        case _:
            return DataLoader(TensorDataset(*TRAIN), 22), DataLoader(TensorDataset(*VAL), 18)


@pytest.mark.parametrize("kind", ["a list of batches", "iterators", "datasets", "loaders"])
def test_every_kind_of_data_gives_the_same_step(kind: str) -> None:
    want, found = made(), made()
    want.step(*data("one batch"))
    found.step(*data(kind))
    assert same(want, found) and found.updates == 2


def test_batches_say_how_many_updates_there_are() -> None:
    tuner, (train, val) = made(), loaders()
    assert tuner.step(train, val, batches=4).gradients == 4 + 4
    assert tuner.step(train, val, batches=(3, 1)).gradients == 3 + 1
    assert tuner.step([TRAIN] * 5, [VAL]).gradients == 5 + 1
    assert tuner.step(train, val).gradients == 2 + 1
    assert tuner.updates == 14
    with pytest.raises(ValueError, match="batches=0 must be a whole number >= 1"):
        tuner.step(train, val, batches=0)
    assert made("delta", update="sequential").step(train, val).gradients == 2 * 2 + 2


def test_a_warm_up_is_as_long_as_asked() -> None:
    tuner, (train, val) = made(warmup=5), loaders()
    found = [tuner.step(train, val) for _ in range(4)]
    assert [each.warming for each in found] == [True, True, True, False] and [past.steps for past in tuner.history] == [
        2,
        2,
        1,
        2,
    ]
    assert "warm-up" in repr(found[0]) and "warm-up" not in repr(found[3])


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_has_the_gradients_that_a_weight_step_takes(mode: str) -> None:
    one, two = made(mode), made(mode)
    loss = one.loss(TRAIN)
    loss.backward()
    found = {name: p.grad for name, p in one.model.module.named_parameters()}
    # By hand: in the modes of two steps the weights see the hyperparameters themselves, and the response a draw.
    space, model = two.space, two.model
    with torch.no_grad():
        draw, centre = space.draw(22, two.generator), space.draw(22, perturb=False)
    at_draw = train_loss(model, TRAIN, draw)
    base, response = model.base_parameters(), model.response_parameters()
    of_base = torch.autograd.grad(
        train_loss(model, TRAIN, centre) if mode.startswith("delta") else at_draw, base, retain_graph=True
    )
    of_response = torch.autograd.grad(at_draw, response)
    names = {id(p): name for name, p in model.module.named_parameters()}
    for parameter, want in zip([*base, *response], [*of_base, *of_response], strict=True):
        torch.testing.assert_close(found[names[id(parameter)]], want, rtol=1e-10, atol=1e-12)
    assert float(loss.detach()) == pytest.approx(float(at_draw.detach()), rel=1e-12)


@pytest.mark.parametrize("mode", ["classic", "centred"])
def test_a_loop_of_ones_own_is_the_loop_of_step(mode: str) -> None:
    one, two = made(mode), made(mode)
    for _ in range(3):
        one.step([TRAIN, TRAIN], VAL)
        for _ in range(2):
            two.optimizers["weights"].zero_grad()
            two.loss(TRAIN).backward()
            two.optimizers["weights"].step()
        record = two.step(TRAIN, VAL)
        assert record.gradients == 3
    assert same(one, two) and one.history == two.history and one.updates == two.updates == 6


def test_a_loss_without_gradients_is_no_update() -> None:
    tuner = made()
    with torch.no_grad():
        tuner.loss(TRAIN)
    tuner.step(TRAIN, VAL)
    assert tuner.updates == 2


def test_the_modes_of_the_network_stay() -> None:
    tuner = made(dropout=True)
    tuner.model.module[0].eval()  # pyright: ignore[reportIndexIssue, reportCallIssue]
    before = [each.training for each in tuner.model.modules()]
    tuner.step(TRAIN, VAL)
    assert [each.training for each in tuner.model.modules()] == before and {*before} == {True, False}


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_state_continues_exactly_with_the_places_in_the_loaders(mode: str, own: bool) -> None:
    def go(tuner: SelfTuning, rounds: int, given: Any) -> None:
        for _ in range(rounds):
            if own:
                lent(tuner)
            tuner.step(*given)

    def lent(tuner: SelfTuning) -> None:
        tuner.optimizers["weights"].zero_grad()
        tuner.loss(TRAIN).backward()
        tuner.optimizers["weights"].step()

    whole = made(mode, warmup=3)
    go(whole, 6, loaders())
    first, given = made(mode, warmup=3), loaders()
    go(first, 3, given)
    if own:
        lent(first)  # a state between a loss and its step
    state = copy.deepcopy(first.state_dict())
    second = made(mode, warmup=3)
    second.load_state_dict(state)
    given = loaders()
    if own:
        second.step(*given)
    go(second, 2 if own else 3, given)
    assert same(whole, second) and whole.history == second.history


def test_a_state_from_before_there_were_places_is_taken() -> None:
    tuner = made()
    tuner.step(TRAIN, VAL)
    state = {name: value for name, value in tuner.state_dict().items() if name not in ("lent", "train", "val")}
    other = made()
    other.load_state_dict(state)
    assert same(tuner, other)


def test_a_step_that_fails_puts_the_places_back() -> None:
    tuner, (train, val) = made(), loaders()
    tuner.step(train, val)
    before = copy.deepcopy(tuner.state_dict())
    with pytest.raises(ValueError, match="val is an iterator with 0 batches left"):
        tuner.step(train, iter([]))
    assert repr(tuner.state_dict()["train"]) == repr(before["train"])


def test_a_record_prints_in_one_line_and_has_the_names_of_tensorboard() -> None:
    tuner = made()
    found = tuner.step(TRAIN, VAL)
    text = repr(found)
    assert re.fullmatch(
        r"step 1: val_loss=[\d.]+, train_loss=[\d.]+, noise=0\.\d+, decay=0\.0\d+, 3 gradient evaluations", text
    ), text
    numbers = found.as_dict()
    assert all(isinstance(value, float) and math.isfinite(value) for value in numbers.values())
    assert numbers["outer/loss"] == found.loss == found.valid_loss == numbers["stn/valid_loss"]
    assert {"hyper/noise", "hyper/noise/low", "stn/scale/decay", "stn/entropy", "stn/train_loss", "cost/gradients"} <= {*numbers}
    assert set(found.hyper) == {"hyper/noise", "hyper/decay"} and isinstance(found, Round)


def test_it_has_the_names_of_the_tuner() -> None:
    public = {name for name in vars(hyperopt.Tuner) if not name.startswith("_")}
    tuner = made()
    assert public | {"steps", "model"} <= {name for name in dir(tuner) if not name.startswith("_")}
    assert repr(tuner) == "SelfTuning(STN, noise=0.2, decay=0.01, mode='centred', steps=0)"


# What is refused before training.

SET = TensorDataset(X, Y)
ALL = DataLoader(SET, 8)


@pytest.mark.parametrize(
    ("train", "val", "what"),
    [
        (ALL, ALL, "are the same object"),
        (ALL, DataLoader(SET, 4, shuffle=True), "have equal values"),
        (TRAIN, (X[:22], Y[:22]), "have equal values"),
        (TRAIN, (X[:22].clone(), Y[:22].clone()), "have equal values"),
        ([TRAIN, VAL], [TRAIN, VAL], "have equal values"),
        (DataLoader(Subset(SET, range(30)), 8), DataLoader(Subset(SET, range(25, 40)), 8), "have 5 rows"),
        (DataLoader(SET, 8, sampler=SubsetRandomSampler(range(30))), DataLoader(Subset(SET, range(20, 40)), 8), "have 10 rows"),
        (Subset(Subset(SET, range(30)), range(5)), ALL, "have 5 rows"),
    ],
)
def test_a_validation_set_with_rows_of_the_training_set_is_refused(train: Any, val: Any, what: str) -> None:
    tuner = made()
    before = copy.deepcopy(tuner.model.state_dict())
    with pytest.raises(ValueError, match=rf"train and val {what}.*; give val rows of its own"):
        tuner.step(train, val)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), tuner.model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        tuple(DataLoader(each, 8) for each in random_split(SET, [30, 10])),
        tuple(DataLoader(SET, 8, sampler=SubsetRandomSampler(each)) for each in (range(30), range(30, 40))),
        (DataLoader(SET, 8, sampler=RandomSampler(SET, num_samples=8)), DataLoader(Subset(SET, [1]), 1, sampler=[0])),
        (TRAIN, VAL),
        ([TRAIN], [VAL]),
    ],
)
def test_sets_that_share_no_row_are_taken(train: Any, val: Any) -> None:
    assert made().step(train, val).step == 1


@pytest.mark.parametrize("source", [Minibatches(TRAIN, 8), Minibatches(TRAIN)])
def test_sources_of_the_same_rows_are_refused(source: Minibatches) -> None:
    for other in (source, Minibatches(TRAIN, 4)):
        with pytest.raises(
            ValueError, match=r"train and val (are the same object|have equal values).*; give val rows of its own"
        ):
            made().step(source, other)
    assert made().step(source, Minibatches(VAL, 4)).step == 1


def tuned(each: Any, dtype: torch.dtype) -> SelfTuning:
    stn = convert(nn.Linear(3, 1, dtype=dtype), HyperSpace({"rate": each}, dtype=dtype))
    return SelfTuning(stn, train_loss, val_loss)


@pytest.mark.parametrize(
    ("each", "dtype", "what"),
    [
        (
            Bounded(0.5, 0.0, 1.0, scale=8.0),
            torch.float32,
            "scale=8 leaves the space: .* above 0.5 is 1 in torch.float32.*lower scale",
        ),
        (Bounded(0.5, 0.0, 1.0, scale=20.0), DOUBLE, "above 0.5 is 1 in torch.float64"),
        (Bounded(9.0, 0.01, 10.0, scale=12.0), DOUBLE, "4 scales (above|below) 9 is (10|0.01) in"),
        (Positive(1e-3, scale=30.0), torch.float32, "4 scales below 0.001 is 0 in torch.float32"),
        (Positive(1e3, scale=200.0), DOUBLE, "4 scales (above|below) 1000 is"),
        (Discrete(1, 0, 2, scale=25.0), DOUBLE, "4 scales above 1.5 is 3 in torch.float64"),
    ],
)
def test_a_perturbation_that_leaves_the_space_is_refused(each: Any, dtype: torch.dtype, what: str) -> None:
    with pytest.raises(ValueError, match=f"the perturbation of rate with .*{what}"):
        tuned(each, dtype)


@pytest.mark.parametrize(
    "each", [Bounded(0.5, scale=3.0), Positive(1e-5, scale=3.0), Discrete(1, 0, 9, scale=2.0), Positive(5.0, map="softplus")]
)
def test_a_wide_perturbation_that_stays_inside_is_taken(each: Any) -> None:
    assert tuned(each, torch.float32).steps == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_validation_loss_without_the_network_is_refused(mode: str) -> None:
    tuner = made(mode)
    weights = nn.Linear(3, 1, dtype=DOUBLE)

    def detached(model: STN, batch: Any, draw: Draw | None) -> Tensor:
        with torch.no_grad():
            return model(batch[0]).mean()

    before = tuner.space.u.detach().clone()
    for loss in (
        detached,
        lambda model, batch, draw: weights(batch[0]).mean().detach(),
        lambda model, batch, draw: weights(batch[0]).mean(),  # a network of its own, as the one before its conversion
    ):
        tuner.valid_loss = loss
        with pytest.raises(ValueError, match="valid_loss does not depend on weights that respond"):
            tuner.step(TRAIN, VAL)
        assert tuner.updates == 0
    assert torch.equal(tuner.space.u, before)


def test_a_hyperparameter_that_the_loss_of_ones_own_loop_does_not_read_is_refused() -> None:
    tuner = made()
    tuner.train_loss = lambda model, batch, draw: (model(batch[0], draw) * draw.h["noise"][:, None]).mean()
    with pytest.raises(ValueError, match=r"never reads decay: use draw.h\['decay'\]"):
        tuner.loss(TRAIN)
    with pytest.raises(ValueError, match="never reads decay"):
        tuner.step(TRAIN, VAL)


def test_a_layer_that_cannot_respond_is_refused_by_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    space = HyperSpace({"decay": Positive(0.01)})
    with pytest.raises(ValueError, match=r"'1'.*Own.*skip"):
        convert(nn.Sequential(nn.Linear(3, 3), Own()), space)
