"""Random numbers for each example of a batch, as a function of its own number and of nothing else that could change.

    word(stream, i)    = mix(mix(mix(mix(seed) + epoch) + stream) + gamma * i)      64 bits for each example i
    word(stream, i, j) = mix(word(stream, i) + gamma * j)                           for each entry j of an example

What an example draws depends on the seed, the epoch and the example's own number alone: not on the batch that it is in, its place
there, the device, the dtype, the number of workers, or any generator's state. So a run that goes on after a stop, or on other
hardware, draws the same, and nothing has to be kept in a checkpoint.

    keys = Keys(rows.index[batch], seed=0, epoch=3)
    noise = keys.normal(Stream.NOISE, (784,))           # shape: (rows, 784)

Reference: G. L. Steele, D. Lea and C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014: SplitMix64, with
``mix(word)`` the generator's output after the state ``word``.
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
BITS = 31  # of a whole number's word that are used: their product with any number of choices up to 2**32 fits into 63
_FRACTION = 23  # bits of a uniform number: the middle of each of its intervals is a float32


class Stream(IntEnum):
    """What a draw is for. A later use takes the next number, and changes no draw of those before it."""

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
    LAYER = 64  # and all after it: one for each layer of a network that draws


def _mix(word: int) -> int:
    """Return what SplitMix64 gives out after the state ``word``: 64 bits, each of which depends on all of its."""
    word = (word + _GAMMA) & _MASK
    for shift, multiplier in _MULTIPLIERS:
        word = ((word ^ (word >> shift)) * multiplier) & _MASK
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """Return 64 bits as the signed number that torch holds them in."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """Return 64-bit words shifted right, zeros coming in; torch's own shift repeats the sign."""
    return (words >> by).bitwise_and_(2 ** (64 - by) - 1)


def _mixed_(words: Tensor) -> Tensor:
    """``_mix`` without its first addition, in place; products wrap around, as they should."""
    for shift, multiplier in _MULTIPLIERS:
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(multiplier))
    return words.bitwise_xor_(_shifted(words, 31))


@dataclass(frozen=True)
class Keys:
    """What the random numbers of a batch's examples are functions of.

    Attributes:
        index: each example's number in its dataset, as ``Rows.index``. shape: (n,), int64.
        seed: the run's seed, 0 to 2**64 - 1.
        epoch: which pass over the data this is, 0 to 2**64 - 1; every epoch draws anew.

    Raises:
        ValueError: an index that is not a vector of int64, or a seed or epoch out of range.
    """

    index: Tensor
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        """Check all three."""
        if self.index.dtype != torch.int64 or self.index.dim() != 1:
            raise ValueError(f"index is {self.index.dtype} of shape {tuple(self.index.shape)}, expected int64 of shape (n,)")
        for name, value in (("seed", self.seed), ("epoch", self.epoch)):
            if not isinstance(value, int) or not 0 <= value <= _MASK:
                raise ValueError(f"{name}={value!r} must be a whole number from 0 to 2**64 - 1")

    def __getitem__(self, rows: slice) -> Keys:
        """The keys of some of the examples."""
        return Keys(self.index[rows], self.seed, self.epoch)

    def check(self, x: Tensor) -> None:
        """Refuse a batch of another number of examples, which would be paired with other examples' draws."""
        if x.dim() == 0 or len(x) != len(self.index):
            raise ValueError(f"a batch of shape {tuple(x.shape)} with {len(self.index)} keys; give the index of these rows")

    def words(self, stream: int) -> Tensor:
        """64 random bits for each example. shape: (n,), int64, on the device of ``index``."""
        start = _mix(_mix(_mix(self.seed) + self.epoch) + stream)
        return _mixed_((self.index + 1) * _signed(_GAMMA) + _signed(start))  # + 1 as in `_mix`

    def whole(self, choices: int, stream: int, entries: int | None = None) -> Tensor:
        """A whole number in ``[0, choices)`` for each example, all equally likely up to ``choices / 2**31``.

        Args:
            choices: 1 to 2**31.
            stream: what the draw is for; draws of different streams are independent.
            entries: so many for each example; None: one, without a dimension of its own.

        Returns:
            shape: (n,) or (n, entries), int64, on the device of ``index``.
        """
        words = self.words(stream) if entries is None else self._entries(stream, entries)
        return (_shifted(words, 64 - BITS) * choices) >> BITS

    def uniform(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers uniform in the open interval (0, 1), to 2**-23: the same in float32 and float64. shape: (n, *shape)."""
        count, rows = math.prod(shape), len(self.index)
        words = self._entries(stream, (count + 1) // 2)
        halves = words.flatten().view(torch.int32).view(rows, 2 * words.shape[1])[:, :count]  # two numbers a word
        numbers = (halves >> (32 - _FRACTION)).to(torch.float32 if dtype.itemsize < 4 else dtype)
        numbers = numbers.add_(2 ** (_FRACTION - 1) + 0.5).mul_(2.0**-_FRACTION)
        return numbers.to(dtype).view(rows, *shape)

    def normal(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, by the inverse of their distribution function; at most 5.3 in size. shape: (n, *shape)."""
        exact = torch.float32 if dtype.itemsize < 4 else dtype
        return self.uniform(stream, shape, exact).mul_(2).sub_(1).erfinv_().mul_(2**0.5).to(dtype)

    def _entries(self, stream: int, entries: int) -> Tensor:
        """64 random bits for each entry of each example. shape: (n, entries), int64."""
        places = torch.arange(1, entries + 1, device=self.index.device) * _signed(_GAMMA)
        return _mixed_(self.words(stream)[:, None] + places)


@contextlib.contextmanager
def drawing(generator: torch.Generator) -> Iterator[None]:
    """Initial values from ``generator`` alone, in float32 whatever the run's precision: one seed, one network."""
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
    """Let the layers of every network that is called in this block draw by these keys."""
    token = _KEYS.set(keys)
    try:
        yield
    finally:
        _KEYS.reset(token)


def current_keys(who: str) -> Keys:
    """The keys of the innermost block.

    Raises:
        RuntimeError: there is no block around; names ``who`` asked.
    """
    keys = _KEYS.get()
    if keys is None:
        raise RuntimeError(
            f"{who} draws by the numbers of the examples, and nobody gave them: call the network inside of "
            "'with hyperopt.core.random.keyed(Keys(index, seed, epoch)):', or in eval mode"
        )
    return keys
