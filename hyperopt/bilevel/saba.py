"""SABA: the single-loop method with the variance reduction of SAGA in all of its terms.

The rows are cut into batches once. A table keeps, for each batch, the value of every term when the batch was last visited. For
a random batch ``k`` of ``m``, with a fraction ``q_k`` of the rows, and a term ``T``,

    direction = m q_k (T_k(now) - table_k) + sum_i q_i table_i,        table_k <- T_k(now)

The direction is unbiased and its variance vanishes as the method converges. So constant steps suffice, and convergence is
linear if the outer objective satisfies a Polyak-Lojasiewicz inequality. The tables hold, for each inner batch, three numbers a
weight or hyperparameter. The first step fills them, which costs a pass over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperopt.bilevel.batches import BatchSource, Minibatches, NoBatches
from hyperopt.bilevel.single_loop import LoopPoint, SingleLoop, Terms
from hyperopt.core.checks import check_count

Cut = NoBatches | Minibatches
"""A source that can give the same batches again: ``piece(k)``, with the fraction ``shares[k]`` of the rows."""


def pieces_of(source: BatchSource) -> Cut:
    """Return a source that can give the same batches again.

    Raises:
        TypeError: the source cannot do this.
    """
    if not isinstance(source, Cut):
        raise TypeError(
            f"SABA visits the same batches again and again, which a {type(source).__name__} does not allow; use "
            "Minibatches on one rank, or the method SOBA"
        )
    return source


class Table:
    """The last values of some terms on every batch, each a (batches, dim) matrix, and their means, each (1, dim)."""

    def __init__(self, kept: list[list[Tensor]], shares: list[float]) -> None:
        (self.rows, self.mean), self.shares = kept, shares

    @property
    def kept(self) -> list[list[Tensor]]:
        """The matrices and the means, for the state of the method."""
        return [self.rows, self.mean]

    @staticmethod
    def filled(values: Sequence[Sequence[Tensor]], shares: list[float]) -> Table:
        """Return the table of the terms of every batch."""
        rows = [torch.cat(list(column)) for column in zip(*values, strict=True)]
        q = rows[0].new_tensor(shares)[None]
        return Table([rows, [q @ column for column in rows]], shares)

    def reduced(self, k: int, now: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return the directions for the present terms of batch ``k``, and a function that writes these terms into the table."""
        q, m = self.shares[k], len(self.shares)
        changes = [new - row[k : k + 1] for new, row in zip(now, self.rows, strict=True)]
        found = [mean + m * q * change for mean, change in zip(self.mean, changes, strict=True)]

        def write() -> None:
            for new, row, mean, change in zip(now, self.rows, self.mean, changes, strict=True):
                row[k] = new[0]
                mean.add_(change, alpha=q)

        return found, write


@dataclass(frozen=True)
class SABA(SingleLoop):
    """The single-loop method with tables of the last terms of every batch.

    Args:
        step_size: step size of the gradient steps in ``w``, above 0.
        adjoint_step: step size in ``u``, above 0 (None: ``step_size``).
        decay: both step sizes are multiplied by ``(1 + t / horizon)^-decay`` in outer step ``t``; in [0, 1], 0 for constant
            steps.
        horizon: see ``decay``; in outer steps, above 0.
        seed: seed of the order in which batches are visited, at least 0.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Dagreou, Ablin, Vaiter & Moreau, NeurIPS 2022, arXiv 2201.13409, section 2 (SABA); SAGA: Defazio, Bach &
    Lacoste-Julien, NIPS 2014, arXiv 1407.0202.

    Example:
        >>> import torch, hyperopt
        >>> method = hyperopt.SABA(step_size=0.4)
        >>> problem = hyperopt.BilevelProblem(
        ...     inner_loss=lambda w, lam, batch: (w - lam).square().sum(),
        ...     outer_loss=lambda w, lam, batch: (w - 3).square().sum(),
        ... )
        >>> bilevel = hyperopt.Bilevel(problem, torch.zeros(1), adjoint=method)
        >>> for _ in range(15):
        ...     estimate = bilevel.step(torch.zeros(1))
        >>> round(float(estimate.grad), 1)  # w = lam, so the exact hypergradient at lam = 0 is 2 (0 - 3)
        -6.0
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "seed", 0)

    def terms(self, at: LoopPoint, memory: dict[str, Any]) -> tuple[Terms, Callable[[], None], Any]:
        """Return the terms of one batch of each loss, corrected by the tables; see ``SingleLoop.terms``.

        Raises:
            TypeError: a source cannot return the same batch again.
        """
        inner, outer = pieces_of(at.problem.inner_batches), pieces_of(at.problem.outer_batches)
        draw = np.random.RandomState((self.seed, memory["steps"]))  # the same on every machine, and after a resume
        i, j = int(draw.randint(len(inner.shares))), int(draw.randint(len(outer.shares)))
        batch = inner.piece(i)
        if "inner" not in memory:
            return *_fill(at, memory, inner, outer), batch
        (slope, product, mixed), write_inner = Table(memory["inner"], inner.shares).reduced(i, at.inner(batch))
        loss, *now = at.outer(outer.piece(j))
        (in_w, direct), write_outer = Table(memory["outer"], outer.shares).reduced(j, now)

        def write() -> None:
            write_inner()
            write_outer()

        return Terms(slope, product, mixed, in_w, direct, loss), write, batch


def _fill(at: LoopPoint, memory: dict[str, Any], inner: Cut, outer: Cut) -> tuple[Terms, Callable[[], None]]:
    """Return the terms over all rows, and a function that writes the terms of every batch into ``memory``."""
    inner_terms = [at.inner(inner.piece(k)) for k in range(len(inner.shares))]
    losses, *columns = zip(*(at.outer(outer.piece(k)) for k in range(len(outer.shares))), strict=True)
    inner_table = Table.filled(inner_terms, inner.shares)
    outer_table = Table.filled(list(zip(*columns, strict=True)), outer.shares)
    loss = sum(q * value for q, value in zip(outer.shares, losses, strict=True))

    def write() -> None:
        memory.update(inner=inner_table.kept, outer=outer_table.kept)

    (slope, product, mixed), (in_w, direct) = inner_table.mean, outer_table.mean
    return Terms(slope, product, mixed, in_w, direct, loss), write
