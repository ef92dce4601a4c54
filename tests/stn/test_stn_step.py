"""The step of a self-tuning network: who moves when, by which derivative, and that all of it comes back from a checkpoint."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import adam, optimizer, scheduler, sgd
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.bilevel.batches import Minibatches
from hyperopt.core.policy import reset_warnings
from hyperopt.stn import (
    STN,
    Bounded,
    Discrete,
    Draw,
    Dropout,
    HyperSpace,
    Positive,
    SelfTuning,
    SelfTuningSettings,
    TunedSchedule,
    TuningError,
    convert,
    replay,
)
from hyperopt.stn.rates import BETAS, ETA

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level

DOUBLE = torch.float64
MODES = ("classic", "centred", "delta", "delta_linear")
X = torch.randn(22, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
Y = X.square().sum(1, keepdim=True)


def train_loss(model: STN, batch: Any, draw: Draw) -> Tensor:
    x, y = batch
    x = x + draw.h["noise"].detach()[:, None] * x.cos()
    return (model(x, draw) - y).square().mean() + (draw.h["decay"].detach() * model.squared_norm(draw)).mean() / 2


def valid_loss(model: STN, batch: Any, draw: Draw | None) -> Tensor:
    x, y = batch
    fit = (model(x) - y).square().mean()
    return fit if draw is None else fit + draw.h["decay"].square().mean()


def made(mode: Any = "centred", std: Any = 0.3, **how: Any) -> SelfTuning:
    torch.manual_seed(0)
    hyper = HyperSpace({"noise": Bounded(0.2, 0.0, 1.0, scale=0.6), "decay": Positive(0.01, per="batch")}, dtype=DOUBLE)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizers = {key: how.pop(key) for key in ("weights", "values", "scales", "response", "trainer") if key in how}
    losses = (how.pop("train", train_loss), how.pop("valid", valid_loss))
    return SelfTuning(convert(plain, hyper, std=std), *losses, SelfTuningSettings(mode=mode, **how), **optimizers)


def sources() -> tuple[Minibatches, Minibatches]:
    return Minibatches((X, Y), 8, seed=1), Minibatches((X, Y), 5, seed=2)  # 22 rows: the last batches are short


def rounds(tuning: SelfTuning, count: int, given: tuple[Minibatches, Minibatches] | None = None) -> None:
    train, valid = given or sources()
    for _ in range(count):
        tuning.round(train.draw, valid.draw)


def snapshot(tuning: SelfTuning) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tuning.model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    def kind(name: str) -> str:
        if name.startswith("space."):
            return name
        return "response" if "response" in name or "gate" in name else "base"

    return {kind(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("update", ["joint", "sequential"])
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_step_moves_weights_and_a_hyper_step_the_hyperparameters(mode: str, update: str) -> None:
    tuning = made(mode, update=update)
    before = snapshot(tuning)
    tuning.weight_step((X, Y))
    middle = snapshot(tuning)
    assert moved(before, middle) == {"base", "response"}
    tuning.hyper_step((X, Y), tuning.optimizers["values"])
    assert moved(middle, snapshot(tuning)) == {"space.u", "space.s"}


def validation(tuning: SelfTuning, u: Tensor, s: Tensor, eps: Tensor, centre: Tensor) -> float:
    """The objective of a hyper step, written out; the centre stands still."""
    settings, space, model = tuning.settings, tuning.space, tuning.model
    sigma = functional.softplus(s)
    m = u + sigma * eps
    draw = Draw(space, m, m - centre if settings.mode != "classic" else m, sigma)
    with torch.no_grad(), model.at(draw):
        loss = tuning.valid_loss(model, (X, Y), draw if settings.direct_grad else None)
    return float(loss) - settings.entropy * float(torch.log(sigma * math.sqrt(2 * math.pi * math.e)).sum())


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_hypergradients_are_those_of_finite_differences(mode: str, direct: bool) -> None:
    tuning = made(mode, direct_grad=direct, entropy=0.05, values=sgd(lr=1.0), scales=sgd(lr=1.0), max_scale=50.0)
    space = tuning.space
    eps = space.noise(len(X), torch.Generator().manual_seed(0))
    u, s = space.u.detach().clone(), space.s.detach().clone()
    want: dict[str, list[float]] = {"u": [], "s": []}
    for name in want:
        for i in range(2):
            step = 1e-6 * torch.eye(2, dtype=DOUBLE)[i]
            ends = [
                validation(tuning, u + (k * step if name == "u" else 0), s + (k * step if name == "s" else 0), eps, u)
                for k in (1, -1)
            ]
            want[name].append((ends[0] - ends[1]) / 2e-6)
    tuning.generator.manual_seed(0)  # the same noise
    tuning.hyper_step((X, Y), tuning.optimizers["values"])
    for name, before in (("u", u), ("s", s)):
        found = before - getattr(space, name).detach()  # of a gradient step of length 1
        torch.testing.assert_close(found, torch.tensor(want[name], dtype=DOUBLE), rtol=1e-6, atol=1e-7)


def test_the_validation_loss_does_not_see_what_it_must_not() -> None:
    def curious(model: STN, batch: Any, draw: Draw | None) -> Tensor:
        context: Any = model._context
        return context.draw.h["decay"].mean()

    tuning = made(valid=curious)
    with pytest.raises(KeyError, match="may not see 'decay'"):
        tuning.hyper_step((X, Y), tuning.optimizers["values"])


def test_the_entropy_moves_the_scales_alone_in_closed_form() -> None:
    tuning = made(valid=lambda model, batch, draw: model(batch[0]).sum() * 0, entropy=0.3, values=sgd(lr=1.0), scales=sgd(lr=1.0))
    space = tuning.space
    u, s = space.u.detach().clone(), space.s.detach().clone()
    tuning.hyper_step((X, Y), tuning.optimizers["values"])
    assert torch.equal(space.u.detach(), u)
    torch.testing.assert_close(space.s.detach() - s, 0.3 * s.sigmoid() / functional.softplus(s), rtol=1e-12, atol=0)
    want = sum(math.log(sigma * math.sqrt(2 * math.pi * math.e)) for sigma in space.scales().values())
    assert space.draw(3).entropy().item() == pytest.approx(want, rel=1e-12)


def test_sequential_moves_the_value_first_then_the_scale_on_the_same_noise() -> None:
    tuning = made(update="sequential", entropy=0.0, values=sgd(lr=0.5), scales=sgd(lr=0.5))
    by_hand = copy.deepcopy(tuning.model)
    tuning.generator.manual_seed(3)
    tuning.hyper_step((X, Y), tuning.optimizers["values"])
    space = by_hand.space
    eps = space.noise(len(X), torch.Generator().manual_seed(3))
    for name in ("u", "s"):
        parameter = getattr(space, name)
        with by_hand.at(space.at(eps)):
            (slope,) = torch.autograd.grad(valid_loss(by_hand, (X, Y), None), parameter)
        with torch.no_grad():
            parameter -= 0.5 * slope
    assert torch.equal(space.u, tuning.space.u) and torch.equal(space.s, tuning.space.s)


@pytest.mark.parametrize("mode", ["delta", "delta_linear"])
def test_delta_trains_the_base_weights_as_a_plain_network_at_lam(mode: str) -> None:
    tuning = made(mode, weights=sgd(lr=0.1))
    plain, space = tuning.model.collapse(), tuning.space
    h = {name: torch.tensor(value, dtype=DOUBLE) for name, value in space.values().items()}
    for _ in range(3):
        tuning.weight_step((X, Y))
        loss = (plain(X + h["noise"] * X.cos()) - Y).square().mean()
        loss = loss + h["decay"] / 2 * sum(p.square().sum() for p in plain.parameters() if p.dim() > 1)
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for found, want in zip(tuning.model.base_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


def test_a_warm_up_moves_no_hyperparameter_and_is_as_long_as_asked() -> None:
    tuning = made(warmup=5, train_steps=2, valid_steps=3)
    before = snapshot(tuning)
    train, valid = sources()
    found = [tuning.round(train.draw, valid.draw) for _ in range(4)]
    assert [each.warming for each in found] == [True, True, True, False]
    assert [past.steps for past in tuning.history] == [2, 2, 1, 2]
    assert torch.equal(torch.tensor(tuning.history[3].u, dtype=DOUBLE), before["space.u"])
    assert all(math.isfinite(each.valid_loss) for each in found)
    assert not torch.equal(tuning.space.u, before["space.u"])


def test_the_response_may_have_an_optimizer_of_its_own() -> None:
    tuning = made(weights=sgd(lr=0.1), response=sgd(lr=1e-300))
    before = snapshot(tuning)
    tuning.weight_step((X, Y))
    assert moved(before, snapshot(tuning)) == {"base"}


def test_scales_stay_between_floor_and_ceiling_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    reset_warnings()
    tuning = made(min_scale=0.55, max_scale=0.65, scales=adam(lr=1.0), entropy=0.0)
    with caplog.at_level(logging.WARNING):
        rounds(tuning, 6)
    assert all(0.55 - 1e-12 <= scale <= 0.65 + 1e-12 for scale in tuning.space.scales().values())
    said = [record.getMessage() for record in caplog.records if "the scale of" in record.getMessage()]
    assert said and len(said) == len(set(said)) and all("min_scale" in text or "entropy" in text for text in said)


def test_a_saturated_hyperparameter_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reset_warnings()
    tuning = made(values=sgd(lr=1e-6))
    with torch.no_grad():
        tuning.space.u[0] = 9.0
    with caplog.at_level(logging.WARNING):
        rounds(tuning, 3)
    assert [text for text in caplog.messages if "noise has come to its bound 1" in text] == caplog.messages


@pytest.mark.slow
def test_a_collapse_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def trivial(model: STN, batch: Any, draw: Draw) -> Tensor:
        return 1e-6 * train_loss(model, batch, draw)

    reset_warnings()
    slow = {name: sgd(lr=1e-9) for name in ("weights", "values", "scales")}
    tuning = made(train=trivial, train_steps=1, check_every=0, **slow)
    with caplog.at_level(logging.WARNING):
        rounds(tuning, 199)
        assert caplog.messages == []
        rounds(tuning, 1)
    assert len(caplog.messages) == 1 and "collapse: the training loss is" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_a_loss_that_is_not_finite_stops_the_run(kind: str) -> None:
    def poison(model: STN, batch: Any, draw: Draw | None) -> Tensor:
        return (train_loss(model, batch, draw) if draw is not None else valid_loss(model, batch, draw)) * math.nan

    tuning = made(**{"train" if kind == "training" else "valid": poison})
    before = snapshot(tuning)
    with pytest.raises(TuningError, match=r"^(train|valid)_loss is nan before the first update: check the data"):
        rounds(tuning, 1)
    assert moved(before, snapshot(tuning)) == set()


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_a_loss_that_is_not_finite_later_stops_the_run(kind: str) -> None:
    tuning = made()
    rounds(tuning, 1)
    loss = tuning.train_loss if kind == "training" else tuning.valid_loss

    def poison(model: STN, batch: Any, draw: Any) -> Tensor:
        return loss(model, batch, draw) * math.nan

    setattr(tuning, "train_loss" if kind == "training" else "valid_loss", poison)
    before = tuning.space.u.detach().clone()
    with pytest.raises(TuningError, match=r"after 4 weight updates .*not finite, or lower"):
        rounds(tuning, 1)
    assert torch.equal(tuning.space.u, before)  # a gradient that is not finite never reaches the optimizer


def test_a_hyperparameter_that_is_not_finite_stops_the_run() -> None:
    tuning = made(values=sgd(lr=1e308))
    with pytest.raises(
        TuningError, match=r"the value of (noise|decay) is .* in R .*lower the learning rate of the optimizer of the hyper"
    ):
        rounds(tuning, 2)


def test_a_hyperparameter_that_nothing_reads_is_named_before_any_update() -> None:
    def partial(model: STN, batch: Any, draw: Draw) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean() + draw.h["noise"].mean()

    tuning = made(train=partial)
    before = snapshot(tuning)
    with pytest.raises(ValueError, match=r"never reads decay: use draw.h\['decay'\]"):
        rounds(tuning, 1)
    assert moved(before, snapshot(tuning)) == set()


def test_a_dropout_inside_of_the_network_counts_as_a_reader() -> None:
    hyper = HyperSpace({"rate": Bounded(0.2, 0.0, 0.9)}, dtype=DOUBLE)
    stn = convert(nn.Sequential(nn.Linear(3, 3), Dropout("rate"), nn.Linear(3, 1)).double(), hyper)
    tuning = SelfTuning(stn, lambda model, batch, draw: (model(batch[0], draw) - batch[1]).square().mean(), valid_loss)
    rounds(tuning, 2)


@pytest.mark.parametrize("mode", MODES)
def test_resume_bit_for_bit_with_all_optimizers(mode: str) -> None:
    how: dict[str, Any] = {
        "weights": adam(lr=0.02, scheduler=scheduler("cosine", T_max=9)),
        "response": adam(lr=0.05, scheduler=scheduler("step", step_size=2)),
        "scales": adam(lr=0.01, clip_norm=0.1),
        "values": adam(lr=0.03, scheduler=scheduler("exponential", gamma=0.9)),
        "warmup": 3,
    }
    whole, given = made(mode, **how), sources()
    rounds(whole, 8, given)
    first, given = made(mode, **how), sources()
    rounds(first, 4, given)
    kept = copy.deepcopy((first.state_dict(), [source.state_dict() for source in given]))
    second, given = made(mode, **how), sources()
    second.load_state_dict(kept[0])
    for source, state in zip(given, kept[1], strict=True):
        source.load_state_dict(state)
    rounds(second, 4, given)
    assert moved(snapshot(whole), snapshot(second)) == set()
    assert whole.history == second.history and len(whole.history) == 8


@pytest.mark.parametrize("name", ["weights", "scales", "response"])
def test_an_optimizer_that_needs_one_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer of the {name} is LBFGS"):
        made(**{name: optimizer("lbfgs")})
    with pytest.raises(ValueError, match=f"schedule of the {name} goes by evaluations"):
        made(**{name: adam(scheduler=scheduler("plateau"))})


@pytest.mark.parametrize("key", ["train_steps", "valid_steps"])
def test_zero_steps_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=0 must be a whole number >= 1; change {key}"):
        SelfTuningSettings(**{key: 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"min_scale=5 is not below max_scale=3.0"):
        SelfTuningSettings(min_scale=5)


def test_a_schedule_is_replayed_on_a_plain_network(tmp_path: Path) -> None:
    tuning = made(std=0.0, train_steps=2, valid_steps=1, values=adam(lr=0.2))
    plain = copy.deepcopy(tuning.model.collapse())
    rounds(tuning, 4)
    schedule = tuning.schedule()
    schedule.save(tmp_path / "schedule.json")
    schedule = TunedSchedule.load(tmp_path / "schedule.json")
    assert schedule == tuning.schedule() and schedule.updates == 8 and len(set(schedule.values)) == 4
    assert schedule.values[0] == pytest.approx((0.2, 0.01), rel=1e-12)
    hyper = HyperSpace(tuning.space.declared, dtype=DOUBLE)
    train = sources()[0]
    found = replay(schedule, plain, hyper, train_loss, train.draw, weights=sgd(lr=0.1))
    by_hand, train = copy.deepcopy(plain), sources()[0]
    for k in range(8):
        x, y = train.draw()
        noise, decay = schedule.values[k // 2]
        squares = sum(p.square().sum() for p in by_hand.parameters() if p.dim() > 1)
        loss = (by_hand(x + noise * x.cos()) - y).square().mean() + decay * squares / 2
        for parameter, slope in zip(by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True):
            parameter.data -= 0.1 * slope
    for found_p, want in zip(found.collapse().parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found_p, want, rtol=1e-10, atol=1e-12)
    default, same = (
        replay(schedule, plain, hyper, train_loss, sources()[0].draw, weights=each).collapse().state_dict()
        for each in (None, adam(lr=ETA["weights"], betas=list(BETAS)))
    )
    assert all(torch.equal(default[name], same[name]) for name in same)
    with pytest.raises(ValueError, match="the schedule is of noise, decay, the space of other"):
        replay(schedule, plain, HyperSpace({"other": Positive(1.0)}, dtype=DOUBLE), train_loss, train.draw)


@pytest.mark.slow
def test_a_whole_number_is_moved_by_the_response() -> None:
    hyper = HyperSpace({"holes": Discrete(1, 0, 4, scale=1.0)}, dtype=DOUBLE)
    stn = convert(nn.Linear(1, 1).double(), hyper)
    zeros = torch.zeros(64, 1, dtype=DOUBLE)

    def train(model: STN, batch: Tensor, draw: Draw) -> Tensor:
        return (model(batch, draw)[:, 0] - draw.h["holes"].detach()).square().mean()

    tuning = SelfTuning(
        stn,
        train,
        lambda model, batch, draw: (model(batch) - 3.5).square().mean(),
        SelfTuningSettings(warmup=50, max_scale=1.5),
        values=adam(lr=0.02),
        weights=adam(lr=0.05),
    )
    for _ in range(150):
        tuning.round(lambda: zeros, lambda: zeros)
    assert hyper.values()["holes"] in (3.0, 4.0)


def test_perturbations_have_nothing_to_do_with_rows_of_a_usual_seed() -> None:
    space = HyperSpace({"a": Bounded(0.5, 0.0, 1.0)}, dtype=DOUBLE)
    stn = convert(nn.Linear(1, 1, dtype=DOUBLE), space)
    tuning = SelfTuning(stn, lambda model, batch, draw: model(batch, draw).mean(), lambda model, batch, draw: model(batch).mean())
    eps = space.noise(1000, tuning.generator)
    for seed in range(10):
        rows = torch.randn(1000, 1, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        assert torch.corrcoef(torch.cat([rows, eps], 1).T)[0, 1].abs() < 0.15


def test_a_hyperparameter_that_is_read_without_effect_is_refused_before_any_update() -> None:
    def without(model: STN, batch: Any, draw: Draw) -> Tensor:
        noise, decay = draw.h["noise"].detach(), draw.h["decay"].detach()
        return (model(batch[0] + noise[:, None], draw) - batch[1]).square().mean() + 0 * decay.mean()

    tuning = made(train=without)
    before = snapshot(tuning)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"reads decay without effect: .* with decay at .* and at .*, which are 4"):
            rounds(tuning, 1)
    assert moved(before, snapshot(tuning)) == set() and tuning.updates == 0


def test_a_hyperparameter_that_has_an_effect_only_with_another_is_not_refused() -> None:
    def product(model: STN, batch: Any, draw: Draw) -> Tensor:  # as a number of holes, which does nothing at length 0
        noise, decay = draw.h["noise"].detach(), draw.h["decay"].detach()
        active = (noise < 0.1).to(noise)  # below its start alone
        return ((model(batch[0] + noise[:, None], draw) - batch[1]).square().mean(1) * (1 + active * decay)).mean()

    rounds(made(train=product), 1)


def test_looking_for_effects_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Any]:
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(4)
        hyper = HyperSpace({"noise": Bounded(0.2, 0.0, 1.0), "rate": Bounded(0.2, 0.0, 0.9)}, dtype=DOUBLE)
        plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Dropout("rate"), nn.Linear(4, 1)).double()

        def loss(model: STN, batch: Any, draw: Draw) -> Tensor:
            noise = draw.h["noise"][:, None] * torch.randn(batch[0].shape, generator=own, dtype=DOUBLE)
            return (model(batch[0] + noise, draw) - batch[1]).square().mean()

        tuning = SelfTuning(convert(plain, hyper), loss, valid_loss_of_rows)
        rounds(tuning, 2)
        return {**snapshot(tuning), "generator": own.get_state(), "torch": torch.get_rng_state()}

    looked = trained()
    monkeypatch.setattr("hyperopt.stn.updates.refuse_without_effect", lambda *given: None)
    for name, value in trained().items():
        assert torch.equal(value, looked[name]), name


def valid_loss_of_rows(model: STN, batch: Any, draw: Draw | None) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()
