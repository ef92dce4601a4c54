"""The state of the outer loop, plain values in every checkpoint, and the rules for the best step and for stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hyperopt.app.rows import is_count
from hyperopt.tasks.base import HypergradientError
from hyperopt.tasks.trainer import TrainerSettings


class MonitorError(ValueError):
    """``trainer.monitor`` is not one of the metrics of the task."""


@dataclass
class LoopState:
    """The state of the outer loop.

    Attributes:
        step: number of outer steps done.
        best: the best monitored value so far (None before the first finite one).
        best_step: the step of that value.
        best_metrics: the row of that step.
        bad: number of successive evaluations without improvement.
        evaluations: calls of the map so far.
        vjps: vector-Jacobian products so far.
        jvps: Jacobian-vector products so far.
        seconds: training time so far, over all sessions.
        row: metrics of the last step done.
        evaluated: whether that row holds an evaluation.
        lost_rows: ``[first, last]`` steps of rows that were lost from the run's ``metrics.jsonl``.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    bad: int = 0
    evaluations: float = 0
    vjps: float = 0
    jvps: float = 0
    seconds: float = 0.0
    row: dict[str, float] = field(default_factory=dict)
    evaluated: bool = False
    lost_rows: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, saved: Any) -> LoopState:
        """Return the state in a checkpoint, or raise a ``ValueError`` that says which value no run can have written."""

        def is_number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        def is_row(value: Any) -> bool:
            return isinstance(value, dict) and all(isinstance(name, str) and is_number(value[name]) for name in value)

        checks = {
            **dict.fromkeys(("step", "bad"), is_count),
            **dict.fromkeys(("evaluations", "vjps", "jvps", "seconds"), lambda value: is_number(value) and value >= 0),
            "best": lambda value: value is None or is_number(value),
            "best_step": lambda value: value is None or is_count(value),
            "best_metrics": is_row,
            "row": lambda value: is_row(value) and "outer/step_loss" in value,
            "evaluated": lambda value: isinstance(value, bool),
            "lost_rows": lambda value: (
                isinstance(value, list)
                and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_count, pair)) for pair in value)
            ),
        }
        if not isinstance(saved, dict) or not saved.keys() <= checks.keys():
            raise ValueError("state is not that of a run")
        found = cls(**saved)
        for item in fields(cls):
            if not checks[item.name](getattr(found, item.name)):
                raise ValueError(f"state.{item.name} is {getattr(found, item.name)!r:.40}")
        if found.step < 1:
            raise ValueError("state.step is 0, before the first checkpoint")
        return found

    def note(self, metrics: Mapping[str, float], trainer: TrainerSettings) -> bool:
        """Add the evaluation of the last step to its row, and keep the row if its value is finite and the best so far.

        Returns:
            Whether it is the best so far.

        Raises:
            MonitorError: the evaluation lacks ``trainer.monitor``.
            HypergradientError: the outer loss is not finite.
        """
        value = monitored(metrics, trainer)
        if not math.isfinite(metrics.get("outer/loss", 0.0)):
            loss = metrics["outer/loss"]
            what = f"step {self.step - 1}: outer/loss is {loss} after the update"
            raise HypergradientError(f"{what}; lower optimizer.lr or check the data")
        self.row.update({name: float(number) for name, number in metrics.items()})
        self.evaluated = True
        sign = 1 if trainer.mode == "min" else -1
        if not math.isfinite(value) or (self.best is not None and sign * value >= sign * self.best):
            self.bad += 1
            return False
        self.best, self.best_step, self.best_metrics, self.bad = value, self.step - 1, dict(self.row), 0
        return True

    def stop_reason(self, trainer: TrainerSettings) -> str | None:
        """Return the key that says why the loop ends now, or None."""
        if self.step >= trainer.max_steps:
            return "trainer.max_steps"
        if trainer.patience is not None and self.bad >= trainer.patience:
            return "trainer.patience"
        if trainer.max_seconds is not None and self.seconds >= trainer.max_seconds:
            return "trainer.max_seconds"
        return None


def monitored(metrics: Mapping[str, float], trainer: TrainerSettings) -> float:
    """Return the monitored quantity of an evaluation, or refuse an evaluation that does not have it."""
    if trainer.monitor not in metrics:
        known = f"the task's metrics {', '.join(sorted(metrics))}"
        raise MonitorError(f"trainer.monitor={trainer.monitor!r} is not one of {known}; change trainer.monitor")
    return float(metrics[trainer.monitor])
