"""Settings of self-tuning networks: frozen, validated, and free of torch.

Names shared by all hyperparameters that are tuned:
    init: where the hyperparameter starts, in its own units; inside of its space, never on a bound.
    scale: standard deviation of its perturbation at first, in the unbounded space (m-space).
    per: ``example``: every row of a batch has its own perturbation; ``batch``: all rows share one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hyperopt.core.checks import check_below, check_choice, check_count, check_flag, check_number

MODES = ("classic", "centred", "delta", "delta_linear")
GATES = ("unit", "scalar")
UPDATES = ("joint", "sequential")
PER = ("example", "batch")


def check_tuned(owner: Any, low: float, high: float) -> None:
    """Check what every tuned hyperparameter has: a start strictly between ``low`` and ``high``, a scale and a sharing."""
    name, init = type(owner).__name__, owner.init
    if isinstance(init, str) and "${" not in init:
        raise ValueError(
            f"{name}: init={init!r} is no number: a choice between words has no order in which a response could be learned; "
            f"try its values in a sweep (hyperopt -m key=a,b); change init"
        )
    check_number(owner, "init", -math.inf)
    if isinstance(init, int | float) and not low < init < high:
        raise ValueError(f"{name}: init={init!r} is not inside ({low:g}, {high:g}), where a bound has no place; change init")
    check_number(owner, "scale", 0.0, open_low=True)
    check_choice(owner, "per", PER)


@dataclass(frozen=True)
class TunedBoundedSettings:
    """A number between ``low`` and ``high``, by a scaled sigmoid."""

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
        check_tuned(self, self.low, self.high)


@dataclass(frozen=True)
class TunedPositiveSettings:
    """A number above 0.

    map: ``exp``, whose steps are relative, or ``softplus``, whose steps are absolute for large values.
    """

    init: float = 1.0
    scale: float = 0.5
    per: str = "example"
    map: str = "exp"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_tuned(self, 0.0, math.inf)
        check_choice(self, "map", ("exp", "softplus"))


@dataclass(frozen=True)
class TunedDiscreteSettings:
    """A whole number from ``low`` to ``high``: the floor of a bounded one, which is what is perturbed and moved."""

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
        check_tuned(self, self.low - 1, self.high + 1)
        check_count(self, "init", self.low)


@dataclass(frozen=True)
class SelfTuningSettings:
    """How the weights, their response and the hyperparameters are updated in turn.

    Attributes:
        mode: what the weights respond to. ``classic``: the perturbed hyperparameters ``lam'`` (arXiv 1903.03088); ``centred``:
            ``lam' - stopgrad(lam)``; ``delta``: the same, and in two steps a batch: the base weights on the unperturbed
            hyperparameters, the response on perturbed ones (arXiv 2010.13514); ``delta_linear``: further with the network
            linearised in the response.
        warmup: updates of the weights before the first one of the hyperparameters; perturbed like all others.
        train_steps: updates of the weights in a round.
        valid_steps: updates of the hyperparameters and their scales in a round.
        entropy: strength tau of the entropy term ``-tau * sum log(sigma sqrt(2 pi e))``.
        update: ``joint``: hyperparameter and scale from one evaluation; ``sequential``: first the hyperparameter, then the scale
            on the same rows and the same noise.
        min_scale: floor of every scale.
        max_scale: ceiling of every scale.
        direct_grad: whether the validation loss sees the hyperparameters themselves, and not only the weights that respond.
    """

    mode: str = "centred"
    warmup: int = 0
    train_steps: int = 2
    valid_steps: int = 1
    entropy: float = 1e-3
    update: str = "joint"
    min_scale: float = 1e-2
    max_scale: float = 3.0
    direct_grad: bool = False

    def __post_init__(self) -> None:
        """Check the choices and ranges."""
        check_choice(self, "mode", MODES)
        check_count(self, "warmup", 0)
        check_count(self, "train_steps")
        check_count(self, "valid_steps")
        check_number(self, "entropy", 0.0)
        check_choice(self, "update", UPDATES)
        check_number(self, "min_scale", 0.0, open_low=True)
        check_number(self, "max_scale", 0.0, open_low=True)
        check_below(self, "min_scale", "max_scale")
        check_flag(self, "direct_grad")
