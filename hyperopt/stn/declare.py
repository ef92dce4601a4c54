"""Hyperparameters to tune: a space of ``hyperopt.spaces.space`` with the scale at which it is perturbed.

Two views of one number: in its own units (h-space), where data, regulariser and network use it, and in R (m-space), where it is
moved and perturbed, and where weights respond to it. The map between them is that of the space.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hyperopt.spaces import space as spaces
from hyperopt.stn.settings import TunedBoundedSettings, TunedDiscreteSettings, TunedPositiveSettings

NEAR = math.log(999)  # a sigmoid is within 1e-3 of its end from here on
FAR = 25.0  # exp: 1e-11 and 1e11


class Tuned(ABC):
    """A hyperparameter to tune.

    Attributes:
        scale: standard deviation of its perturbation at first, in m-space.
        per: ``example`` or ``batch``: who shares a perturbation.
    """

    scale: float
    per: str

    @property
    @abstractmethod
    def space(self) -> spaces.Space:
        """Its space, with the initial value."""

    def value(self, m: Tensor) -> Tensor:
        """In the user's units, differentiable."""
        return self.space.value(m)

    @abstractmethod
    def saturated(self, m: float) -> str | None:
        """The bound that ``m`` has come to, in words, or None."""

    def raw(self, dtype: torch.dtype, device: torch.device | str, key: str) -> Tensor:
        """Where it starts in m-space; see ``Space.raw``. shape: ()."""
        return self.space.raw(torch.Size(), dtype, device, key)


class Bounded(TunedBoundedSettings, Tuned):
    """A number in an interval; settings in ``TunedBoundedSettings``."""

    @property
    def space(self) -> spaces.Bounded:
        """The open interval."""
        return spaces.Bounded(float(self.init), low=self.low, high=self.high)

    def saturated(self, m: float) -> str | None:
        """Within a thousandth of the interval from a bound."""
        return _bound(m, self.low, self.high)


class Positive(TunedPositiveSettings, Tuned):
    """A positive number; settings in ``TunedPositiveSettings``."""

    @property
    def space(self) -> spaces.Positive:
        """The open half-line."""
        return spaces.Positive(float(self.init), map=self.map)

    def saturated(self, m: float) -> str | None:
        """So far out that float32 sees 0 or no number."""
        return "0" if m < -FAR else "infinity" if m > FAR and self.map == "exp" else None


class Discrete(TunedDiscreteSettings, Tuned):
    """A whole number; settings in ``TunedDiscreteSettings``.

    ``floor(b)`` with b in ``(low, high + 1)``, which starts in the middle of its whole number. Its derivative is 0: only the
    weights' response to m moves it.
    """

    @property
    def space(self) -> spaces.Bounded:
        """The open interval of which the floor is taken."""
        return spaces.Bounded(self.init + 0.5, low=self.low, high=self.high + 1)

    def value(self, m: Tensor) -> Tensor:
        """The whole number; at the end of a saturated sigmoid still at most ``high``."""
        return self.space.value(m).floor().clamp(max=self.high)

    def saturated(self, m: float) -> str | None:
        """Within a thousandth of the interval from a bound."""
        return _bound(m, self.low, self.high)


def _bound(m: float, low: float, high: float) -> str | None:
    """The end of an interval that a sigmoid of ``m`` has come to."""
    return f"its bound {low:g}" if m < -NEAR else f"its bound {high:g}" if m > NEAR else None
