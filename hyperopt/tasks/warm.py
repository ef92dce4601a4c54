"""Warm starts: the state and the adjoint variable of every fitted row, kept from one visit of the row to its next.

With minibatches a row is seen once an epoch, and what is kept of it is one epoch of updates old: its staleness. The adjoint
variables of a mean over ``n`` rows carry a factor ``1/n``; what is kept is ``n v``, which a batch of another size can start from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt.core import distributed


@dataclass(frozen=True)
class WarmStart:
    """Where the solves of one batch start.

    Attributes:
        state: None: at zero, which is also where the rows start that were not seen before. shape: (rows, dim)
        adjoint: None: at the gradient of the loss; a row of zeros stands for that too. shape: (rows, dim)
        metrics: ``warm/rows``, the part of the rows seen before, and, if there are such rows, the mean and the largest number of
            steps since then: 1 for a row of the batch before.
    """

    state: Tensor | None = None
    adjoint: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class WarmStore:
    """What is kept of each of ``rows`` rows.

    Args:
        rows: fitted rows.
        dim: entries of a state.
        dtype: of what is handed out.
        kept: of what is kept (None: ``dtype``); ``bfloat16`` takes half the memory of float32 and keeps 8 bits of each entry, its
            range being that of float32.
        device: where it is kept.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start with no row seen."""
        self.dtype = dtype
        self._state = torch.zeros(rows, dim, dtype=kept or dtype, device=device)
        self._adjoint = torch.zeros_like(self._state)  # of the sum over rows, not of their mean
        self._seen = torch.full((rows,), -1, dtype=torch.int64, device=device)  # the latest step of each row

    @property
    def nbytes(self) -> int:
        """Bytes of memory, and about those that it adds to every checkpoint."""
        return sum(tensor.nbytes for tensor in (self._state, self._adjoint, self._seen))

    def start(self, index: Tensor | slice | None, step: int, count: int | None = None) -> WarmStart:
        """Return where the rows of a batch start.

        Args:
            index: their places; None: all rows.
            step: index of the step under way.
            count: rows that the loss is a mean of, those of other ranks too (None: these).
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
            index: places of its rows; None: all rows.
            step: index of the step under way.
            state: shape: (rows, dim)
            adjoint: adjoint variables (None: they were not solved for). shape: (rows, dim)
            count: rows that the loss is a mean of, those of other ranks too (None: these).
        """
        rows = slice(None) if index is None else index
        self._state[rows] = state.to(self._state.dtype)
        if adjoint is not None:
            self._adjoint[rows] = (adjoint * (count or len(adjoint))).to(self._adjoint.dtype)
        self._seen[rows] = step

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is kept, by whatever rank: each keeps its own rows, and nothing of others."""
        if distributed.ranks() == 1:
            return self._tensors()
        return {
            "state": distributed.sum_over_ranks(self._state),
            "adjoint": distributed.sum_over_ranks(self._adjoint),
            "seen": distributed.sum_over_ranks(self._seen + 1) - 1,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, in place: this rank's rows of it."""
        mine = distributed.share_of(len(self._seen))
        for (name, tensor), nothing in zip(self._tensors().items(), (0, 0, -1), strict=True):
            tensor.fill_(nothing)
            tensor[mine] = state[name][mine].to(tensor.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"state": self._state, "adjoint": self._adjoint, "seen": self._seen}
