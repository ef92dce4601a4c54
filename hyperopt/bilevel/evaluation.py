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
        record: whether it will be evaluated more than once, or changes tensors in place that are no buffers.
    """

    def __init__(self, problem: BilevelProblem, batch: Any, *, record: bool = True) -> None:
        """Nothing is evaluated yet."""
        self.problem, self.batch, self.record = problem, batch, record
        self.replay: Replay | None = None

    def __call__(self, w: Any, lam: Any) -> Tensor:
        """``L(w, lam, batch)``."""
        return self.of(lambda w, lam: self.problem.inner(w, lam, self.batch), w, lam)

    def of(self, function: Callable[[Any, Any], Any], w: Any, lam: Any) -> Any:
        """Another function of the loss's parts, ``function(w, lam)``, which draws what the loss draws."""
        if self.replay is None:
            device = optree.tree_leaves(w)[0].device.type
            self.replay = Replay(Places.of(self.problem.inner_loss), device, record=self.record)
        return self.replay(function, w, lam)

    @property
    def random(self) -> bool:
        """Whether the loss draws random numbers."""
        return self.replay is not None and bool(self.replay.random)

    @property
    def wrote(self) -> bool:
        """Whether the loss changes tensors in place, other than the buffers of modules in training mode."""
        return self.replay is not None and self.replay.wrote

    def commit(self) -> None:
        """Let running statistics, counters and the like be as the latest evaluation left them: it was a step of training."""
        if self.replay is not None:
            self.replay.commit()
