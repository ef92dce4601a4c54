"""``Running``: means over the steps since the last evaluation, for a table that has one line an epoch."""

from __future__ import annotations

from typing import Any

from hyperopt.tasks.base import StepRecord

SHOWN = {
    "running/accuracy": "outer/step_accuracy",
    "running/inner_iterations": "inner/iterations",
    "running/inner_iterations_mean": "inner/iterations_mean",
    "running/adjoint_iterations": "adjoint/iterations",
    "running/adjoint_iterations_mean": "adjoint/iterations_mean",
}


class Running:
    """Means over steps. ``read`` may be called several times; the next ``add`` after it starts new means."""

    def __init__(self) -> None:
        """Start without steps."""
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._was_read = False

    def add(self, record: StepRecord) -> None:
        """Add one step."""
        if self._was_read:
            self.__init__()
        values = {"running/loss": record.loss}
        values |= {name: record.metrics[key] for name, key in SHOWN.items() if key in record.metrics}
        for name, status in record.statuses.items():
            values[f"running/{name}_failed"] = float(status.failed)
            values[f"running/{name}_fallbacks"] = float(record.metrics[f"{name}/fallbacks"] > 0)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the means, or nothing before the first step."""
        self._was_read = True
        return {name: total / self._steps for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers."""
        return {"sums": dict(self._sums), "steps": self._steps, "was_read": self._was_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._sums, self._steps, self._was_read = dict(state["sums"]), state["steps"], state["was_read"]
