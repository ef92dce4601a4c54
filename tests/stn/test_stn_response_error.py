"""``stn/response_error``: against the closed form of ridge, for responses made wrong on purpose, and that it changes nothing."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_response
import torch
from optimizers import adam, sgd
from ranks import run_ranks
from torch import Tensor, nn

from hyperopt.core.policy import reset_warnings
from hyperopt.stn import STN, Bounded, Draw, Dropout, HyperSpace, Positive, SelfTuning, SelfTuningSettings, convert
from hyperopt.stn.response_check import ResponseCheck, advice, check_response
from hyperopt.tasks.stn_ridge import Ridge

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level

DOUBLE = torch.float64
STRENGTH = 0.3


def ridge(optimizer: Any, spread: float = 0.3, scale: float = 1e-3, mode: str = "centred") -> tuple[SelfTuning, Ridge, Any]:
    """Ridge at its solution, with the true response; columns of different sizes, so that curvatures differ."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.linspace(1 - spread, 1 + spread, 6, dtype=DOUBLE)
    x, y, x_val, y_val = (
        torch.randn(*shape, generator=draw, dtype=DOUBLE) * (sizes if len(shape) == 2 else 1)
        for shape in ((30, 6), (30,), (20, 6), (20,))
    )
    closed = Ridge(x, y, x_val, y_val)
    space = HyperSpace({"decay": Positive(STRENGTH, scale=scale)}, dtype=DOUBLE, centred=mode != "classic")
    stn = convert(nn.Linear(6, 1, bias=False, dtype=DOUBLE), space)

    def train_loss(model: STN, batch: Tensor, draw: Draw) -> Tensor:
        fit = (model(batch, draw)[..., 0] - y).square().mean() / 2
        return fit + (draw.h["decay"].detach() * model.squared_norm(draw)).mean() / 2

    def valid_loss(model: STN, batch: Tensor, draw: Draw | None) -> Tensor:
        return (model(x_val.expand(8, -1, -1))[..., 0] - y_val).square().mean() / 2

    tuning = SelfTuning(stn, train_loss, valid_loss, SelfTuningSettings(mode=mode), weights=optimizer)
    set_response(tuning, closed, lambda j: j)
    return tuning, closed, x.expand(8, -1, -1)


def set_response(tuning: SelfTuning, closed: Ridge, of: Callable[[Tensor], Tensor]) -> None:
    """Put the weights at the minimum, and make the response some function of the true one."""
    _, _, response = tuning.model.weights()["weight"]
    with torch.no_grad():
        jacobian = of(closed.jacobian(STRENGTH))
        response.direction.copy_(jacobian[None])
        response.gate.fill_(1.0)
        weight = closed.weights(STRENGTH)
        if not tuning.space.centred:
            weight = weight - jacobian * tuning.space.u[0]
        tuning.model.base_parameters()[0].copy_(weight[None])


def error(tuning: SelfTuning, batch: Any, steps: int = 5) -> ResponseCheck:
    found = check_response(tuning, [batch], steps)
    assert found is not None
    return found


@pytest.mark.parametrize("mode", ["classic", "centred", "delta"])
def test_the_true_response_has_no_error(mode: str) -> None:
    tuning, _, batch = ridge(sgd(lr=0.3), mode=mode)
    found = error(tuning, batch)
    assert found.error < 1e-5 and found.share == pytest.approx(1.0, abs=1e-5) and found.gradients == 20


@pytest.mark.cases(quick=6)
@pytest.mark.parametrize("mode", ["classic", "centred", "delta"])
@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.5, 0.9, 1.3, 2.0])
def test_a_multiple_of_the_true_response_has_its_own_error(factor: float, mode: str) -> None:
    tuning, closed, batch = ridge(sgd(lr=0.3), mode=mode)
    set_response(tuning, closed, lambda j: factor * j)
    found = error(tuning, batch)
    assert found.error == pytest.approx(abs(1 - factor), abs=1e-5) and found.share == pytest.approx(factor, abs=1e-5)


@pytest.mark.cases(quick=0, slow=2)
@pytest.mark.parametrize("seed", range(6))
def test_any_other_error_is_found_within_a_factor_of_the_curvatures(seed: int) -> None:
    """The part of the way that the steps go is between ``1 - (1 - lr h)^5`` for the least and the largest curvature h."""
    tuning, closed, batch = ridge(sgd(lr=0.3), spread=0.6)
    noise = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    jacobian = closed.jacobian(STRENGTH)
    wrong = jacobian + 0.5 * noise * jacobian.norm() / noise.norm()
    set_response(tuning, closed, lambda j: wrong)
    x = closed.x
    curvatures = torch.linalg.eigvalsh(x.T @ x / len(x) + STRENGTH * torch.eye(6, dtype=DOUBLE))
    way = 1 - (1 - 0.3 * curvatures) ** 5
    factor = float(way.max() / way.min())
    assert factor < 3
    true = float((wrong - jacobian).norm() / jacobian.norm())
    assert true / factor <= error(tuning, batch).error <= true * factor
    assert error(tuning, batch, steps=200).error == pytest.approx(true, rel=0.02)  # all the way to the minimum


def test_with_adam_in_the_middle_of_training() -> None:
    tuning, _, batch = ridge(adam(lr=0.01), scale=0.05)
    for _ in range(300):
        tuning.weight_step(batch)
    good = error(tuning, batch)
    _, _, response = tuning.model.weights()["weight"]
    found = {}
    for factor in (-1.0, 0.0, 1.0):
        with torch.no_grad():
            response.gate.mul_(factor)
        found[factor] = error(tuning, batch).error
        with torch.no_grad():
            response.gate.fill_(1.0) if factor == 0 else response.gate.mul_(factor)
    assert good.error < 0.3 < 0.8 < found[0.0] < 1.2 < 1.6 < found[-1.0] < 2.4


def test_before_the_first_step_of_adam_there_is_nothing_to_check() -> None:
    tuning, _, batch = ridge(adam(lr=0.01))
    assert check_response(tuning, [batch], 5) is None


# That it changes nothing.

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
Y = X.square().sum(1, keepdim=True)


def noisy(every: int, mode: str = "centred", own: bool = False) -> SelfTuning:
    """A network with batch statistics, dropout, and a loss that draws from every generator and keeps a count."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    space = HyperSpace({"rate": Bounded(0.2, 0.0, 0.9), "decay": Positive(0.01, per="batch")}, dtype=DOUBLE)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), Dropout("rate"), nn.Dropout(0.1), nn.Linear(4, 1))
    mine = torch.Generator().manual_seed(3)
    counts = {"calls": 0}

    def train_loss(model: STN, batch: Any, draw: Draw) -> Tensor:
        counts["calls"] += 1
        x = batch[0] + 0.01 * torch.randn(batch[0].shape, generator=mine, dtype=DOUBLE)
        x = x + 0.01 * random.random() + 0.01 * np.random.rand() + 1e-4 * counts["calls"] * torch.rand(3, dtype=DOUBLE)
        return (model(x, draw) - batch[1]).square().mean() + (draw.h["decay"].detach() * model.squared_norm(draw)).mean()

    def valid_loss(model: STN, batch: Any, draw: Draw | None) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    settings = SelfTuningSettings(mode=mode, check_every=every)
    return SelfTuning(
        convert(plain.double(), space, std=0.1), train_loss, valid_loss, settings, weights=adam(lr=0.02, clip_norm=1.0)
    )


@pytest.mark.cases(quick=1, slow=4, among={"mode": ["delta_linear"]})
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mode", ["classic", "centred", "delta", "delta_linear"])
def test_nothing_of_the_training_changes_by_it(mode: str, own: bool) -> None:
    ends = []
    for every in (0, 2):
        tuning = noisy(every, mode)
        records = []
        for _ in range(6):
            if own:
                tuning.model.train()
                tuning.optimizers["weights"].zero_grad()
                tuning.loss((X[:30], Y[:30])).backward()
                tuning.optimizers["weights"].step()
            records.append(tuning.step((X[:30], Y[:30]), (X[30:], Y[30:])))
        checked = [each for each in records if "stn/response_error" in each.metrics]
        assert len(checked) == (3 if every else 0)
        assert all(each.gradients - records[0].gradients == 20 for each in checked)
        slopes = [None if p.grad is None else p.grad.clone() for p in tuning.model.parameters()]
        state = tuning.state_dict()
        assert (state["watch"].pop("response") is None) == (not every)  # the error itself, for the message at the next check
        ends.append((state, slopes, torch.rand(1), random.random(), np.random.rand(), tuning.history))
    (one, *rest), (two, *others) = ends
    flat = [torch.utils._pytree.tree_leaves(each) for each in ((one, rest), (two, others))]  # pyright: ignore
    assert len(flat[0]) == len(flat[1])
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_an_iterator_of_the_loss_gives_the_same_to_all_and_stands_still() -> None:
    tuning, _, batch = ridge(sgd(lr=0.3))
    plain = tuning.train_loss

    def numbers() -> Iterator[float]:
        yield from (0.1 * k for k in range(1000))

    source = numbers()
    tuning.train_loss = lambda model, batch, draw: plain(model, batch, draw) * (1 + next(source))
    assert error(tuning, batch).error < 1e-2
    inside: Any = tuning.train_loss
    (place,) = (cell for cell in inside.__closure__ if not callable(cell.cell_contents))
    assert next(place.cell_contents) == 0.0  # the next loss gets the number that it would have got


def test_the_record_says_it(caplog: pytest.LogCaptureFixture) -> None:
    reset_warnings()
    tuning = noisy(2)
    first, second = (tuning.step((X[:30], Y[:30]), (X[30:], Y[30:])) for _ in range(2))
    assert "off by" not in repr(first) and f"a response that is off by {second.metrics['stn/response_error']:.2g}" in repr(second)
    assert second.as_dict()["stn/response_error"] > 0


# What is said of a bad one.


@pytest.mark.parametrize(
    ("found", "before", "moved", "learning", "text"),
    [
        (ResponseCheck(0.5, 0.5, 20), 0.9, 9.0, 0.1, None),
        (ResponseCheck(0.9, 0.1, 20), 0.5, 9.0, 0.1, None),
        (ResponseCheck(0.9, 0.1, 20), None, 9.0, 0.1, None),
        (ResponseCheck(0.9, 0.1, 20), 0.9, 4.0, 1.0, "lower the rate of the optimizer values from 0.1 to 0.025"),
        (ResponseCheck(0.9, 0.1, 20), 0.9, 0.5, 0.3, "raise the rate of the optimizer weights from 0.1 to 0.2"),
        (ResponseCheck(0.8, 0.2, 20), 1.5, 0.5, 1.0, "raise the rate of the optimizer response from 0.1 to 0.5"),
        (ResponseCheck(2.0, -1.0, 20), 2.05, 0.5, 1.0, "raise the rate of the optimizer response from 0.1 to 1"),
        (ResponseCheck(1.4, 1.0, 20), 2.5, 0.5, 1.0, "lower the rate of the optimizer response from 0.1 to 0.025"),
        (ResponseCheck(1.0, 2.0, 20), 3.0, 0.5, 1.0, "lower the rate of the optimizer response from 0.1 to 0.035"),
    ],
)
def test_the_message_names_the_rate_and_where_to_move_it(
    found: ResponseCheck, before: float | None, moved: float, learning: float, text: str | None
) -> None:
    said = advice(found, before, moved, learning, lambda name: 0.1)
    assert said == text if text is None else said is not None and said.endswith(text)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({}, "raise the rate of the optimizer response from 1e-09 to 1e-08"),
        ({"values": adam(lr=0.05)}, "lower the rate of the optimizer values from 0.05 to 0.00"),
    ],
)
def test_a_rate_that_is_wrong_is_named(how: Any, what: str, caplog: pytest.LogCaptureFixture) -> None:
    reset_warnings()
    tuning, _, batch = ridge(adam(lr=0.05), scale=0.05)
    made = SelfTuning(
        tuning.model,
        tuning.train_loss,
        tuning.valid_loss,
        SelfTuningSettings(check_every=10),
        weights=sgd(lr=0.3),
        **{"values": sgd(lr=1e-9), "response": sgd(lr=1e-9), **how},
    )
    with torch.no_grad():
        tuning.model.response_parameters()[1].mul_(-1)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            made.step(batch, batch + 1)
    said = [text for text in caplog.messages if "stn/response_error" in text]
    assert len(said) == 1 and what in said[0], caplog.messages


def test_a_parametrized_weight_is_checked_and_put_back() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).double()
    space = HyperSpace({"decay": Positive(0.01)}, dtype=DOUBLE)

    def train_loss(model: STN, batch: Any, draw: Draw) -> Tensor:
        return (model(batch[0], draw) - batch[1]).square().mean() + (draw.h["decay"].detach() * model.squared_norm(draw)).mean()

    tuning = SelfTuning(convert(plain, space, std=0.3), train_loss, lambda model, batch, draw: model(batch[0]).mean())
    tuning.weight_step((X, Y))
    before = copy.deepcopy(tuning.model.state_dict())
    assert error(tuning, (X, Y)).error > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), tuning.model.state_dict().values(), strict=True))


def test_a_check_drops_as_training_does_and_leaves_the_modes() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 3, dtype=DOUBLE)
    space = HyperSpace({"rate": Bounded(0.3, 0.0, 0.9, scale=0.2)}, dtype=DOUBLE)
    stn = convert(nn.Sequential(Dropout("rate"), nn.Linear(3, 1)).double(), space)

    def loss(model: STN, batch: Tensor, draw: Draw | None) -> Tensor:
        out = model(batch, draw) if draw is not None else model(batch)
        return (out - batch.sum(1, keepdim=True)).square().mean()

    tuning = SelfTuning(stn, loss, loss, SelfTuningSettings(warmup=9, train_steps=1), weights=sgd(lr=0.1))
    tuning.round(lambda: x, lambda: x)
    assert not stn.training  # the validation loss has left it in evaluation mode
    found = check_response(tuning, [x], 3)
    assert found is not None and not stn.training  # without dropout the four trainings would be the same


@pytest.mark.slow
def test_on_two_ranks_the_check_is_that_of_one_and_training_goes_on_as_without_it(tmp_path: Path) -> None:
    alone = rank_response.cases()
    run_ranks(Path(rank_response.__file__), 2, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for mode in ("centred", "delta"):
        checked, plain = f"{mode}, 2", f"{mode}, 0"
        assert len(alone[checked]["errors"]) == 3 and plain in alone
        assert ranks[0][checked]["errors"] == ranks[1][checked]["errors"]  # to the last bit
        assert ranks[0][checked]["errors"] == pytest.approx(alone[checked]["errors"], rel=1e-9)
        for name, value in ranks[0][checked]["state"].items():
            others = ranks[1][checked], ranks[0][plain], ranks[1][plain]
            assert all(torch.equal(other["state"][name], value) for other in others), name
            torch.testing.assert_close(value, alone[checked]["state"][name], rtol=1e-9, atol=1e-12)
