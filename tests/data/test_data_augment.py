"""Augmentation: against a reference image by image, and the same for an example whatever batch it comes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chi2, kstest
from torch import Tensor

from hyperopt.core.random import Keys, Stream
from hyperopt.data.augment import Augment

MASK = 2**64 - 1


def splitmix(state: int) -> int:
    """SplitMix64's output after `state`, in Python's whole numbers, after the published C code."""
    word = (state + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def reference_draw(index: int, choices: int, seed: int, epoch: int, stream: int) -> int:
    key = splitmix(splitmix(splitmix(seed) + epoch) + stream)
    return (splitmix(key + index * 0x9E3779B97F4A7C15) >> 33) * choices // 2**31


def reference(augment: Augment, images: Tensor, index: Tensor, seed: int, epoch: int) -> Tensor:
    """Pad, crop and flip one image after another."""
    out = []
    for image, number in zip(images, index.tolist(), strict=True):
        channels, height, width = image.shape
        pad = augment.padding
        padded = torch.full((channels, height + 2 * pad, width + 2 * pad), augment.fill, dtype=image.dtype)
        padded[:, pad : pad + height, pad : pad + width] = image
        down = reference_draw(number, 2 * pad + 1, seed, epoch, 0)
        right = reference_draw(number, 2 * pad + 1, seed, epoch, 1)
        crop = padded[:, down : down + height, right : right + width]
        flip = reference_draw(number, 2**31, seed, epoch, 2) < augment.flip * 2**31
        out.append(crop.flip(2) if flip else crop)
    return torch.stack(out)


def images(n: int = 40, channels: int = 3, height: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    pixels = torch.randint(1, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(0))
    return pixels.to(dtype) if dtype == torch.uint8 else pixels.to(dtype) / 256  # no pixel is 0, so padding shows


def test_the_generator_is_splitmix64() -> None:
    """Its published outputs from the state 1234567, which the reference and the tensors here both give."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix(1234567 + i * 0x9E3779B97F4A7C15 & MASK) for i in range(5)] == published


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**32 - 1, 10**6), (2**64 - 1, 2**64 - 1)])
def test_draws_equal_the_reference(seed: int, epoch: int) -> None:
    index = torch.tensor([0, 1, 2, 59_999, 2**31, 2**62])
    for stream in Stream:
        for choices in (1, 2, 9, 2**31):
            got = Keys(index, seed, epoch).whole(choices, stream).tolist()
            assert got == [reference_draw(i, choices, seed, epoch, stream) for i in index.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("values", [{}, {"padding": 0}, {"flip": 0.0}, {"flip": 1}, {"padding": 2, "fill": 7}, {"padding": 9}])
def test_a_batch_equals_the_reference_image_by_image(values: dict[str, Any], dtype: torch.dtype) -> None:
    augment, batch, index = Augment(**values), images(dtype=dtype), torch.arange(40) * 1499
    before = batch.clone()
    got = augment(batch, index, seed=3, epoch=5)
    assert got.dtype == dtype and got.shape == batch.shape
    assert torch.equal(got, reference(augment, batch, index, 3, 5))
    assert torch.equal(batch, before) and got.data_ptr() != batch.data_ptr()


def test_an_example_does_not_depend_on_its_batch() -> None:
    augment, batch, index = Augment(), images(), torch.arange(40) * 7
    whole = augment(batch, index, seed=1, epoch=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(batch[order], index[order], seed=1, epoch=2), whole[order])
    for size in (1, 7, 40):
        parts = [augment(b, i, seed=1, epoch=2) for b, i in zip(batch.split(size), index.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert augment(batch[:0], index[:0], seed=1, epoch=2).shape == (0, 3, 6, 5)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first = Augment()(images(), torch.arange(40), seed=0, epoch=0)
    state = torch.random.get_rng_state()
    second = Augment()(images(), torch.arange(40), seed=0, epoch=0)
    assert torch.equal(first, second) and torch.equal(torch.random.get_rng_state(), state)


def test_seed_epoch_and_example_each_change_the_draw() -> None:
    batch = images(1).expand(40, -1, -1, -1)
    augment, index = Augment(), torch.arange(40)
    base = augment(batch, index, seed=0, epoch=0)
    for numbers, seed, epoch in ((index, 1, 0), (index, 0, 1), (index + 40, 0, 0)):
        same = (augment(batch, numbers, seed=seed, epoch=epoch) == base).flatten(1).all(1).double().mean()
        assert same < 0.2  # 1 of 162 outcomes is the same by chance


@pytest.mark.parametrize("choices", [2, 9])
def test_draws_are_uniform_and_independent(choices: int) -> None:
    """Chi-squared of single draws and of pairs, many times: by chance, every p-value is as likely as any other."""
    n = 5000
    index = torch.arange(n)

    def one(*, seed: int = 0, epoch: int = 0, stream: int = 0, of: Tensor = index) -> Tensor:
        return Keys(of, seed, epoch).whole(choices, stream)

    def p_value(values: Tensor, cells: int) -> float:
        counts = values.bincount(minlength=cells).double()
        return float(chi2.sf(((counts - n / cells).square() / (n / cells)).sum().item(), cells - 1))

    keys: list[dict[str, Any]] = [{"seed": seed, "epoch": epoch} for seed in range(0, 20, 2) for epoch in range(0, 20, 2)]
    pairs = {
        "single": [p_value(one(**key), choices) for key in keys],
        "streams": [p_value(one(**key) * choices + one(**key, stream=1), choices**2) for key in keys],
        "epochs": [p_value(one(**key) * choices + one(seed=key["seed"], epoch=key["epoch"] + 1), choices**2) for key in keys],
        "seeds": [p_value(one(**key) * choices + one(seed=key["seed"] + 1, epoch=key["epoch"]), choices**2) for key in keys],
        "neighbours": [p_value(one(**key, of=2 * index) * choices + one(**key, of=2 * index + 1), choices**2) for key in keys],
    }
    for name, values in pairs.items():
        assert kstest(values, "uniform").pvalue > 1e-3 and min(values) > 1e-5, name  # fixed draws: it passes always or never


def test_shifts_and_flips_have_their_chances() -> None:
    """Read off from what became of an image: each of the 81 shifts equally often, and a flip of chance 0.3 among each."""
    n, augment = 40_500, Augment(padding=4, flip=0.3)
    picture = torch.arange(1, 1 + 20 * 20, dtype=torch.float64).reshape(1, 1, 20, 20)  # every pixel tells its place
    out = augment(picture.expand(n, -1, -1, -1), torch.arange(n), seed=9, epoch=0)
    centre = out[:, 0, 10, 10:12].long() - 1  # shape: (n, 2); two neighbours
    flipped = centre[:, 0] > centre[:, 1]
    down = centre[:, 0] // 20 - 10
    right = torch.where(flipped, centre[:, 0] % 20 - 9, centre[:, 0] % 20 - 10)
    assert down.min() == right.min() == -4 and down.max() == right.max() == 4
    counts = ((down + 4) * 9 + right + 4).bincount(minlength=81).double()
    chi = ((counts - 500).square() / 500).sum()
    assert abs(chi - 80) < 5 * 160**0.5
    for shift in range(-4, 5):
        share = flipped[right == shift].double().mean()
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 4500) ** 0.5


def test_the_gradient_goes_to_the_pixels_that_were_kept() -> None:
    batch, index = images(6, 1, 4, 3).requires_grad_(), torch.arange(6)
    assert torch.autograd.gradcheck(lambda x: Augment(padding=1)(x, index, seed=0, epoch=0), (batch,))


BAD_SETTINGS = [{"padding": -1}, {"padding": 1.0}, {"padding": True}, {"flip": 1.1}, {"flip": "half"}, {"fill": float("nan")}]


@pytest.mark.parametrize("values", BAD_SETTINGS)
def test_bad_settings_are_refused(values: dict[str, Any]) -> None:
    ((key, value),) = values.items()
    with pytest.raises(ValueError, match=f"{key}={value!r} .*; change {key}"):
        Augment(**values)


def test_bad_arguments_are_refused() -> None:
    batch, index = images(4), torch.arange(4)
    augment = Augment()
    for x, i, seed, epoch, message in (
        (batch.flatten(1), index, 0, 0, r"shape \(4, 90\), expected \(n, channels"),
        (batch, index.int(), 0, 0, r"index is torch.int32 of shape \(4,\), expected int64"),
        (batch, index[:3], 0, 0, r"of shape \(3,\), expected int64 of shape \(4,\)"),
        (batch, index, -1, 0, "seed=-1"),
        (batch, index, 0, 2**64, "epoch=18446744073709551616"),
        (batch, index, 0, 1.0, "epoch=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            augment(x, i, seed=seed, epoch=epoch)  # pyright: ignore[reportArgumentType]
    for fill in (0.5, -1, 256):
        with pytest.raises(ValueError, match="is not a whole number from 0 to 255"):
            Augment(fill=fill)(images(4, dtype=torch.uint8), index, seed=0, epoch=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_images() -> None:
    here = Augment()(images(), torch.arange(40), seed=0, epoch=0)
    there = Augment()(images().cuda(), torch.arange(40).cuda(), seed=0, epoch=0)
    assert there.device.type == "cuda" and torch.equal(there.cpu(), here)
