"""Optimizers and their schedules, made from settings on ``torch.optim``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from hyperopt.bilevel.outer_settings import (
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
            "power": lambda: lr_scheduler.LambdaLR(optimizer, lambda t: (1 + t / (s.horizon or 1.0)) ** -(s.decay or 0.0)),
            "plateau": lambda: lr_scheduler.ReduceLROnPlateau(
                optimizer,
                "max" if trainer.mode == "max" else "min",
                factor=0.1 if s.factor is None else s.factor,
                patience=10 if s.patience is None else s.patience,
            ),
        }
        self.kind = settings.kind
        self._optimizer = optimizer
        self._scheduler = make[settings.kind]()

    def after_step(self) -> None:
        """Advance a schedule that counts outer steps."""
        if self._scheduler is not None and self.kind != "plateau":
            # torch warns of a schedule that is ahead of its optimizer, which stands still while a self-tuning network warms up.
            vars(self._optimizer)["_opt_called"] = True
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
