"""A trained problem on several ranks: each draws the whole batch and takes its share; both losses are means over the ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import optree
import torch

from hyperopt.bilevel.problem import BatchSource, BilevelProblem, Composite, Loss, SameBatch
from hyperopt.bilevel.refusals import rows_of
from hyperopt.core import distributed
from hyperopt.data.sparse import SparseRows


def over_ranks(problem: BilevelProblem) -> BilevelProblem:
    """The problem whose losses and derivatives of every kind are those of all ranks' rows, the same bits on each rank.

    A loss must be a mean over the rows of its batch, plus what does not depend on them; the leaves of a batch share their first
    dimension, and w and lam, the same on all ranks, come in through its arguments. A loss whose batch is None is worked out whole
    on every rank. On one rank it is the problem itself.

    Example:
        >>> import torch, hyperopt
        >>> data = torch.randn(100, 3), torch.randn(100)
        >>> problem = hyperopt.BilevelProblem(
        ...     lambda w, lam, batch: (batch[0] @ w - batch[1]).square().mean() + lam * w.square().sum(),
        ...     lambda w, lam, batch: (batch[0] @ w - batch[1]).square().mean(),
        ...     inner_batches=hyperopt.Minibatches(data, size=20),
        ...     outer_batches=hyperopt.Minibatches(data),
        ... )
        >>> problem = hyperopt.over_ranks(problem)  # under torchrun, after init_process_group
    """
    if distributed.ranks() == 1:
        return problem
    return dataclasses.replace(
        problem,
        inner_loss=_mean(problem.inner_loss),
        outer_loss=_mean(problem.outer_loss),
        inner_batches=_shared(problem.inner_batches),
        outer_batches=_shared(problem.outer_batches),
    )


def _mean(loss: Loss) -> Loss:
    """The mean of a loss over the ranks."""
    if isinstance(loss, Composite):
        return dataclasses.replace(loss, ranks=True)
    return lambda w, lam, batch: distributed.mean_over_ranks(loss, w, lam, batch, rows=rows_of(batch))


class _Share:
    """This rank's share of every batch of a source; where the next one stands is the same on every rank."""

    def __init__(self, source: BatchSource) -> None:
        """Wrap it."""
        self.source = source
        self.last = self.part = None
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict
        self.shares = getattr(source, "shares", [1.0])

    def draw(self) -> Any:
        """This rank's rows of the next batch; all rows, always the same, are cut once."""
        batch = self.source.draw()
        if self.last is None or batch is not self.last:
            self.last, self.part = batch, optree.tree_map(_part, batch)
        return self.part


def _shared(source: BatchSource) -> BatchSource:
    """See ``_Share``; of one batch that never changes, once for all."""
    return SameBatch(_Share(source).draw()) if isinstance(source, SameBatch) else _Share(source)


def _part(leaf: Any) -> Any:
    """This rank's rows of a leaf."""
    mine = distributed.share_of(leaf.shape[0])
    return leaf.take(torch.arange(mine.start, mine.stop)) if isinstance(leaf, SparseRows) else leaf[mine]
