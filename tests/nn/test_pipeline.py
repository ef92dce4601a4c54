"""The pipeline of training images: its steps in order, each with its own strengths, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hyperopt.core.random import Keys, Stream, current_keys, keyed
from hyperopt.nn.regularise.colour import jitter
from hyperopt.nn.regularise.cutout import cutout
from hyperopt.nn.regularise.dropout import dropout
from hyperopt.nn.regularise.noise import gaussian, scaled
from hyperopt.nn.regularise.pipeline import RANGES, Pipeline, check_range

N = 10
KEYS = Keys(torch.arange(N), 1, 2)
IMAGES = torch.rand(N, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def strengths() -> dict[str, Tensor]:
    top = {name: min(high, 3.0) for name, (_, high) in RANGES.items()}
    return {name: torch.linspace(0.1 * high, 0.8 * high, N, dtype=torch.float64) for name, high in top.items()}


def test_all_steps_in_their_order() -> None:
    h, pipeline = strengths(), Pipeline.of(IMAGES, tuple(RANGES), most=3)
    x = jitter(IMAGES, {name: h[name] for name in ("brightness", "contrast", "saturation", "hue")}, KEYS)
    x = (x - IMAGES.mean((0, 2, 3), keepdim=True)) / IMAGES.std((0, 2, 3), correction=0, keepdim=True)
    x = cutout(x, h["cut_holes"], h["cut_length"], KEYS, most=3)
    x = dropout(x, h["input_dropout"], KEYS, Stream.INPUT_DROPOUT)
    x = gaussian(scaled(x, h["input_scale"], KEYS), h["input_noise"], KEYS)
    assert torch.allclose(pipeline(IMAGES, h, KEYS), x, rtol=1e-12)


@pytest.mark.parametrize("name", RANGES)
def test_a_strength_counts_only_where_it_is_declared(name: str) -> None:
    h = strengths()
    none, names = Pipeline.of(IMAGES, ()), (name, "cut_length") if name == "cut_holes" else (name,)
    assert torch.equal(none(IMAGES, h, KEYS), none.plain(IMAGES))
    changed = Pipeline.of(IMAGES, names, most=3)(IMAGES, {each: h[each] for each in names}, KEYS)
    assert (changed - none.plain(IMAGES)).abs().flatten(1).amax(1).gt(
        1e-3
    ).double().mean() > 0.3  # the shortest holes have no length


def test_cutout_after_standardising_leaves_the_mean() -> None:
    h = {"cut_length": torch.full((N,), 99.0)}
    assert not Pipeline.of(IMAGES, ("cut_length",))(IMAGES, h, KEYS).any()


def test_standardised_images() -> None:
    plain = Pipeline.of(IMAGES, ()).plain(IMAGES)
    assert torch.allclose(plain.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(plain.std((0, 2, 3), correction=0), torch.ones(3).double())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nothing is done to images under 'noise'; the names are brightness"):
        Pipeline.of(IMAGES, ("noise",))
    with pytest.raises(ValueError, match="cut_holes is there without cut_length"):
        Pipeline.of(IMAGES, ("cut_holes",))
    with pytest.raises(ValueError, match="a channel is constant over the 10 training images"):
        Pipeline.of(torch.ones(N, 1, 4, 4), ())
    check_range("hue", 0.0, 0.5, RANGES["hue"])
    with pytest.raises(ValueError, match=r"hue may be 0 to 0\.6, but has a meaning from 0 to 0\.5 only; declare it bounded"):
        check_range("hue", 0.0, 0.6, RANGES["hue"])
    with pytest.raises(ValueError, match="input_dropout may be 0 to inf"):
        check_range("input_dropout", 0.0, math.inf, RANGES["input_dropout"])


def test_keys_of_the_innermost_block() -> None:
    other = Keys(torch.arange(3), 0, 0)
    with keyed(KEYS):
        with keyed(other):
            assert current_keys("x") is other
        assert current_keys("x") is KEYS
        with pytest.raises(ZeroDivisionError), keyed(other):
            _ = 1 / 0
        assert current_keys("x") is KEYS
    with pytest.raises(RuntimeError, match="Layer 'a' draws by the numbers of the examples, and nobody gave them"):
        current_keys("Layer 'a'")
