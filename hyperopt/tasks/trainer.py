"""``TrainerSettings``: the settings of the outer loop, which every task receives."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt.core.checks import check_choice, check_count, check_flag, check_optional, check_optional_count

MODES = ("min", "max")
ON_FAILURE = ("raise", "warn")


@dataclass(frozen=True)
class TrainerSettings:
    """The settings of the outer loop.

    Attributes:
        max_steps: number of outer steps (step k is logged after k + 1 updates), at least 1.
        max_seconds: largest number of seconds of training, including those before a resume, above 0 (None: no limit).
        eval_every: evaluate at steps k with ``k % eval_every == 0``, and at the last one.
        checkpoint_every: write ``checkpoints/last.pt`` after each multiple of this number of steps, and at the end.
        monitor: the metric for ``best.pt``, early stopping, the plateau schedule and the job's return value.
        mode: ``min`` or ``max``: whether a smaller or a larger ``monitor`` is better.
        patience: stop after this many evaluations in a row without improvement (None: never).
        figures_every: draw the task's figures after each multiple of this number of steps (None: at the end only).
        progress: whether to show a live progress line on stderr.
        on_failure: what to do when a solve ends as ``diverged`` or ``nonfinite``: ``raise``, or ``warn`` (1st, 10th, ... time).
            A hypergradient or outer loss that is not finite always stops the run; milder statuses always warn.
    """

    max_steps: int = 200
    max_seconds: float | None = None
    eval_every: int = 10
    checkpoint_every: int = 50
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int | None = None
    figures_every: int | None = None
    progress: bool = True
    on_failure: str = "raise"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_steps", "eval_every", "checkpoint_every"):
            check_count(self, name)
        for name in ("patience", "figures_every"):
            check_optional_count(self, name)
        check_optional(self, "max_seconds", 0.0, open_low=True)
        check_choice(self, "mode", MODES)
        check_choice(self, "on_failure", ON_FAILURE)
        check_flag(self, "progress")
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(
                f"TrainerSettings: monitor={self.monitor!r} is not the name of a metric, such as 'val/loss'; change monitor"
            )
