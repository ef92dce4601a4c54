"""Settings of the outer loop, the optimizers and their schedules: frozen, validated, and free of torch.

Names and defaults of optimizer and scheduler fields are those of ``torch.optim``; one class per optimizer, so that a field which
the chosen optimizer does not have is refused when the config is composed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from hyperopt.core.checks import (
    check_below_one,
    check_betas,
    check_choice,
    check_count,
    check_number,
    check_optional,
    check_optional_count,
)

MODES = ("min", "max")
ON_FAILURE = ("raise", "warn")
SCHEDULERS = ("none", "step", "cosine", "exponential", "power", "plateau")
LINE_SEARCHES = ("strong_wolfe",)


@dataclass(frozen=True)
class TrainerSettings:
    """The outer loop: how long, how often, and when to stop.

    max_steps: outer steps (step k is logged after k + 1 updates).
    max_seconds: stop after this many seconds of training, those before a resume included (None: no limit).
    eval_every: evaluate at steps k with ``k % eval_every == 0``, and at the last one.
    checkpoint_every: write ``checkpoints/last.pt`` each time this many steps are done, and at the end.
    monitor: the quantity that ``best.pt``, early stopping, the plateau schedule and the job's return value go by.
    mode: ``min`` or ``max``: which way ``monitor`` is better.
    patience: stop after this many evaluations in a row without improvement (None: never).
    figures_every: draw the task's figures each time this many steps are done (None: at the end only).
    progress: show a live progress line on stderr.
    on_failure: what to do when a solve ends as ``diverged`` or ``nonfinite``: ``raise``, or ``warn`` (1st, 10th, ... time). A
        hypergradient or outer loss that is not finite always stops the run; milder statuses always warn.
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
        if not self.monitor:
            raise ValueError("TrainerSettings: monitor='' names no metric, such as 'val/loss'; change monitor")


@dataclass(frozen=True)
class SchedulerSettings:
    """The learning rate over the outer steps; a field that the chosen ``kind`` does not use is refused.

    kind: ``none``, ``step`` (times gamma every step_size steps), ``cosine`` (down to eta_min over t_max steps), ``exponential``
        (times gamma every step), ``power`` (times ``(1 + t / horizon)^-decay`` in step t) or ``plateau`` (times factor after
        patience evaluations with ``trainer.monitor`` no better).
    step_size: steps between drops; ``step`` needs it.
    gamma: factor of ``step`` (default 0.1) and of ``exponential`` (needed).
    t_max: steps to the minimum of ``cosine`` (default: trainer.max_steps).
    eta_min: lowest learning rate of ``cosine`` (default 0).
    factor: factor of ``plateau`` (default 0.1), in (0, 1).
    patience: evaluations of ``plateau`` without improvement before a drop (default 10).
    decay: exponent of ``power``, in (0, 1]; needed.
    horizon: steps until a fall of ``power`` sets in (default 1).
    """

    kind: str = "none"
    step_size: int | None = None
    gamma: float | None = None
    t_max: int | None = None
    eta_min: float | None = None
    factor: float | None = None
    patience: int | None = None
    decay: float | None = None
    horizon: float | None = None

    USES: ClassVar[dict[str, tuple[str, ...]]] = {
        "none": (),
        "step": ("step_size", "gamma"),
        "cosine": ("t_max", "eta_min"),
        "exponential": ("gamma",),
        "power": ("decay", "horizon"),
        "plateau": ("factor", "patience"),
    }
    NEEDS: ClassVar[dict[str, tuple[str, ...]]] = {"step": ("step_size",), "exponential": ("gamma",), "power": ("decay",)}

    def __post_init__(self) -> None:
        """Check the kind, that its fields and no others are set, and the ranges."""
        check_choice(self, "kind", SCHEDULERS)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "kind" and value is not None and item.name not in self.USES[self.kind]:
                uses = ", ".join(self.USES[self.kind]) or "no numbers"
                raise ValueError(
                    f"SchedulerSettings: kind={self.kind!r} uses {uses}, but {item.name}={value!r} is set; drop {item.name}"
                )
        for name in self.NEEDS.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"SchedulerSettings: kind={self.kind!r} needs {name}, which is None; set {name}")
        check_optional_count(self, "step_size")
        check_optional_count(self, "t_max")
        check_optional_count(self, "patience", 0)
        check_optional(self, "gamma", 0.0, 1.0, open_low=True)
        check_optional(self, "eta_min", 0.0)
        check_optional(self, "decay", 0.0, 1.0, open_low=True)
        check_optional(self, "horizon", 0.0, open_low=True)
        if self.factor is not None and not 0 < self.factor < 1:
            raise ValueError(f"SchedulerSettings: factor={self.factor!r} is not in (0, 1); change factor")


@dataclass(frozen=True)
class OptimizerSettings:
    """What every outer optimizer has.

    lr: learning rate.
    clip_norm: largest 2-norm of the hypergradient over all groups together; a longer one is scaled down (None: no clipping).
    scheduler: the learning rate over time.
    """

    lr: float = 0.01
    clip_norm: float | None = None
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)

    def __post_init__(self) -> None:
        """Check the ranges; a mapping given as ``scheduler`` (a composed config) becomes its settings."""
        if isinstance(self.scheduler, Mapping):
            values = {str(key): value for key, value in self.scheduler.items() if key != "_target_"}
            object.__setattr__(self, "scheduler", SchedulerSettings(**values))
        check_number(self, "lr", 0.0, open_low=True)
        check_optional(self, "clip_norm", 0.0, open_low=True)


@dataclass(frozen=True)
class SGDSettings(OptimizerSettings):
    """Plain gradient descent; weight_decay adds ``weight_decay * lam`` to the hypergradient."""

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "weight_decay", 0.0)


@dataclass(frozen=True)
class MomentumSettings(SGDSettings):
    """Gradient descent with (Nesterov) momentum, as ``torch.optim.SGD`` has it."""

    lr: float = 0.5
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_below_one(self, "momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("MomentumSettings: nesterov=True needs momentum > 0, but momentum=0; change momentum or nesterov")


@dataclass(frozen=True)
class AdamSettings(OptimizerSettings):
    """Adam (arXiv 1412.6980), its weight decay coupled (added to the hypergradient)."""

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges; a list given as ``betas`` becomes a tuple."""
        super().__post_init__()
        check_betas(self)
        check_number(self, "eps", 0.0, open_low=True)
        check_number(self, "weight_decay", 0.0)


@dataclass(frozen=True)
class AdamWSettings(AdamSettings):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    weight_decay: float = 0.01


@dataclass(frozen=True)
class LBFGSSettings(OptimizerSettings):
    """Limited-memory BFGS over all groups at once; evaluates the outer objective up to ``max_eval`` times an outer step.

    max_iter: quasi-Newton iterations an outer step.
    max_eval: evaluations an outer step (None: 1.25 * max_iter).
    tolerance_grad, tolerance_change: stop the iterations of this outer step below these.
    history_size: pairs kept.
    line_search_fn: ``strong_wolfe``, or None for steps of length ``lr``.
    """

    lr: float = 1.0
    max_iter: int = 5
    max_eval: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    history_size: int = 10
    line_search_fn: str | None = "strong_wolfe"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "max_iter")
        check_optional_count(self, "max_eval")
        check_number(self, "tolerance_grad", 0.0)
        check_number(self, "tolerance_change", 0.0)
        check_count(self, "history_size")
        if self.line_search_fn is not None:
            check_choice(self, "line_search_fn", LINE_SEARCHES)
