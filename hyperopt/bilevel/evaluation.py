"""``Evaluation``: the inner loss on one batch, as one function of the weights and the hyperparameters.

Finite differences, products, checkpoints and line searches evaluate the loss of one step more than once. All evaluations after
the first are replays of it: they see its dropout masks and its running statistics, and leave no trace (``hyperopt.core.replay``).
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
        batch: of the inner loss.
    """

    def __init__(self, problem: BilevelProblem, batch: Any) -> None:
        """Nothing is evaluated yet."""
        self.problem, self.batch = problem, batch
        self.replay: Replay | None = None

    def once_after(self, step: Evaluation) -> None:
        """Be a step of training that is evaluated once, after another ``step`` of it, and is committed.

        Nothing has to be put back then, and one search for the loss's modules serves both. But if that step has changed tensors
        in place that are no buffers, which its graph may have saved, this one is watched as it was.
        """
        if self.replay is None and step.replay is not None and not step.replay.wrote:
            self.replay = Replay(step.replay.places, step.replay.autocast[0], record=False)

    def __call__(self, w: Any, lam: Any) -> Tensor:
        """``L(w, lam, batch)``."""
        return self.of(lambda w, lam: self.problem.inner(w, lam, self.batch), w, lam)

    def of(self, function: Callable[[Any, Any], Any], w: Any, lam: Any) -> Any:
        """Another function of the loss's parts, ``function(w, lam)``, which draws what the loss draws."""
        if self.replay is None:
            self.replay = Replay(Places.of(self.problem.inner_loss), optree.tree_leaves(w)[0].device.type)
        return self.replay(function, w, lam)

    @property
    def random(self) -> bool:
        """Whether the loss draws random numbers."""
        return self.replay is not None and bool(self.replay.random)

    def commit(self) -> None:
        """Let running statistics, counters and the like be as the latest evaluation left them: it was a step of training."""
        if self.replay is not None:
            self.replay.commit()
