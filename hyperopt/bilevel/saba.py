"""SABA: the single loop with the variance reduction of SAGA in all of its terms.

The rows are cut once into batches. For each batch a table keeps every term as it was when the batch was last visited. With a
batch ``k`` of ``m`` at random, its share ``q_k`` of the rows, and ``T`` a term,

    direction = m q_k (T_k(now) - table_k) + sum_i q_i table_i,        table_k <- T_k(now)

which has no bias, and a variance that vanishes as the method converges: constant steps, and linear convergence where the outer
objective satisfies a Polyak-Lojasiewicz inequality. The tables take three numbers a weight or hyperparameter and inner batch, and
are filled at the very first step, which costs a pass over all rows.

Reference: Dagreou, Ablin, Vaiter & Moreau, NeurIPS 2022, arXiv 2201.13409, section 2 (SABA); SAGA: Defazio, Bach &
Lacoste-Julien, NIPS 2014, arXiv 1407.0202.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperopt.bilevel.batches import Minibatches
from hyperopt.bilevel.problem import BatchSource, NoBatches
from hyperopt.bilevel.single_loop import At, SingleLoop, Terms
from hyperopt.core.checks import check_count


@dataclass(frozen=True)
class Pieces:
    """A data set cut into the same batches for good.

    Attributes:
        take: the batch of a number.
        shares: of the rows, one for each.
    """

    take: Callable[[int], Any]
    shares: list[float]

    @staticmethod
    def of(source: BatchSource) -> Pieces:
        """Those of a source of batches.

        Raises:
            TypeError: it has batches, but cannot give one again.
        """
        if isinstance(source, NoBatches):  # one batch, always
            return Pieces(lambda k: source.draw(), [1.0])
        if not isinstance(source, Minibatches):
            raise TypeError(
                f"SABA keeps a table of batches that it visits again, which a {type(source).__name__} cannot give; use "
                "Minibatches on one rank, or the method SOBA"
            )
        return Pieces(source.piece, source.shares)


class Table:
    """The last values of some terms on every batch, and their mean; each a (batches, dim) matrix."""

    def __init__(self, kept: list[list[Tensor]], shares: list[float]) -> None:
        """Keep what ``kept`` has of another table, without a copy."""
        (self.rows, self.mean), self.shares = kept, shares

    @property
    def kept(self) -> list[list[Tensor]]:
        """All that a table remembers."""
        return [self.rows, self.mean]

    @staticmethod
    def filled(values: Sequence[Sequence[Tensor]], shares: list[float]) -> Table:
        """The table of these terms of every batch."""
        rows = [torch.cat(list(column)) for column in zip(*values, strict=True)]
        q = rows[0].new_tensor(shares)[None]
        return Table([rows, [q @ column for column in rows]], shares)

    def reduced(self, k: int, now: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """The directions, given the terms of batch ``k`` as they are now, and what writes them into the table."""
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
    """The single loop with tables of the last terms of every batch.

    Args:
        seed: of the order in which batches are visited, at least 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_count(self, "seed", 0)

    def terms(self, at: At, memory: dict[str, Any]) -> tuple[Terms, Callable[[], None], Any]:
        """Those of one batch of each loss, corrected by the tables.

        Raises:
            TypeError: the batches cannot be visited again.
        """
        inner, outer = Pieces.of(at.problem.inner_batches), Pieces.of(at.problem.outer_batches)
        draw = np.random.RandomState((self.seed, memory["steps"]))  # the same on every machine, and after a resume
        i, j = int(draw.randint(len(inner.shares))), int(draw.randint(len(outer.shares)))
        batch = inner.take(i)
        if "inner" not in memory:
            return *_fill(at, memory, inner, outer), batch
        (slope, product, mixed), write_inner = Table(memory["inner"], inner.shares).reduced(i, at.inner(batch))
        loss, *now = at.outer(outer.take(j))
        (in_w, direct), write_outer = Table(memory["outer"], outer.shares).reduced(j, now)

        def write() -> None:
            write_inner()
            write_outer()

        return Terms(slope, product, mixed, in_w, direct, loss), write, batch


def _fill(at: At, memory: dict[str, Any], inner: Pieces, outer: Pieces) -> tuple[Terms, Callable[[], None]]:
    """The terms over all rows, and what puts those of every batch into ``memory``."""
    within = [at.inner(inner.take(k)) for k in range(len(inner.shares))]
    losses, *columns = zip(*(at.outer(outer.take(k)) for k in range(len(outer.shares))), strict=True)
    one, two = Table.filled(within, inner.shares), Table.filled(list(zip(*columns, strict=True)), outer.shares)
    loss = sum(q * value for q, value in zip(outer.shares, losses, strict=True))

    def write() -> None:
        memory.update(inner=one.kept, outer=two.kept)

    (slope, product, mixed), (in_w, direct) = one.mean, two.mean
    return Terms(slope, product, mixed, in_w, direct, loss), write
