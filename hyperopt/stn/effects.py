"""A hyperparameter that the training loss reads without effect is refused before the first update.

At the first batch the loss is evaluated at a value four scales above and at one four scales below the start, with the same
random numbers. If it is the same to the last bit, wherever the other hyperparameters are (four scales above, four below, or at
their start), no perturbation teaches the weights anything. One evaluation for each hyperparameter, and one more, is the usual
cost; nothing of the training changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hyperopt.core.places import Places
from hyperopt.core.policy import ImpureMapError
from hyperopt.core.replay import Replay
from hyperopt.stn.draw import Draw
from hyperopt.stn.refusals import FAR
from hyperopt.stn.response_check import in_training_mode, same_numbers

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
    with in_training_mode(model):
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
