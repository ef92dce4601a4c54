"""Regularisers with a strength for each example: closed forms, torchvision one image after another, gradients, refusals."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from hyperopt.core.random import Keys, Stream
from hyperopt.nn.regularise import colour
from hyperopt.nn.regularise.cutout import cutout
from hyperopt.nn.regularise.dropout import dropout
from hyperopt.nn.regularise.noise import gaussian, scaled

N = 12
KEYS = Keys(torch.arange(N) * 131, seed=3, epoch=4)


def images(channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.rand(N, channels, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made[0] = 0.5  # grey
    made[1] = 0  # black
    made[2, :, 0, :3] = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.2]])[
        :channels
    ].double()  # pure, equal maxima
    return made.to(dtype)


def strengths(high: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """From 0 to `high`, both included."""
    return torch.linspace(0, high, N, dtype=dtype)


EACH: dict[str, tuple[Callable[[Tensor, Any, Keys], Tensor], float]] = {  # and a strength that all accept
    "dropout": (lambda x, p, keys: dropout(x, p, keys, Stream.LAYER), 0.9),
    "channels": (lambda x, p, keys: dropout(x, p, keys, Stream.LAYER, channels=True), 0.9),
    "gaussian": (gaussian, 2.0),
    "scaled": (scaled, 0.3),
    "cutout_holes": (lambda x, holes, keys: cutout(x, holes, 3, keys, most=4), 4.0),
    "cutout_length": (lambda x, length, keys: cutout(x, 2, length, keys, most=4), 6.0),
    **{
        name: (lambda x, size, keys, name=name: colour.jitter(x, {name: size}, keys), largest)
        for name, largest in colour.LARGEST.items()
    },
}


@pytest.mark.parametrize("name", EACH)
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    regularise, high = EACH[name]
    x, strength = images(), strengths(high)
    whole = regularise(x, strength, KEYS)
    assert whole.shape == x.shape and whole.dtype == x.dtype
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(regularise(x[order], strength[order], Keys(KEYS.index[order], 3, 4)), whole[order])
    for size in (1, 5):
        places = torch.arange(N).split(size)
        parts = [regularise(x[at], strength[at], Keys(KEYS.index[at], 3, 4)) for at in places]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-12, atol=0)  # a mean may be summed in another order
    assert regularise(x[:0], strength[:0], Keys(KEYS.index[:0], 3, 4)).shape == (0, 3, 7, 6)
    changed = [
        regularise(x, strength, keys) for keys in (Keys(KEYS.index, 4, 4), Keys(KEYS.index, 3, 5), Keys(KEYS.index + 1, 3, 4))
    ]
    assert all(not torch.equal(other, whole) for other in changed)


@pytest.mark.parametrize("name", EACH)
def test_nothing_at_strength_0_and_a_number_is_a_strength_for_all(name: str) -> None:
    regularise, high = EACH[name]
    x = images()
    assert torch.allclose(regularise(x, torch.zeros(N), KEYS), x, rtol=1e-14, atol=0)
    half = high / 2
    assert torch.equal(regularise(x, half, KEYS), regularise(x, torch.full((N,), half, dtype=torch.float64), KEYS))
    assert torch.equal(regularise(x, torch.tensor(half, dtype=torch.float64), KEYS), regularise(x, half, KEYS))


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("name", EACH)
def test_gradients_to_the_pixels_and_the_strength(name: str) -> None:
    regularise, high = EACH[name]
    # Away from the ends, where it is clipped.
    x, strength = 0.05 + 0.5 * images()[8:, :, 1:4, :3], strengths(0.9 * high)[8:].requires_grad_()
    keys = Keys(KEYS.index[8:], 3, 4)
    if name in ("dropout", "channels", "cutout_holes", "cutout_length"):  # a discrete choice: none to the strength
        assert torch.autograd.gradcheck(lambda x: regularise(x, strength, keys), (x.requires_grad_(),))
        out = regularise(x, strength, keys)
        assert torch.autograd.grad(out.sum(), strength, allow_unused=True) == (None,)
    else:
        small = (strength / 4).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, s: regularise(x, s, keys), (x.requires_grad_(), small))


@pytest.mark.parametrize("name", EACH)
def test_bad_strengths_and_batches(name: str) -> None:
    regularise, high = EACH[name]
    x = images()
    for wrong in (-0.1, math.nan, *([] if name in ("gaussian", "scaled", "cutout_length") else [high + 1])):
        with pytest.raises(ValueError, match=r"is not in .*; change"):
            regularise(x, wrong, KEYS)
        strength = strengths(high)
        strength[5] = wrong
        bad = regularise(x, strength, KEYS).isnan().flatten(1)
        assert bad[5].all() and not bad[[k for k in range(N) if k != 5]].any()  # its own example alone
    with pytest.raises(ValueError, match=r"of shape \(11,\) for a batch of"):
        regularise(x, strengths(high)[1:], KEYS)
    with pytest.raises(ValueError, match="with 11 keys"):
        regularise(x, 0.0, Keys(KEYS.index[1:], 3, 4))
    with pytest.raises(TypeError, match=r"a batch of torch\.uint8"):
        regularise(x.to(torch.uint8), strengths(high), KEYS)


def test_images_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"cutout: a batch of shape \(12, 126\), expected \(n, channels"):
        cutout(images().flatten(1), 1, 1, KEYS, most=1)
    for name in ("saturation", "hue"):
        with pytest.raises(ValueError, match=rf"{name}: a batch of shape \(12, 1, 7, 6\), expected \(n, 3"):
            colour.jitter(images(1), {name: 0.1}, KEYS)
    with pytest.raises(ValueError, match="there is no 'colour'; the names are brightness"):
        colour.jitter(images(), {"colour": 0.1}, KEYS)


@pytest.mark.parametrize("channels", [False, True])
def test_dropout_drops_the_chance_and_scales_the_rest(channels: bool) -> None:
    n = 2000
    keys, p = Keys(torch.arange(n), 0, 0), torch.tensor([0.0, 0.25, 0.9, 1.0]).double().repeat(n // 4)
    out = dropout(torch.ones(n, 10, 4, 4, dtype=torch.float64), p, keys, Stream.LAYER, channels=channels)
    for k, chance in enumerate((0.0, 0.25, 0.9, 1.0)):
        mine = out[k::4]
        if channels:
            assert torch.equal(mine, mine[:, :, :1, :1].expand_as(mine))
            mine = mine[:, :, 0, 0]
        dropped = (mine == 0).double()
        assert abs(dropped.mean().item() - chance) <= 5 * math.sqrt(chance * (1 - chance) / mine.numel())
        assert chance == 1 or torch.allclose(mine[mine != 0], torch.tensor(1 / (1 - chance)).double())
    assert not torch.equal(out, dropout(torch.ones_like(out), p, keys, Stream.LAYER + 1, channels=channels))


def test_noise_has_its_deviation_and_scale_its_range() -> None:
    n = 4000
    keys = Keys(torch.arange(n), 0, 0)
    deviation = torch.tensor([0.5, 2.0]).double().repeat(n // 2)
    noise = gaussian(torch.zeros(n, 8, dtype=torch.float64), deviation, keys)
    for k, expected in enumerate((0.5, 2.0)):
        assert abs(noise[k::2].std().item() / expected - 1) < 5 / math.sqrt(2 * 4 * n)
    factors = scaled(torch.ones(n, 2, dtype=torch.float64), 0.25, keys)
    assert torch.equal(factors[:, 0], factors[:, 1])  # one for the whole example
    low, high = factors.min().item(), factors.max().item()
    assert 0.8 < low < 0.801 and 1.249 < high < 1.25 and abs(factors.mean().item() - 1.025) < 0.01


def test_holes_equal_squares_cut_one_by_one() -> None:
    most = 4
    holes, length = torch.arange(N) % 5, torch.arange(N) % 7
    got = cutout(images(), holes.double() + 0.7, length.double() + 0.3, KEYS, most=most)  # floored
    expected = images()
    rows, columns = KEYS.whole(7, Stream.HOLE_DOWN, most).tolist(), KEYS.whole(6, Stream.HOLE_RIGHT, most).tolist()
    for k in range(N):
        for hole in range(int(holes[k])):
            side = int(length[k])
            top, left = rows[k][hole] - math.ceil(side / 2), columns[k][hole] - math.ceil(side / 2)
            expected[k, :, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    assert torch.equal(got[2:], expected[2:]) and (got == 0).any(1).sum() > 20
    assert torch.equal(cutout(images(), holes.double(), length.double(), KEYS, most=9), expected)  # a larger cap changes nothing


ADJUST = {
    "brightness": (vision.adjust_brightness, [0.0, 0.3, 1.0, 1.7]),
    "contrast": (vision.adjust_contrast, [0.0, 0.3, 1.0, 1.7]),
    "saturation": (vision.adjust_saturation, [0.0, 0.3, 1.0, 1.7]),
    "hue": (vision.adjust_hue, [-0.5, -0.2, 0.0, 0.4]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ADJUST)
def test_colours_equal_torchvision(name: str, dtype: torch.dtype) -> None:
    theirs, factors = ADJUST[name]
    each = torch.tensor(factors, dtype=dtype).repeat(N // 4)
    got = colour.ADJUST[name](images(dtype=dtype), each)
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images(dtype=dtype), each.tolist(), strict=True)])
    # torchvision turns the hue in float32, whatever the image is.
    assert torch.allclose(got, expected, rtol=0, atol=2e-6 if dtype == torch.float32 or name == "hue" else 1e-12)


def test_hue_equals_colorsys_in_float64() -> None:
    for turn in (-0.5, -0.13, 0.31, 0.5):
        expected = []
        for pixel in images().permute(0, 2, 3, 1).reshape(-1, 3).tolist():
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
        got = colour.adjust_hue(images(), turn).permute(0, 2, 3, 1).reshape(-1, 3)
        assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_one_channel_is_grey(name: str) -> None:
    theirs, _ = ADJUST[name]
    got = colour.ADJUST[name](images(1), 0.4)
    assert torch.allclose(got, torch.stack([theirs(image, 0.4) for image in images(1)]), rtol=0, atol=1e-12)


def test_jitter_applies_all_four_in_order_with_their_draws() -> None:
    sizes = {"hue": 0.2, "brightness": 0.4, "saturation": 0.9, "contrast": 0.6}  # the order given does not matter
    got = colour.jitter(images(), {name: torch.full((N,), size).double() for name, size in sizes.items()}, KEYS)
    expected = []
    for k, image in enumerate(images()):
        for name in ("brightness", "contrast", "saturation", "hue"):
            draw = 2 * KEYS.uniform(Stream[name.upper()], dtype=torch.float64)[k].item() - 1
            image = ADJUST[name][0](image, sizes[name] * draw + (name != "hue"))
        expected.append(image)
    assert torch.allclose(got, torch.stack(expected), rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", EACH)
def test_a_gpu_gives_the_same(name: str) -> None:
    regularise, high = EACH[name]
    there = regularise(images().cuda(), strengths(high).cuda(), Keys(KEYS.index.cuda(), 3, 4))
    assert there.device.type == "cuda" and torch.allclose(there.cpu(), regularise(images(), strengths(high), KEYS), atol=1e-9)
