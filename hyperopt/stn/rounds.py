"""The rounds of a self-tuning network: ``SelfTuningSettings`` says what a round does, ``Round`` what one did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hyperopt.core.checks import check_below, check_choice, check_count, check_flag, check_number

MODES = ("classic", "centred", "delta", "delta_linear")
UPDATES = ("joint", "sequential")


@dataclass(frozen=True)
class SelfTuningSettings:
    """How the weights, their response and the hyperparameters are updated in turn.

    Attributes:
        mode: what the weights respond to. ``classic``: the perturbed hyperparameters ``lam'`` (arXiv 1903.03088). ``centred``:
            ``lam' - stopgrad(lam)``. ``delta``: the same in two steps a batch, the base weights on the unperturbed
            hyperparameters and the response on perturbed ones (arXiv 2010.13514). ``delta_linear``: the same with the network
            linearised in the response.
        warmup: updates of the weights, with perturbations, before the first update of the hyperparameters.
        train_steps: updates of the weights in a round.
        valid_steps: updates of the hyperparameters and their scales in a round.
        entropy: strength tau of the entropy term ``-tau * sum log(sigma sqrt(2 pi e))``.
        update: ``joint``: hyperparameter and scale from one evaluation; ``sequential``: first the hyperparameter, then the
            scale with the same rows and the same noise.
        min_scale: smallest scale.
        max_scale: largest scale.
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


@dataclass
class Round:
    """What one round did.

    Attributes:
        warming: whether it was part of the warm-up, without an update of the hyperparameters.
        train_loss: mean of its training losses, perturbed, each before its update.
        valid_loss: its last validation loss, perturbed, before an update, if there was one.
        metrics: ``hyper/<name>`` with ``/low`` and ``/high`` one scale away; ``stn/scale/<name>``, ``stn/entropy``,
            ``stn/train_loss``, ``stn/valid_loss``, ``stn/updates``.
    """

    warming: bool
    train_loss: float
    valid_loss: float
    metrics: dict[str, float] = field(default_factory=dict)


class Past(NamedTuple):
    """The part of a round that is kept in the history.

    Attributes:
        steps: number of updates of the weights.
        train_loss: see ``Round``.
        valid_loss: see ``Round``.
        u: the hyperparameters in R during those updates.
        sigma: the scales after the round.
    """

    steps: int
    train_loss: float
    valid_loss: float
    u: list[float]
    sigma: list[float]
