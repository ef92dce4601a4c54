"""A trained problem on several ranks: each rank has its share of every batch, and both losses are means over the ranks."""

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
    """Return the problem whose losses and derivatives are those of the rows of all ranks, bit for bit the same on each rank.

    A loss must be a mean over the rows of its batch, plus terms that do not depend on the rows. The leaves of a batch share
    their first dimension. ``w`` and ``lam`` must be the same on all ranks and reach the loss through its arguments. A loss
    whose batch is None is computed in full on every rank. With one rank the result is the problem itself.

    Args:
        problem: the problem of this rank: its losses are means over the rows of a batch, and its sources of batches give all
            rows.

    Returns:
        ``BilevelProblem``: the problem on the rows of all ranks; with one rank, ``problem`` itself.

    Raises:
        TypeError, ValueError: a source of batches cannot be shared out.

    Example:
        >>> import torch, hyperopt
        >>> data = torch.randn(100, 3), torch.randn(100)
        >>> problem = hyperopt.BilevelProblem(
        ...     lambda w, lam, batch: (batch[0] @ w - batch[1]).square().mean() + lam * w.square().sum(),
        ...     lambda w, lam, batch: (batch[0] @ w - batch[1]).square().mean(),
        ...     inner_batches=hyperopt.Minibatches(data, size=20),
        ...     outer_batches=hyperopt.Minibatches(data),
        ... )
        >>> hyperopt.over_ranks(problem) is problem  # one rank; under torchrun call it after init_process_group
        True
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
    """Return the mean of a loss over the ranks."""
    if isinstance(loss, Composite):
        return dataclasses.replace(loss, ranks=True)
    return lambda w, lam, batch: distributed.mean_over_ranks(loss, w, lam, batch, rows=rows_of(batch))


class _Share:
    """This rank's share of every batch of a source; the position in the source is the same on every rank."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source
        self.last = self.part = None
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict
        self.shares = getattr(source, "shares", [1.0])

    def draw(self) -> Any:
        """Return this rank's rows of the next batch; a batch that is the same object as the last one is not cut again."""
        batch = self.source.draw()
        if self.last is None or batch is not self.last:
            self.last, self.part = batch, optree.tree_map(_part, batch)
        return self.part


def _shared(source: BatchSource) -> BatchSource:
    """Return a source of this rank's share of every batch; the share of a constant batch is cut once."""
    return SameBatch(_Share(source).draw()) if isinstance(source, SameBatch) else _Share(source)


def _part(leaf: Any) -> Any:
    """Return this rank's rows of a leaf."""
    mine = distributed.share_of(leaf.shape[0])
    return leaf.take(torch.arange(mine.start, mine.stop)) if isinstance(leaf, SparseRows) else leaf[mine]
