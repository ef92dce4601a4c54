"""Warm starts: the state and the adjoint variable of every fitted row, kept from one visit of the row to the next.

With minibatches a row is visited once an epoch, so its kept state is one epoch of updates old; this age is its staleness. The
adjoint variables of a mean over ``n`` rows have a factor ``1/n``. What is kept is ``n v``, from which a batch of another size
can start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt.core import distributed


@dataclass(frozen=True)
class WarmStart:
    """The start of the solves of one batch.

    Attributes:
        state: initial states (None: zeros); rows that were not visited before start at zero. shape: (rows, dim)
        adjoint: initial adjoint variables (None: the gradient of the loss); a row of zeros means the gradient too. shape:
            (rows, dim)
        metrics: ``warm/rows``, the fraction of the rows that were visited before, and, if there are any, the mean and the
            largest number of steps since their last visit, which is 1 for a row of the last batch.
    """

    state: Tensor | None = None
    adjoint: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class WarmStore:
    """The last states and adjoint variables of the fitted rows.

    Args:
        rows: number of fitted rows.
        dim: number of entries of a state.
        dtype: dtype of the states that ``start`` returns.
        kept: dtype of the kept states (None: ``dtype``); ``bfloat16`` takes half the memory of float32 and keeps 8 significant
            bits with the range of float32.
        device: device of the kept states.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start without visited rows."""
        self.dtype = dtype
        self._state = torch.zeros(rows, dim, dtype=kept or dtype, device=device)
        self._adjoint = torch.zeros_like(self._state)  # of the sum over rows, not of their mean
        self._seen = torch.full((rows,), -1, dtype=torch.int64, device=device)  # the step of the last visit; -1: none

    @property
    def nbytes(self) -> int:
        """The memory in bytes, which is also about what it adds to every checkpoint."""
        return sum(tensor.nbytes for tensor in (self._state, self._adjoint, self._seen))

    def start(self, index: Tensor | slice | None, step: int, count: int | None = None) -> WarmStart:
        """Return the start of the solves of a batch.

        Args:
            index: row numbers of the batch; None: all rows.
            step: number of the present step.
            count: number of rows over which the loss is a mean, including those of other ranks (None: the rows of ``index``).
        """
        rows = slice(None) if index is None else index
        seen = self._seen[rows]
        age = (step - seen)[seen >= 0]
        metrics = {"warm/rows": len(age) / max(1, len(seen))}
        if not len(age):
            return WarmStart(metrics=metrics)
        metrics["warm/staleness_mean"], metrics["warm/staleness_max"] = float(age.double().mean()), float(age.max())
        state = self._state[rows].to(self.dtype, copy=True)
        return WarmStart(state, self._adjoint[rows].to(self.dtype) / (count or len(seen)), metrics)

    @torch.no_grad()
    def keep(
        self, index: Tensor | slice | None, step: int, state: Tensor, adjoint: Tensor | None, count: int | None = None
    ) -> None:
        """Keep the solution of a batch.

        Args:
            index: row numbers of the batch; None: all rows.
            step: number of the present step.
            state: the states. shape: (rows, dim)
            adjoint: the adjoint variables (None: there are none). shape: (rows, dim)
            count: number of rows over which the loss is a mean, including those of other ranks (None: the rows of ``index``).
        """
        rows = slice(None) if index is None else index
        self._state[rows] = state.to(self._state.dtype)
        if adjoint is not None:
            self._adjoint[rows] = (adjoint * (count or len(adjoint))).to(self._adjoint.dtype)
        self._seen[rows] = step

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is kept, of all ranks; each rank keeps only its own rows."""
        if distributed.ranks() == 1:
            return self._tensors()
        return {
            "state": distributed.sum_over_ranks(self._state),
            "adjoint": distributed.sum_over_ranks(self._adjoint),
            "seen": distributed.sum_over_ranks(self._seen + 1) - 1,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, in place: this rank's rows of it."""
        mine = distributed.share_of(len(self._seen))
        for (name, tensor), nothing in zip(self._tensors().items(), (0, 0, -1), strict=True):
            tensor.fill_(nothing)
            tensor[mine] = state[name][mine].to(tensor.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"state": self._state, "adjoint": self._adjoint, "seen": self._seen}
