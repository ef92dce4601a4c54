"""Training by any optimizer of ``torch.optim``; Adam by default.

Weight decay that an optimizer adds to the gradient is a penalty ``weight_decay |w|^2 / 2`` of the loss that is trained, and of
the one that is differentiated. One that shrinks the weights beside an adaptive step is the gradient of no loss, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.problem import BilevelProblem
from hyperopt.core.checks import check_flag, check_kind, check_number

DECOUPLED = ("AdamW", "Adafactor", "Muon")  # their weight decay is no part of the gradient


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """An optimizer of PyTorch.

    Args:
        optimizer: its name in ``torch.optim`` (``Adam``, ``AdamW``, ``RMSprop``, ``SGD``, ...).
        lr: learning rate, above 0.
        options: its further arguments by name.
        keep: whether its moments live on from one outer step to the next.
    """

    optimizer: str = "Adam"
    lr: float = 0.001
    options: dict[str, Any] = field(default_factory=dict)
    keep: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_number(self, "lr", 0.0, open_low=True)
        check_kind(self, "optimizer", str)
        check_kind(self, "options", dict)
        check_flag(self, "keep")

    def objective(self, problem: BilevelProblem) -> BilevelProblem:
        """The problem with the optimizer's weight decay as a penalty of the inner loss.

        Raises:
            ValueError: the optimizer moves the weights in a way that is the gradient of no loss.
        """
        return problem.decayed(self._decay) if self._decay else problem

    @cached_property
    def _decay(self) -> float:
        """The weight decay that is a part of the gradient; what is the gradient of no loss is refused."""
        given = self._make([torch.zeros(1, 1)], self.options).defaults
        beside = given.get("decoupled_weight_decay") or self.optimizer in DECOUPLED
        decay = float(given.get("weight_decay") or 0.0)
        for refused, what, remedy in (
            (given.get("maximize"), "maximize=True climbs the inner loss", "minimise the negative loss"),
            (given.get("lambd"), f"lambd={given.get('lambd')} shrinks the weights beside its step", "give options={'lambd': 0}"),
            (
                beside and decay,
                f"weight_decay={decay:g} shrinks the weights beside an adaptive step",
                "give options={'weight_decay': 0} and put a penalty into the inner loss, or use Adam, whose decay is a part of "
                "the gradient",
            ),
        ):
            if refused:
                raise ValueError(f"TorchOptimizer: {self.optimizer} with {what}, which the derivative does not know; {remedy}")
        return decay

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> torch.optim.Optimizer:
        """Build it, with the moments of the outer step before; its weight decay is in the loss (``objective``).

        Raises:
            ValueError: ``torch.optim`` has no such optimizer, or it does not take such options.
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
        """One step."""
        for x, g in zip(w, grads, strict=True):
            x.grad = g
        work.step()

    def finish(self, work: torch.optim.Optimizer, memory: dict[str, Any]) -> None:
        """Keep the moments."""
        if self.keep:
            memory["moments"] = work.state_dict()["state"]

    def remedy(self, lam: Any) -> str:
        """Name the learning rate."""
        return f"lower lr={self.lr:g} of TorchOptimizer ({self.optimizer})"
