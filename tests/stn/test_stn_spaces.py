"""Tuned hyperparameters: both views of one number, draws, and what cannot be declared."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional

import hyperopt
from hyperopt.stn import Bounded, Discrete, HyperSpace, Positive, Tuned
from hyperopt.stn.space import unsoftplus

DOUBLE = torch.float64


@settings(max_examples=60, deadline=None)
@given(part=st.floats(1e-3, 0.999), low=st.floats(-100, 100), width=st.floats(1e-2, 1e3), scale=st.floats(1e-3, 100))
def test_bounded_numbers_come_back_in_their_own_units(part: float, low: float, width: float, scale: float) -> None:
    init, high = low + part * width, low + width
    for dtype, tolerance in ((DOUBLE, 1e-12), (torch.float32, 1e-4)):
        space = HyperSpace({"a": Bounded(init, low, high, scale)}, dtype=dtype)
        assert abs(space.values()["a"] - init) <= tolerance * width + 4 * torch.finfo(dtype).eps * max(abs(low), abs(high))
        assert space.scales()["a"] == pytest.approx(scale, rel=10 * tolerance)


@pytest.mark.parametrize("scale", [1e-3, 19.9, 20.0, 20.1, 21.0, 25.0, 39.9, 40.1, 100.0, 1e4])
def test_a_scale_of_any_size_is_kept(scale: float) -> None:
    space = HyperSpace({"a": Positive(1.0, scale=scale)}, dtype=DOUBLE)
    assert space.scales()["a"] == pytest.approx(scale, rel=1e-14)
    (slope,) = torch.autograd.grad(space.sigma.sum(), space.s)
    assert float(slope) == pytest.approx(1 - math.exp(-scale), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(init=st.floats(1e-8, 1e8), map=st.sampled_from(["exp", "softplus"]))
def test_positive_numbers_come_back_in_their_own_units(init: float, map: str) -> None:
    space = HyperSpace({"a": Positive(init, map=map)}, dtype=DOUBLE)
    assert space.values()["a"] == pytest.approx(init, rel=1e-12)
    if map == "exp" or init > 1e-3:
        assert HyperSpace({"a": Positive(init, map=map)}, dtype=torch.float32).values()["a"] == pytest.approx(init, rel=1e-4)


def test_softplus_is_inverted_where_the_naive_formula_overflows() -> None:
    assert math.isinf(torch.tensor(100.0).exp().sub(1).log().item())  # what the formula of the textbook gives
    assert HyperSpace({"a": Positive(100.0, map="softplus")}, dtype=torch.float32).values()["a"] == pytest.approx(100.0)
    assert unsoftplus([100.0, 1e-6]).tolist() == pytest.approx([100.0, math.log(math.expm1(1e-6))], rel=1e-12)


@pytest.mark.parametrize("init", [0, 1, 4])
def test_whole_numbers_start_where_they_are_declared_and_stay_inside(init: int) -> None:
    declared = Discrete(init, 0, 4)
    space = HyperSpace({"a": declared})
    assert space.values()["a"] == init
    m = torch.linspace(-40, 40, 1001)
    values = declared.value(m)
    assert values.unique().tolist() == [0, 1, 2, 3, 4] and bool((values.diff() >= 0).all())


def space(**how: Any) -> HyperSpace:
    declared = {"x": Bounded(0.5, 0.01, 10.0, scale=0.5), "y": Positive(2.0, scale=0.1, per="batch"), "z": Discrete(1, 0, 3)}
    return HyperSpace(declared, dtype=DOUBLE, **how)


def test_a_draw_is_one_for_all_that_read_it() -> None:
    hyper = space()
    eps = hyper.noise(6, torch.Generator().manual_seed(1))
    draw = hyper.draw(6, torch.Generator().manual_seed(1))
    m = hyper.u + functional.softplus(hyper.s) * eps
    assert torch.equal(draw.m, m) and torch.equal(draw.delta, m - hyper.u)
    assert torch.equal(draw.h["x"], 0.01 + 9.99 * m[:, 0].sigmoid()) and torch.equal(draw.h["y"], m[:, 1].exp())
    assert draw.m[:, 1].unique().numel() == 1 and draw.m[:, 0].unique().numel() == 6
    assert list(draw.h) == ["x", "y", "z"] and draw.h["x"].shape == (6,) and draw.rows == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        draw.m = m  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyError, match="no hyperparameter 'w'; there are x, y, z"):
        draw.h["w"]


def test_the_values_themselves() -> None:
    hyper = space()
    draw = hyper.draw(3, perturb=False)
    assert torch.equal(draw.m, hyper.u.expand(3, -1)) and draw.delta.abs().max() == 0 and draw.responds
    (slope,) = torch.autograd.grad(draw.delta.sum(), hyper.u)
    assert torch.equal(slope, torch.full_like(hyper.u, 3))
    with torch.no_grad():
        assert not hyper.draw(3, perturb=False).responds  # nothing to compute
        classic = space(centred=False).draw(3, perturb=False)
    assert torch.equal(classic.delta, classic.m) and classic.responds


def test_the_perturbation_has_the_declared_scale() -> None:
    draw = space().draw(200_000, torch.Generator().manual_seed(0))
    assert draw.m[:, 0].std().item() == pytest.approx(0.5, rel=0.01)
    assert draw.sigma.tolist() == pytest.approx([0.5, 0.1, 0.5], rel=1e-12)
    low, high = space().band()["y"]
    assert (low, high) == (pytest.approx(2 * math.exp(-0.1)), pytest.approx(2 * math.exp(0.1)))


def test_state_comes_back() -> None:
    one, two = space(), space()
    with torch.no_grad():
        one.u.add_(1)
        one.s.sub_(1)
    two.load_state_dict(one.state_dict())
    assert one.values() == two.values() and one.scales() == two.scales() and set(one.state_dict()) == {"u", "s"}


DECLARED: list[tuple[Any, str]] = [
    (lambda: Bounded(0.0, 0.0, 1.0), r"Bounded: init=0.0 is not inside \(0, 1\).*change init"),
    (lambda: Bounded(1.0, 0.0, 1.0), r"init=1.0 is not inside \(0, 1\), where a bound has no place"),
    (lambda: Bounded(2.0, 0.0, 1.0), r"init=2.0 is not inside"),
    (lambda: Bounded(0.5, 1.0, 1.0), "low=1.0 is not below high=1.0; change low or high"),
    (lambda: Bounded(0.5, 2.0, 1.0), "low=2.0 is not below high=1.0"),
    (lambda: Bounded(0.5, scale=0.0), "scale=0.0 is not in"),
    (lambda: Bounded(0.5, scale=-1.0), "scale=-1.0 is not in"),
    (lambda: Bounded(math.nan), "init=nan"),
    (lambda: Bounded(0.5, per="row"), "per='row' is not one of example, batch"),
    (lambda: Positive(0.0), r"init=0.0 is not inside \(0, inf\)"),
    (lambda: Positive(1.0, map="square"), "map='square' is not one of exp, softplus"),
    (lambda: Discrete(5, 0, 4), "init=5 is not inside"),
    (lambda: Discrete(1, 4, 0), "low=4 is not below high=0"),
    (lambda: Discrete(1.5, 0, 4), "init=1.5 must be a whole number"),  # pyright: ignore[reportArgumentType]
    (lambda: Discrete("relu"), "init='relu' is not a number.*hyperopt -m"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("declare", "message"), DECLARED)
def test_a_bad_declaration_is_refused_at_once(declare: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declare()


def test_a_bound_within_rounding_is_refused_when_the_dtype_is_known() -> None:
    near = Bounded(1 - 1e-9, 0.0, 1.0)
    assert HyperSpace({"a": near}, dtype=DOUBLE).values()["a"] == pytest.approx(1 - 1e-9, rel=1e-15)
    with pytest.raises(ValueError, match=r"space\.a\.init=0\.999999999"):
        HyperSpace({"a": near}, dtype=torch.float32)


SPACES: list[tuple[Any, str]] = [
    ({}, "there are no hyperparameters to tune"),
    ([("a", Positive(1.0)), ("a", Positive(2.0))], "two hyperparameters are called 'a'"),
    ({"a": ["relu", "tanh"]}, r"space\.a=\['relu', 'tanh'\]: a choice between things without an order.*hyperopt -m"),
    ({"a": hyperopt.Bounded(0.5)}, "hyperopt.Bounded has no scale of a perturbation; declare it with hyperopt.stn"),
    ({"a": 0.5}, r"space\.a=0\.5 is not a hyperparameter"),
    ({"": Positive(1.0)}, "'' cannot be the name"),
]


@pytest.mark.parametrize(("declared", "message"), SPACES)
def test_a_bad_space_is_refused(declared: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyperSpace(declared)


def test_what_is_far_out_is_called_saturated() -> None:
    far: list[tuple[Tuned, float, str | None]] = [
        (Bounded(0.5, -1.0, 3.0), 6.0, None),
        (Bounded(0.5, -1.0, 3.0), 7.0, "its bound 3"),
        (Bounded(0.5, -1.0, 3.0), -7.0, "its bound -1"),
        (Discrete(1, 0, 3), 7.0, "its bound 3"),
        (Positive(1.0), -26.0, "0"),
        (Positive(1.0), 26.0, "infinity"),
        (Positive(1.0, map="softplus"), 26.0, None),
    ]
    for each, m, want in far:
        assert each.saturated(m) == want
