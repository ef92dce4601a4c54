"""Uniform and normal numbers by an example's own number: against the definition, their distribution, and what they depend on."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2, kstest

from hyperopt.core.random import Keys, Stream

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix(state: int) -> int:
    """SplitMix64's output after `state`, in Python's whole numbers, after the published C code."""
    word = (state + GAMMA) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def reference_words(index: int, seed: int, epoch: int, stream: int, entries: int) -> list[int]:
    start = splitmix(splitmix(splitmix(splitmix(seed) + epoch) + stream) + index * GAMMA)
    return [splitmix(start + entry * GAMMA) for entry in range(entries)]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**32 - 1, 7), (2**64 - 1, 2**64 - 1)])
def test_entries_equal_the_reference(seed: int, epoch: int) -> None:
    index = torch.tensor([0, 3, 59_999, 2**62])
    keys = Keys(index, seed, epoch)
    for row, number in enumerate(index.tolist()):
        words = reference_words(number, seed, epoch, Stream.NOISE, 3)
        assert keys.whole(9, Stream.NOISE, 3)[row].tolist() == [(word >> 33) * 9 // 2**31 for word in words]
        # Two numbers a word, the low half first; of each the top 23 bits, as a signed number counted from its least.
        halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
        expected = [(((half >> 9) ^ 2**22) + 0.5) / 2**23 for half in halves]
        assert keys.uniform(Stream.NOISE, (6,), torch.float64)[row].tolist() == expected


def test_dtypes_agree_and_ends_are_open() -> None:
    keys = Keys(torch.arange(3), 1, 2)
    exact = keys.uniform(Stream.NOISE, (4, 5), torch.float64)
    assert exact.shape == (3, 4, 5) and keys.uniform(Stream.NOISE).shape == (3,)
    assert torch.equal(keys.uniform(Stream.NOISE, (4, 5)).double(), exact)
    assert torch.equal(keys.uniform(Stream.NOISE, (4, 5), torch.bfloat16), exact.bfloat16())
    assert torch.equal(keys.uniform(Stream.NOISE, (19,)), keys.uniform(Stream.NOISE, (20,))[:, :19])  # a prefix is a prefix
    ends = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)  # what no draw here meets: the largest and least half word
    numbers = (ends >> 9).float().add_(2**22 + 0.5).mul_(2.0**-23)
    assert 0 < numbers[0] < 1e-7 and 1 - 1e-7 < numbers[1] < 1
    assert keys.normal(Stream.NOISE, (4, 5), torch.float16).dtype == torch.float16
    assert Keys(torch.arange(0), 0, 0).uniform(Stream.NOISE, (3,)).shape == (0, 3)
    assert keys.uniform(Stream.NOISE, (0,)).shape == (3, 0)


def test_distributions_and_independence() -> None:
    """Chi-squared of pairs of cells: entries of an example, neighbours, epochs and streams."""
    n, cells = 4000, 8
    index = torch.arange(n)

    def cell(index: torch.Tensor, epoch: int, stream: int, entry: int) -> torch.Tensor:
        return (Keys(index, 5, epoch).uniform(stream, (entry + 1,))[:, entry] * cells).long()

    pairs = [
        (cell(index, e, s, 0), other)
        for e in range(8)
        for s in (Stream.NOISE, Stream.LAYER)
        for other in (
            cell(index, e, s, 1),
            cell(index, e, s, 2),
            cell(index + 1, e, s, 0),
            cell(index, e + 1, s, 0),
            cell(index, e, s + 1, 0),
        )
    ]
    values = []
    for a, b in pairs:
        counts = (a * cells + b).bincount(minlength=cells**2).double()
        values.append(chi2.sf(((counts - n / cells**2).square() / (n / cells**2)).sum().item(), cells**2 - 1))
    assert kstest(values, "uniform").pvalue > 1e-3 and min(values) > 1e-5  # fixed draws: it passes always or never
    keys = Keys(index, 5, 0)
    assert kstest(keys.uniform(Stream.NOISE, (5,)).flatten().numpy(), "uniform").pvalue > 1e-2
    assert kstest(keys.normal(Stream.NOISE, (5,)).flatten().numpy(), "norm").pvalue > 1e-2


def test_bad_keys_are_refused() -> None:
    index = torch.arange(4)
    for wrong, seed, epoch, message in (
        (index.int(), 0, 0, r"index is torch.int32 of shape \(4,\), expected int64"),
        (index[None], 0, 0, r"of shape \(1, 4\), expected int64 of shape \(n,\)"),
        (index, -1, 0, "seed=-1"),
        (index, 0, 2**64, "epoch=18446744073709551616"),
        (index, 0, 0.5, "epoch=0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Keys(wrong, seed, epoch)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"a batch of shape \(3, 2\) with 4 keys"):
        Keys(index, 0, 0).check(torch.zeros(3, 2))
