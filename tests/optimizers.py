"""Outer optimizers by short names."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim import lr_scheduler

from hyperopt.bilevel.outer import OuterOptimizer, PowerLR

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "lbfgs": (torch.optim.LBFGS, {"max_iter": 5, "line_search_fn": "strong_wolfe"}),
}
SCHEDULES: dict[str, Any] = {
    "step": lr_scheduler.StepLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "exponential": lr_scheduler.ExponentialLR,
    "power": PowerLR,
    "plateau": lr_scheduler.ReduceLROnPlateau,
}


def scheduler(kind: str, **values: Any) -> Any:
    """What makes a schedule; None for ``none``."""
    return None if kind == "none" else functools.partial(SCHEDULES[kind], **values)


def optimizer(kind: str, scheduler: Any = None, clip_norm: float | None = None, **values: Any) -> OuterOptimizer:
    """What makes an optimizer."""
    made, own = KINDS[kind]
    return OuterOptimizer(functools.partial(made, **{**own, **values}), scheduler, clip_norm)


def sgd(lr: float = 0.01, **values: Any) -> OuterOptimizer:
    """Plain gradient descent."""
    return optimizer("sgd", lr=lr, **values)


def adam(lr: float = 0.001, **values: Any) -> OuterOptimizer:
    """Adam."""
    return optimizer("adam", lr=lr, **values)
