"""How a solve ended: ``Status``, whose members carry the message that says what to change, and ``SolveStats``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.text import described
from hyperopt.core.tree import Layout


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


@dataclass(repr=False)
class SolveStats:
    """What one solve did and what it cost. Tensors stay on their device until they are read.

    Attributes:
        row_status: codes of ``Status``, shape (rows,).
        iterations: steps each row took before it stopped, shape (rows,).
        residual: the last measured true residual of each row, relative to ``scale``, shape (rows,).
        scale: ``||phi(w)||`` of each row, or ``||g||`` for a linear solve, shape (rows,).
        evaluations: calls of the map (forward) made in this solve, over whole batches.
        vjps: vector-Jacobian products made in this solve.
        jvps: Jacobian-vector products made in this solve.
        contraction: estimate of the contraction factor from the decay of the residual (NaN if it cannot be estimated).
        trace: largest relative residual over the rows after each evaluation, shape (steps,); empty if it was not measured.
        method: name of the method that gave the result.
        fallbacks: names of the methods that were tried before it and failed.

    Example:
        >>> import torch, hyperopt
        >>> stats = hyperopt.fixed_point(torch.cos, torch.ones(2, 1), solver=hyperopt.Picard(rtol=1e-3)).forward
        >>> stats.status.name, stats.evaluations, stats.worst_residual() < 1e-3
        ('converged', 18, True)
    """

    row_status: Tensor
    iterations: Tensor
    residual: Tensor
    scale: Tensor
    evaluations: int = 0
    vjps: int = 0
    jvps: int = 0
    contraction: float | Tensor = float("nan")
    trace: Tensor = field(default_factory=lambda: torch.empty(0))
    method: str = ""
    fallbacks: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst status of the rows (converged for a solve without rows)."""
        return Status(int(self.row_status.max())) if self.row_status.numel() else Status.converged

    def __repr__(self) -> str:
        """Return the method, status, iterations, residual, number of rows and costs."""
        steps = int(self.iterations.max()) if self.iterations.numel() else 0
        costs = "".join(f", {name}={count}" for name in ("evaluations", "vjps", "jvps") if (count := getattr(self, name)))
        return (
            f"SolveStats({self.method or 'no method'}: {self.status}, iterations={steps}, "
            f"residual={self.worst_residual():.3g}, rows={self.row_status.numel()}{costs})"
        )

    def worst_residual(self) -> float:
        """Return the largest residual of the rows (NaN if one is NaN)."""
        return float(self.residual.max()) if self.residual.numel() else 0.0

    def describe(self) -> str:
        """Return one line: method, iterations, residual and how many rows failed, with the message of the status."""
        rows = self.row_status.numel()
        bad = int((self.row_status > Status.fixed_steps).sum())
        steps = int(self.iterations.max()) if self.iterations.numel() else 0
        return (
            f"{self.method} stopped after {steps} iterations at residual {self.worst_residual():.1e} "
            f"({bad} of {rows} rows failed): {self.status.message}"
        )


@dataclass
class AdjointBox:
    """Holder of the statistics of the latest backward solve. It does not reference the autograd graph.

    Attributes:
        stats: statistics of the solve.
        v: the adjoint variable, detached, shape (rows, dim).
    """

    stats: SolveStats | None = None
    v: Tensor | None = None


@dataclass(repr=False)
class Solution:
    """A solved fixed point.

    Attributes:
        value: the state, in the structure of ``w0``; differentiable in ``args`` and in every tensor that the map captures.
        forward: statistics of the forward solve.
        layout: how the state lies in a matrix.
        box: holder of the latest backward solve; read ``adjoint`` and ``v`` instead.
        aux: under ``has_aux=True``, the second value that the map returned when it last evaluated all rows, detached.

    Example:
        >>> import torch, hyperopt
        >>> solution = hyperopt.fixed_point(lambda w: {"x": 0.5 * w["x"] + 1}, {"x": torch.zeros(4, 2)})
        >>> solution.value["x"].shape, solution.status.name, solution.rows
        (torch.Size([4, 2]), 'converged', 4)
    """

    value: Any
    forward: SolveStats
    layout: Layout
    box: AdjointBox = field(default_factory=AdjointBox)
    aux: Any = None

    def __repr__(self) -> str:
        """Return the shape of the value and the statistics of both solves."""
        return described(self, value=self.value, forward=self.forward, adjoint=self.adjoint)

    @property
    def rows(self) -> int:
        """Number of independent rows."""
        return self.layout.rows

    @property
    def v(self) -> Any:
        """The adjoint variable of the latest backward solve, in the structure of ``value``; None before the first."""
        return None if self.box.v is None else self.layout.tree(self.box.v, dual=True)

    @property
    def status(self) -> Status:
        """Worst status of the forward solve."""
        return self.forward.status

    @property
    def adjoint(self) -> SolveStats | None:
        """Statistics of the latest backward solve; None before the first."""
        return self.box.stats
