"""Outer optimizers: those of ``torch.optim`` over named groups of hyperparameters, with a schedule and gradient clipping.

optimizer = OuterOptimizer(functools.partial(torch.optim.Adam, lr=0.01), clip_norm=1.0)
made = optimizer.build({"decay": [raw]})        # a torch.optim.Adam
schedule = Schedule(optimizer.scheduler, made)  # stepped by the loop
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from hyperopt.core.checks import check_optional
from hyperopt.core.text import with_article

Make = Callable[..., torch.optim.Optimizer]
"""A function from parameter groups to an optimizer, such as ``functools.partial(torch.optim.Adam, lr=0.01)``."""
MakeScheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
"""A function from an optimizer to its schedule, such as ``functools.partial(lr_scheduler.StepLR, step_size=30)``."""


@dataclass(frozen=True)
class OuterOptimizer:
    """The settings of the outer optimizer, from which ``build`` makes one for given hyperparameters.

    Attributes:
        make: makes the optimizer of ``[{"params": tensors, "name": group}, ...]``.
        scheduler: makes its learning-rate schedule (None: the rate is constant).
        clip_norm: largest 2-norm of the gradient over all groups together; a longer one is scaled down (None: no clipping).
    """

    make: Make
    scheduler: MakeScheduler | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_optional(self, "clip_norm", 0.0, open_low=True)

    def build(self, groups: Mapping[str, Sequence[Tensor]]) -> torch.optim.Optimizer:
        """Return the optimizer over named groups of hyperparameters; each ``param_group`` carries its ``name``.

        LBFGS takes one group only, so for it all groups are merged into one named ``all``.

        Raises:
            ValueError: there are no hyperparameters, or one occurs twice.
        """
        params: list[dict[str, Any]] = [{"params": list(group), "name": name} for name, group in groups.items() if len(group)]
        if not params:
            raise ValueError("the task has no hyperparameters to optimize: its groups() are empty; change task")
        if getattr(self.make, "func", self.make) is torch.optim.LBFGS:
            params = [{"params": [tensor for group in params for tensor in group["params"]], "name": "all"}]
        return self.make(params)


def as_outer_optimizer(optimizer: OuterOptimizer | Make, name: str) -> OuterOptimizer:
    """Return an ``OuterOptimizer`` for a given one, or for a function that makes an optimizer.

    Raises:
        TypeError: it is none of these; the message calls it ``name``.
    """
    if isinstance(optimizer, OuterOptimizer):
        return optimizer
    if not callable(optimizer):
        built = ", which is built already" if isinstance(optimizer, torch.optim.Optimizer) else ""
        raise TypeError(
            f"{name} is {with_article(type(optimizer).__name__)}{built}; give a function that makes it of parameters, such as "
            "functools.partial(torch.optim.Adam, lr=0.01)"
        )
    return OuterOptimizer(optimizer)


class PowerLR(lr_scheduler.LambdaLR):
    """Multiply the learning rate by ``(1 + t / horizon)^-decay`` in step t, as the theory of single-loop methods requires.

    Args:
        optimizer: the optimizer whose learning rate changes.
        decay: exponent, in (0, 1].
        horizon: number of steps before the rate falls noticeably, above 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float, horizon: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"PowerLR: decay={decay!r} is not in (0, 1]; change decay")
        if not 0 < horizon < math.inf:
            raise ValueError(f"PowerLR: horizon={horizon!r} is not in (0, inf); change horizon")
        super().__init__(optimizer, lambda t: (1 + t / horizon) ** -decay)


class Schedule:
    """A learning-rate schedule that is stepped by the loop: every outer step, and, for ``ReduceLROnPlateau``, every evaluation.

    Args:
        make: makes the scheduler (None: the learning rate is constant).
        optimizer: the optimizer whose learning rates change.
    """

    def __init__(self, make: MakeScheduler | None, optimizer: torch.optim.Optimizer) -> None:
        self._scheduler = None if make is None else make(optimizer)

    @property
    def by_evaluation(self) -> bool:
        """Whether the schedule counts evaluations and not steps."""
        return isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau)

    def after_step(self) -> None:
        """Advance a schedule that counts outer steps."""
        if self._scheduler is not None and not self.by_evaluation:
            with warnings.catch_warnings():  # the optimizer makes no steps while a self-tuning network warms up
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self._scheduler.step()

    def after_evaluation(self, monitored: float) -> None:
        """Advance a schedule that counts evaluations, by the monitored quantity."""
        if isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(monitored)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain containers (empty without a schedule)."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state)


def with_values(kind: type, values: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a class of torch with the values of a config as its arguments, after trying them on a dummy parameter.

    Args:
        kind: an optimizer or a schedule.
        values: its arguments except the parameters or the optimizer; a list becomes a tuple.

    Raises:
        ValueError: the class refuses an argument; the message names it, its value and the reason.
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    hints = typing.get_type_hints(kind.__init__)
    for name, value in given.items():
        _check_type(kind, name, value, hints.get(name))
    if "lr" in given and not (isinstance(given["lr"], int | float) and 0 < given["lr"] < math.inf):
        raise ValueError(f"{kind.__name__}: lr={given['lr']!r} is not in (0, inf); change lr")
    try:
        _try(kind, given)
    except Exception as error:
        needed = {name: given[name] for name in given if _needed(kind, name)}
        for name in given:
            try:
                _try(kind, {**needed, name: given[name]})
            except Exception as alone:
                text = str(alone).rstrip(".")
                if text.startswith(f"{kind.__name__}: "):
                    raise
                raise ValueError(f"{kind.__name__}: {name}={given[name]!r} is refused: {text}; change {name}") from error
        raise ValueError(f"{kind.__name__}: {error}") from error
    return functools.partial(kind, **given)


def _needed(kind: type, name: str) -> bool:
    """Whether an argument of a class has no default."""
    found = inspect.signature(kind).parameters.get(name)
    return found is not None and found.default is inspect.Parameter.empty


def _check_type(kind: type, name: str, value: Any, hint: Any) -> None:
    """Refuse a value whose argument is annotated as a number, a text or a boolean, if the value has another type."""
    allowed = {each for each in (hint, *typing.get_args(hint)) if each in (int, float, bool, str, type(None))}
    if not allowed or value is None:
        return
    allowed |= {int} if float in allowed else set()
    if type(value) not in allowed and not (isinstance(value, tuple) and any(typing.get_args(hint))):
        names = " or ".join(sorted(each.__name__ for each in allowed if each is not type(None)))
        raise ValueError(f"{kind.__name__}: {name}={value!r} is not {with_article(names)}; change {name}")


def _try(kind: type, values: Mapping[str, Any]) -> None:
    """Build an optimizer, or a schedule that then makes two steps."""
    parameter = torch.nn.Parameter(torch.ones(1))
    if issubclass(kind, torch.optim.Optimizer):
        kind([parameter], **values)  # pyright: ignore[reportCallIssue]
        return
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = Schedule(functools.partial(kind, **values), optimizer)
    for _ in range(2):
        schedule.after_step()
        schedule.after_evaluation(1.0)
