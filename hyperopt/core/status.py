"""What a solve leaves: ``SolveStats``, and the ``Solution`` that has them. How it ended is ``statuses.Status``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt.core.statuses import Status
from hyperopt.core.text import described
from hyperopt.core.tree import Layout


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

    @classmethod
    def of_steps(cls, steps: int, residual: Tensor, scale: Tensor, **others: Any) -> SolveStats:
        """Return the statistics of a fixed number of steps, for the relative residuals that they leave, shape (rows,)."""
        status = torch.where(torch.isfinite(residual), int(Status.fixed_steps), int(Status.nonfinite))
        return cls(status, torch.full_like(status, steps), residual, scale, **others)

    @classmethod
    def of_one(cls, status: Status, iterations: int, residual: float, scale: float, **others: Any) -> SolveStats:
        """Return the statistics of a solve of one row, made of numbers."""
        left, size = torch.tensor([[residual], [scale]], dtype=torch.float64)
        return cls(torch.tensor([int(status)]), torch.tensor([iterations]), left, size, **others)

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
    """Holder of what a solve leaves for the user. It does not reference the autograd graph.

    Attributes:
        stats: statistics of the latest backward solve.
        v: the adjoint variable, detached, shape (rows, dim).
        forward: statistics of the forward solve.
    """

    stats: SolveStats | None = None
    v: Tensor | None = None
    forward: SolveStats | None = None


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
