"""L-BFGS to a tolerance on the gradient, for smooth problems on all their data: tens of gradients to a minimum, at any scale.

Reference: Liu & Nocedal, Math. Programming 45, 1989; the line search is that of ``torch.optim.LBFGS`` (strong Wolfe).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.inner.base import InnerSolver, Watch, gradient
from hyperopt.bilevel.problem import BilevelProblem, Leaves
from hyperopt.bilevel.settings import LBFGSSettings
from hyperopt.policy import SolveError
from hyperopt.status import SolveStats


@dataclass(frozen=True)
class InnerLBFGS(LBFGSSettings, InnerSolver):
    """L-BFGS; settings in ``LBFGSSettings``. Its statistics count every gradient, those of the line search among them."""

    def update(self, w: Sequence[Tensor], grads: Sequence[Tensor], lam: Any, work: Any) -> None:
        """Not used: the line search takes gradients of its own."""
        raise NotImplementedError

    def solve(self, problem: BilevelProblem, lam: Any, state: State) -> SolveStats:
        """Train ``state.w`` in place, on one batch.

        Raises:
            SolveError: the loss or its gradient is not finite.
        """
        w = Leaves.of(state.w, "w")
        lam = optree.tree_map(lambda x: x.detach(), lam)
        watch = Watch(self, state.memory.setdefault("inner", {}))
        batch, spent = problem.inner_batches.draw(), 0
        optimizer = torch.optim.LBFGS(
            w.flat, max_iter=1, max_eval=25, history_size=self.history, tolerance_grad=0, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            nonlocal spent
            loss, grads = gradient(problem, w, lam, batch)
            spent += 1
            for x, g in zip(w.flat, grads, strict=True):
                x.grad = g
            return loss

        for k in range(self.max_steps):
            closure()
            watch.wants(k)
            watch.see(k, [x.grad for x in w.flat if x.grad is not None])
            if watch.lost:
                raise SolveError(self.diverged(problem, w, lam, batch, watch.growth))
            if watch.met:
                break
            before = [x.detach().clone() for x in w.flat]
            optimizer.step(closure)
            if all(torch.equal(x, old) for x, old in zip(w.flat, before, strict=True)):
                break  # the line search finds no lower point: rounding has the last word
        if problem.refresh is not None:
            problem.refresh(state.w, lam, batch)
        stats = watch.stats()
        stats.evaluations = spent
        return stats

    def remedy(self, lam: Any) -> str:
        """What to change."""
        return "the inner loss is unbounded below or not finite: add a penalty, or use inner=gradient_descent"
