"""What the tasks share whose outer loss goes through equilibria: one update of an optimizer, and its record."""

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
from hyperopt.tasks.base import Guard, StepRecord, Task
from hyperopt.tasks.solve_figures import solve_metrics


def check_adjoint(owner: Any) -> None:
    """Refuse an adjoint that cannot differentiate what the task's solver finds."""
    if owner.adjoint is not None and (why := owner.adjoint.unfit(owner.solver or Picard())) is not None:
        raise ValueError(f"{type(owner).__name__}: adjoint={type(owner.adjoint).__name__} {why}; change adjoint")


class SolvingTask(Task):
    """A task with one or more equilibria inside its outer loss.

    Attributes:
        steps: outer steps done; ``setup`` sets it to 0.
    """

    steps: int

    @abstractmethod
    def solutions(self) -> Sequence[Solution]:
        """Return the latest solve of every equilibrium in the model."""

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        loss: Callable[[], Tensor],
        measure: Callable[[], dict[str, float]] = dict,
        rows: int = 1,
    ) -> StepRecord:
        """Let the optimizer make one step.

        Args:
            optimizer: see ``Task.step``.
            guard: see ``Guard``.
            loss: the outer loss of this step on the rows of this rank; the same function at every call, since a line search makes
                several.
            measure: further metrics, taken after the first backward and before the guard clips.
            rows: of this rank, whose mean ``loss`` is.

        Returns:
            The record of the first evaluation, its costs summed over all.
        """
        measures = iter([measure])  # for the first call alone

        def record(value: float) -> StepRecord:
            metrics, statuses = solve_metrics(self.solutions())
            return StepRecord(value, {**metrics, **next(measures, dict)()}, statuses, rows)

        found = self.descend(optimizer, guard, loss, record, rows)
        self.steps += 1
        return found

    def certificate(self, every: int, constants: Callable[[], Constants | None] = lambda: None) -> dict[str, float]:
        """Return the certificate of the hypergradient of the latest backward through the one equilibrium, where it is due.

        It makes no evaluation and no vjp: it costs some norms of (rows, state) matrices, and what ``constants`` costs.

        Args:
            every: outer steps from one certificate to the next.
            constants: of the cell and the outer loss, where they are known (unused on several ranks, each of which sees a part).
        """
        solutions = self.solutions()
        if self.steps % every or not solutions or solutions[0].adjoint is None:
            return {}
        known = constants() if distributed.ranks() == 1 else None
        found = certify(solutions[0], tree_norm(self.gradients()), known)
        return {"hypergrad/error_estimate": found.error, "hypergrad/is_bound": float(found.is_bound)}
