"""How a solve ended: ``Status``, whose members carry the message that says what to change. This module imports no torch."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How a row, or a whole solve, ended. The members are ordered: a solve has the largest status of its rows.

    Attributes:
        converged: the residual met its tolerance.
        fixed_steps: exactly as many steps were taken as were asked for.
        max_steps: the tolerance was not met within ``max_steps``.
        stagnated: the residual stopped falling above its tolerance.
        coupled_rows: rows that were treated as independent depend on each other.
        breakdown: the method broke down, such as at a singular system.
        negative_curvature: conjugate gradients met a direction of negative curvature.
        diverged: the residual grew.
        nonfinite: a NaN or an infinity was met.

    Example:
        >>> import hyperopt
        >>> hyperopt.Status.max_steps.failed, hyperopt.Status.fixed_steps.failed
        (True, False)
        >>> hyperopt.Status.max_steps.message
        'the tolerance was not met within max_steps; raise max_steps, loosen rtol or choose another method'
    """

    converged = 0
    fixed_steps = 1
    max_steps = 2
    stagnated = 3
    coupled_rows = 4
    breakdown = 5
    negative_curvature = 6
    indefinite = 6  # the former name of negative_curvature
    diverged = 7
    nonfinite = 8

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def __format__(self, spec: str) -> str:
        """Return the name, or the number if ``spec`` is a format for whole numbers."""
        return format(int(self), spec) if spec[-1:] in ("d", "x", "b", "n") and spec else format(self.name, spec)

    @property
    def failed(self) -> bool:
        """Whether the result is not to be trusted."""
        return self > Status.fixed_steps

    @property
    def message(self) -> str:
        """What happened and what to change."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.converged: "the residual met its tolerance",
    Status.fixed_steps: "exactly max_steps steps were taken, as asked for by rtol=0, atol=0",
    Status.max_steps: "the tolerance was not met within max_steps; raise max_steps, loosen rtol or choose another method",
    Status.stagnated: "the residual stopped falling above its tolerance; loosen rtol or compute in float64",
    Status.coupled_rows: "the residual of a finished row rose again: rows depend on each other; use rows='joint'",
    Status.breakdown: "the method broke down (a division by zero or a singular system); choose another method",
    Status.negative_curvature: (
        "a direction of negative curvature was met: I - J is not positive definite (an inner loss that is not convex here?); use "
        "MINRES, curvature='gauss_newton', or add a quadratic penalty to the inner loss"
    ),
    Status.diverged: (
        "the residual grew: the map does not contract here; use Anderson or, for the adjoint, GMRES, damp it, or "
        "bound its Jacobian's norm"
    ),
    Status.nonfinite: "a NaN or infinity was met; check the inputs, lower the step size or the scale of the parameters",
}
