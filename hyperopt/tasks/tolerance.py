"""The tolerance of the inner solves of a run, in proportion to the norm of the hypergradient.

    rtol_k = solver.rtol * min(1, ||h_{k-1}|| / max_{j < k} ||h_j||)

An error in the states changes the hypergradient by about the same amount whatever its norm. A fixed tolerance is therefore too
tight while the hypergradient is large, and too loose when it is small. A tolerance in proportion to the norm keeps the relative
error about the same, as the forcing terms of an inexact Newton method do. It never falls below the rounding floor of the dtype.

Reference: F. Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016, arXiv 1602.02355, section 2
(tolerances that fall along the run); S. Eisenstat and H. Walker, Choosing the forcing terms in an inexact Newton method, 1996.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from hyperopt.core.loop import rounding_floor
from hyperopt.core.solvers.base import FixedPointSolver


class GradientTolerance:
    """The norms of the hypergradients so far, and the tolerance that follows from them.

    Attributes:
        factor: factor of ``solver.rtol`` in the next step, in (0, 1].
    """

    def __init__(self) -> None:
        """Start without a hypergradient, so that the factor is 1."""
        self._latest = self._largest = math.nan

    @property
    def factor(self) -> float:
        """``||h_{k-1}|| / max ||h_j||``, or 1 if that is not a positive number."""
        ratio = self._latest / self._largest if self._largest else math.nan
        return ratio if ratio > 0 else 1.0

    def apply(self, solver: FixedPointSolver, dtype: torch.dtype) -> FixedPointSolver:
        """Return the solver with the tolerance of the next step, for states of type ``dtype``."""
        least = min(solver.rtol, rounding_floor(dtype))
        return dataclasses.replace(solver, rtol=max(least, solver.rtol * self.factor))

    def note(self, norm: float) -> None:
        """Record the norm of a hypergradient; a norm that is not finite is ignored."""
        if math.isfinite(norm):
            self._latest, self._largest = norm, max(norm, 0.0 if math.isnan(self._largest) else self._largest)

    def state_dict(self) -> dict[str, float]:
        """Return the recorded norms."""
        return {"latest": self._latest, "largest": self._largest}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` returned."""
        self._latest, self._largest = state["latest"], state["largest"]
