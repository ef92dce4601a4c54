"""SOBA: the single-loop method with plain minibatches.

Each step uses one batch of the inner loss, which its three terms share, and one batch of the outer loss. Constant steps end in
a neighbourhood of the solution whose size depends on the steps and the noise. Steps that fall as ``1 / t`` (``decay=1``, and
likewise in the outer optimizer) converge as ``1 / t`` if the problem is strongly convex.

Reference: Dagreou, Ablin, Vaiter & Moreau, NeurIPS 2022, arXiv 2201.13409, section 2 (SOBA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hyperopt.bilevel.single_loop import LoopPoint, SingleLoop, Terms


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """The single-loop method on minibatches; its arguments are those of ``SingleLoop``."""

    def terms(self, at: LoopPoint, memory: dict[str, Any]) -> tuple[Terms, Callable[[], None], Any]:
        """Return the terms on the next batches; see ``SingleLoop.terms``."""
        loss, outer, direct = at.outer(at.problem.outer_batches.draw())
        batch = at.problem.inner_batches.draw()
        return Terms(*at.inner(batch), outer, direct, loss), lambda: None, batch
