"""``SolvingTask``: the outer step and its record, for tasks whose outer loss contains equilibria."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt.core import distributed
from hyperopt.core.certificate import Constants, certify
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Solution
from hyperopt.core.tree import tree_norm
from hyperopt.tasks.base import GradientCheck, StepRecord, Task
from hyperopt.tasks.solve_figures import solve_metrics


def check_adjoint(owner: Any) -> None:
    """Refuse an adjoint that does not fit the task's solver."""
    if owner.adjoint is not None and (why := owner.adjoint.unfit(owner.solver or Picard())) is not None:
        raise ValueError(f"{type(owner).__name__}: adjoint={type(owner.adjoint).__name__} {why}; change adjoint")


class SolvingTask(Task):
    """A task with one or more equilibria in its outer loss.

    Attributes:
        steps: number of outer steps so far; ``setup`` sets it to 0.
    """

    steps: int

    @abstractmethod
    def solutions(self) -> Sequence[Solution]:
        """Return the latest solution of every equilibrium in the model."""

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        check: GradientCheck,
        loss: Callable[[], Tensor],
        measure: Callable[[], dict[str, float]] = dict,
        rows: int = 1,
    ) -> StepRecord:
        """Let the optimizer make one step.

        Args:
            optimizer: see ``Task.step``.
            check: see ``GradientCheck``.
            loss: the outer loss on the rows of this rank; see ``Task.descend``.
            measure: returns further metrics; called after the first ``backward`` and before ``check``, which may clip.
            rows: number of rows of this rank, over which ``loss`` is a mean.

        Returns:
            The record of the first evaluation, with the costs of all evaluations.
        """
        measures = iter([measure])  # only for the first call

        def record(value: float) -> StepRecord:
            metrics, statuses = solve_metrics(self.solutions())
            return StepRecord(value, {**metrics, **next(measures, dict)()}, statuses, rows)

        found = self.descend(optimizer, check, loss, record, rows)
        self.steps += 1
        return found

    def certificate(self, every: int, constants: Callable[[], Constants | None] = lambda: None) -> dict[str, float]:
        """Return the certificate of the latest hypergradient through the first equilibrium, if one is due; else nothing.

        It takes no evaluation and no vjp, only some norms of (rows, state) matrices and the cost of ``constants``.

        Args:
            every: number of outer steps between two certificates.
            constants: returns the constants of the cell and the outer loss, or None; not used on several ranks, since each has
                only a part of the rows.
        """
        solutions = self.solutions()
        if self.steps % every or not solutions or solutions[0].adjoint is None:
            return {}
        known = constants() if distributed.ranks() == 1 else None
        found = certify(solutions[0], tree_norm(self.gradients()), known)
        return {"hypergrad/error_estimate": found.error, "hypergrad/is_bound": float(found.is_bound)}
