"""Losses that could tune nothing are refused before the first update.

A hyperparameter that the training loss reads without effect: at the first batch the loss is evaluated at a value four scales
above and at one four scales below the start, with the same random numbers. If it is the same to the last bit, wherever the other
hyperparameters are (four scales above, four below, or at their start), no perturbation teaches the weights anything. One
evaluation for each hyperparameter, and one more, is the usual cost; nothing of the training changes.

A validation loss that is not finite at the start, or does not depend on the weights that respond, costs one gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt.core.places import Places
from hyperopt.core.policy import ImpureMapError
from hyperopt.core.replay import Replay
from hyperopt.stn.draw import Draw
from hyperopt.stn.refusals import FAR
from hyperopt.stn.response_check import in_mode, same_numbers
from hyperopt.stn.warnings import TuningError

if TYPE_CHECKING:
    from hyperopt.stn.updates import Updates


@torch.no_grad()
def refuse_without_effect(tuning: Updates, batch: Any) -> None:
    """Refuse a hyperparameter on which the training loss does not depend.

    A loss that cannot be evaluated twice alike is taken as it is.

    Raises:
        ValueError: names the hyperparameter and its values.
    """
    model, space, rows = tuning.model, tuning.space, tuning.rows(batch)
    u, sigma = space.u.detach(), space.sigma.detach()
    with in_mode(model, training=True):
        replay = Replay(Places.of(tuning.train_loss, (model,)), u.device.type)

        def loss(side: float, name: str | None = None) -> float:
            """Return the loss with all at ``side`` times four scales, and one of them on the other side."""
            m = u + side * FAR * sigma
            if name is not None:
                place = space.names.index(name)
                m[place] = u[place] - (side or 1) * FAR * sigma[place]
            m = m.expand(rows, -1)
            draw = Draw(space, m, torch.zeros_like(m), sigma, responds=False)
            with same_numbers(u.device):
                return float(tuning.evaluated(batch, draw, replay)[0])

        still, base = list(space.names), 0.0
        try:
            for side in (1.0, -1.0, 0.0):
                base = loss(side)
                still = [name for name in still if loss(side, name) == base]
                if not still:
                    return
        except ImpureMapError:
            return
        finally:
            replay.contents.rewind()
    name = still[0]
    each, start, far = space.declared[name], u[space.names.index(name)], FAR * sigma[space.names.index(name)]
    low, high = (float(each.value(start + way * far)) for way in (-1, 1))
    raise ValueError(
        f"the training loss reads {name} without effect: it is {base:.6g} with {name} at {low:.3g} and at {high:.3g}, which are "
        f"{FAR} scales from its start; use draw.h[{name!r}] where it changes the loss, raise its scale, or do not declare it"
    )


def refuse_valid_loss(tuning: Updates, batch: Any) -> None:
    """Refuse a validation loss that is not finite, or that does not depend on the weights that respond.

    Raises:
        TypeError, ValueError: says what the loss must be.
        TuningError: it is not finite before any update.
    """
    space = tuning.space
    eps = torch.zeros(tuning.rows(batch), len(space.names)).to(space.u)
    with in_mode(tuning.model, training=False):
        replay = Replay(Places.of(tuning.valid_loss, (tuning.model,)), space.u.device.type)
        try:
            with torch.enable_grad(), same_numbers(space.u.device):
                loss, draw = tuning.validation(batch, lambda: space.at(eps), replay)
                refuse_not_finite(loss, "valid_loss")
                with tuning.model.at(draw):
                    slope = torch.autograd.grad(loss, space.u, allow_unused=True)[0] if loss.requires_grad else None
        finally:
            replay.contents.rewind()
    if slope is None:
        raise ValueError(
            "valid_loss does not depend on weights that respond, so no hyperparameter would move: let it call the model that "
            "it is given, with gradients"
        )


def refuse_not_finite(loss: Tensor, name: str) -> None:
    """Refuse a loss, called ``name``, that is not finite before the first update.

    Raises:
        TuningError: says what to check.
    """
    if not math.isfinite(value := float(loss.detach())):
        raise TuningError(
            f"{name} is {value} before the first update: check the data for numbers that are not finite, and the weights and "
            "hyperparameters at their start"
        )
