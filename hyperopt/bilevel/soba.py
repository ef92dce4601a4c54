"""SOBA: the single loop with plain minibatches.

One batch of the inner loss and one of the outer loss a step; the three terms of the inner loss share theirs. Constant steps end
in a neighbourhood whose size the steps and the noise decide; steps that fall as ``1 / t`` (``decay=1``, and the outer optimizer's
likewise) converge as ``1 / t`` where the problem is strongly convex.

Reference: Dagreou, Ablin, Vaiter & Moreau, NeurIPS 2022, arXiv 2201.13409, section 2 (SOBA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hyperopt.bilevel.single_loop import At, SingleLoop, Terms


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """The single loop on minibatches; its arguments are those of ``SingleLoop``."""

    def terms(self, at: At, memory: dict[str, Any]) -> tuple[Terms, Callable[[], None], Any]:
        """On the next batches."""
        loss, outer, direct = at.outer(at.problem.outer_batches.draw())
        batch = at.problem.inner_batches.draw()
        return Terms(*at.inner(batch), outer, direct, loss), lambda: None, batch
