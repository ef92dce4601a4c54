"""Random numbers for each example of a batch, as a function of the seed, the epoch and the example's own number alone.

    word(stream, i)    = mix(mix(mix(mix(seed) + epoch) + stream) + gamma * i)      64 bits for each example i
    word(stream, i, j) = mix(word(stream, i) + gamma * j)                           for each entry j of an example

They depend neither on the batch that an example is in or its position there, nor on the device, the dtype, the number of
workers or the state of a generator. A run that is resumed, even on other hardware, draws the same numbers, and a checkpoint
needs to keep nothing for them.

    keys = Keys(rows.index[batch], seed=0, epoch=3)
    noise = keys.normal(Stream.NOISE, (784,))           # shape: (rows, 784)

Reference: G. L. Steele, D. Lea and C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).
``mix(word)`` is the generator's output after the state ``word``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
BITS = 31  # bits of a word used for a whole number: their product with up to 2**32 choices fits into 63 bits
_FRACTION = 23  # bits of a uniform number: a float32 can represent the middle of each interval


class Stream(IntEnum):
    """What a draw is for. A new use takes the next number, so that the draws of the others stay the same."""

    DOWN = 0
    RIGHT = 1
    FLIP = 2
    NOISE = 3
    INPUT_DROPOUT = 4
    INPUT_SCALE = 5
    BRIGHTNESS = 6
    CONTRAST = 7
    SATURATION = 8
    HUE = 9
    HOLE_DOWN = 10
    HOLE_RIGHT = 11
    LAYER = 64  # this and all later numbers: one for each layer of a network that draws


def _mix(word: int) -> int:
    """Return SplitMix64's output after the state ``word``: 64 bits, each of which depends on all bits of the state."""
    word = (word + _GAMMA) & _MASK
    for shift, multiplier in _MULTIPLIERS:
        word = ((word ^ (word >> shift)) * multiplier) & _MASK
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """Return 64 bits as the signed number by which torch represents them."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """Return 64-bit words shifted right with zeros coming in; torch's own shift repeats the sign."""
    return (words >> by).bitwise_and_(2 ** (64 - by) - 1)


def _mixed_(words: Tensor) -> Tensor:
    """Return ``_mix`` without its first addition, in place; products wrap around, as they should."""
    for shift, multiplier in _MULTIPLIERS:
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(multiplier))
    return words.bitwise_xor_(_shifted(words, 31))


@dataclass(frozen=True)
class Keys:
    """What the random numbers of a batch's examples depend on.

    Attributes:
        index: each example's number in its dataset, as ``Rows.index``. shape: (n,), int64.
        seed: the run's seed, 0 to 2**64 - 1.
        epoch: number of the pass over the data, 0 to 2**64 - 1; every epoch has new draws.

    Raises:
        ValueError: the index is not a vector of int64, or the seed or epoch is out of range.
    """

    index: Tensor
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        if self.index.dtype != torch.int64 or self.index.dim() != 1:
            raise ValueError(f"index is {self.index.dtype} of shape {tuple(self.index.shape)}, expected int64 of shape (n,)")
        for name, value in (("seed", self.seed), ("epoch", self.epoch)):
            if not isinstance(value, int) or not 0 <= value <= _MASK:
                raise ValueError(f"{name}={value!r} must be a whole number from 0 to 2**64 - 1")

    def __getitem__(self, rows: slice) -> Keys:
        """Return the keys of some of the examples."""
        return Keys(self.index[rows], self.seed, self.epoch)

    def check(self, x: Tensor) -> None:
        """Refuse a batch with another number of examples, which would get the draws of other examples."""
        if x.dim() == 0 or len(x) != len(self.index):
            raise ValueError(f"a batch of shape {tuple(x.shape)} with {len(self.index)} keys; give the index of these rows")

    def words(self, stream: int) -> Tensor:
        """Return 64 random bits for each example. shape: (n,), int64, on the device of ``index``."""
        start = _mix(_mix(_mix(self.seed) + self.epoch) + stream)
        return _mixed_((self.index + 1) * _signed(_GAMMA) + _signed(start))  # + 1 as in `_mix`

    def whole(self, choices: int, stream: int, entries: int | None = None) -> Tensor:
        """Return a whole number in ``[0, choices)`` for each example, all equally likely up to ``choices / 2**31``.

        Args:
            choices: 1 to 2**31.
            stream: what the draw is for; draws of different streams are independent.
            entries: how many numbers each example gets; None: one, without a dimension of its own.

        Returns:
            shape: (n,) or (n, entries), int64, on the device of ``index``.
        """
        words = self.words(stream) if entries is None else self._entries(stream, entries)
        return (_shifted(words, 64 - BITS) * choices) >> BITS

    def uniform(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Return uniform numbers in the open interval (0, 1), to 2**-23, equal in float32 and float64. shape: (n, *shape)."""
        count, rows = math.prod(shape), len(self.index)
        words = self._entries(stream, (count + 1) // 2)
        halves = words.flatten().view(torch.int32).view(rows, 2 * words.shape[1])[:, :count]  # two numbers a word
        numbers = (halves >> (32 - _FRACTION)).to(torch.float32 if dtype.itemsize < 4 else dtype)
        numbers = numbers.add_(2 ** (_FRACTION - 1) + 0.5).mul_(2.0**-_FRACTION)
        return numbers.to(dtype).view(rows, *shape)

    def normal(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal numbers, by the inverse distribution function; at most 5.3 in size. shape: (n, *shape)."""
        exact = torch.float32 if dtype.itemsize < 4 else dtype
        return self.uniform(stream, shape, exact).mul_(2).sub_(1).erfinv_().mul_(2**0.5).to(dtype)

    def _entries(self, stream: int, entries: int) -> Tensor:
        """Return 64 random bits for each entry of each example. shape: (n, entries), int64."""
        places = torch.arange(1, entries + 1, device=self.index.device) * _signed(_GAMMA)
        return _mixed_(self.words(stream)[:, None] + places)


@contextlib.contextmanager
def drawing(generator: torch.Generator) -> Iterator[None]:
    """Draw initial values in a block from ``generator`` alone, in float32 whatever the run's precision."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


_KEYS: ContextVar[Keys | None] = ContextVar("keys", default=None)


@contextlib.contextmanager
def keyed(keys: Keys) -> Iterator[None]:
    """Let the layers of every network that is called in this block draw with these keys."""
    token = _KEYS.set(keys)
    try:
        yield
    finally:
        _KEYS.reset(token)


def current_keys(who: str) -> Keys:
    """Return the keys of the innermost ``keyed`` block.

    Raises:
        RuntimeError: there is no such block; the message names ``who`` asked.
    """
    keys = _KEYS.get()
    if keys is None:
        raise RuntimeError(
            f"{who} draws by the numbers of the examples, and nobody gave them: call the network inside of "
            "'with hyperopt.core.random.keyed(Keys(index, seed, epoch)):', or in eval mode"
        )
    return keys
