"""SOBA: the single-loop method with plain minibatches.

Each step uses one batch of the inner loss, which its three terms share, and one batch of the outer loss. Constant steps end in
a neighbourhood of the solution whose size depends on the steps and the noise. Steps that fall as ``1 / t`` (``decay=1``, and
likewise in the outer optimizer) converge as ``1 / t`` if the problem is strongly convex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hyperopt.bilevel.single_loop import LoopPoint, SingleLoop, Terms


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """The single-loop method on minibatches.

    Args:
        step_size: step size of the gradient steps in ``w``, above 0.
        adjoint_step: step size in ``u``, above 0 (None: ``step_size``).
        decay: both step sizes are multiplied by ``(1 + t / horizon)^-decay`` in outer step ``t``; in [0, 1], 0 for constant
            steps.
        horizon: see ``decay``; in outer steps, above 0.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Reference: Dagreou, Ablin, Vaiter & Moreau, NeurIPS 2022, arXiv 2201.13409, section 2 (SOBA).

    Example:
        >>> import torch, hyperopt
        >>> method = hyperopt.SOBA(step_size=0.4)
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

    def terms(self, at: LoopPoint, memory: dict[str, Any]) -> tuple[Terms, Callable[[], None], Any]:
        """Return the terms on the next batches; see ``SingleLoop.terms``."""
        loss, outer, direct = at.outer(at.problem.outer_batches.draw())
        batch = at.problem.inner_batches.draw()
        return Terms(*at.inner(batch), outer, direct, loss), lambda: None, batch
