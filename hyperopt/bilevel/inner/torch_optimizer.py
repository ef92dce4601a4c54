"""Training by any optimizer of ``torch.optim``; Adam by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt.bilevel.inner.base import InnerSolver
from hyperopt.bilevel.settings import TorchOptimizerSettings


@dataclass(frozen=True)
class TorchOptimizer(TorchOptimizerSettings, InnerSolver):
    """An optimizer of PyTorch; settings in ``TorchOptimizerSettings``."""

    def begin(self, w: Sequence[Tensor], lam: Any, memory: dict[str, Any]) -> torch.optim.Optimizer:
        """Build it, with the moments of the outer step before.

        Raises:
            ValueError: ``torch.optim`` has no such optimizer, or it does not take such options.
        """
        make = getattr(torch.optim, self.optimizer, None)
        if make is torch.optim.LBFGS:
            raise ValueError("TorchOptimizer: LBFGS needs a line search of its own; use InnerLBFGS")
        if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
            raise ValueError(f"TorchOptimizer: torch.optim has no optimizer {self.optimizer!r}; change optimizer")
        try:
            optimizer = make(list(w), lr=self.lr, **self.options)  # pyright: ignore[reportCallIssue]
        except TypeError as error:
            raise ValueError(f"TorchOptimizer: {self.optimizer} refuses {self.options}: {error}; change options") from error
        if self.keep and "moments" in memory:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": memory["moments"]})
        return optimizer

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
