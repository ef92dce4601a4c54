"""The rounds of a self-tuning network: ``SelfTuningSettings`` says what a round does, ``Round`` what one did."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from hyperopt.core.checks import check_below, check_choice, check_count, check_flag, check_number, check_optional_count

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
        measured: whether the optimizer of the hyperparameters gets gradients in measured scales, see ``hyperopt.stn.rates``
            (None: where it is the default one).
        rounds: length of the run, in which the default rates of weights, response and hyperparameters fall to 0 by a cosine
            (None: they are constant).
        check_every: rounds from one check of the response to the next, which changes nothing of the training; 0: no checks.
        check_steps: steps of each of the four trainings of a check; see ``hyperopt.stn.response_check``.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: MacKay et al., ICLR 2019, arXiv 1903.03088; Bae & Grosse, NeurIPS 2020, arXiv 2010.13514.

    Example:
        >>> import hyperopt
        >>> settings = hyperopt.SelfTuningSettings(warmup=10, train_steps=5)
        >>> settings.train_steps, settings.valid_steps
        (5, 1)
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
    measured: bool | None = None
    rounds: int | None = None
    check_every: int = 100
    check_steps: int = 5

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
        if self.measured is not None:
            check_flag(self, "measured")
        check_optional_count(self, "rounds")
        check_count(self, "check_every", 0)
        check_count(self, "check_steps")


@dataclass(repr=False)
class Round:
    """What one round did; it prints as one line, like the record of a ``hyperopt.Tuner``.

    Attributes:
        warming: whether it was part of the warm-up, without an update of the hyperparameters.
        train_loss: mean of its training losses, perturbed, each before its update.
        valid_loss: its last validation loss, perturbed, before an update, if there was one.
        metrics: ``hyper/<name>`` with ``/low`` and ``/high`` one scale away; ``stn/scale/<name>``, ``stn/entropy``,
            ``stn/train_loss``, ``stn/valid_loss``, ``stn/updates``, and, where it was checked, ``stn/response_error``.
        step: how many rounds were made, with this one.
        gradients: what it cost, in gradient evaluations.

    Example:
        >>> from hyperopt import stn
        >>> record = stn.Round(warming=False, train_loss=0.5, valid_loss=0.7, metrics={"hyper/decay": 0.01}, step=3, gradients=4)
        >>> record
        step 3: val_loss=0.7, train_loss=0.5, decay=0.01, 4 gradient evaluations
    """

    warming: bool
    train_loss: float
    valid_loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    gradients: int = 0

    @property
    def loss(self) -> float:
        """The validation loss, as a ``Tuner``'s record calls it."""
        return self.valid_loss

    @property
    def hyper(self) -> dict[str, float]:
        """The hyperparameters after the round, in their own units, as ``hyper/<name>``."""
        return {name: value for name, value in self.metrics.items() if re.fullmatch("hyper/[^/]+", name)}

    def as_dict(self) -> dict[str, float]:
        """All numbers, by the names of TensorBoard."""
        more = {"stn/warming": float(self.warming), "cost/gradients": float(self.gradients)}
        return {"outer/loss": self.loss, **self.metrics, **more}

    def __repr__(self) -> str:
        """One line."""
        values = ", ".join(f"{name.removeprefix('hyper/')}={value:.4g}" for name, value in self.hyper.items())
        error = self.metrics.get("stn/response_error")
        checked = "" if error is None else f"a response that is off by {error:.2g}, "
        warming = " (warm-up: the hyperparameters did not move)" if self.warming else ""
        return (
            f"step {self.step}: val_loss={self.valid_loss:.6g}, train_loss={self.train_loss:.6g}, {values}, {checked}"
            f"{self.gradients} gradient evaluations{warming}"
        )


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
