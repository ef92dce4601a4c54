"""Training by any optimizer of ``torch.optim``; Adam by default.

Weight decay that an optimizer adds to the gradient is a penalty ``weight_decay |w|^2 / 2``, both in the loss that is trained
and in the loss that is differentiated. Decoupled weight decay, which shrinks the weights outside an adaptive step, is not the
gradient of any loss, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.checks import check_flag, check_kind, check_number

DECOUPLED = ("AdamW", "Adafactor", "Muon")  # their weight decay is not part of the gradient


def decay_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], loss: str, zero: Callable[[str], str]) -> float:
    """Return the weight decay that a parameter group adds to the gradient, as a penalty ``weight_decay |w|^2 / 2``.

    Args:
        optimizer: the optimizer.
        group: the settings of one of its parameter groups.
        loss: name of the trained loss, for messages.
        zero: returns the text that sets a setting to 0, for messages.

    Raises:
        ValueError: the optimizer changes the weights in a way that is not the gradient of a loss, or that is not known.
    """
    decay = float(group.get("weight_decay") or 0.0)
    family = [kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim")]
    beside = group.get("decoupled_weight_decay") or any(name in DECOUPLED for name in family)
    penalty = f"give {zero('weight_decay')} and put a penalty into {loss}"
    for refused, what, remedy in (
        (group.get("maximize"), f"maximize=True climbs {loss}", "minimise the negative loss"),
        (group.get("lambd"), f"lambd={group.get('lambd')} shrinks the weights outside its step", f"give {zero('lambd')}"),
        (
            beside and decay,
            f"weight_decay={decay:g} shrinks the weights outside an adaptive step",
            f"{penalty}, or use Adam, whose decay is part of the gradient",
        ),
        (
            decay and family == ["Optimizer"],
            f"weight_decay={decay:g}, which may be added to the gradient or shrink the weights outside it",
            penalty,
        ),
    ):
        if refused:
            raise ValueError(f"{type(optimizer).__name__} with {what}, which the hypergradient cannot include; {remedy}")
    return decay


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """An optimizer of PyTorch.

    Args:
        rtol, atol: training stops at ``|grad L| <= atol + rtol * scale``, see ``hyperopt.bilevel.inner.base.InnerSolver``; both
            at least 0, and both 0 for exactly ``max_steps`` steps.
        max_steps: largest number of steps, at least 1.
        optimizer: name in ``torch.optim`` (``Adam``, ``RMSprop``, ``SGD``, ...).
        lr: learning rate, above 0.
        options: other arguments of the optimizer, by name.
        keep: whether its moments continue from one outer step to the next.

    Raises:
        TypeError, ValueError: there is no such optimizer, it does not take an option, or it decays weights beside an adaptive
            step.

    Example:
        >>> import torch, hyperopt
        >>> inner = hyperopt.TorchOptimizer(optimizer="SGD", lr=0.1)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: ((w - 1) ** 2 + lam * w**2).sum(),
        ...     outer_loss=lambda w, lam, batch: (w**2).sum(),
        ... )
        >>> estimate = hyperopt.hypergradient(problem, torch.zeros(1), torch.ones(()), inner=inner)
        >>> round(float(estimate.w), 3), round(float(estimate.grad), 3)  # w = 1 / (1 + lam) = 0.5, dE/dlam = -0.25
        (0.5, -0.25)
    """

    optimizer: str = "Adam"
    lr: float = 0.001
    options: dict[str, Any] = field(default_factory=dict)
    keep: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "lr", 0.0, open_low=True)
        check_kind(self, "optimizer", str)
        check_kind(self, "options", dict)
        check_flag(self, "keep")

    def objective(self, problem: BilevelProblem) -> BilevelProblem:
        """Return the problem with the optimizer's weight decay as a penalty of the inner loss.

        Raises:
            ValueError: the optimizer changes the weights in a way that is not the gradient of a loss.
        """
        return problem.decayed(self._decay) if self._decay else problem

    @cached_property
    def _decay(self) -> float:
        """The weight decay that is part of the gradient; see ``decay_of``."""
        made = self._make([torch.zeros(1, 1)], self.options)
        try:
            return decay_of(made, made.param_groups[0], "the inner loss", "options={{'{}': 0}}".format)
        except ValueError as error:
            raise ValueError(f"TorchOptimizer: {error}") from None

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> torch.optim.Optimizer:
        """Build the optimizer with the moments of the last outer step; its weight decay is in the loss (``objective``).

        Raises:
            ValueError: ``torch.optim`` has no such optimizer, or the optimizer does not take these options.
        """
        without = {"weight_decay": 0.0} if self.options.get("weight_decay") else {}
        optimizer = self._make(list(w), {**self.options, **without})
        if self.keep and "moments" in memory:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": memory["moments"]})
        return optimizer

    def _make(self, w: list[Tensor], options: dict[str, Any]) -> torch.optim.Optimizer:
        make = getattr(torch.optim, self.optimizer, None)
        if make is torch.optim.LBFGS:
            raise ValueError("TorchOptimizer: LBFGS needs a line search of its own; use InnerLBFGS")
        if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
            raise ValueError(f"TorchOptimizer: torch.optim has no optimizer {self.optimizer!r}; change optimizer")
        try:
            return make(w, lr=self.lr, **options)  # pyright: ignore[reportCallIssue]
        except TypeError as error:
            raise ValueError(f"TorchOptimizer: {self.optimizer} refuses {self.options}: {error}; change options") from error

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: torch.optim.Optimizer) -> None:
        """Make one step."""
        for x, g in zip(w, grads, strict=True):
            x.grad = g
        work.step()

    def finish(self, work: torch.optim.Optimizer, memory: dict[str, Any]) -> None:
        """Keep the moments."""
        if self.keep:
            memory["moments"] = work.state_dict()["state"]

    def remedy(self, lam: Any) -> str:
        """Return the advice to lower the learning rate."""
        return f"lower lr={self.lr:g} of TorchOptimizer ({self.optimizer})"
