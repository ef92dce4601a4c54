"""``Record``: the results and the cost of one step of a ``Tuner``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from hyperopt.bilevel.estimate import Estimate
from hyperopt.core.status import Status


@dataclass(frozen=True, repr=False)
class Record:
    """The results of one step of a ``Tuner``; it prints as one line.

    Attributes:
        step: number of steps so far, including this one.
        hyper: the hyperparameters after the step, in their own units, by the names of ``Hyperparameters.metrics``.
        gradients: the cost of the step in backward passes through a loss, including products with second derivatives.
        products: number of Hessian products of the adjoint solve.
        estimate: the hypergradient, without the weights; ``estimate.grad`` is in the units of the hyperparameters.
    """

    step: int
    hyper: dict[str, float]
    gradients: int
    products: int
    estimate: Estimate

    @property
    def loss(self) -> float:
        """``val_loss`` before the step."""
        return self.estimate.loss

    @property
    def grad(self) -> dict[str, Any]:
        """The hypergradient by name, in the units of the hyperparameters."""
        return self.estimate.grad

    @property
    def status(self) -> Status:
        """How the adjoint solve ended."""
        return self.estimate.status

    @property
    def adjoint(self) -> str:
        """The adjoint that was used and, under ``adjoint="auto"``, why."""
        stats = self.estimate.adjoint
        return str(self.estimate.choice or (stats.method if stats else "none"))

    @property
    def error(self) -> float:
        """How far the hypergradient may be from the exact one; see ``estimate.certificate``."""
        return self.estimate.certificate.error

    def as_dict(self) -> dict[str, float]:
        """Return all numbers, by their names in TensorBoard."""
        return {
            "outer/loss": self.loss,
            **self.hyper,
            "adjoint/status": float(self.status),
            **self.estimate.metrics(),
            "hypergrad/norm": self.estimate.norm,
            "cost/gradients": float(self.gradients),
        }

    def __repr__(self) -> str:
        """Return one line."""
        values = ", ".join(f"{name.removeprefix('hyper/')}={value:.4g}" for name, value in self.hyper.items())
        kind = "bound" if self.estimate.certificate.is_bound else "estimate"
        error = f"no error {kind} for" if math.isnan(self.error) else f"error {kind} {self.error:.2g} of"
        unused = [re.sub(r"^lam\['|'\]$", "", name).replace("']['", ".") for name in self.estimate.unused]
        said = f"; unused: {', '.join(unused)}" if unused else ""
        return (
            f"step {self.step}: val_loss={self.loss:.6g}, {values}, {self.status} by {self.adjoint}, {error} "
            f"a hypergradient of {self.estimate.norm:.3g}, {self.gradients} gradient evaluations ({self.products} products){said}"
        )
