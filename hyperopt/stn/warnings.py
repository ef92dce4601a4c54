"""Warnings, given once a run, of failures of a self-tuning network that look like well-tuned hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hyperopt.core.policy import note_once
from hyperopt.stn.rounds import SelfTuningSettings
from hyperopt.stn.space import HyperSpace

DECAY = 0.95  # decay of the running means of both losses
WINDOW = 100  # number of rounds over which the validation loss must have fallen
TRIVIAL = 0.01  # a training loss below this fraction of the validation loss is near 0


class TuningError(ArithmeticError):
    """A loss, a hyperparameter or a scale is not finite; the message names it and what to change.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> net = stn.convert(torch.nn.Linear(1, 1), stn.HyperSpace({"decay": stn.Positive(0.1)}))
        >>> def train_loss(net, x, draw):
        ...     return net(x, draw).sum() + (-draw.h["decay"]).log().sum()
        >>> tuning = stn.SelfTuning(net, train_loss, lambda net, x, draw: net(x).sum())
        >>> try:
        ...     record = tuning.round(lambda: torch.ones(2, 1), lambda: torch.ones(2, 1))
        ... except stn.TuningError:
        ...     print("a loss is not finite")
        a loss is not finite
    """


class Watch:
    """Checks every round: values, scales, and both losses.

    Args:
        settings: settings with the smallest and largest scale.
    """

    def __init__(self, settings: SelfTuningSettings) -> None:
        """Start before the first round."""
        self._settings = settings
        self._state: dict[str, Any] = {"train": None, "valid": None, "before": None, "rounds": 0, "response": None}

    def finite(self, updates: int, u: Mapping[str, float], s: Mapping[str, float], losses: Mapping[str, Sequence[float]]) -> None:
        """Refuse numbers that are not finite.

        Raises:
            TuningError: the message names the number.
        """
        for kind, values in losses.items():
            if not all(map(math.isfinite, values)):
                bad = next(value for value in values if not math.isfinite(value))
                raise TuningError(
                    f"the {kind} loss is {bad} after {updates} weight updates; lower the learning rate of the optimizer "
                    "weights, or the scale of the perturbation, or look for numbers in the data that are not finite"
                )
        for kind, values in (("value", u), ("scale", s)):
            for name, value in values.items():
                if not math.isfinite(value):
                    raise TuningError(
                        f"the {kind} of {name} is {value} in R after {updates} weight updates; lower the learning rate of the "
                        "optimizer of the hyperparameters, or that of scales"
                    )

    def saturated(self, space: HyperSpace, u: Mapping[str, float], sigma: Mapping[str, float]) -> None:
        """Warn of a hyperparameter at the end of its space, and of a scale at its smallest or largest value."""
        s = self._settings
        for name, each in space.declared.items():
            if (bound := each.saturated(u[name])) is not None:
                note_once(
                    f"hyperparameter {name} has come to {bound}, where it moves no more; widen its bounds, or lower the "
                    "learning rate of the hyperparameters (said once a run)",
                    f"saturated {name}",
                )
            if sigma[name] <= s.min_scale * 1.0001:
                note_once(
                    f"the scale of {name} is at its floor {s.min_scale:g}: the response is learned from almost no perturbation; "
                    "raise entropy, or lower min_scale if that is meant (said once a run)",
                    f"floor {name}",
                )
            if sigma[name] >= s.max_scale * 0.9999:
                note_once(
                    f"the scale of {name} is at its ceiling {s.max_scale:g}: the validation loss does not depend on it; lower "
                    "entropy (said once a run)",
                    f"ceiling {name}",
                )

    def collapse(self, train: float, valid: float) -> None:
        """Warn of a training loss near 0 while the validation loss does not fall: the training task is trivial."""
        state = self._state
        for kind, value in (("train", train), ("valid", valid)):
            state[kind] = value if state[kind] is None else DECAY * state[kind] + (1 - DECAY) * value
        state["rounds"] += 1
        if state["rounds"] % WINDOW:
            return
        before, state["before"] = state["before"], state["valid"]
        if before is not None and 0 <= state["train"] < TRIVIAL * state["valid"] and state["valid"] > 0.9 * before:
            note_once(
                f"collapse: the training loss is {state['train']:.2g} while the validation loss stands at {state['valid']:.2g} "
                f"for {WINDOW} rounds: the hyperparameters make the training task trivial; start elsewhere, use mode=centred, "
                "or more weight updates for each of the hyperparameters (said once a run)",
                "collapse",
            )

    def response(self, error: float) -> float | None:
        """Note the error of a check of the response, and return that of the check before."""
        before, self._state["response"] = self._state.get("response"), error
        return before

    def state_dict(self) -> dict[str, Any]:
        """Return the running means and the last error of the response."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self._state |= state
