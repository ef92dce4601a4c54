"""What the tasks share whose outer loss goes through equilibria: one update of an optimizer, and its record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperopt.status import Solution
from hyperopt.tasks.base import Guard, StepRecord, Task
from hyperopt.tasks.solves import solve_metrics


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
    ) -> StepRecord:
        """Let the optimizer make one step.

        Args:
            optimizer: see ``Task.step``.
            guard: see ``Guard``.
            loss: the outer loss of this step; the same function at every call, since a line search makes several.
            measure: further metrics, taken after the first backward and before the guard clips.

        Returns:
            The record of the first evaluation, its costs summed over all.
        """
        records: list[StepRecord] = []

        def closure() -> float:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            measured = {} if records else measure()
            guard(self.gradients())
            metrics, statuses = solve_metrics(self.solutions())
            records.append(StepRecord(value.item(), {**metrics, **measured}, statuses))
            return records[-1].loss

        optimizer.step(closure)
        first = records[0]
        for cost in ("cost/evaluations", "cost/vjps", "cost/jvps"):
            first.metrics[cost] = sum(record.metrics[cost] for record in records)
        self.steps += 1
        return first
