"""The default rates: the formula by hand, what it does not depend on, and that nothing moves farther than it may."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from optimizers import sgd
from torch import Tensor, nn

from hyperopt.stn import STN, Bounded, Draw, HyperSpace, Positive, SelfTuning, SelfTuningSettings, convert
from hyperopt.stn.rates import BETA, ETA, MeasuredGradient, optimizer_of

DOUBLE = torch.float64
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
Y = X.square().sum(1, keepdim=True)
TRAIN, VAL = (X[:20], Y[:20]), (X[20:], Y[20:])


def made(times: float = 1.0, update: str = "joint", tau: float = 0.0, **how: Any) -> SelfTuning:
    torch.manual_seed(0)
    space = HyperSpace({"noise": Bounded(0.2, 0.0, 1.0, scale=0.6), "decay": Positive(0.01)}, dtype=DOUBLE)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def train_loss(model: STN, batch: Any, draw: Draw) -> Tensor:
        x = batch[0] + draw.h["noise"].detach()[:, None] * batch[0].cos()
        return (model(x, draw) - batch[1]).square().mean() + (draw.h["decay"].detach() * model.squared_norm(draw)).mean()

    def valid_loss(model: STN, batch: Any, draw: Draw | None) -> Tensor:
        return times * (model(batch[0]) - batch[1]).square().mean()

    given = {name: how.pop(name) for name in ("values", "scales") if name in how}
    settings = SelfTuningSettings(update=update, entropy=tau, **how)
    return SelfTuning(convert(plain, space, std=0.3), train_loss, valid_loss, settings, **given)


@pytest.mark.parametrize("update", ["joint", "sequential"])
@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_the_formula(update: str, tau: float) -> None:
    """Steps of the hyperparameters from the derivatives that plain steps of length 1 show."""
    tuning = made(update=update, tau=tau, scales=sgd(lr=1e-300))
    space, square, slope = tuning.space, torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    for k in range(1, 5):
        tuning.weight_step(TRAIN)
        sigma, before = space.sigma.detach(), space.u.detach().clone()
        eps = space.noise(10, copy.deepcopy(tuning.generator).set_state(tuning.generator.get_state()))
        u, width = before.clone().requires_grad_(), sigma.clone().requires_grad_()
        draw = Draw(space, u + width * eps, u + width * eps - before, width)
        with tuning.model.at(draw):
            g, c = torch.autograd.grad((tuning.model(VAL[0]) - VAL[1]).square().mean(), (u, width))
        square = BETA * square + (1 - BETA) * g.square()
        slope = BETA * slope + (1 - BETA) * c
        known = 1 - BETA**k
        want = ETA["values"] * sigma * g / (torch.maximum(square / known, g.square()) + (slope / known).square()).sqrt()
        tuning.hyper_step(VAL, tuning.optimizers["values"])
        torch.testing.assert_close(before - space.u.detach(), want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("times", [1e-6, 1e-2, 1e3, 1e6])
def test_the_unit_of_the_validation_loss_does_not_matter(times: float) -> None:
    one, other = made(scales=sgd(lr=1e-300)), made(times, scales=sgd(lr=1e-300))
    for tuning in (one, other):
        for _ in range(5):
            tuning.step(TRAIN, VAL)
    torch.testing.assert_close(one.space.u, other.space.u, rtol=1e-9, atol=1e-12)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("start", [-30.0, -1.0, 0.5, 8.0])
@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e5])
def test_in_a_valley_the_steps_are_those_of_newton_where_it_bends_within_the_scale(start: float, curvature: float) -> None:
    """``L = a u^2 / 2``, with ``dL/du = a u`` and ``dL/dsigma = a sigma``."""
    sigma, u, measured = (
        torch.tensor([0.5], dtype=DOUBLE),
        torch.tensor([start], dtype=DOUBLE),
        MeasuredGradient(torch.zeros(1, dtype=DOUBLE)),
    )
    for _ in range(3000):
        step = ETA["values"] * measured(curvature * u, curvature * sigma, sigma)
        assert abs(step) <= ETA["values"] * sigma + 1e-12 and step * u >= 0
        u = u - step
    assert abs(u) < 1e-3
    near = MeasuredGradient(torch.zeros(1, dtype=DOUBLE))
    tiny = torch.full((1,), 1e-6, dtype=DOUBLE)
    torch.testing.assert_close(near(curvature * tiny, curvature * sigma, sigma), tiny, rtol=1e-6, atol=0)  # g / L''


def test_no_step_is_longer_than_its_part_of_the_scale_even_if_gradients_grow() -> None:
    measured, sigma = MeasuredGradient(torch.zeros(2, dtype=DOUBLE)), torch.tensor([0.5, 2.0], dtype=DOUBLE)
    for k in range(40):
        found = measured(torch.tensor([1.5**k, -(3.0**k)], dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), sigma)
        assert (found.abs() <= sigma * (1 + 1e-12)).all() and found[0] > 0 > found[1]


def test_a_hyperparameter_without_a_gradient_stands_still() -> None:
    zero = torch.zeros(2, dtype=DOUBLE)
    assert torch.equal(MeasuredGradient(zero)(zero, zero, zero + 1), zero)


def test_gradients_that_become_noise_are_small_against_those_before() -> None:
    measured, one = MeasuredGradient(torch.zeros(1, dtype=DOUBLE)), torch.ones(1, dtype=DOUBLE)
    for _ in range(50):
        measured(one, 0 * one, one)
    moved = [float(measured(1e-3 * (-1) ** k * one, 0 * one, one)) for k in range(200)]
    assert max(map(abs, moved)) < 3e-3


def test_a_given_optimizer_gets_the_gradients_as_they_are_unless_told() -> None:
    steps = {}
    for key, how in {"given": {"values": sgd(lr=1.0)}, "told": {"values": sgd(lr=1.0), "measured": True}, "own": {}}.items():
        tuning = made(scales=sgd(lr=1e-300), **how)
        before = tuning.space.u.detach().clone()
        tuning.hyper_step(VAL, tuning.optimizers["values"])
        steps[key] = before - tuning.space.u.detach()
    torch.testing.assert_close(steps["own"], ETA["values"] * steps["told"], rtol=1e-12, atol=0)
    assert not torch.allclose(steps["given"], steps["told"], rtol=1e-2)
    off = made(measured=False, scales=sgd(lr=1e-300))
    before = off.space.u.detach().clone()
    off.hyper_step(VAL, off.optimizers["values"])
    torch.testing.assert_close(before - off.space.u.detach(), ETA["values"] * steps["given"], rtol=1e-12, atol=0)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("rounds", [None, 8])
@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_the_default_resumes_bit_for_bit(update: str, rounds: int | None) -> None:
    def go(tuning: SelfTuning, count: int) -> SelfTuning:
        for _ in range(count):
            tuning.step(TRAIN, VAL)
        return tuning

    whole = go(made(update=update, rounds=rounds), 8)
    second = made(update=update, rounds=rounds)
    second.load_state_dict(copy.deepcopy(go(made(update=update, rounds=rounds), 4).state_dict()))
    go(second, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )


def test_the_response_has_the_rate_of_the_weights_over_the_scale() -> None:
    tuning = made()
    scale = math.sqrt(0.6 * 0.5)  # the geometric mean
    rates = {group["name"]: group["lr"] for group in tuning.optimizers["weights"].param_groups}
    assert rates == pytest.approx({"weights": ETA["weights"], "response": ETA["weights"] / scale}, rel=1e-9)
    tuning.step(TRAIN, VAL)
    assert {group["name"]: group["lr"] for group in made(rounds=2).optimizers["weights"].param_groups} == pytest.approx(rates)


def test_weights_take_whole_steps_again_soon_after_their_gradients_have_become_small() -> None:
    weight = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    optimizer = optimizer_of("weights", None, None, torch.ones(1)).build({"weights": [weight]})
    for k in range(1600):
        before, weight.grad = weight.detach().clone(), torch.full_like(weight, 1000.0 if k < 20 else 1.0)
        optimizer.step()
    assert float(before - weight.detach()) > 0.9 * ETA["weights"]  # 0.014 of it with a memory of 1,000 steps


def test_the_rates_fall_to_zero_over_a_run_of_known_length() -> None:
    tuning = made(rounds=6)
    rates = []
    for _ in range(6):
        rates.append({name: each.param_groups[0]["lr"] for name, each in tuning.optimizers.items()})
        tuning.step(TRAIN, VAL)
    for name in ("weights", "values"):
        want = [ETA[name] * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
        assert [rate[name] for rate in rates] == pytest.approx(want, rel=1e-12)
        assert tuning.optimizers[name].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-15)
    assert {rate["scales"] for rate in rates} == {ETA["scales"]}


@pytest.mark.parametrize(
    ("name", "value"), [("rounds", 0), ("rounds", 1.5), ("measured", 1), ("check_every", -1), ("check_steps", 0)]
)
def test_settings_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SelfTuningSettings: {name}={value}"):
        SelfTuningSettings(**{name: value})
