"""The tolerance of the inner solves of a run, driven by the size of its hypergradient.

    rtol_k = solver.rtol * min(1, ||h_{k-1}|| / max_{j < k} ||h_j||)

An error in the states moves the hypergradient by about as much whatever its size, so that a fixed tolerance is too tight while
the hypergradient is large and too loose when it is small. In proportion to it the relative error stays about the same, as with
the forcing terms of an inexact Newton method. Never below the rounding floor of the dtype.

Reference: F. Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016, arXiv 1602.02355, section 2 (tolerances
that fall along the run); S. Eisenstat and H. Walker, Choosing the forcing terms in an inexact Newton method, 1996.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from hyperopt.core.loop import rounding_floor
from hyperopt.core.solvers.base import FixedPointSolver


class GradientTolerance:
    """What is known of the hypergradients so far.

    Attributes:
        factor: what ``solver.rtol`` is multiplied by in the next step, in (0, 1].
    """

    def __init__(self) -> None:
        """No hypergradient yet: the factor is 1."""
        self._latest = self._largest = math.nan

    @property
    def factor(self) -> float:
        """``||h_{k-1}|| / max ||h_j||``; 1 where that is no number above 0."""
        ratio = self._latest / self._largest if self._largest else math.nan
        return ratio if ratio > 0 else 1.0

    def apply(self, solver: FixedPointSolver, dtype: torch.dtype) -> FixedPointSolver:
        """Return the solver with the tolerance of the next step, for states of type ``dtype``."""
        least = min(solver.rtol, rounding_floor(dtype))
        return dataclasses.replace(solver, rtol=max(least, solver.rtol * self.factor))

    def note(self, norm: float) -> None:
        """Take in the norm of a hypergradient; one that is not finite changes nothing."""
        if math.isfinite(norm):
            self._latest, self._largest = norm, max(norm, 0.0 if math.isnan(self._largest) else self._largest)

    def state_dict(self) -> dict[str, float]:
        """Return everything that is kept."""
        return {"latest": self._latest, "largest": self._largest}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what ``state_dict`` returned."""
        self._latest, self._largest = state["latest"], state["largest"]
