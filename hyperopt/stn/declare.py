"""Hyperparameters to tune: a space of ``hyperopt.spaces.space``, and the scale at which it is perturbed.

A hyperparameter is one number in two forms. Data, regulariser and network use its value h. The variable m in R, which the
space maps to h, is moved and perturbed, and the weights respond to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt.core.checks import check_below, check_choice, check_count, check_number
from hyperopt.spaces import space as spaces

PER = ("example", "batch")
NEAR = math.log(999)  # beyond this, a sigmoid is within 1e-3 of its end
FAR = 25.0  # exp(-25) and exp(25) are about 1e-11 and 1e11


class Tuned(ABC):
    """A hyperparameter to tune.

    Attributes:
        init: initial value, inside the space and not on a bound.
        scale: initial standard deviation of its perturbation in R, above 0.
        per: ``example``: every row of a batch has its own perturbation; ``batch``: all rows share one.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088, section 3.3.

    Example:
        >>> from hyperopt import stn
        >>> rate = stn.Bounded(0.25, 0.0, 0.9)
        >>> isinstance(rate, stn.Tuned), rate.saturated(0.0) is None  # 0 in R is the middle of the interval
        (True, True)
    """

    init: float
    scale: float
    per: str

    def _check(self, low: float, high: float) -> None:
        """Check the common fields: a start strictly between ``low`` and ``high``, a scale and ``per``."""
        name, init = type(self).__name__, self.init
        if isinstance(init, str) and "${" not in init:
            raise ValueError(
                f"{name}: init={init!r} is not a number: a choice between words has no order in which a response could be "
                f"learned; try its values in a sweep (hyperopt -m key=a,b); change init"
            )
        check_number(self, "init", -math.inf)
        if isinstance(init, int | float) and not low < init < high:
            raise ValueError(f"{name}: init={init!r} is not inside ({low:g}, {high:g}), where a bound has no place; change init")
        check_number(self, "scale", 0.0, open_low=True)
        check_choice(self, "per", PER)

    @property
    @abstractmethod
    def space(self) -> spaces.Space:
        """Its space, with the initial value."""

    def value(self, m: Tensor) -> Tensor:
        """Return the value for ``m``, differentiable."""
        return self.space.value(m)

    @abstractmethod
    def saturated(self, m: float) -> str | None:
        """Return the bound that ``m`` has reached, in words, or None."""

    def raw(self, dtype: torch.dtype, device: torch.device | str, key: str) -> Tensor:
        """Return the initial variable in R; see ``Space.raw``. shape: ()."""
        return self.space.raw(torch.Size(), dtype, device, key)


@dataclass(frozen=True)
class Bounded(Tuned):
    """A number between ``low`` and ``high``, by a scaled sigmoid.

    Attributes:
        init: initial value, inside the space and not on a bound.
        scale: initial standard deviation of its perturbation in R, above 0.
        per: ``"example"``: every row of a batch has its own perturbation; ``"batch"``: all rows share one.
        low: the lower bound, finite.
        high: the upper bound, finite and above ``low``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> dropout = stn.Bounded(0.25, low=0.0, high=0.9)
        >>> float(dropout.value(torch.tensor(0.0)))  # 0 in R is the middle of the interval
        0.44999998807907104
    """

    init: float = 0.5
    low: float = 0.0
    high: float = 1.0
    scale: float = 0.5
    per: str = "example"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number(self, "low", -math.inf)
        check_number(self, "high", -math.inf)
        check_below(self, "low", "high")
        self._check(self.low, self.high)

    @property
    def space(self) -> spaces.Bounded:
        """The open interval."""
        return spaces.Bounded(float(self.init), low=self.low, high=self.high)

    def saturated(self, m: float) -> str | None:
        """Return the bound that is within a thousandth of the interval, if any."""
        return _bound(m, self.low, self.high)


@dataclass(frozen=True)
class Positive(Tuned):
    """A number above 0.

    Attributes:
        init: initial value, inside the space and not on a bound.
        scale: initial standard deviation of its perturbation in R, above 0.
        per: ``"example"``: every row of a batch has its own perturbation; ``"batch"``: all rows share one.
        map: ``exp``, whose steps are relative, or ``softplus``, whose steps are absolute for large values.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> decay = stn.Positive(1e-3)
        >>> float(decay.value(torch.tensor(0.0)))  # exp(0)
        1.0
    """

    init: float = 1.0
    scale: float = 0.5
    per: str = "example"
    map: str = "exp"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._check(0.0, math.inf)
        check_choice(self, "map", ("exp", "softplus"))

    @property
    def space(self) -> spaces.Positive:
        """The open half-line."""
        return spaces.Positive(float(self.init), map=self.map)

    def saturated(self, m: float) -> str | None:
        """Return ``0`` or ``infinity`` if the value is near the end of what float32 can hold."""
        return "0" if m < -FAR else "infinity" if m > FAR and self.map == "exp" else None


@dataclass(frozen=True)
class Discrete(Tuned):
    """A whole number from ``low`` to ``high``: the floor of a bounded number, which is perturbed and moved instead.

    It is ``floor(b)`` with b in ``(low, high + 1)``, which starts at ``init + 1/2``. The derivative of the floor is 0, so only
    the weights' response to m moves it.

    Attributes:
        init: initial value, inside the space and not on a bound.
        scale: initial standard deviation of its perturbation in R, above 0.
        per: ``"example"``: every row of a batch has its own perturbation; ``"batch"``: all rows share one.
        low: the least value.
        high: the largest value, above ``low``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> holes = stn.Discrete(1, low=0, high=4)
        >>> [float(holes.value(torch.tensor(m))) for m in (-10.0, 0.0, 10.0)]
        [0.0, 2.0, 4.0]
    """

    init: int = 1
    low: int = 0
    high: int = 2
    scale: float = 0.5
    per: str = "example"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("low", "high"):
            check_count(self, name, -(2**31))
        check_below(self, "low", "high")
        self._check(self.low - 1, self.high + 1)
        check_count(self, "init", self.low)

    @property
    def space(self) -> spaces.Bounded:
        """The open interval of the number whose floor is taken."""
        return spaces.Bounded(self.init + 0.5, low=self.low, high=self.high + 1)

    def value(self, m: Tensor) -> Tensor:
        """Return the whole number, which is at most ``high`` even if the sigmoid is saturated."""
        return self.space.value(m).floor().clamp(max=self.high)

    def saturated(self, m: float) -> str | None:
        """Return the bound that is within a thousandth of the interval, if any."""
        return _bound(m, self.low, self.high)


def _bound(m: float, low: float, high: float) -> str | None:
    """Return the end of an interval that a sigmoid of ``m`` has reached, if any."""
    return f"its bound {low:g}" if m < -NEAR else f"its bound {high:g}" if m > NEAR else None
