"""The outer optimizer and its schedule, made from settings on ``torch.optim``, and the guard that every hypergradient passes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from hyperopt.tasks.base import HypergradientError
from hyperopt.train_settings import (
    AdamSettings,
    AdamWSettings,
    LBFGSSettings,
    MomentumSettings,
    OptimizerSettings,
    SchedulerSettings,
    SGDSettings,
    TrainerSettings,
)


class OuterOptimizer(OptimizerSettings, ABC):
    """Optimizer settings that can build their optimizer; what ``optimizer._target_`` names, also for one of your own."""

    @abstractmethod
    def make(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer over ``params``, one ``{"params": tensors, "name": group}`` a group."""

    def build(self, groups: Mapping[str, Sequence[Tensor]]) -> torch.optim.Optimizer:
        """Return the optimizer over named groups of hyperparameters; each ``param_group`` carries its ``name``.

        Raises:
            ValueError: no hyperparameters, or one of them twice.
        """
        params: list[dict[str, Any]] = [{"params": list(group), "name": name} for name, group in groups.items() if len(group)]
        if not params:
            raise ValueError("the task has no hyperparameters to optimize: its groups() are empty; change task")
        return self.make(params)


class SGD(SGDSettings, OuterOptimizer):
    """``torch.optim.SGD`` without momentum."""

    def make(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build it."""
        return torch.optim.SGD(params, lr=self.lr, weight_decay=self.weight_decay)


class Momentum(MomentumSettings, OuterOptimizer):
    """``torch.optim.SGD`` with momentum."""

    def make(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build it."""
        return torch.optim.SGD(params, self.lr, self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay)


class Adam(AdamSettings, OuterOptimizer):
    """``torch.optim.Adam``."""

    def make(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build it."""
        return torch.optim.Adam(params, self.lr, self.betas, self.eps, self.weight_decay)


class AdamW(AdamWSettings, OuterOptimizer):
    """``torch.optim.AdamW``."""

    def make(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build it."""
        return torch.optim.AdamW(params, self.lr, self.betas, self.eps, self.weight_decay)


class LBFGS(LBFGSSettings, OuterOptimizer):
    """``torch.optim.LBFGS``, which has one curvature model of everything: all groups become one, named ``all``."""

    def make(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build it."""
        return torch.optim.LBFGS(
            [{"params": [tensor for group in params for tensor in group["params"]], "name": "all"}],
            lr=self.lr,
            max_iter=self.max_iter,
            max_eval=self.max_eval,
            tolerance_grad=self.tolerance_grad,
            tolerance_change=self.tolerance_change,
            history_size=self.history_size,
            line_search_fn=self.line_search_fn,
        )


class Schedule:
    """A learning-rate schedule that is stepped by the loop: every outer step, and, for ``plateau``, at every evaluation.

    Args:
        settings: kind and numbers.
        optimizer: whose learning rates move.
        trainer: gives ``cosine`` its default length, and ``plateau`` the direction of the monitored quantity.
    """

    def __init__(self, settings: SchedulerSettings, optimizer: torch.optim.Optimizer, trainer: TrainerSettings) -> None:
        """Build the scheduler of ``torch.optim.lr_scheduler``."""
        s = settings
        make: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "step": lambda: lr_scheduler.StepLR(optimizer, s.step_size or 1, 0.1 if s.gamma is None else s.gamma),
            "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, 1.0 if s.gamma is None else s.gamma),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, s.t_max or trainer.max_steps, s.eta_min or 0.0),
            "plateau": lambda: lr_scheduler.ReduceLROnPlateau(
                optimizer,
                "max" if trainer.mode == "max" else "min",
                factor=0.1 if s.factor is None else s.factor,
                patience=10 if s.patience is None else s.patience,
            ),
        }
        self.kind = settings.kind
        self._scheduler = make[settings.kind]()

    def after_step(self) -> None:
        """Advance a schedule that counts outer steps."""
        if self._scheduler is not None and self.kind != "plateau":
            self._scheduler.step()

    def after_evaluation(self, monitored: float) -> None:
        """Show a ``plateau`` schedule the monitored quantity."""
        if self.kind == "plateau":
            self._scheduler.step(monitored)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain containers (empty for ``none``)."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state)


class HypergradientGuard:
    """Refuses a hypergradient that is not finite, measures it group by group, and clips it.

    The norm is ``sqrt(sum_groups |g|^2)``, in float64, so that a finite float32 hypergradient cannot overflow it. With
    ``clip_norm=c`` every gradient is scaled in place by ``min(1, c / norm)``.

    Args:
        clip_norm: largest norm let through (None: any finite one).

    Attributes:
        step: index of the outer step under way; the loop sets it.
        norms: ``hypergrad/norm`` and ``hypergrad/norm/<group>`` of the step's first evaluation, before clipping.
    """

    def __init__(self, clip_norm: float | None = None) -> None:
        """Start before step 0."""
        self.clip_norm = clip_norm
        self.begin(0)

    def begin(self, step: int) -> None:
        """Open an outer step."""
        self.step = step
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Check, measure and clip ``{group: [gradient, ...]}`` in place.

        Raises:
            HypergradientError: an entry is NaN or infinite; names the step and the groups.
        """
        # One norm a tensor, read back in one transfer: the only synchronisation with a GPU here.
        tensors = [tensor for group in gradients.values() for tensor in group]
        found = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).tolist() if tensors else []
        each = iter(found)
        norms = {name: math.hypot(*(next(each) for _ in group)) for name, group in gradients.items()}
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if bad:
            counts = ", ".join(f"{name} ({sum(int((~t.isfinite()).sum()) for t in gradients[name])} entries)" for name in bad)
            raise HypergradientError(
                f"step {self.step}: the hypergradient of group {counts} is not finite; lower optimizer.lr, check the "
                f"data, or use precision=float64"
            )
        total = math.hypot(*norms.values())
        if not self.norms:
            self.norms = {"hypergrad/norm": total, **{f"hypergrad/norm/{name}": norm for name, norm in norms.items()}}
        if self.clip_norm is not None and total > self.clip_norm:
            for tensor in tensors:
                tensor.mul_(self.clip_norm / total)
