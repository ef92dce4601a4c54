"""``Evaluation``: the inner loss on one batch, as a function of the weights and the hyperparameters.

Finite differences, products, checkpoints and line searches evaluate the loss of one step more than once. Every evaluation after
the first replays it: it uses the same dropout masks and running statistics, and leaves no trace (``hyperopt.core.replay``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
from torch import Tensor

from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.places import Places
from hyperopt.core.replay import Replay


class Evaluation:
    """The inner loss on one batch.

    Args:
        problem: the losses.
        batch: batch of the inner loss.
    """

    def __init__(self, problem: BilevelProblem, batch: Any) -> None:
        self.problem, self.batch = problem, batch
        self.replay: Replay | None = None

    def once_after(self, step: Evaluation) -> None:
        """Prepare for a training step that follows another ``step``, is evaluated once and is then committed.

        Nothing needs to be restored then, and the search for the loss's modules is not repeated. The exception is a ``step``
        that changed tensors other than buffers in place: its graph may have saved them, so this evaluation is recorded as
        usual.
        """
        if self.replay is None and step.replay is not None and not step.replay.wrote:
            self.replay = Replay(step.replay.places, step.replay.autocast[0], record=False)

    def __call__(self, w: Any, lam: Any) -> Tensor:
        """Return ``L(w, lam, batch)``."""
        return self.of(lambda w, lam: self.problem.inner(w, lam, self.batch), w, lam)

    def of(self, function: Callable[[Any, Any], Any], w: Any, lam: Any) -> Any:
        """Return ``function(w, lam)``, made of parts of the loss, with the random numbers and buffers of the loss."""
        if self.replay is None:
            self.replay = Replay(Places.of(self.problem.inner_loss), optree.tree_leaves(w)[0].device.type)
        return self.replay(function, w, lam)

    @property
    def random(self) -> bool:
        """Whether the loss draws random numbers."""
        return self.replay is not None and bool(self.replay.random)

    def commit(self) -> None:
        """Keep the running statistics and counters of the latest evaluation, because it was a step of training."""
        if self.replay is not None:
            self.replay.commit()
